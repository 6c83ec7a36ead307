"""Files that sources find on disk: which of them count, whether they stay in their folder, whose films they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow.parquet

IMAGE_SUFFIXES = {".bmp", ".dcm", ".dicom", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
SPLIT_OF_NAME = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
LEFT_BY_SYSTEMS = {"__MACOSX", "Thumbs.db", "desktop.ini"}


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name, without hidden files and what macOS and Windows leave behind."""
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in LEFT_BY_SYSTEMS
    )


def visible_files(folder: Path, root: Path) -> Iterator[Path]:
    """All visible files below a folder, in sorted order.

    Raises:
        ValueError: a link that leads out of `root`, or to a folder (which could lead back to itself).
    """
    for path in visible(folder):
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{path} is a link to a folder; expected a folder in its place.")
        if check_link(path, root).is_dir():
            yield from visible_files(path, root)
        else:
            yield path


def check_link(path: Path, root: Path) -> Path:
    """The path, which may be a link if it leads to something in `root`.

    Raises:
        ValueError: it leads out of there. A set from elsewhere must not have this machine read what is no part of it.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link out of {root}; expected a file or folder in its place.")
    return path


def listed_file(folder: Path, name: str, where: str) -> str:
    """The real path of a file that a table lists, relative to `folder` or absolute in it.

    A table from elsewhere must not make this machine read, and an audit show, a file that is no part of the data.

    Args:
        where: what a message calls the line that lists it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a path that leaves the folder, by `..`, by a link or as an absolute one; or that no file can have.
    """
    try:
        path = Path(os.path.realpath(folder / name))
        exists = path.is_file()
    except (OSError, ValueError):  # too long, a zero byte
        raise ValueError(f"{where} has an image path that no file can have.") from None
    if not exists:
        raise FileNotFoundError(f"{where} lists {name!r}, which is no file in {folder}.")
    if not path.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{where} lists {name}, which is outside {folder}; expected a file inside it.")
    return str(path)


def patients_by_pattern(names: Sequence[str], pattern: str, where: Callable[[int], str]) -> list[str]:
    """The patient of each file: where `pattern` matches its name, the first group if it has one, else the match.

    Args:
        names: paths, as a table writes them or relative to the source.
        where: what a message calls a row.

    Raises:
        ValueError: no regular expression, or a name that it finds no patient in.
    """
    try:
        search = re.compile(pattern)
    except re.error as reason:
        raise ValueError(f"patient_pattern={pattern!r} is no regular expression: {reason}.") from None
    patients = []
    for row, name in enumerate(names):
        match = search.search(name)
        patient = match[1 if search.groups else 0] if match else None
        if not patient:
            raise ValueError(f"{where(row)}: patient_pattern={pattern!r} finds no patient in {name!r}.")
        patients.append(patient)
    return patients


def split_of(name: str, where: str) -> str:
    """The split that a name of any case means: train; validation, val, valid or dev; test.

    Raises:
        ValueError: any other name.
    """
    if name.lower() not in SPLIT_OF_NAME:
        raise ValueError(f"{where} has the split {name!r}; expected one of {', '.join(SPLIT_OF_NAME)}.")
    return SPLIT_OF_NAME[name.lower()]


def load_shards(folder: Path) -> datasets.DatasetDict | None:
    """Parquet shards, `train-*.parquet` and the like, in a folder or its `data/`; None where there are none.

    Raises:
        ValueError: as `load_parquet`.
    """
    files = shards_by_split(folder, "*.parquet")
    return load_parquet(files, folder) if files else None


def shards_by_split(folder: Path, pattern: str) -> dict[str, list[str]]:
    """The shards in a folder's `data/`, or else in itself, under what their names start with: `train-0.parquet`,
    `train_0.parquet` and `train.parquet` are of train.

    Raises:
        ValueError: a shard, or `data/`, is a link out of the folder.
    """
    files: dict[str, list[str]] = {}
    data = check_link(folder / "data", folder)
    for shard in sorted(data.glob(pattern)) or sorted(folder.glob(pattern)):
        files.setdefault(re.split(r"[-_.]", shard.name)[0], []).append(str(check_link(shard, folder)))
    return files


def load_parquet(files: Mapping[str, Sequence[str]], source: Path) -> datasets.DatasetDict:
    """Parquet files by split.

    Raises:
        ValueError: a damaged file, or shards that differ in their columns; it names `source`.
    """
    check_same_classes(files)
    try:
        return datasets.load_dataset("parquet", data_files=dict(files))
    except (ValueError, OSError, NotImplementedError, datasets.exceptions.DatasetsError) as reason:  # also Arrow's own
        raise ValueError(f"{source} can't be read as Parquet: {reason}") from reason


def check_same_classes(files: Mapping[str, Sequence[str]]) -> None:
    """Refuse Parquet files whose ClassLabel columns name other classes: `datasets` would read the indices of all files
    by the names of the first, and so give films the label of another class.

    Raises:
        ValueError: it names two files that differ. (A file that is no Parquet is left to whoever reads it.)
    """
    first: dict[str, tuple[str, list[str]]] = {}
    for file in (file for shards in files.values() for file in shards):
        try:
            features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
        except (OSError, ValueError):
            continue
        for column, feature in features.items():
            if isinstance(feature, datasets.ClassLabel):
                other, names = first.setdefault(column, (file, feature.names))
                if feature.names != names:
                    raise ValueError(f"{file} has the classes {feature.names} in {column}, and {other} has {names}.")


def load_from_hub(source: str | Path) -> datasets.DatasetDict:
    """A data set of the Hub.

    Raises:
        FileNotFoundError: the source is no Hub id, or can't be loaded from there.
    """
    if not is_hub_id(source):
        raise FileNotFoundError(f"There is no file or folder {source}.")
    try:
        return datasets.load_dataset(str(source))
    except (OSError, datasets.exceptions.DatasetsError) as reason:
        raise FileNotFoundError(f"{source} is neither here nor a Hub data set that can be loaded: {reason}") from reason


def is_hub_id(source: str | Path) -> bool:
    return isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
