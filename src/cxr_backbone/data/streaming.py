"""Shards read as a stream: training holds neither the films nor a decoded copy of them, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import DataLoader

from cxr_backbone.data.decoding import CACHE_FORMAT, FILMS_PER_BATCH, cache_folder, decode_film, leave_out_unreadable
from cxr_backbone.data.facts import FILM_FEATURES
from cxr_backbone.data.shards import Stream


@dataclass(frozen=True)
class FilmStream:
    """Decoded films that are read anew in every epoch.

    rows: yields `pixels` as `decode_once` makes them, and `label`.
    num_films: how many one epoch yields.
    fingerprint: names the films and how they were decoded.
    num_workers: processes that decode ahead of training.
    """

    rows: datasets.IterableDataset
    num_films: int
    fingerprint: str
    num_workers: int = 0

    def __len__(self) -> int:
        return self.num_films


def decode_stream(
    stream: Stream,
    image_size: int,
    divide: Callable[[datasets.DatasetDict], datasets.DatasetDict],
    *,
    cache_dir: str | Path | None = None,
    reduced: bool = False,
    on_unreadable: Callable[[str, str], None] | None = None,
    num_workers: int = 0,
) -> tuple[datasets.DatasetDict, FilmStream]:
    """Look at every film of a stream once, divide it, and decode what is held out.

    Two passes over the shards: one that writes labels, ids and the facts of each film (10 KB) to the cache; and one
    that writes the decoded films of all splits but train there, which are read again and again. Those of train are
    decoded anew in every epoch.

    Args:
        image_size, cache_dir, reduced, on_unreadable: as `decode_once`.
        divide: makes train and the other splits of the rows that the first pass wrote.
        num_workers: processes that decode; more than there are shards are of no use.

    Returns:
        train (label, ids, `film`; no `pixels`), the other splits (the same and `pixels`); and the stream of train.

    Raises:
        ValueError: films that can't be read, unless `on_unreadable` takes them; or whatever `divide` refuses.
    """
    decode = partial(_decode_row, image_size=image_size, reduced=reduced)
    name = hashlib.sha256(f"{CACHE_FORMAT} {stream.fingerprint} {image_size} {reduced}".encode()).hexdigest()[:32]
    folder = cache_folder(cache_dir) / f"stream-{name}"

    facts = datasets.DatasetDict()
    for split, rows in stream.splits.items():
        columns = datasets.Features({**rows.features, "film": FILM_FEATURES, "error": datasets.Value("string")})
        del columns["image"]
        looked_at = _write(rows.map(decode), columns, folder / f"facts-{split}", num_workers)
        facts[split] = leave_out_unreadable(looked_at, looked_at["image_id"][:].__getitem__, on_unreadable)
    image_ids = [image_id for rows in facts.values() for image_id in rows["image_id"][:]]
    if doubled := [image_id for image_id, count in Counter(image_ids).items() if count > 1]:
        raise ValueError(f"{doubled[0]} comes twice; expected a film to have a name of its own in all shards.")
    splits = divide(facts)

    def members(split: str) -> datasets.IterableDataset:
        """The undecoded films of one side, from the shards that have any."""
        image_ids = set(splits[split]["image_id"][:])
        shards = [rows for given, rows in stream.splits.items() if image_ids.intersection(facts[given]["image_id"][:])]
        return datasets.concatenate_datasets([rows.filter(_IsMember(image_ids)) for rows in shards])

    for split in sorted(splits.keys() - {"train"}):
        columns = datasets.Features({**splits[split].features, "pixels": datasets.Value("binary")})
        place = folder / f"{split}-{_name_of(splits[split])}"
        splits[split] = _write(members(split).map(decode), columns, place, num_workers)
    rows = members("train").map(decode).select_columns(["image_id", "label", "pixels"])  # not the file
    return splits, FilmStream(rows, len(splits["train"]), f"{name}-{_name_of(splits['train'])}", num_workers)


@dataclass(frozen=True)
class _IsMember:
    image_ids: set[str]

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return row["image_id"] in self.image_ids


def _decode_row(row: Mapping[str, Any], image_size: int, reduced: bool) -> dict[str, Any]:
    try:
        decoded = decode_film(row["image"], image_size, reduced=reduced, name=row["image_id"])
        return {**decoded, "error": None}
    except ValueError as error:
        return {"pixels": None, "film": None, "error": str(error)}


def _write(
    rows: datasets.IterableDataset, features: datasets.Features, folder: Path, num_workers: int
) -> datasets.Dataset:
    """Those columns of the rows, in an Arrow file in `folder`; a later call reads it back."""

    def generate() -> Iterator[dict[str, Any]]:
        # A loader for its workers alone: no batches, and rows as they are.
        chosen = rows.select_columns(list(features))
        yield from DataLoader(chosen, batch_size=None, collate_fn=_as_it_is, num_workers=num_workers)

    fingerprint = hashlib.sha256(str(folder).encode()).hexdigest()
    try:
        return datasets.Dataset.from_generator(
            generate,
            features=features,
            cache_dir=str(folder),
            fingerprint=fingerprint,
            writer_batch_size=FILMS_PER_BATCH,  # by default it holds a thousand films before it writes any
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None  # what is wrong with the row, and not that something is


def _as_it_is(row: Any) -> Any:
    return row


def _name_of(rows: datasets.Dataset) -> str:
    return hashlib.sha256("\n".join(rows["image_id"][:]).encode()).hexdigest()[:16]
