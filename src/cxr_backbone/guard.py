"""An input check: is a picture like the films that a model was trained on? The backbone's own features tell.

    classify = guarded_pipeline("org/cxr-inception")

A photo, an ankle, a negative or a blank picture gets scores like any film. Here each answer also says whether the
picture is `out_of_distribution`: farther from the training films than all but 1 % of the validation films are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ImageClassificationPipeline, pipeline
from transformers.utils import ModelOutput

from cxr_backbone.training.atomic import replacing

logger = logging.getLogger(__name__)

FILE = "guard.safetensors"
STAGES = 3  # the last ones, whose pooled feature maps are looked at
DIMENSIONS = 64
SHARE_OUTSIDE = 0.01  # of the validation films
TENSORS = ("mean", "directions", "variances", "threshold")


class Guard:
    """A Gaussian fitted to the pooled features of the training films: probabilistic PCA (Tipping & Bishop 1999), with
    full variance in a small subspace and one variance for all that lies outside.

    Args:
        mean: (features,).
        directions: (dimensions, features), orthonormal rows that span the subspace.
        variances: (dimensions + 1,), along each direction, and of everything outside.
        threshold: the distance beyond which a picture is out of distribution, a scalar.
    """

    def __init__(self, mean: Tensor, directions: Tensor, variances: Tensor, threshold: Tensor):
        self.mean, self.directions, self.variances, self.threshold = mean, directions, variances, threshold

    @classmethod
    def fit(cls, training: Tensor, validation: Tensor) -> Guard:
        """Fit to features of training films, `pooled_stages`; those of validation films fix the threshold.

        Raises:
            ValueError: fewer than three training films, or no validation films.
        """
        if len(training) < 3 or len(validation) == 0:
            raise ValueError(
                f"{len(training)} training and {len(validation)} validation films; expected three and one, or more."
            )
        mean = training.mean(dim=0)
        _, spread, directions = torch.linalg.svd(training - mean, full_matrices=False)
        variances = spread.square() / (len(training) - 1)
        kept = min(DIMENSIONS, min(training.shape) // 2)
        outside = variances[kept:].sum() / (training.shape[1] - kept)
        guard = cls(mean, directions[:kept], torch.cat([variances[:kept], outside[None]]), torch.tensor(torch.inf))
        guard.threshold = torch.quantile(guard.distance(validation), 1 - SHARE_OUTSIDE)
        return guard

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance of features (films, features) from the training films, a root mean square over the
        features: about one for a training film. (films,)"""
        centred = features.float() - self.mean.to(features.device)
        along = centred @ self.directions.T.to(features.device)
        outside = (centred.square().sum(dim=1) - along.square().sum(dim=1)).clamp(min=0)
        *inside, noise = self.variances.to(features.device)
        squares = (along.square() / torch.stack(inside)).sum(dim=1) + outside / noise
        return (squares / len(self.mean)).sqrt()

    def is_outside(self, features: Tensor) -> Tensor:
        """bool (films,): out of distribution. What is no number is."""
        return ~(self.distance(features) <= self.threshold.to(features.device))

    def save(self, folder: str | Path) -> None:
        """Write `guard.safetensors` beside a model."""
        with replacing(Path(folder) / FILE) as file:
            save_file({name: getattr(self, name).contiguous() for name in TENSORS}, file)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Guard:
        """The guard beside a model: in a folder, or a repository of the Hub.

        Raises:
            ValueError: there is none, or its file is damaged.
            OSError: the Hub can't be reached, and no earlier download is there.
        """
        file: Path | None = Path(source) / FILE
        if not Path(source).is_dir():
            try:
                file = Path(hf_hub_download(str(source), FILE, revision=revision))
            except LocalEntryNotFoundError:  # an EntryNotFoundError too, but it says nothing of the repository
                raise
            except EntryNotFoundError:
                file = None
        if file is None or not file.is_file():
            raise ValueError(f"{source} has no {FILE}; expected a model of recipes/two_stage.py.")
        try:
            return cls(**load_file(file))
        except Exception as error:
            raise ValueError(f"{file} is no guard: {error}") from error


def guarded_pipeline(source: str | Path, *, revision: str | None = None, **options: Any) -> GuardedPipeline:
    """Image classification by a model and the guard beside it, both of one revision.

    Args:
        source: a folder, or a repository of the Hub.
        options: of `transformers.pipeline`, such as `device`.

    Raises:
        ValueError: as `Guard.from_pretrained`.
        OSError: (of transformers) the Hub can't be reached, or there is no such model.
    """
    guard = Guard.from_pretrained(source, revision)
    options |= {"pipeline_class": GuardedPipeline, "guard": guard, "trust_remote_code": False}
    guarded = pipeline("image-classification", model=str(source), revision=revision, **options)
    return cast(GuardedPipeline, guarded)


class GuardedPipeline(ImageClassificationPipeline):
    """Image classification whose answers also have `out_of_distribution`; what is so is logged as a warning."""

    def __init__(self, *args: Any, guard: Guard, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.guard = guard

    # (Each method's parents disagree about its arguments.)
    def _forward(self, model_inputs: Any) -> ModelOutput:  # type: ignore[override]
        outputs = self.model(**model_inputs, output_hidden_states=True)
        is_outside = self.guard.is_outside(pooled_stages(outputs.hidden_states))
        return ModelOutput(logits=outputs.logits, is_outside=is_outside)

    def postprocess(self, model_outputs: Any, **options: Any) -> list[dict[str, Any]]:  # type: ignore[override]
        is_outside = bool(model_outputs["is_outside"].item())
        if is_outside:
            logger.warning("A picture is unlike the films that the model was trained on; its scores mean nothing.")
        answers = super().postprocess(model_outputs, **options)
        return [answer | {"out_of_distribution": is_outside} for answer in answers]


def pooled_stages(hidden_states: Sequence[Tensor]) -> Tensor:
    """The feature maps of the last stages, each averaged over its pixels: (films, features), float32."""
    return torch.cat([stage.float().mean(dim=(2, 3)) for stage in hidden_states[-STAGES:]], dim=1)
