"""What a model said of the films of a split, beside what is true of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit, softmax


@dataclass(frozen=True)
class Predictions:
    """Logits and labels, film by film.

    names: classes (index 0 first), or findings.
    labels: int64 (films,), class indices; or float (films, findings): 1 present, 0 absent, NaN unknown.
    logits: float64 (films, len(names)).
    image_ids: what each film is called.
    patient_ids: whose film it is; None where that is not known.
    groups: columns that divide the films into subgroups, such as sex or view; None where a film is in none.

    Raises:
        ValueError: lengths that differ, a label that is no class, or a logit that is NaN or infinite.
    """

    names: list[str]
    labels: np.ndarray
    logits: np.ndarray
    image_ids: list[str]
    patient_ids: list[str | None]
    groups: Mapping[str, list[str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        films = len(self.labels)
        lengths = {"logits": len(self.logits), "image_ids": len(self.image_ids), "patient_ids": len(self.patient_ids)}
        lengths |= {f"groups[{name!r}]": len(values) for name, values in self.groups.items()}
        for name, length in lengths.items():
            if length != films:
                raise ValueError(f"Predictions: there are {films} labels and {length} {name}; expected as many.")
        if self.logits.shape != (films, len(self.names)):
            raise ValueError(
                f"Predictions: logits are {self.logits.shape}; expected {(films, len(self.names))} for the labels "
                f"{', '.join(self.names)}."
            )
        if self.is_multi_label and self.labels.shape != self.logits.shape:
            raise ValueError(f"Predictions: labels are {self.labels.shape}; expected {self.logits.shape}.")
        known = self.labels[~np.isnan(self.labels)] if self.is_multi_label else self.labels
        if not np.isin(known, (0, 1) if self.is_multi_label else range(len(self.names))).all():
            raise ValueError(f"Predictions: a label is none of the {len(self.names)} classes, or of 0, 1 and NaN.")
        if not_finite := int((~np.isfinite(self.logits)).any(axis=1).sum()):
            first = self.image_ids[int((~np.isfinite(self.logits)).any(axis=1).argmax())]
            raise ValueError(f"Predictions: the logits of {not_finite} films are not finite; the first is {first}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_multi_label(self) -> bool:
        return self.labels.ndim == 2

    @property
    def scores(self) -> np.ndarray:
        """Probabilities (films, len(names)), as the pipeline gives them."""
        return expit(self.logits) if self.is_multi_label else softmax(self.logits, axis=1)

    @property
    def targets(self) -> list[str]:
        """What is asked as a question of yes or no: the positive one (index 1) of two classes, each of several classes
        against the rest, or each finding."""
        return self.names[1:] if len(self.names) == 2 and not self.is_multi_label else self.names

    def question(self, target: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The films where the answer is known, and about these: is it there, and how sure is the model?

        Returns:
            films: int64 (known films,), indices.
            truth: bool (known films,).
            scores: float64 (known films,), the probability of `target`.
        """
        column = self.names.index(target)
        truth = self.labels[:, column] if self.is_multi_label else (self.labels == column).astype(float)
        films = np.flatnonzero(~np.isnan(truth))
        return films, truth[films] == 1, self.scores[films, column]

    def select(self, films: np.ndarray) -> Predictions:
        """Some of the films, by index."""
        return replace(
            self,
            labels=self.labels[films],
            logits=self.logits[films],
            image_ids=[self.image_ids[film] for film in films],
            patient_ids=[self.patient_ids[film] for film in films],
            groups={name: [values[film] for film in films] for name, values in self.groups.items()},
        )

    def write(self, path: Path) -> None:
        """Write a row a film as Parquet: image_id, patient_id, `subgroup <name>`, `score <name>` of each class or
        finding, and the class in `label`, or each finding in `label <finding>`, null if unknown."""
        columns: dict[str, object] = {"image_id": self.image_ids, "patient_id": pa.array(self.patient_ids, pa.string())}
        columns |= {f"subgroup {name}": pa.array(values, pa.string()) for name, values in self.groups.items()}
        if self.is_multi_label:
            for column, name in enumerate(self.names):
                columns[f"label {name}"] = pa.array(self.labels[:, column], from_pandas=True)  # NaN becomes null
        else:
            columns["label"] = [self.names[label] for label in self.labels]
        columns |= {f"score {name}": self.scores[:, column] for column, name in enumerate(self.names)}
        pq.write_table(pa.table(columns), path)
