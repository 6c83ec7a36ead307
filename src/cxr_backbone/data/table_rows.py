"""The rows of a table in its own words: CSV, JSON lines, Parquet, or a data set of the Hub."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import datasets

from cxr_backbone.data.files import load_from_hub, load_parquet, load_shards, split_of, visible

TEXT_TABLES = (".csv", ".csv.gz", ".jsonl")
METADATA = ("metadata.csv", "metadata.jsonl")
# Several times the largest public sets; a table from elsewhere may unpack to more than the memory.
MAX_ROWS = 5_000_000
MAX_TEXT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Rows:
    """All rows of a source; where it brings splits, one after the other."""

    paths: list[str]  # of the images, as the source writes them; blank where it doesn't
    image_ids: list[str]
    columns: dict[str, list[str]]  # those asked for, as text, blank where missing
    where: Callable[[int], str]  # what a message calls a row
    folder: Path | None  # that paths are relative to
    splits: list[str] | None = None  # of each row, where folders or shards tell
    embedded: datasets.Dataset | None = None  # the undecoded images, where the source holds their bytes
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of ClassLabel columns


def read_rows(source: str | Path, image_column: str, columns: Sequence[str]) -> Rows:
    """Read the image column and some others.

    Args:
        source: a .csv, .csv.gz, .jsonl or .parquet file; a folder of Parquet shards (`train-*.parquet`, in it or in
            its `data/`), or with `metadata.csv` or `metadata.jsonl` in it or in its train/, validation/ and test/;
            or a Hub id.

    Raises:
        FileNotFoundError: no such file, folder or Hub data set.
        ValueError: no such layout, a damaged table, a missing column, an unknown split.
    """
    path = Path(source)
    if path.is_dir():
        if shards := load_shards(path):
            return _from_arrow(shards, image_column, columns, name=str(path), folder=path)
        if tables := metadata_tables(path):
            return _from_text(tables, path, image_column, columns)
        raise ValueError(
            f"{path} has neither Parquet shards such as train-00000-of-00001.parquet, nor {' or '.join(METADATA)} "
            "in it or in its split folders."
        )
    if not path.exists():
        return _from_arrow(load_from_hub(source), image_column, columns, name=str(source), folder=None)
    if path.name.endswith(TEXT_TABLES):
        return _from_text([path], path.parent, image_column, columns)
    if path.suffix == ".parquet":
        loaded = load_parquet({"train": [str(path)]}, path)
        return _from_arrow(loaded, image_column, columns, name=str(path), folder=path.parent, in_splits=False)
    raise ValueError(f"{path} is no table; expected {', '.join(TEXT_TABLES)} or .parquet.")


def metadata_tables(folder: Path) -> list[Path]:
    """metadata.csv or metadata.jsonl of a folder, or else those of its split folders."""
    folders = [folder, *(path for path in visible(folder) if path.is_dir())]
    tables = [path / name for path in folders for name in METADATA if (path / name).is_file()]
    if len(tables) > 1 and (tables[0].parent == folder or len({table.parent for table in tables}) < len(tables)):
        found = ", ".join(str(table) for table in tables)
        raise ValueError(f"{folder} has {found}; expected one for the folder, or one for each split folder.")
    return tables


def _from_text(tables: list[Path], folder: Path, image_column: str, columns: Sequence[str]) -> Rows:
    wanted = [image_column, *columns]
    values: dict[str, list[str]] = {column: [] for column in wanted}
    places: list[tuple[Path, int]] = []
    splits: list[str] = []
    for table in tables:
        prefix = table.parent.relative_to(folder)
        split = split_of(prefix.name, where=str(table)) if prefix.name else None
        seen: dict[str, None] = {}  # a set in the order of the table
        start = len(places)
        for line, row in _csv_rows(table) if ".csv" in table.suffixes else _json_rows(table):
            if len(places) == MAX_ROWS:
                raise ValueError(f"{table} has more than {MAX_ROWS:,} rows; expected a row for each film of a set.")
            where = f"{table}, line {line}"
            seen |= dict.fromkeys(row)
            for column in wanted:
                values[column].append(as_text(row.get(column), where=f"{where}, column {column}"))
            places.append((table, line))
            if split:
                values[image_column][-1] = str(prefix / values[image_column][-1])
                splits.append(split)
        if len(places) == start:
            raise ValueError(f"{table} has no rows.")
        _check_columns(wanted, seen, name=str(table))
    paths = values.pop(image_column)
    return Rows(
        paths=paths,
        image_ids=paths,
        columns=values,
        where=lambda row: f"{places[row][0]}, line {places[row][1]}",
        folder=folder,
        splits=splits or None,
    )


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_text(table) as file:
        rows = csv.DictReader(file, strict=True)
        try:
            header = rows.fieldnames or []
            if twice := {name for name in header if name and header.count(name) > 1}:
                raise ValueError(f"{table} has the column {min(twice)!r} twice.")
            for row in rows:
                # DictReader puts fields beyond the header under None, and None where a line has fewer.
                if None in row or None in row.values():
                    raise ValueError(f"{table}, line {rows.line_num} has more or fewer fields than the header.")
                yield rows.line_num, row
        except csv.Error as reason:
            raise ValueError(f"{table}, line {rows.line_num} is not CSV: {reason}.") from None
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
            raise ValueError(f"{table} is damaged or not UTF-8 text, near line {rows.line_num + 1}.") from None


def _json_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open_text(table) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):  # a number of thousands of digits is no JSONDecodeError
                        row = None
                    if not isinstance(row, dict):
                        raise ValueError(f"{table}, line {number} is no JSON object; expected one a line.")
                    yield number, row
        except UnicodeDecodeError:
            raise ValueError(f"{table} is not UTF-8 text.") from None


def _open_text(table: Path) -> TextIO:
    if _text_bytes(table) > MAX_TEXT_BYTES:
        raise ValueError(f"{table} holds more than {MAX_TEXT_BYTES:,} bytes of text; expected a smaller table.")
    if table.suffix == ".gz":
        return gzip.open(table, "rt", newline="", encoding="utf-8-sig")
    return table.open(newline="", encoding="utf-8-sig")


def _text_bytes(table: Path) -> int:
    """How much a table unpacks to, counted until it is too much."""
    if table.suffix != ".gz":
        return table.stat().st_size
    total = 0
    try:
        with gzip.open(table) as file:
            while total <= MAX_TEXT_BYTES and (block := file.read(2**20)):
                total += len(block)
    except (OSError, EOFError, zlib.error):
        pass  # what is damaged is left to whoever reads the rows
    return total


def _from_arrow(
    loaded: datasets.DatasetDict,
    image_column: str,
    columns: Sequence[str],
    *,
    name: str,
    folder: Path | None,
    in_splits: bool = True,
) -> Rows:
    for split, part in loaded.items():
        _check_columns([image_column, *columns], part.column_names, name=f"{name} ({split})" if in_splits else name)
    splits = {split: split_of(split, where=name) for split in loaded}
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{name} has the splits {', '.join(loaded)}, of which two are the same.")
    places = [(split, row) for split, part in loaded.items() for row in range(len(part))]

    def where(row: int) -> str:
        split, number = places[row]
        return f"{name} ({split}), row {number}" if in_splits else f"{name}, row {number}"

    films = datasets.concatenate_datasets([part.select_columns([image_column, *columns]) for part in loaded.values()])
    class_names = {c: films.features[c].names for c in columns if isinstance(films.features[c], datasets.ClassLabel)}
    values = {}
    for column in columns:
        names = class_names.get(column)
        cells = films[column][:]
        if names:  # the Hub writes -1 where a film has no label
            cells = [None if cell is None or cell < 0 else names[cell] for cell in cells]
        values[column] = [as_text(cell, f"{where(row)}, column {column}") for row, cell in enumerate(cells)]
    try:
        images = films.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, KeyError, NotImplementedError):
        found = films.features[image_column]
        raise ValueError(f"{name} has {found} in column {image_column}; expected paths, bytes or images.") from None
    paths, embedded = _arrow_images(images.rename_columns({image_column: "image"}), where)
    ids = _embedded_ids([(f"{splits[split]}/" if in_splits else "", row) for split, row in places], paths)
    return Rows(
        paths=paths,
        image_ids=paths if embedded is None else ids,
        columns=values,
        where=where,
        folder=folder,
        splits=[splits[split] for split, _ in places] if in_splits else None,
        embedded=embedded,
        class_names=class_names,
    )


def _embedded_ids(places: list[tuple[str, int]], names: Sequence[str]) -> list[str]:
    """The name of each image; with its row where it is missing or repeated, after what its split puts before it."""
    counts = Counter(zip((prefix for prefix, _ in places), names, strict=True))
    ids = []
    for (prefix, row), name in zip(places, names, strict=True):
        if not name:
            name = f"row {row}"
        elif counts[prefix, name] > 1:
            name = f"{name} (row {row})"
        ids.append(prefix + name)
    return ids


def _arrow_images(images: datasets.Dataset, where: Callable[[int], str]) -> tuple[list[str], datasets.Dataset | None]:
    """Paths alone; or, where the bytes are embedded, names and the undecoded images."""
    parts = images.flatten()
    paths = [path or "" for path in parts.data.column("image.path").to_pylist()]
    without_bytes = parts.data.column("image.bytes").is_null().to_pylist()
    # An image without bytes would be opened at its path, whatever that is: it has to be checked like a listed file.
    if all(without_bytes):
        return paths, None
    if any(without_bytes):
        raise ValueError(f"{where(without_bytes.index(True))} has no image bytes, unlike other rows.")
    return paths, images


def _check_columns(wanted: Sequence[str], found: Iterable[str], *, name: str) -> None:
    found = list(found)
    if missing := [column for column in wanted if column not in found]:
        raise ValueError(f"{name} lacks the columns {', '.join(missing)}; it has {', '.join(found)}.")


def as_text(value: Any, where: str) -> str:
    """A cell as CSV would hold it: 1 for 1.0 and true, blank for null and NaN.

    Raises:
        ValueError: a list, a struct, or anything else that is neither text nor a number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (bool, int, float)):
        return str(int(value) if isinstance(value, bool) else value)
    if not isinstance(value, str):
        raise ValueError(f"{where} is a {type(value).__name__}; expected text or a number.")
    text = value.strip()
    return "" if text.lower() == "nan" else text


def patient_text(value: Any, where: str) -> str:
    """A patient id as text: 7 and 7.0, which tables make of it, are one patient, and 007 another. Blank if none."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", as_text(value, where))
