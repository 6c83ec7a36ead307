"""Sharded sets, opened without being read: Parquet and WebDataset files, on disk or on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from cxr_backbone.data.files import IMAGE_SUFFIXES, check_same_classes, is_hub_id, shards_by_split, split_of
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.table_labels import class_labels, finding_labels
from cxr_backbone.data.table_rows import as_text, patient_text

UNDECODED = datasets.Image(decode=False)
ROWS_AT_ONCE = 16  # of a shard in memory; a film may take several MB
SHARDS = {"parquet": "*.parquet", "webdataset": "*.tar"}
# The parts of a WebDataset sample that may be its film: file name extensions.
IMAGE_PARTS = sorted(suffix[1:] for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Stream:
    """Undecoded rows of each split (columns of `labels.make_features`, image as path and bytes), and their name."""

    splits: dict[str, datasets.IterableDataset]
    fingerprint: str

    @property
    def features(self) -> datasets.Features:
        return self.splits["train"].features


def open_stream(
    source: str,
    *,
    label_columns: list[str],
    label_names: list[str] | None = None,
    image_column: str | None = None,
    patient_column: str = "patient_id",
    uncertain: str = "ignore",
    missing: str = "ignore",
) -> Stream:
    """Open a sharded set without reading it.

    Args:
        source: a folder with Parquet or WebDataset shards whose names start with their split (`train-0000.parquet`,
            `validation-0000.tar`, ...), or a Hub id. A tar sample is a film (`7.png`) and a JSON object (`7.json`)
            with label and patient.
        label_columns, label_names, patient_column, uncertain, missing: as `load_table`.
        image_column: `image` by default, or the film of a tar sample.

    Raises:
        FileNotFoundError: no such folder or Hub data set.
        ValueError: no shards, an unknown split, or a column that is missing; while reading, a label that is none.
    """
    loaded, fingerprint = _load_shards(source)
    splits = {}
    for name, rows in loaded.items():
        where = f"{source} ({name})"
        columns = rows.features
        if columns is None:
            raise ValueError(f"{where} doesn't tell its columns; expected Parquet or WebDataset shards.")
        beside = columns.get("json", {}) if "__key__" in columns else columns
        film = image_column or ("image" if beside is columns else next(filter(columns.__contains__, IMAGE_PARTS), None))
        if film is None or film not in columns:
            raise ValueError(f"{where} has no column of films; it has {', '.join(columns)}.")
        if absent := [column for column in (*label_columns, patient_column) if column and column not in beside]:
            raise ValueError(f"{where} has no column {absent[0]!r}; it has {', '.join(beside)}.")
        kinds = {column: beside[column] for column in label_columns}
        class_names = {column: kind.names for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        names = _label_names(label_columns, label_names, class_names, where)
        features = make_features(names, multi_label=len(label_columns) > 1)
        policies = {"uncertain": uncertain, "missing": missing}
        read = _RowReader(
            film, patient_column, label_columns, names, class_names, policies, beside is not columns, where
        )
        if (split := split_of(name, source)) in splits:
            raise ValueError(f"{source} has two {split} splits: {', '.join(loaded)}.")
        splits[split] = rows.cast_column(film, UNDECODED).map(
            read,
            batched=True,
            batch_size=ROWS_AT_ONCE,
            remove_columns=list(columns),
            features=datasets.Features({**features, "image": UNDECODED}),
        )
    if "train" not in splits:
        raise ValueError(f"{source} has no train split; it has {', '.join(splits)}.")
    settings = (label_columns, label_names, image_column, patient_column, uncertain, missing)
    return Stream(splits, f"{fingerprint} {settings}")


@dataclass(frozen=True)
class _RowReader:
    """A batch of rows of a shard to rows of a `Stream`; films without a label are left out."""

    film: str
    patient_column: str
    label_columns: list[str]
    label_names: list[str]
    class_names: dict[str, list[str]]  # of label columns that hold indices into names of their own
    policies: dict[str, str]
    in_json: bool
    where: str

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        images = batch[self.film]
        beside = batch
        if self.in_json:
            columns = {*self.label_columns, self.patient_column, "image_id"} - {""}
            beside = {column: [row.get(column) for row in batch["json"]] for column in columns}
        # Never the position in the stream: it changes with the order and with the share that a process reads.
        nothing = [None] * len(images)
        candidates = [
            beside.get("image_id") or nothing,
            [image and image["path"] for image in images],
            batch.get("__key__") or nothing,
        ]
        image_ids = [next(filter(None, names), "") for names in zip(*candidates, strict=True)]

        def where(row: int) -> str:
            return f"{self.where}, {image_ids[row] or 'a film without a name'}"

        for row, image in enumerate(images):
            if image is None or image["bytes"] is None:
                raise ValueError(
                    f"{where(row)} holds no bytes of a film; expected the whole file in the shard, not its path."
                )
        if "" in image_ids:
            raise ValueError(
                f"{self.where} has a film without a name; expected a column image_id, or a path beside it."
            )
        labels, kept = self._labels(beside, where)
        patients = beside[self.patient_column] if self.patient_column else [None] * len(images)
        patients = [patient_text(patient, where(row)) or None for row, patient in enumerate(patients)]
        columns_of_row = {"image": images, "label": labels, "patient_id": patients, "image_id": image_ids}
        return {name: [values[row] for row in kept] for name, values in columns_of_row.items()}

    def _labels(self, beside: Mapping[str, list[Any]], where: Callable[[int], str]) -> tuple[list[Any], list[int]]:
        """The label of each row, and the rows that have one."""
        cells = {}
        for column in self.label_columns:
            values = beside[column]
            if names := self.class_names.get(column):  # the Hub writes -1 where a film has no label
                values = [None if cell is None or cell < 0 else names[cell] for cell in values]
            cells[column] = [as_text(cell, f"{where(row)}, {column}") for row, cell in enumerate(values)]
        if len(cells) == 1:
            ((column, values),) = cells.items()
            labels = class_labels(values, where, column, self.label_names, **self.policies)[1]
            kept = np.flatnonzero(~np.isnan(labels)).tolist()
            return np.nan_to_num(labels).astype(int).tolist(), kept
        findings = [finding_labels(values, where, column, **self.policies) for column, values in cells.items()]
        films = np.stack(findings, axis=1).tolist()
        return [dict(zip(cells, film, strict=True)) for film in films], list(range(len(films)))


def _label_names(
    columns: list[str], given: list[str] | None, class_names: Mapping[str, list[str]], where: str
) -> list[str]:
    if len(columns) > 1:
        return columns
    if names := given or class_names.get(columns[0]):
        return names
    raise ValueError(f"{where} doesn't tell the classes of {columns[0]!r}; name them in label_names, index 0 first.")


def _parquet_rows(shards: list[str]) -> datasets.IterableDataset:
    """Rows of local shards, one row group in memory for each shard that is open.

    (`load_dataset` reads far ahead in each, and a shuffled stream has ten of them open.)
    """
    features = datasets.Features.from_arrow_schema(pq.read_schema(shards[0]))
    return datasets.IterableDataset.from_generator(_read_parquet, features=features, gen_kwargs={"shards": shards})


def _read_parquet(shards: list[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with pq.ParquetFile(shard, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
                yield from batch.to_pylist()


def _load_shards(source: str) -> tuple[dict[str, datasets.IterableDataset], str]:
    """The shards of each split, unread, and what changes when they do."""
    folder = Path(source)
    if folder.is_dir():
        for kind, pattern in SHARDS.items():
            if files := shards_by_split(folder, pattern):
                if kind == "parquet":
                    check_same_classes(files)
                status = {shard: Path(shard).stat() for shards in files.values() for shard in shards}
                states = [(str(Path(shard).resolve()), it.st_size, it.st_mtime_ns) for shard, it in status.items()]
                if kind == "parquet":
                    return {split: _parquet_rows(shards) for split, shards in files.items()}, str(states)
                return datasets.load_dataset(kind, data_files=files, streaming=True), str(states)
        raise ValueError(f"{folder} holds no shards; expected {' or '.join(SHARDS.values())} named after their split.")
    if not is_hub_id(source):
        raise FileNotFoundError(f"There is no folder {source}.")
    try:
        revision = HfApi().dataset_info(source).sha
        return datasets.load_dataset(source, revision=revision, streaming=True), f"{source}@{revision}"
    except (OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as reason:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a Hub data set that can be streamed: {reason}"
        ) from reason
