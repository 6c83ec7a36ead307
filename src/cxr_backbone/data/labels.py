"""Labels of a data set: one class a film, or several findings each present, absent or unknown.

Every source gives the same columns:

    image       datasets.Image: a path, or the bytes of a file
    label       datasets.ClassLabel; or, multi-label, a struct of one float a finding: 1 present, 0 absent, NaN unknown
    patient_id  string, or null where the source does not tell patients apart
    image_id    string, unique in the source: what a report calls the film
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np


def make_features(names: Sequence[str], *, multi_label: bool = False) -> datasets.Features:
    """The columns above, for class names (index 0 first) or for finding names."""
    label = (
        {name: datasets.Value("float32") for name in names} if multi_label else datasets.ClassLabel(names=list(names))
    )
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": label,
            "patient_id": datasets.Value("string"),
            "image_id": datasets.Value("string"),
        }
    )


def is_multi_label(features: datasets.Features) -> bool:
    return not isinstance(features["label"], datasets.ClassLabel)


def label_names(features: datasets.Features) -> list[str]:
    """Class names in the order of their indices, or finding names."""
    return list(features["label"]) if is_multi_label(features) else list(features["label"].names)


def stack_labels(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The labels of some rows: int64 (rows,), or float32 (rows, findings)."""
    labels = [row["label"] for row in rows]
    if isinstance(labels[0], Mapping):
        return np.array([list(label.values()) for label in labels], dtype=np.float32)
    return np.array(labels, dtype=np.int64)


def labels_of(dataset: datasets.Dataset) -> np.ndarray:
    """All labels of a split: int64 (films,), or float32 (films, findings)."""
    if not is_multi_label(dataset.features):
        return np.array(dataset["label"][:], dtype=np.int64)
    flat = dataset.select_columns("label").flatten().with_format("numpy")
    columns = [flat[f"label.{name}"][:] for name in label_names(dataset.features)]
    return np.stack(columns, axis=1).astype(np.float32)


def label_counts(dataset: datasets.Dataset) -> dict[str, int]:
    """How many films of a split belong to each class, or show each finding."""
    names, labels = label_names(dataset.features), labels_of(dataset)
    counts = (labels == 1).sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def strata_of(dataset: datasets.Dataset) -> list[str]:
    """What a stratified split balances: the class of each film, or the rarest finding that it shows.

    (Combinations of findings are too many to balance; the rarest findings are those that chance would spread worst.)
    """
    names, labels = label_names(dataset.features), labels_of(dataset)
    if labels.ndim == 1:
        return [names[label] for label in labels]
    shown = labels == 1
    rarest_first = np.argsort(shown.sum(axis=0), kind="stable")
    first = shown[:, rarest_first].argmax(axis=1)
    return [names[rarest_first[i]] if any_shown else "none" for i, any_shown in zip(first, shown.any(1), strict=True)]
