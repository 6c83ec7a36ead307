"""Splits that keep a patient's films together: folds, the rest of an incomplete split, and a split read from a file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from cxr_backbone.data.labels import strata_of

SPLITS = ("train", "validation", "test")
SPLIT_FILE_COLUMNS = ["split", "image_id", "patient_id"]


def folds_by_patient(patient_ids: Sequence[Any], strata: Sequence[Any], num_folds: int, seed: int) -> np.ndarray:
    """Deal films out to folds of about equal size; a patient's films share a fold, the strata keep their shares.

    Args:
        patient_ids: the patient of each film, any kind of identifier.
        strata: what to balance, film by film: a label or a subtype.
        num_folds: 2 or more.
        seed: the same seed and input give the same folds.

    Returns:
        int array: the fold of each film, 0 to num_folds - 1.

    Raises:
        ValueError: no films, lengths that differ, a missing patient id, or too few patients or films.
    """
    if len(patient_ids) == 0:
        raise ValueError("There are no films to split: patient_ids is empty.")
    if len(patient_ids) != len(strata):
        raise ValueError(f"patient_ids has {len(patient_ids)} entries, strata {len(strata)}; expected as many.")
    if num_folds < 2:
        raise ValueError(f"num_folds must be 2 or more, not {num_folds}.")
    for row, patient in enumerate(patient_ids):
        if is_missing(patient):
            raise ValueError(f"Row {row} has no patient_id, so patients can't be kept apart.")
    patients = [str(patient) for patient in patient_ids]
    if (num_patients := len(set(patients))) < num_folds:
        raise ValueError(f"{num_folds} folds need {num_folds} patients or more; there are {num_patients}.")
    if (largest := max(Counter(strata).values())) < num_folds:
        raise ValueError(f"{num_folds} folds need a stratum of at least {num_folds} films; the largest has {largest}.")

    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    folds = np.empty(len(patients), dtype=np.int64)
    names = [str(stratum) for stratum in strata]
    for fold, (_, members) in enumerate(splitter.split(np.zeros(len(patients)), names, patients)):
        folds[members] = fold
    return folds


def complete_splits(
    given: datasets.DatasetDict,
    *,
    num_folds: int = 10,
    fold: int = 0,
    seed: int = 0,
    stratify_by: str = "label",
    group_by: str = "patient_id",
) -> datasets.DatasetDict:
    """Train, validation and test, by patient; what the source does not bring is carved from its train split.

    Train is dealt out to `num_folds` folds. Fold `fold` becomes validation; where the source brings no test split
    either, the fold after it (fold 0 after the last) becomes test. So `fold` = 0, 1, ... walks through k-fold
    cross-validation.

    Args:
        given: has train; may have validation and test, which stay as they are.
        stratify_by: `label`, or a column of strings.
        group_by: the column whose films stay together. (By `image_id` a patient's films end up on several sides, which
            is for comparison with work that splits so, and for nothing else.)

    Raises:
        ValueError: no train split, a split that is empty or unknown, a fold out of range or of a source that brings all
            splits, or as `folds_by_patient`.
    """
    if "train" not in given or given.keys() - set(SPLITS):
        found = ", ".join(given) or "none"
        raise ValueError(f"A data set has a train split, and may have validation and test; found {found}.")
    for name, films in given.items():
        if len(films) == 0:
            raise ValueError(f"The {name} split has no films.")
    if not 0 <= fold < num_folds:
        raise ValueError(f"fold={fold} must be 0 or more and below num_folds={num_folds}.")
    splits = datasets.DatasetDict(given)
    if fold and set(SPLITS) <= given.keys():
        raise ValueError(f"fold={fold} means nothing: the source brings its validation and its test split.")
    if missing := [name for name in ("validation", "test") if name not in given]:
        if len(missing) == 2 and num_folds == 2:
            raise ValueError("num_folds=2 leaves nothing to train on: the source has no validation and no test split.")
        train = given["train"]
        strata = strata_of(train) if stratify_by == "label" else train[stratify_by][:]
        folds = folds_by_patient(train[group_by][:], strata, num_folds, seed)
        held_out = {name: (fold + offset) % num_folds for offset, name in enumerate(missing)}
        splits["train"] = train.select(np.flatnonzero(~np.isin(folds, list(held_out.values()))))
        splits |= {name: train.select(np.flatnonzero(folds == number)) for name, number in held_out.items()}
    return datasets.DatasetDict({name: splits[name] for name in SPLITS})


def write_split(splits: datasets.DatasetDict, path: Path) -> None:
    """Write which film is on which side, a line a film in the order of the split, as CSV for `repeat_split`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(SPLIT_FILE_COLUMNS)
        for name, films in splits.items():
            for image_id, patient_id in zip(films["image_id"][:], films["patient_id"][:], strict=True):
                lines.writerow([name, image_id, "" if patient_id is None else patient_id])


def repeat_split(splits: datasets.DatasetDict, path: Path) -> datasets.DatasetDict:
    """The same films, dealt out as `write_split` wrote it: same sides, same order. Films that the file does not list
    are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no split file, lists a film more often than the data set has it, or none of a split; or
            two films of one split share an image_id. (In two splits it is one film that stands in both.)
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no split file {path}.")
    for name, split in splits.items():
        if (distinct := len(set(split["image_id"]))) < len(split):
            raise ValueError(
                f"image_id is not unique: {len(split)} films of the {name} split share {distinct}, so {path} can't "
                "tell them apart."
            )
    films = all_films(splits)
    rows: dict[str, list[int]] = {}
    for row, image_id in enumerate(films["image_id"][:]):
        rows.setdefault(image_id, []).append(row)

    patients = films["patient_id"][:]
    chosen: dict[str, list[int]] = {name: [] for name in SPLITS}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:  # what is no text has no such columns
        lines = csv.DictReader(file)
        try:
            columns = lines.fieldnames
        except csv.Error:  # of Python 3.10, for a NUL
            columns = None
        if columns != SPLIT_FILE_COLUMNS:
            raise ValueError(f"{path} is no split file: expected the columns {', '.join(SPLIT_FILE_COLUMNS)}.")
        for line in lines:
            where = f"{path}, line {lines.line_num}"
            if line["split"] not in chosen:
                raise ValueError(f"{where} has the split {line['split']!r}; expected {', '.join(SPLITS)}.")
            if not rows.get(line["image_id"]):
                raise ValueError(f"{where} lists {line['image_id']}, which the data set lacks or lists before.")
            row = rows[line["image_id"]].pop(0)
            if line["patient_id"] != (patients[row] or ""):
                raise ValueError(f"{where} lists {line['image_id']} as a film of another patient than the data set.")
            chosen[line["split"]].append(row)
    if empty := [name for name, indices in chosen.items() if not indices]:
        raise ValueError(f"{path} lists no film of the {empty[0]} split.")
    return datasets.DatasetDict({name: films.select(indices) for name, indices in chosen.items()})


def all_films(splits: datasets.DatasetDict) -> datasets.Dataset:
    """Every film, whatever its split: of an external set, a model has seen none of them."""
    return datasets.concatenate_datasets(list(splits.values()))


def permute_labels(splits: datasets.DatasetDict, seed: int) -> datasets.DatasetDict:
    """The same films with noise for labels: those of train are shuffled among the films of train, and those of
    validation among its own; test keeps its labels. Class counts stay, and so do combinations of findings.

    For a control run. No model can know the labels of validation then, so one that scores well there has been told,
    and how well it fits train is how well it learns by heart (Zhang et al., ICLR 2017).

    Args:
        seed: the same seed and films give the same labels.
    """
    noise = np.random.default_rng(seed)
    permuted = datasets.DatasetDict(splits)
    for name in ("train", "validation"):
        films = splits[name]
        labels = films.select_columns("label").select(noise.permutation(len(films)))
        columns = [films.remove_columns("label"), labels]
        permuted[name] = datasets.concatenate_datasets(columns, axis=1).select_columns(films.column_names)
    return permuted


def is_missing(patient_id: Any) -> bool:
    """Whether a patient id is None, NaN or blank."""
    return patient_id is None or patient_id != patient_id or not str(patient_id).strip()
