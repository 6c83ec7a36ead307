"""NIH ChestX-ray14 (Wang et al., CVPR 2017), as the NIH Clinical Center publishes it."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets

from cxr_backbone.data.files import check_link
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.splits import complete_splits

logger = logging.getLogger(__name__)

# In the paper's order: first the eight of ChestX-ray8, then the six that were added.
FINDINGS = [
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
]
NO_FINDING = "No Finding"
PNEUMONIA_LABELS = ["No pneumonia", "Pneumonia"]
TASKS = ("findings", "pneumonia")
TABLE_PATTERN = "Data_Entry_2017*.csv"
TABLE_COLUMNS = ["Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position"]
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
UNITS_A_YEAR = {"": 1, "Y": 1, "M": 12, "D": 365}
OLDEST = 120


def load_chestxray14(
    source: str | Path, *, task: str = "findings", num_folds: int = 10, fold: int = 0, seed: int = 0
) -> datasets.DatasetDict:
    """Load ChestX-ray14 with its official test split, which is by patient. No image is decoded here.

    112,120 frontal films of 30,805 adults and children; free to use, with attribution to the NIH Clinical Center
    (https://nihcc.app.box.com/v/ChestXray-NIHCC). Known to be wrong with it: labels were mined from the text of
    reports, "Pneumonia" is among the least reliable of them, and the view (AP for films taken at the bed) goes with
    illness, so a network can score by telling the view.

    Args:
        source: the folder with `Data_Entry_2017.csv` or `Data_Entry_2017_v2020.csv`, `train_val_list.txt`,
            `test_list.txt`, and the images in `images/`, or in `images_001/` to `images_012/` or the `images/` in
            each of these.
        task: `findings`, all 14; or `pneumonia`, CheXNet's: pneumonia against the rest.
        num_folds, fold, seed: which fold of the official train films becomes validation, see `complete_splits`.

    Returns:
        Splits train, validation and test with the columns of `make_features` and
        age in years (int32; null where the table has none or, as the one of 2017 does, one above 120 such as 411),
        sex (F, M or null) and view (PA, AP or null).
        `label` is a struct of FINDINGS, all 0 for "No Finding"; or the class, "No pneumonia" 0 and "Pneumonia" 1.
        `image_id` is the table's Image Index.

    Raises:
        FileNotFoundError: the folder, the table or a list is missing, or images that the lists name.
        ValueError: an unknown task or finding, a damaged table, a film listed twice, in both lists or not in the
            table, two tables, two files for a film, a patient in both lists, or as `complete_splits`.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is no task; expected {' or '.join(TASKS)}.")
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    table = _find_table(folder)
    entries = _read_table(table)
    listed = _read_lists(folder)
    for split, names in listed.items():
        if unknown := next((name for name in names if name not in entries), None):
            raise ValueError(f"{folder / LISTS[split]} lists {unknown}, which {table} lacks.")
    _check_patients({split: [entries[name] for name in names] for split, names in listed.items()}, folder)
    paths = _find_images(folder, [name for names in listed.values() for name in names])
    if unlisted := len(entries) - len(paths):
        logger.info("Leaving out %d films of %s that are in neither list.", unlisted, table)

    features = make_features(FINDINGS if task == "findings" else PNEUMONIA_LABELS, multi_label=task == "findings")
    features |= {"age": datasets.Value("int32"), "sex": datasets.Value("string"), "view": datasets.Value("string")}
    official = datasets.DatasetDict()
    for split, names in listed.items():
        films = [entries[name] for name in names]
        columns = {
            "image": [str(paths[name]) for name in names],
            "label": [_label(film.findings, task) for film in films],
            "patient_id": [film.patient_id for film in films],
            "image_id": names,
            "age": [film.age for film in films],
            "sex": [film.sex for film in films],
            "view": [film.view for film in films],
        }
        official[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return complete_splits(official, num_folds=num_folds, fold=fold, seed=seed)


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    findings: frozenset[str]
    patient_id: str
    age: int | None
    sex: str | None
    view: str | None


def _find_table(folder: Path) -> Path:
    tables = sorted(folder.glob(TABLE_PATTERN))
    if not tables:
        raise FileNotFoundError(f"There is no {TABLE_PATTERN} in {folder}.")
    if len(tables) > 1:
        raise ValueError(f"{folder} has {' and '.join(table.name for table in tables)}; expected one of them.")
    return tables[0]


def _read_table(table: Path) -> dict[str, Entry]:
    entries = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        # The header's `OriginalImage[Width,Height]` makes two columns, and the lines of 2017 end in a comma: rows are
        # not held to the header's length, only to the columns that are read.
        rows = csv.DictReader(file, strict=True)
        try:
            if lacking := [column for column in TABLE_COLUMNS if column not in (rows.fieldnames or [])]:
                raise ValueError(f"{table} lacks the columns {', '.join(lacking)}.")
            for row in rows:
                where = f"{table}, line {rows.line_num}"
                cells = [row[column] for column in TABLE_COLUMNS]
                if None in cells:
                    raise ValueError(f"{where} ends before its columns do.")
                name, labels, patient_id, age, sex, view = (cell.strip() for cell in cells)
                if name in entries:
                    raise ValueError(f"{where} has {name}, which an earlier line has.")
                if not patient_id:
                    raise ValueError(f"{where} has no Patient ID.")
                entries[name] = Entry(_findings(labels, where), patient_id, _age(age, where), sex or None, view or None)
        except (csv.Error, UnicodeDecodeError) as reason:
            raise ValueError(f"{table} is no CSV table in UTF-8, near line {rows.line_num + 1}.") from reason
    return entries


def _findings(cell: str, where: str) -> frozenset[str]:
    found = frozenset(cell.split("|"))
    if unknown := found - {*FINDINGS, NO_FINDING}:
        raise ValueError(f"{where} has the finding {min(unknown)[:40]!r}; expected some of {', '.join(FINDINGS)}.")
    if NO_FINDING in found and len(found) > 1:
        raise ValueError(f"{where} has {NO_FINDING!r} beside a finding.")
    return found - {NO_FINDING}


def _age(cell: str, where: str) -> int | None:
    """In years. Early copies of the table write 058Y, 011M, 007D."""
    match = re.fullmatch(r"(\d+)([YMD]?)", cell)
    if cell and not match:
        raise ValueError(f"{where} has a Patient Age that is none; expected years, as 58 or 058Y.")
    age = int(match[1]) // UNITS_A_YEAR[match[2]] if match else None
    return None if age is None or age > OLDEST else age


def _read_lists(folder: Path) -> dict[str, list[str]]:
    listed: dict[str, list[str]] = {}
    seen: dict[str, Path] = {}
    for split, file_name in LISTS.items():
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(f"There is no {file_name} in {folder}.")
        listed[split] = path.read_text(encoding="utf-8-sig").split()
        for name in listed[split]:
            if name in seen:
                raise ValueError(f"{path} lists {name}, which {seen[name]} lists before.")
            seen[name] = path
    return listed


def _check_patients(films: dict[str, Iterable[Entry]], folder: Path) -> None:
    train, test = ({film.patient_id for film in films[split]} for split in LISTS)
    if shared := len(train & test):
        raise ValueError(f"{' and '.join(LISTS.values())} in {folder} share {shared} patients; expected none.")


def _find_images(folder: Path, names: list[str]) -> dict[str, Path]:
    """The file of each film. Names are looked up among what the image folders hold, so no name leads out of them, nor
    does a link. (The folders may be links: people keep the images on another disk.)"""
    candidates = [folder / "images", *(path for part in folder.glob("images_*") for path in (part, part / "images"))]
    paths: dict[str, Path] = {}
    wanted = set(names)
    for images in sorted(path for path in candidates if path.is_dir()):
        for path in images.absolute().iterdir():
            if path.name in paths:
                raise ValueError(
                    f"{path.name} is in {paths[path.name].parent} and in {images}; expected one file a film."
                )
            if path.name in wanted:
                paths[path.name] = check_link(path, images)
    if missing := [name for name in names if name not in paths]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} images that the lists in {folder} name are in none of its image "
            f"folders, {missing[0]} the first of them; expected all of them in images/ or images_001/ to images_012/."
        )
    return paths


def _label(findings: frozenset[str], task: str) -> dict[str, float] | int:
    if task == "pneumonia":
        return int("Pneumonia" in findings)
    return {finding: float(finding in findings) for finding in FINDINGS}
