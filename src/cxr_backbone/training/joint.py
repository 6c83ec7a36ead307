"""Joint training: what phase two learns beside the labels of its films, each thing with a head of its own, which is
thrown away in the end.

Films of another source keep the backbone from forgetting what is not in the run's own. Subgroups of the run's own
films, such as the subtype of a pneumonia, tell it more of them than their labels do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.data.labels import is_multi_label, labels_of
from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.data.subgroups import subgroups_of
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import JointArguments
from cxr_backbone.training.batches import Batch

UNKNOWN = -100  # the class that `cross_entropy` leaves out


class JointBatch(NamedTuple):
    """Some of the run's own films, and behind them those of the other source: `pixels` uint8 (films, 1, size, size);
    `targets`, for each head class indices (films,), -100 for unknown, or findings (films, findings): 1, 0, or NaN for
    unknown. A head knows nothing of films that it is not about."""

    pixels: Tensor
    image_ids: list[str]
    targets: dict[str, Tensor]


class JointTargets:
    """What is learnt beside the labels, and of which films.

    Args:
        own: the films that the run trains on; of their columns that `arguments.subgroups` names.
        others: decoded films of another source, if there are any; of their label and of each of their subgroups
            (`data.subgroups.subgroups_of`).

    Attributes:
        widths: how many classes, or findings, each head tells apart.

    Raises:
        ValueError: `own` are streamed or have no such subgroups; there are fewer other films than
            `arguments.batch_size`, or nothing of them differs.
    """

    def __init__(self, own: Dataset | FilmStream, others: Dataset | None, arguments: JointArguments, *, seed: int):
        self.others, self.batch_size, self.weight, self.seed = others, arguments.batch_size, arguments.weight, seed
        self.of_own, self.of_others, self.row = {}, {}, {}
        if arguments.subgroups:
            if isinstance(own, FilmStream):
                raise ValueError(f"joint.subgroups={arguments.subgroups} is not allowed with data.streaming.")
            self.of_own = _own_targets(own, arguments.subgroups)
            self.row = {image_id: row for row, image_id in enumerate(own["image_id"])}
        if others is not None:
            if len(others) < arguments.batch_size:
                raise ValueError(
                    f"joint.batch_size={arguments.batch_size} is more than the {len(others)} films of joint.films."
                )
            self.of_others = _targets(others)
        # (The columns of two sources may have the same names.)
        heads = {f"own {name}": target for name, target in self.of_own.items()} | self.of_others
        self.widths = {name: target.width for name, target in heads.items()}

    def beside(self, batch: Batch, number: int) -> JointBatch:
        """The films of batch `number` and, behind them, that of an endless sequence of shuffled passes over the other
        films, of which each is once in every pass."""
        pixels, image_ids = batch["pixels"], batch["image_id"]
        rows = [self.row[image_id] for image_id in image_ids] if self.of_own else []
        own = {f"own {name}": target.values[rows] for name, target in self.of_own.items()}
        others: dict[str, Tensor] = {}
        if self.others is not None:
            chosen = self._draw(number)
            read = [self.others[row] for row in chosen]
            others = {name: target.values[chosen] for name, target in self.of_others.items()}
            behind = torch.from_numpy(stack_pixels(read)).unsqueeze(1).to(pixels.device)
            pixels, image_ids = torch.cat([pixels, behind]), image_ids + [row["image_id"] for row in read]
        few, all_films = len(batch["image_id"]), len(image_ids)
        targets = {name: torch.cat([values, _unknown(values, all_films - few)]) for name, values in own.items()}
        targets |= {name: torch.cat([_unknown(values, few), values]) for name, values in others.items()}
        return JointBatch(pixels, image_ids, {name: values.to(pixels.device) for name, values in targets.items()})

    def _draw(self, number: int) -> list[int]:
        films = len(self.others)  # type: ignore[arg-type]
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        # A batch may lie in two passes: the end of one and the beginning of the next.
        turns = {place // films for place in places}
        order = {turn: np.random.default_rng((self.seed, turn)).permutation(films) for turn in turns}
        return [int(order[place // films][place % films]) for place in places]


class JointModel(nn.Module):
    """A classifier and, on the same backbone, a linear head for everything that is learnt beside the labels.

    Args:
        widths: of each head, `JointTargets.widths`.
    """

    def __init__(self, model: CXRInceptionForImageClassification, widths: dict[str, int]):
        super().__init__()
        self.model = model
        features = model.config.hidden_sizes[-1]
        # (Names of columns may have dots in them, which names of modules may not.)
        self.names = list(widths)
        self.heads = nn.ModuleList(nn.Linear(features, width) for width in widths.values())
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)  # heads that say nothing yet pull the backbone nowhere at first

    def forward(self, pixel_values: Tensor, labels: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The losses of the classifier and of the heads, a mean over them.

        Args:
            pixel_values: of the run's own films and then of the others, (films, channels, height, width): one pass, so
                that BatchNorm's statistics are of both.
            labels: of the own films.
            targets: of all films, as `JointBatch` has them.
        """
        features = self.model.cxr_inception(pixel_values).pooler_output
        loss = self.model.compute_loss(self.model.classifier(features[: len(labels)]), labels)
        losses = [
            _loss(head(features).float(), targets[name]) for name, head in zip(self.names, self.heads, strict=True)
        ]
        return loss, torch.stack(losses).mean()


class _Target(NamedTuple):
    """Of some films: class indices (films,) or findings (films, findings), and how many classes or findings."""

    values: Tensor
    width: int


def _own_targets(films: Dataset, columns: list[str]) -> dict[str, _Target]:
    found = _subgroup_targets(films)
    if missing := [column for column in columns if column not in found]:
        raise ValueError(
            f"joint.subgroups={columns} is not allowed: {missing[0]} divides the training films into no subgroups; "
            f"expected {', '.join(found) or 'a column of data.subgroup_columns'}."
        )
    return {column: found[column] for column in columns}


def _targets(films: Dataset) -> dict[str, _Target]:
    found = _subgroup_targets(films)
    labels = torch.from_numpy(labels_of(films))
    width = labels.shape[1] if is_multi_label(films.features) else films.features["label"].num_classes
    if labels.ndim == 2 or width > 1:
        found = {"label": _Target(labels, width)} | found
    if not found:
        raise ValueError("joint.films: every film has the same label and there are no subgroups; nothing to learn.")
    return found


def _subgroup_targets(films: Dataset) -> dict[str, _Target]:
    found = {}
    for column, names in subgroups_of(films).items():
        classes = sorted({name for name in names if name is not None})
        if len(classes) > 1:
            index = {name: number for number, name in enumerate(classes)} | {None: UNKNOWN}
            found[column] = _Target(torch.tensor([index[name] for name in names]), len(classes))
    return found


def _unknown(values: Tensor, films: int) -> Tensor:
    """Targets like `values`, of films of which nothing is known."""
    unknown = float("nan") if values.is_floating_point() else UNKNOWN
    return values.new_full((films, *values.shape[1:]), unknown)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """0 where nothing is known."""
    if targets.is_floating_point():
        known = ~targets.isnan()
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)
    known = targets != UNKNOWN
    return F.cross_entropy(logits, targets, ignore_index=UNKNOWN, reduction="sum") / known.sum().clamp(min=1)
