"""Any table of films: CSV, JSON lines, Parquet, a data set of the Hub."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from cxr_backbone.data.files import listed_file, patients_by_pattern, split_of
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.splits import SPLITS, complete_splits
from cxr_backbone.data.subgroups import OF_EVERY_FILM, subgroup_column
from cxr_backbone.data.table_labels import class_labels, finding_labels, labels_by_value, log_classes
from cxr_backbone.data.table_rows import Rows, patient_text, read_rows

logger = logging.getLogger(__name__)


def load_table(
    source: str | Path,
    *,
    label_columns: Sequence[str],
    image_column: str = "image",
    patient_column: str | None = "patient_id",
    patient_pattern: str | None = None,
    split_column: str | None = None,
    label_names: Sequence[str] | None = None,
    label_values: Sequence[str] | None = None,
    subgroup_columns: Sequence[str] = (),
    images_dir: str | Path | None = None,
    uncertain: str = "ignore",
    missing: str = "ignore",
    num_folds: int = 10,
    fold: int = 0,
    seed: int = 0,
    carve: bool = True,
) -> datasets.DatasetDict:
    """Load films that a table lists. No image is decoded here.

    Splits that the source brings stay as they are, what is missing is carved from train by patient. (Whether a
    patient stands on two of the given sides is for the audit to say.)

    CheXpert as published, for example, where the table has a path such as
    `CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg` and no column for the patient:

        load_table("data/CheXpert-v1.0-small/train.csv", images_dir="data", image_column="Path",
                   label_columns=["Cardiomegaly", "Edema"], patient_pattern=r"patient\\d+", missing="zeros")

    Args:
        source: one .csv, .csv.gz, .jsonl or .parquet file; a folder of Parquet shards (`train-*.parquet`,
            `validation-*.parquet`, `test-*.parquet`, in it or in its `data/`), or with `metadata.csv` or
            `metadata.jsonl` in it or in each of its split folders; or a Hub id.
        label_columns: one column of classes, given by name or by index from 0; or several of findings, each 1, 0,
            -1 (uncertain) or blank (missing), as CheXpert and MIMIC-CXR publish them.
        image_column: paths relative to the table's folder, or to `images_dir`; in Parquet also bytes or
            `datasets.Image`.
        patient_column: the column that tells patients apart; None or "" where nothing does, and all splits are given.
        patient_pattern: instead of a column, a regular expression that is searched in the image path; the patient
            is its first group, or all that it matches.
        split_column: train; validation, val, valid or dev; test; in any case.
        label_names: the classes, index 0 first; the last of two is the positive one. By default those of the table,
            sorted, which the log says.
        label_values: instead of `label_names`, what the values of one label column mean: `value=CLASS` for each that
            counts, in the order of the classes, such as "Normal=NORMAL", "Lung Opacity=PNEUMONIA". Several values may
            mean one class. Films with any other value, or none, are left out, which the log says.
        subgroup_columns: columns that are carried over, as numbers if all of their cells are, to report on subgroups
            (see `subgroups.subgroups_of`).
        images_dir: the folder that image paths are relative to. None may lead out of it.
        uncertain, missing: `ignore` (a finding becomes NaN; with one label column the film is left out), `zeros` or
            `ones` (of findings, or of two classes).
        num_folds, fold, seed: see `complete_splits`.
        carve: False leaves the films in the splits that the source brings, or all in train, for a set that is only to
            be tested on. Patients need not be known then.

    Returns:
        Splits train, validation and test with the columns of `make_features` and the subgroup columns. `image_id` is
        the path as the table writes it; of an embedded image its name, or its row where names are missing or repeated,
        after its split.

    Raises:
        FileNotFoundError: no such source, or an image that the table lists is missing.
        ValueError: a damaged table, a missing column, an unknown label, split or policy, a label value that is
            malformed, listed twice or nowhere in the table, a film listed twice, an image path that leads out of its
            folder, a missing patient, or as `complete_splits`.
    """
    if not label_columns:
        raise ValueError("label_columns is empty; expected one column of classes, or several of findings.")
    patient_column = None if patient_pattern else patient_column or None
    beside = [*(column for column in (patient_column, split_column) if column), *subgroup_columns]
    asked = Counter([image_column, *label_columns, *beside])
    if twice := [column for column, count in asked.items() if count > 1]:
        raise ValueError(f"The column {twice[0]} is asked for twice; expected one meaning a column.")
    if taken := [column for column in subgroup_columns if column in OF_EVERY_FILM]:
        raise ValueError(
            f"subgroup_columns has {taken[0]!r}, a name that films have for themselves; rename the column."
        )
    rows = read_rows(source, image_column, [*label_columns, *beside])
    if split_column and rows.splits:
        raise ValueError(f"{source} comes in splits; expected split_column=None, not {split_column!r}.")

    if label_values and (label_names or len(label_columns) > 1 or {uncertain, missing} != {"ignore"}):
        raise ValueError("label_values goes with one label column, and without label_names, uncertain and missing.")
    names, labels, kept = _labels(rows, label_columns, label_names, label_values, uncertain, missing)
    _check_unique(rows)
    patients = _patients(rows, patient_column, patient_pattern)
    columns = {"label": labels, "patient_id": patients, "image_id": rows.image_ids}
    features = make_features(names, multi_label=len(label_columns) > 1)
    for column in subgroup_columns:
        features[column], columns[column] = subgroup_column(rows.columns[column])
    described = datasets.Dataset.from_dict(columns, features=datasets.Features({c: features[c] for c in columns}))
    films = datasets.concatenate_datasets([_images(rows, images_dir), described], axis=1)

    splits = rows.splits
    if split_column:
        splits = [split_of(name, rows.where(row)) for row, name in enumerate(rows.columns[split_column])]
    chosen = np.flatnonzero(kept)
    return split_films(
        films.select(chosen) if len(chosen) < len(films) else films,
        [splits[row] for row in chosen] if splits else None,
        source=source,
        num_folds=num_folds,
        fold=fold,
        seed=seed,
        carve=carve,
    )


def split_films(
    films: datasets.Dataset,
    splits: Sequence[str] | None,
    *,
    source: str | Path,
    num_folds: int,
    fold: int,
    seed: int,
    carve: bool,
) -> datasets.DatasetDict:
    """Deal films out to the splits that the source names for each, and complete these by patient if asked to `carve`.

    Raises:
        ValueError: there is a split to carve and no patient to carve it by, or as `complete_splits`.
    """
    given = datasets.DatasetDict(train=films)
    if splits is not None:
        rows = {name: np.flatnonzero([split == name for split in splits]) for name in SPLITS}
        given = datasets.DatasetDict({name: films.select(chosen) for name, chosen in rows.items() if len(chosen)})
    if not carve:
        return given
    if (lacking := [name for name in SPLITS if name not in given]) and None in films["patient_id"][:]:
        raise ValueError(
            f"{source} brings no {' and no '.join(lacking)} split, and patients are not known, so none can be carved; "
            "expected a patient column or pattern, or train, validation and test given."
        )
    completed = complete_splits(given, num_folds=num_folds, fold=fold, seed=seed)
    for name, split in completed.items():
        logger.info("%s: %d films", name, len(split))
    return completed


def _labels(
    rows: Rows,
    columns: Sequence[str],
    label_names: Sequence[str] | None,
    label_values: Sequence[str] | None,
    uncertain: str,
    missing: str,
) -> tuple[list[str], list[Any], np.ndarray]:
    """Class or finding names, the label of each row, and which rows to keep."""
    policies = {"uncertain": uncertain, "missing": missing}
    if len(columns) == 1:
        (column,) = columns
        cells = rows.columns[column]
        if label_values:
            names, classes = labels_by_value(cells, column, label_values)
            left_out = f"none of these ({cells.count('')} of them blank)"
        else:
            given = label_names or rows.class_names.get(column)
            names, classes = class_labels(cells, rows.where, column, given, **policies)
            left_out = "uncertain or missing"
        log_classes(column, names, classes, left_out)
        kept = ~np.isnan(classes)
        return names, np.where(kept, classes, 0).astype(int).tolist(), kept
    if label_names:
        raise ValueError("label_names goes with one label column; findings are called as their columns are.")
    findings = [finding_labels(rows.columns[column], rows.where, column, **policies).tolist() for column in columns]
    labels = [dict(zip(columns, film, strict=True)) for film in zip(*findings, strict=True)]
    return list(columns), labels, np.ones(len(labels), dtype=bool)


def _patients(rows: Rows, column: str | None, pattern: str | None) -> list[str | None]:
    if pattern:
        return list(patients_by_pattern(rows.paths, pattern, rows.where))
    if column is None:
        return [None] * len(rows.paths)
    patients: list[str | None] = [patient_text(cell, rows.where(row)) for row, cell in enumerate(rows.columns[column])]
    if "" in patients:
        raise ValueError(f"{rows.where(patients.index(''))} has no {column}, so patients can't be kept apart.")
    return patients


def _check_unique(rows: Rows) -> None:
    counts = Counter(rows.image_ids)
    if len(counts) < len(rows.image_ids):
        row = [row for row, image_id in enumerate(rows.image_ids) if counts[image_id] > 1][1]
        raise ValueError(
            f"{rows.where(row)} has the image {rows.image_ids[row]!r}, which another row has; expected one row a film."
        )


def _images(rows: Rows, images_dir: str | Path | None) -> datasets.Dataset:
    """One column `image`."""
    if rows.embedded is not None:
        return rows.embedded.cast_column("image", datasets.Image())
    folder = Path(images_dir) if images_dir else rows.folder
    if folder is None:
        raise ValueError(f"{rows.where(0)} has an image path and no bytes; give images_dir, the folder it is in.")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    paths = [listed_file(folder, path, rows.where(row)) for row, path in enumerate(rows.paths)]
    return datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
