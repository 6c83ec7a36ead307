"""The films of all splits of a decoded data set in one table, without their pixels."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from cxr_backbone.data.facts import THUMBNAIL_SIZE
from cxr_backbone.data.labels import label_names, labels_of

NUMBERS = ("height", "width", "file_bytes", "mean", "low", "high", "black", "white")
THUMBNAILS_PER_BATCH = 1024


@dataclass(frozen=True)
class FilmTable:
    """Films in the order of the splits and of their rows. Memory is a kilobyte a film or less."""

    split: np.ndarray  # str (films,)
    row: np.ndarray  # int64 (films,): the row in its split
    image_id: list[str]
    patient_id: list[str | None]
    label_names: list[str]
    targets: np.ndarray  # float32 (films, labels): 1, 0, or NaN where a finding is not known
    numbers: dict[str, np.ndarray]  # float64 (films,) for each of NUMBERS, units as `decode_once` says
    pixel_hash: list[str]
    perceptual_hash: list[str]
    thumbnails: np.ndarray  # uint8 (films, 96 * 96), in a temporary file

    def describe(self, film: int) -> dict[str, Any]:
        """What a report says of a film: where to find it, whose it is, and its class or its findings."""
        shown = [name for name, target in zip(self.label_names, self.targets[film], strict=True) if target == 1]
        return {
            "split": str(self.split[film]),
            "row": int(self.row[film]),
            "image_id": self.image_id[film],
            "patient_id": self.patient_id[film],
            "label": " | ".join(shown) or "none",
        }


def read_films(data: datasets.DatasetDict) -> FilmTable:
    """Read what `decode_once` found out about the films of each split; `pixels` are neither needed nor read.

    Raises:
        ValueError: no films, or a split that lacks `label`, `patient_id`, `image_id` or `film`.
    """
    for name, split in data.items():
        if missing := {"label", "patient_id", "image_id", "film"} - set(split.column_names):
            raise ValueError(f"The {name} split lacks {', '.join(sorted(missing))}; expected what decode_once returns.")
    sizes = {name: len(split) for name, split in data.items()}
    if sum(sizes.values()) == 0:
        raise ValueError("There are no films to audit: every split is empty.")
    splits = [split.with_format(None) for split in data.values() if len(split)]
    facts = [split.select_columns("film").flatten() for split in splits]

    def fact(name: str) -> list[Any]:
        return [value for films in facts for value in films[f"film.{name}"][:]]

    names = label_names(splits[0].features)
    labels = np.concatenate([labels_of(split) for split in splits])
    return FilmTable(
        split=np.repeat(list(sizes), list(sizes.values())),
        row=np.concatenate([np.arange(size) for size in sizes.values()]),
        image_id=[image_id for split in splits for image_id in split["image_id"][:]],
        patient_id=[patient_id for split in splits for patient_id in split["patient_id"][:]],
        label_names=names,
        targets=labels if labels.ndim == 2 else np.eye(len(names), dtype=np.float32)[labels],
        numbers={name: np.array(fact(name), dtype=np.float64) for name in NUMBERS},
        pixel_hash=fact("pixel_hash"),
        perceptual_hash=fact("perceptual_hash"),
        thumbnails=_read_thumbnails([films.select_columns("film.thumbnail") for films in facts]),
    )


def _read_thumbnails(splits: list[datasets.Dataset]) -> np.ndarray:
    with tempfile.TemporaryFile() as file:  # the memory map keeps it alive, and nothing of it is left behind
        shape = (sum(map(len, splits)), THUMBNAIL_SIZE**2)
        thumbnails = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    filled = 0
    for split in splits:
        for batch in split.iter(THUMBNAILS_PER_BATCH):
            block = np.frombuffer(b"".join(batch["film.thumbnail"]), dtype=np.uint8).reshape(-1, shape[1])
            thumbnails[filled : filled + len(block)] = block
            filled += len(block)
    return thumbnails
