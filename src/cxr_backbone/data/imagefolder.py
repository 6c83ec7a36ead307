"""A folder of films with one folder for each class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from cxr_backbone.data.files import IMAGE_SUFFIXES, SPLIT_OF_NAME, patients_by_pattern, visible, visible_files
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.table import load_table, split_films
from cxr_backbone.data.table_labels import class_labels, log_classes
from cxr_backbone.data.table_rows import metadata_tables

logger = logging.getLogger(__name__)


def load_imagefolder(
    source: str | Path,
    *,
    patient_pattern: str | None = None,
    label_names: Sequence[str] | None = None,
    num_folds: int = 10,
    fold: int = 0,
    seed: int = 0,
    carve: bool = True,
) -> datasets.DatasetDict:
    """Load films from class folders, the layout that `datasets` calls `imagefolder`. No image is decoded here.

    Two things differ from `datasets.load_dataset("imagefolder")`: DICOM and TIFF files are films too, and the class
    is the topmost folder (below the split, if there are any), so that the films of a class may lie in folders a
    patient.

    Args:
        source: one of
            a folder with a folder a class: `NORMAL/a.png`, `PNEUMONIA/7/b.dcm`;
            the same below train/, validation/ (val, valid, dev) and test/, or some of these;
            a folder with `metadata.csv` or `metadata.jsonl`, in it or in each of its split folders, which has the
            columns file_name, label and, without a `patient_pattern`, patient_id. For other columns, and for
            findings, call `load_table` with `image_column="file_name"`.
        patient_pattern: a regular expression that is searched in the path relative to `source`, such as
            r"person\\d+"; the patient is its first group, or all that it matches. None where names tell no patient:
            then all three splits have to be there.
        label_names: the classes, index 0 first. By default the folders' names, sorted, which the log says.
        num_folds, fold, seed: see `complete_splits`.
        carve: as in `load_table`.

    Returns:
        Splits train, validation and test with the columns of `make_features`; `image_id` is the path relative to
        `source`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class folders, a class folder without films, a film outside of them, a file in one that is no
            film, classes that differ between the splits, a link out of the folder, or as `load_table`.
    """
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}.")
    if tables := metadata_tables(root):
        if tables[0].parent == root and _split_folders(root):
            raise ValueError(
                f"{tables[0]} stands beside split folders, so the split of its films is not certain; expected a table "
                "in each of them, or load_table with a split_column."
            )
        return load_table(
            root,
            image_column="file_name",
            label_columns=["label"],
            patient_column=None if patient_pattern else "patient_id",
            patient_pattern=patient_pattern,
            label_names=label_names,
            num_folds=num_folds,
            fold=fold,
            seed=seed,
            carve=carve,
        )

    films = _films(root)
    ids = [film.path.relative_to(root).as_posix() for film in films]

    def where(row: int) -> str:
        return str(films[row].path)

    names, labels = class_labels([film.label for film in films], where, "folder", label_names)
    log_classes("folder", names, labels)
    columns = {
        "image": [str(film.path.absolute()) for film in films],
        "label": labels.astype(int).tolist(),
        "patient_id": patients_by_pattern(ids, patient_pattern, where) if patient_pattern else [None] * len(ids),
        "image_id": ids,
    }
    return split_films(
        datasets.Dataset.from_dict(columns, features=make_features(names)),
        [film.split for film in films if film.split] or None,
        source=source,
        num_folds=num_folds,
        fold=fold,
        seed=seed,
        carve=carve,
    )


@dataclass(frozen=True)
class Film:
    """One file. The split is None where folders don't tell it."""

    path: Path
    label: str
    split: str | None


def _films(root: Path) -> list[Film]:
    split_folders = _split_folders(root)
    depth = 1 if split_folders else 0  # of the class folders
    films, left_out = [], []
    for path in visible_files(root, root):
        parts = path.relative_to(root).parts
        is_film = path.suffix.lower() in IMAGE_SUFFIXES
        if is_film and len(parts) < depth + 2:
            raise ValueError(
                f"{path} is in no class folder; expected folders such as {root}/NORMAL and {root}/PNEUMONIA."
            )
        if is_film:
            films.append(Film(path, label=parts[depth], split=SPLIT_OF_NAME[parts[0].lower()] if depth else None))
        elif len(parts) < depth + 2:
            left_out.append(path.name)
        else:
            raise ValueError(f"{path} is no film; expected files in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    if left_out:
        logger.warning("Leaving out %d files beside the class folders of %s: %s", len(left_out), root, left_out[:10])
    _check_class_folders(
        split_folders or [root], {film.path.relative_to(root).parts[: depth + 1] for film in films}, root
    )
    return films


def _split_folders(root: Path) -> list[Path]:
    """The folders in `root`, if they are called as splits are; none if they are called otherwise."""
    folders = [path for path in visible(root) if path.is_dir()]
    splits = [SPLIT_OF_NAME[path.name.lower()] for path in folders if path.name.lower() in SPLIT_OF_NAME]
    if not splits:
        return []
    found = ", ".join(path.name for path in folders)
    if len(splits) < len(folders):
        raise ValueError(f"{root} has the folders {found}; expected splits alone, or classes alone.")
    if len(set(splits)) < len(splits):
        raise ValueError(f"{root} has the folders {found}, of which two are the same split.")
    return folders


def _check_class_folders(holders: list[Path], with_films: set[tuple[str, ...]], root: Path) -> None:
    """Each holder, a split or the root, has the same classes, and films of each."""
    classes = {}
    for holder in holders:
        folders = [path for path in visible(holder) if path.is_dir()]
        if len(folders) < 2:
            raise ValueError(f"{holder} has {len(folders)} class folders; expected two or more.")
        for folder in folders:
            if folder.relative_to(root).parts not in with_films:
                raise ValueError(f"{folder} holds no films; expected files in {', '.join(sorted(IMAGE_SUFFIXES))}.")
        classes[holder] = [folder.name for folder in folders]
    first, *others = classes
    for holder in others:
        if classes[holder] != classes[first]:
            raise ValueError(f"{holder} has the classes {classes[holder]}, but {first} has {classes[first]}.")
