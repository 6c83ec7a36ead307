"""The Kermany chest X-ray set (Cell 2018), also known as Kaggle's "Chest X-Ray Images (Pneumonia)"."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from cxr_backbone.data.files import IMAGE_SUFFIXES, check_link, listed_file, load_from_hub, load_shards, visible
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.protocols import OFFICIAL_VALIDATION, divide
from cxr_backbone.data.splits import is_missing

logger = logging.getLogger(__name__)

LABELS = ["NORMAL", "PNEUMONIA"]
LABEL_OF_SUBTYPE = {"normal": "NORMAL", "bacteria": "PNEUMONIA", "virus": "PNEUMONIA"}
CSV_COLUMNS = ["path", "label", "split", "patient_id", "subtype"]
LAYOUTS = "labels.csv; train/ and test/ with NORMAL/ and PNEUMONIA/; chest_xray/ around those; Parquet shards"

FEATURES = datasets.Features({**make_features(LABELS), "subtype": datasets.Value("string")})

# Kaggle's names, then Mendeley's: person1312_bacteria_3317, NORMAL2-IM-0832-0001-0001, VIRUS-1135262-0001.
FILE_NAMES = [
    re.compile(r"(?P<patient>person\d+)_(?P<subtype>bacteria|virus)_\d+(_\d+)?"),
    re.compile(r"(?P<patient>(NORMAL2-)?IM-\d+)-\d+(-\d+)?"),
    re.compile(r"(?P<subtype>NORMAL|BACTERIA|VIRUS)-(?P<patient>\d+)-\d+"),
]


def load_kermany(
    source: str | Path, *, protocol: str = "official", num_folds: int = 10, fold: int = 0, seed: int = 0
) -> datasets.DatasetDict:
    """Load the Kermany set, split by patient. No image is decoded here.

    The official validation split (16 films) is too small to choose anything by, so it is left out, and
    validation is carved from train by patient, stratified by subtype. The official test split stays as it is.
    (That is the protocol `official`; the others are those of published work, for comparison.)
    Be aware that 170 of Kaggle's `personN` numbers stand in both official train and test, never with one
    subtype; whether they are the same child is not known.

    Args:
        source: one of
            a folder with `labels.csv` (path, label, split, patient_id, subtype; paths relative to it);
            a folder in Kaggle's or Mendeley's layout, train/ and test/ with NORMAL/ and PNEUMONIA/ in each,
            or the folder that holds such a `chest_xray/`;
            a folder of Parquet shards (`train-*.parquet`, `test-*.parquet`, in it or in its `data/`), or a
            Hub id such as `hf-vision/chest-xray-pneumonia`; the file name kept with each image then tells the
            patient.
        protocol, num_folds, fold, seed: how the films are divided, see `protocols.divide`.

    Returns:
        Splits train, validation and test with the columns of `labels.make_features` (NORMAL 0, PNEUMONIA 1) and
        subtype (normal, bacteria or virus).

    Raises:
        FileNotFoundError: no such folder or Hub data set, or a file that labels.csv lists is missing.
        ValueError: no known layout, an empty class folder, an unknown or contradictory label, a missing CSV
            column, a file name that doesn't tell the patient, or as `protocols.divide`.
    """
    official = _load_official(source)
    for name in ("train", "test"):
        if name not in official:
            raise ValueError(f"{source} has no {name} split; it has {', '.join(official) or 'none'}.")

    splits = divide(datasets.DatasetDict(official), protocol, num_folds=num_folds, fold=fold, seed=seed)
    for name, split in splits.items():
        logger.info("%s: %d films, %s", name, len(split), dict(sorted(Counter(split["subtype"]).items())))
    return splits


@dataclass(frozen=True)
class Film:
    """One file of the set. `where` is what an error message calls it."""

    path: str | None
    image_id: str
    label: str
    patient_id: str
    subtype: str
    where: str

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(f"{self.where} has the label {self.label!r}; expected {' or '.join(LABELS)}.")
        if self.subtype not in LABEL_OF_SUBTYPE:
            expected = ", ".join(LABEL_OF_SUBTYPE)
            raise ValueError(f"{self.where} has the subtype {self.subtype!r}; expected one of {expected}.")
        if LABEL_OF_SUBTYPE[self.subtype] != self.label:
            raise ValueError(f"{self.where} is labelled {self.label} but its subtype is {self.subtype}.")
        if is_missing(self.patient_id):
            raise ValueError(f"{self.where} has no patient_id, so patients can't be kept apart.")


def _load_official(source: str | Path) -> dict[str, datasets.Dataset]:
    folder = Path(source)
    if not folder.is_dir():
        return _with_patients(load_from_hub(source), name=str(source))
    if (folder / "labels.csv").is_file():
        return _from_films(_read_labels_csv(folder))
    if shards := load_shards(folder):
        return _with_patients(shards, name=str(folder))
    for root in (folder, folder / "chest_xray"):
        if (root / "train").is_dir() and (root / "test").is_dir():
            return _from_films(_read_class_folders(root))
    raise ValueError(f"{folder} has none of the layouts looked for: {LAYOUTS}.")


def _read_labels_csv(folder: Path) -> dict[str, list[Film]]:
    table = folder / "labels.csv"
    films: dict[str, list[Film]] = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if missing := [column for column in CSV_COLUMNS if column not in (rows.fieldnames or [])]:
            raise ValueError(f"{table} lacks the columns {', '.join(missing)}.")
        for row in rows:
            where = f"{table}, line {rows.line_num}"
            if row["split"] not in {"train", "test"} | OFFICIAL_VALIDATION:
                raise ValueError(f"{where} has the split {row['split']!r}; expected train, val or test.")
            path = listed_file(folder, row["path"] or "", where)
            film = Film(path, row["path"], row["label"], row["patient_id"], row["subtype"], where)
            films.setdefault(row["split"], []).append(film)
    return films


def _read_class_folders(root: Path) -> dict[str, list[Film]]:
    films: dict[str, list[Film]] = {}
    for split in ("train", "val", "test"):
        if split == "val" and not (root / split).is_dir():
            continue  # Mendeley's copy has none
        films[split] = []
        # A split may be a link: people keep the films on another disk. What is in it may not lead out of it.
        for class_folder in [check_link(root / split / label, root / split) for label in LABELS]:
            found = visible(class_folder) if class_folder.is_dir() else []
            paths = [check_link(path, root / split) for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
            if not paths:
                raise ValueError(f"{class_folder} holds no images; expected JPEG or PNG files.")
            for path in paths:
                patient_id, subtype = _parse_file_name(path.name, where=str(path))
                image_id = path.relative_to(root).as_posix()
                films[split].append(Film(str(path), image_id, class_folder.name, patient_id, subtype, str(path)))
        for path in visible(root / split):
            if path.is_dir() and path.name not in LABELS:
                raise ValueError(f"{path} is no known class; expected {', '.join(LABELS)}.")
    return films


def _from_films(films_by_split: dict[str, list[Film]]) -> dict[str, datasets.Dataset]:
    return {
        split: datasets.Dataset.from_dict(
            {"image": [film.path for film in films], **_columns(films)}, features=FEATURES
        )
        for split, films in films_by_split.items()
    }


def _with_patients(loaded: datasets.DatasetDict, name: str) -> dict[str, datasets.Dataset]:
    """Put patient and subtype beside each image, from the file name in its `path`; leave the bytes alone."""
    prepared = {}
    for split, dataset in loaded.items():
        if missing := {"image", "label"} - set(dataset.column_names):
            raise ValueError(f"{name} ({split}) lacks the columns {', '.join(sorted(missing))}.")
        labels = _label_names(dataset)
        undecoded = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
        parts = undecoded.flatten()
        without_bytes = parts.data.column("image.bytes").is_null().to_pylist()
        films = []
        for row, (path, label) in enumerate(zip(parts["image.path"], labels, strict=True)):
            where = f"{name} ({split}), row {row}"
            if without_bytes[row]:  # its path would be opened, whatever on this machine that is
                raise ValueError(f"{where} holds no bytes of a film; expected the whole file in it, not its path.")
            if not path:
                raise ValueError(f"{where} has no file name in its image, so patients can't be kept apart.")
            patient_id, subtype = _parse_file_name(Path(path).name, where=f"{where}, file {path}")
            image_id = f"{split}/{label}/{Path(path).name}"
            films.append(Film(None, image_id, label, patient_id, subtype, f"{where}, file {path}"))
        images = undecoded.cast_column("image", datasets.Image())
        for column, values in _columns(films).items():
            images = images.add_column(column, values, feature=FEATURES[column])
        prepared[split] = images
    return prepared


def _label_names(dataset: datasets.Dataset) -> list[str]:
    feature, labels = dataset.features["label"], dataset["label"]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else LABELS
    return [names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label) for label in labels]


def _parse_file_name(file_name: str, where: str) -> tuple[str, str]:
    """The patient and the subtype that a file name tells."""
    for pattern in FILE_NAMES:
        if match := pattern.fullmatch(Path(file_name).stem):
            return match["patient"], match.groupdict().get("subtype", "normal").lower()
    raise ValueError(
        f"The name of {where} doesn't tell its patient, so patients can't be kept apart; expected names like "
        "person1_bacteria_2.jpeg, IM-0115-0001.jpeg or VIRUS-1135262-0001.jpeg."
    )


def _columns(films: list[Film]) -> dict[str, list[Any]]:
    return {
        "label": [LABELS.index(film.label) for film in films],
        "patient_id": [film.patient_id for film in films],
        "image_id": [film.image_id for film in films],
        "subtype": [film.subtype for film in films],
    }
