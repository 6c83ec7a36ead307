"""CXRInception: Inception V3 for X-rays, as a backbone, with global pooling and with a classification head. What it is
built of is in `layers_…`."""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from .configuration_cxr_inception import SMALLEST_IMAGE, CXRInceptionConfig

# Not used here, but `save_pretrained` copies the files that this one imports, and the Hub needs all of them.
from .image_processing_cxr_inception import CXRInceptionImageProcessor  # noqa: F401
from .layers_cxr_inception import (
    CXRInceptionAuxiliaryHead,
    CXRInceptionConvLayer,
    CXRInceptionEncoder,
    CXRInceptionHead,
    CXRInceptionStage,
)

# Pixels that a fused copy takes at once on a CPU: 8 images of 299 x 299 in 16 bits, 4 in 32. Whatever follows from them
# stays in its cache.
BYTES_AT_ONCE = 8 * 299 * 299 * 2
# What a backbone leaves behind when it is loaded from a checkpoint with a head, without a warning.
HEAD_KEYS = [r"^classifier\.", r"^auxiliary_classifier\."]
Model = TypeVar("Model", bound="CXRInceptionPreTrainedModel")


class CXRInceptionPreTrainedModel(PreTrainedModel):
    base_model_prefix = "cxr_inception"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CXRInceptionStage"]
    config: CXRInceptionConfig

    def freeze_backbone(self, to_stage: str | None = None) -> None:
        """Freeze the stages from the stem up to and including `to_stage` (default: all).

        A frozen stage gets no gradients, and its BatchNorm layers stay in eval mode through every later `.train()`, so
        their running statistics do not move. The head is never frozen. Later stages are left as they are.

        Raises:
            ValueError: if `to_stage` is not one of `config.stage_names`.
        """
        end = None if to_stage is None else self._stage_index(to_stage) + 1
        for stage in self._stages()[:end]:
            stage.set_frozen(True, training=self.training)

    def unfreeze_backbone(self, from_stage: str | None = None) -> None:
        """Undo `freeze_backbone` for `from_stage` and the stages after it (default: all).

        Raises:
            ValueError: if `from_stage` is not one of `config.stage_names`.
        """
        first = 0 if from_stage is None else self._stage_index(from_stage)
        for stage in self._stages()[first:]:
            stage.set_frozen(False, training=self.training)

    def freeze_batch_norm(self) -> None:
        """Normalize by the running statistics and keep them as they are: BatchNorm layers stay in eval mode through
        every later `.train()`, whichever stages are frozen. Their weights and all others are trained as before.

        For fine-tuning: the statistics of small batches, or of other images than the weights come from, undo much of
        what the network knows."""
        for module in self.modules():
            if isinstance(module, CXRInceptionConvLayer):
                module.keeps_statistics = True
                module.train(module.training)

    def fuse(self: Model, dtype: torch.dtype | None = None) -> Model:
        """A copy for inference: BatchNorm is folded into the convolutions, memory is laid out channels last, and a CPU
        takes large batches in pieces that its cache holds.

        Outputs are the same to 1e-4 of their size. The copy can neither be trained nor saved.

        Args:
            dtype: of the backbone, such as `torch.bfloat16` (the model's by default). A head stays in float32, where it
                costs nothing: logits of bfloat16 have three digits, and scores would tie.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False).float()  # 16 bits are too few to fold with
        for module in fused.modules():
            if isinstance(module, CXRInceptionConvLayer):
                module.fuse()
        for module in fused.modules():
            if isinstance(module, CXRInceptionEncoder):
                module.bytes_at_once = BYTES_AT_ONCE
                module.to(dtype or self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return fused

    def train(self, mode: bool = True):
        if mode and self.is_fused:
            raise ValueError("This copy was made by fuse() and has no BatchNorm to train with; train the original.")
        return super().train(mode)

    def save_pretrained(self, *args, **kwargs):
        if self.is_fused:
            raise ValueError("This copy was made by fuse() and can't be opened again; save the original.")
        return super().save_pretrained(*args, **kwargs)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, *args, **kwargs) -> None:
        # Checkpointing runs each stage forward twice a step, and plain BatchNorm would move its statistics both times.
        if enable:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError("CXRInception needs gradient checkpointing with use_reentrant=False, not True.")
            gradient_checkpointing_func = partial(
                gradient_checkpointing_func,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _running_statistics_kept(self)),  # first pass, recomputed pass
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def is_fused(self) -> bool:
        """Whether `fuse` made this copy."""
        return any(isinstance(module, CXRInceptionEncoder) and module.bytes_at_once for module in self.modules())

    def _stages(self) -> list[CXRInceptionStage]:
        """From the stem up."""
        return [module for module in self.modules() if isinstance(module, CXRInceptionStage)]

    def _stage_index(self, name: str) -> int:
        if name not in self.config.stage_names:
            raise ValueError(f"There is no stage {name!r}; the stages are {', '.join(self.config.stage_names)}.")
        return self.config.stage_names.index(name)

    def _check_pixel_values(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` in the network's dtype, or a ValueError that says what is wrong with their shape."""
        _, channels, height, width = pixel_values.shape
        if channels != self.config.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channels, but this model takes {self.config.num_channels} "
                "(config.num_channels); prepare images with the image processor that was saved with the model."
            )
        if min(height, width) < SMALLEST_IMAGE:
            raise ValueError(
                f"pixel_values is {height} x {width} pixels; at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} needed."
            )
        return pixel_values.to(self.dtype)


class CXRInceptionModel(CXRInceptionPreTrainedModel):
    """The backbone with global average pooling."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = HEAD_KEYS

    def __init__(self, config: CXRInceptionConfig):
        super().__init__(config)
        self.encoder = CXRInceptionEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Args:
            pixel_values: (batch, num_channels, height, width), normalised by the image processor.
            output_hidden_states: also return the feature maps of the five stages.

        Returns:
            `last_hidden_state` (batch, 2048, height / 32, width / 32), `pooler_output` (batch, 2048), `hidden_states`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.encoder(self._check_pixel_values(pixel_values), every_stage=bool(output_hidden_states))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states[-1],
            pooler_output=hidden_states[-1].mean(dim=(2, 3)),
            hidden_states=hidden_states if output_hidden_states else None,
        )


class CXRInceptionForImageClassification(CXRInceptionPreTrainedModel):
    """The backbone with a classification head; `config.problem_type` says whether an image has one label or several."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: CXRInceptionConfig):
        super().__init__(config)
        if not set(config.operating_points or {}) <= set((config.id2label or {}).values()):  # they were another head's
            config.temperature = config.operating_points = None
        self.cxr_inception = CXRInceptionModel(config)
        self.classifier = CXRInceptionHead(config, config.hidden_sizes[-1])
        if config.use_auxiliary_head:
            self.auxiliary_classifier = CXRInceptionAuxiliaryHead(config, config.hidden_sizes[-2])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """
        Args:
            pixel_values: (batch, num_channels, height, width), normalised by the image processor.
            labels: single-label: int (batch,), class indices. Multi-label: float (batch, num_labels) of 0 and 1, NaN
                where the label is unknown (it is left out of the loss).
            output_hidden_states: also return the feature maps of the five stages.

        Returns:
            `loss` (if labels are given), `logits` (batch, num_labels), `hidden_states`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_auxiliary_head = self.config.use_auxiliary_head and self.training and labels is not None
        outputs = self.cxr_inception(
            pixel_values, output_hidden_states=output_hidden_states or use_auxiliary_head, return_dict=True
        )
        logits = self.classifier(outputs.pooler_output.to(self.classifier.output_layer.weight.dtype))

        loss = None
        if labels is not None:
            loss = self.compute_loss(logits, labels)
            if use_auxiliary_head:
                auxiliary_logits = self.auxiliary_classifier(outputs.hidden_states[-2])
                loss = loss + self.config.auxiliary_loss_weight * self.compute_loss(auxiliary_logits, labels)
        hidden_states = outputs.hidden_states if output_hidden_states else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=hidden_states)

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The training loss of `logits` (batch, num_labels), as the config defines it: a scalar, in float32 or better.

        Raises:
            ValueError: if the shape or the type of `labels` does not fit `config.problem_type`.
        """
        labels = labels.to(logits.device)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = self.config.class_weights and logits.new_tensor(self.config.class_weights)
        problem_type = self.config.problem_type or (
            "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        )
        loss_function = _single_label_loss if problem_type == "single_label_classification" else _multi_label_loss
        return loss_function(logits, labels, weights, self.config.label_smoothing)


class CXRInceptionBackbone(BackboneMixin, CXRInceptionPreTrainedModel):
    """The feature maps of the stages in `config.out_features`, for detection and segmentation heads.

    `AutoBackbone.from_pretrained` of transformers opens Hub ids only; open a folder with this class.
    """

    has_attentions = False
    _auto_class = "AutoBackbone"
    _keys_to_ignore_on_load_unexpected = HEAD_KEYS

    def __init__(self, config: CXRInceptionConfig):
        super().__init__(config)
        self.num_features = config.hidden_sizes
        self.encoder = CXRInceptionEncoder(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """
        Args:
            pixel_values: (batch, num_channels, height, width), normalised by the image processor.

        Returns:
            `feature_maps`: one (batch, channels, height, width) for each of `config.out_features`.
        """
        hidden_states = self.encoder(self._check_pixel_values(pixel_values))
        return BackboneOutput(
            feature_maps=tuple(hidden_states[index] for index in self.out_indices),
            hidden_states=hidden_states,
        )


def _single_label_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(
            "single_label_classification takes integer labels of shape (batch,), "
            f"not {labels.dtype} of shape {tuple(labels.shape)}."
        )
    return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)


def _multi_label_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    if labels.shape != logits.shape:
        raise ValueError(
            f"multi_label_classification takes labels of shape {tuple(logits.shape)} (batch, num_labels), "
            f"0 or 1 or NaN for unknown, not {tuple(labels.shape)}."
        )
    known = ~labels.isnan()
    targets = torch.where(known, labels, 0).to(logits.dtype) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    # Mean over what is known. A batch where nothing is known has loss 0, with gradients of 0.
    return (losses * known).sum() / known.sum().clamp(min=1)


@contextmanager
def _running_statistics_kept(model: nn.Module):
    # With momentum 0, BatchNorm in train mode still normalises by the batch but leaves its statistics as they are.
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:  # (SyncBatchNorm does not do without a count, though nobody reads it)
        layer.momentum, layer.num_batches_tracked = 0.0, torch.tensor(0)
    try:
        yield
    finally:
        for layer, values in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = values


__all__ = [
    "CXRInceptionBackbone",
    "CXRInceptionForImageClassification",
    "CXRInceptionModel",
    "CXRInceptionPreTrainedModel",
]
