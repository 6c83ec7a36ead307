"""Configuration of CXRInception, an Inception V3 for chest X-rays.

This file and its siblings (`layers_…`, `modeling_…`, `image_processing_…`) are copied to the Hub beside the weights and
run there on their own, so they import nothing of this package but each other.
"""

import difflib
import math
from typing import NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

SMALLEST_IMAGE = 75  # pixels; below this a 3 x 3 window of the last stage finds no input
SMALLEST_WIDTH = 16  # channels; TF-slim's floor for narrow networks
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")

# Written into every config.json, so that each Auto class finds its class whichever model was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_cxr_inception.CXRInceptionConfig",
    "AutoModel": "modeling_cxr_inception.CXRInceptionModel",
    "AutoModelForImageClassification": "modeling_cxr_inception.CXRInceptionForImageClassification",
    "AutoBackbone": "modeling_cxr_inception.CXRInceptionBackbone",
    "AutoImageProcessor": "image_processing_cxr_inception.CXRInceptionImageProcessor",
}


@strict
class CXRInceptionConfig(BackboneConfigMixin, PreTrainedConfig):
    """What a CXRInception network looks like.

    Args:
        image_size (`int`): height and width in pixels that the weights were trained at. The network takes any size of
            at least 75 pixels; this is the size the image processor is expected to deliver.
        num_channels (`int`): 1 (grey, as X-rays are) or 3.
        depth_multiplier (`float`): scales the channels of every layer, never below 16 (TF-slim's name and rule).
        batch_norm_eps (`float`): epsilon of every BatchNorm. Inception V3 uses 1e-3; torch's default of 1e-5 silently
            changes the outputs.
        avg_pool_count_include_pad (`bool`): whether the average pooling inside the blocks counts its zero padding.
            True for weights from torchvision and timm, False for weights from Keras.
        dropout (`float`): probability of dropping a feature in the head, in [0, 1).
        head_hidden_sizes (`list[int]`): widths of extra hidden layers between pooled features and logits.
        use_auxiliary_head (`bool`): train a second head on stage 3 beside the first one (it is unused in eval mode).
        auxiliary_loss_weight (`float`): weight of the auxiliary head's loss.
        class_weights (`list[float]`, *optional*): one positive weight a label. Single-label: weight of the class in the
            cross entropy. Multi-label: weight of the positive examples of the finding.
        label_smoothing (`float`): in [0, 1).
        temperature (`float` or `list[float]`, *optional*): what the logits were divided by after training, so that
            scores are calibrated: one number, or one a finding. The head does it already; this is its record.
        operating_points (`dict`, *optional*): thresholds that were chosen on the validation split, for `decide`:
            `{label: {name: {"threshold": ..., "sensitivity": ..., "specificity": ..., "films": ...}}}`; the last three
            are the validation figures that chose it (films counts views, if these were perturbed). A model with a head
            for other labels drops both.
        out_features / out_indices: stages that `CXRInceptionBackbone` returns, out of `stage_names`.

    The five stages and their (channels, stride) at full width: stem (64, 2), stage1 (192, 4), stage2 (288, 8),
    stage3 (768, 16), stage4 (2048, 32).

    Raises:
        StrictDataclassError: (of huggingface_hub) for a value that is not allowed. At assignment only types are
            checked; `validate()` checks ranges again.
        ValueError: for a key that does not exist.
    """

    model_type = "cxr_inception"
    _auto_class = "AutoConfig"  # makes save_pretrained copy the code

    image_size: int = 299
    num_channels: int = 1
    depth_multiplier: float | int = 1.0
    batch_norm_eps: float = 1e-3
    avg_pool_count_include_pad: bool = True
    dropout: float | int = 0.2
    head_hidden_sizes: list[int] | tuple[int, ...] = ()
    use_auxiliary_head: bool = False
    auxiliary_loss_weight: float | int = 0.4
    class_weights: list[float] | None = None
    label_smoothing: float | int = 0.0
    temperature: float | int | list[float] | None = None
    operating_points: dict | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        self.head_hidden_sizes = list(self.head_hidden_sizes)
        _refuse_unknown_keys(kwargs, allowed=set(self.__dataclass_fields__))
        # Our own map wins over the "repo--file.Class" form that loading remote code leaves here.
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)
        if self.label2id is None and self.id2label is not None:  # transformers does not derive one from the other
            self.label2id = {str(label): int(index) for index, label in self.id2label.items()}

    def decide(self, outputs: list[dict], operating_point: str) -> dict[str, bool]:
        """What the pipeline's answer for one image means at an operating point: is it there, label by label?

            answer = classify("chest.png", top_k=None)
            classify.model.config.decide(answer, "sensitivity>=0.95")  # {"PNEUMONIA": True}

        Args:
            outputs: what the image-classification pipeline returns for one image, with `top_k=None`.
            operating_point: a name in `operating_points`.

        Returns:
            For each label that has this point, whether its score reaches the threshold.

        Raises:
            ValueError: no label has such a point, or `outputs` lacks the score of one that has.
        """
        points = self.operating_points or {}
        thresholds = {
            label: its[operating_point]["threshold"] for label, its in points.items() if operating_point in its
        }
        if not thresholds:
            names = sorted({name for its in points.values() for name in its})
            raise ValueError(
                f"This model has no operating point {operating_point!r}; it has {', '.join(names) or 'none at all'}."
            )
        if not all(isinstance(output, dict) for output in outputs):
            raise ValueError("outputs holds the answers for several images; give the answer for one.")
        scores = {output["label"]: output["score"] for output in outputs}
        if absent := sorted(thresholds.keys() - scores.keys()):
            raise ValueError(
                f"outputs has no score of {absent[0]}; call the pipeline with top_k=None to get all labels."
            )
        return {label: scores[label] >= threshold for label, threshold in thresholds.items()}

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the five stages; the last is the size of the pooled features."""
        w = self.scale_width
        return [
            w(64),
            w(192),
            2 * w(64) + w(96) + w(64),
            4 * w(192),
            w(320) + 4 * w(384) + w(192),
        ]

    def scale_width(self, channels: int) -> int:
        """Channels of a layer that has `channels` at full width."""
        return max(int(channels * self.depth_multiplier), min(channels, SMALLEST_WIDTH))

    # The methods below are run by `@strict`, at construction and by `validate()`.

    def validate_image_size(self):
        _require(
            self.image_size >= SMALLEST_IMAGE,
            "image_size",
            self.image_size,
            f"at least {SMALLEST_IMAGE} (pixels)",
        )

    def validate_num_channels(self):
        _require(self.num_channels in (1, 3), "num_channels", self.num_channels, "1 (grey) or 3")

    def validate_depth_multiplier(self):
        _require(0 < self.depth_multiplier <= 4, "depth_multiplier", self.depth_multiplier, "above 0 and at most 4")

    def validate_batch_norm_eps(self):
        _require(
            0 < self.batch_norm_eps < 1,
            "batch_norm_eps",
            self.batch_norm_eps,
            "between 0 and 1 (usually 1e-3)",
        )

    def validate_dropout(self):
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")

    def validate_head_hidden_sizes(self):
        allowed = all(size > 0 for size in self.head_hidden_sizes)
        _require(
            allowed,
            "head_hidden_sizes",
            self.head_hidden_sizes,
            "a list of positive widths, for example [256]",
        )

    def validate_auxiliary_loss_weight(self):
        allowed = self.auxiliary_loss_weight >= 0
        _require(allowed, "auxiliary_loss_weight", self.auxiliary_loss_weight, "0 or more")

    def validate_class_weights(self):
        if self.class_weights is None or self.id2label is None:
            return
        allowed = len(self.class_weights) == self.num_labels and all(
            math.isfinite(weight) and weight > 0 for weight in self.class_weights
        )
        expected = f"one positive number for each of the {self.num_labels} labels"
        _require(allowed, "class_weights", self.class_weights, expected)

    def validate_label_smoothing(self):
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")

    def validate_temperature(self):
        if self.temperature is None:
            return
        given = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        allowed = all(math.isfinite(value) and value > 0 for value in given)
        _require(allowed, "temperature", self.temperature, "a number above 0, or one for each finding")

    def validate_operating_points(self):
        points = [point for label in (self.operating_points or {}).values() for point in label.values()]
        allowed = all(0 <= point.get("threshold", -1) <= 1 for point in points)
        _require(allowed, "operating_points", self.operating_points, "a threshold in [0, 1] for each")

    def validate_problem_type(self):
        allowed = self.problem_type is None or self.problem_type in PROBLEM_TYPES
        _require(allowed, "problem_type", self.problem_type, " or ".join(PROBLEM_TYPES))


def _require(allowed: bool, name: str, value: object, expected: str) -> None:
    if not allowed:
        raise ValueError(f"CXRInceptionConfig: {name}={value!r} is not allowed; expected {expected}.")


# Keys without a field that transformers itself passes or stores. Everything else is a misspelling: transformers would
# keep it as an attribute nobody reads, and the value meant would silently stay at its default.
_KEYS_OF_TRANSFORMERS = {
    *("num_labels", "auto_map", "model_type", "name_or_path", "torch_dtype", "quantization_config"),
    *("output_attentions", "attn_implementation", "experts_implementation", "stage_names", "use_cache"),
    *("tie_word_embeddings", "trust_remote_code"),
}


def _refuse_unknown_keys(keys, allowed: set[str]) -> None:
    known = allowed | _KEYS_OF_TRANSFORMERS
    for key in keys:
        if key not in known and not key.startswith("_"):
            guess = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {guess[0]!r}?" if guess else f"known keys are {', '.join(sorted(allowed))}."
            raise ValueError(f"CXRInceptionConfig has no key {key!r}; {hint}")


# The architecture at full width, as tables of layers. `layers_cxr_inception` builds what they say.


class Conv(NamedTuple):
    """Convolution without bias, BatchNorm, ReLU."""

    channels: int
    kernel: int | tuple[int, int] = 1  # (height, width)
    stride: int = 1
    same: bool = True  # zero padding that keeps height and width; False: none


class PooledConv(NamedTuple):
    """3 x 3 average with padding, stride 1, then as `Conv` with a kernel of 1."""

    channels: int


class MaxPool(NamedTuple):
    """3 x 3 maximum without padding, stride 2."""


class Block(NamedTuple):
    """Branches run side by side and concatenated."""

    branches: tuple[tuple, ...]


def block_a(pool_channels: int) -> Block:
    """Figure 5 of the paper: a 5 x 5 convolution becomes two of 3 x 3."""
    return Block(
        (
            (Conv(64),),
            (Conv(48), Conv(64, 5)),
            (Conv(64), Conv(96, 3), Conv(96, 3)),
            (PooledConv(pool_channels),),
        )
    )


def block_c(channels: int) -> Block:
    """Figure 6: a 7 x 7 convolution becomes 1 x 7 and 7 x 1."""
    row, column = (1, 7), (7, 1)
    return Block(
        (
            (Conv(192),),
            (Conv(channels), Conv(channels, row), Conv(192, column)),
            (Conv(channels), *[Conv(channels, k) for k in (column, row, column)], Conv(192, row)),
            (PooledConv(192),),
        )
    )


def block_e() -> Block:
    """Figure 7: the last 3 x 3 convolutions are spread into 1 x 3 beside 3 x 1."""
    spread = Block(((Conv(384, (1, 3)),), (Conv(384, (3, 1)),)))
    return Block(
        (
            (Conv(320),),
            (Conv(384), spread),
            (Conv(448), Conv(384, 3), spread),
            (PooledConv(192),),
        )
    )


# Figure 10: the two blocks that halve height and width.
BLOCK_B = Block(
    (
        (Conv(384, 3, stride=2, same=False),),
        (Conv(64), Conv(96, 3), Conv(96, 3, stride=2, same=False)),
        (MaxPool(),),
    )
)
BLOCK_D = Block(
    (
        (Conv(192), Conv(320, 3, stride=2, same=False)),
        (Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, 3, stride=2, same=False)),
        (MaxPool(),),
    )
)

STAGES: dict[str, tuple] = {  # shape after the stage, for an input of 299 x 299
    "stem": (
        Conv(32, 3, stride=2, same=False),
        Conv(32, 3, same=False),
        Conv(64, 3),
    ),  # (batch, 64, 147, 147)
    "stage1": (MaxPool(), Conv(80), Conv(192, 3, same=False)),  # (batch, 192, 71, 71)
    "stage2": (MaxPool(), block_a(32), block_a(64), block_a(64)),  # (batch, 288, 35, 35)
    "stage3": (BLOCK_B, block_c(128), block_c(160), block_c(160), block_c(192)),  # (batch, 768, 17, 17)
    "stage4": (BLOCK_D, block_e(), block_e()),  # (batch, 2048, 8, 8)
}


__all__ = ["CXRInceptionConfig"]
