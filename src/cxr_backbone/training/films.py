"""The films of a run: loaded, split by patient, decoded, and ready to be audited."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.labels import is_multi_label, label_counts, labels_of
from cxr_backbone.data.shards import Stream, open_stream
from cxr_backbone.data.sources import check_options, load_films
from cxr_backbone.data.splits import complete_splits, repeat_split
from cxr_backbone.data.streaming import FilmStream, decode_stream
from cxr_backbone.training.arguments import DataArguments
from cxr_backbone.training.hardware import join_processes

# Fields of the data section that say what is done with the films, whatever their source.
NOT_FOR_LOADERS = {
    "format",
    "streaming",
    "num_workers",
    "split_file",
    "decoding",
    "unreadable",
    "allow_leaks",
    "cache_dir",
}
SPLITTING = {"num_folds", "fold"}


@dataclass
class Films:
    """Decoded films.

    splits: train, validation and test, with labels, ids and the facts that the audit reads; `pixels` too, but for the
        train split of a stream.
    train: what training reads: the train split, or its stream.
    unreadable: path and reason of each film that was left out.
    """

    splits: DatasetDict
    train: Dataset | FilmStream
    unreadable: dict[str, str] = field(default_factory=dict)


def open_films(data: DataArguments, *, image_size: int, seed: int) -> DatasetDict | Stream:
    """Find the films that `data` names, without decoding any: split by patient, or, if they are to be streamed, as the
    shards bring them.

    Raises:
        FileNotFoundError, ValueError: as the loader and the split.
    """
    options = {
        name: value for name, value in vars(data).items() if name not in NOT_FOR_LOADERS and value not in (None, [])
    }
    if data.streaming:
        options = {name: value for name, value in options.items() if name not in SPLITTING}
        check_options(open_stream, options, "data.streaming")
        return open_stream(**options)
    films = load_films(data.format, seed=seed, image_size=image_size, **options)
    if data.split_file is not None:
        films = repeat_split(films, Path(data.split_file))
    return films


def decode_films(opened: DatasetDict | Stream, data: DataArguments, *, image_size: int, seed: int) -> Films:
    """Decode what `open_films` found; a stream is divided here, after a first look at it.

    On several processes the first one decodes and the others read its cache.

    Raises:
        ValueError: films that can't be read, unless `data.unreadable` is `skip`; of a stream, as `complete_splits`.
    """
    unreadable: dict[str, str] = {}
    settings: dict[str, Any] = {"cache_dir": data.cache_dir, "reduced": data.decoding == "reduced"}
    settings["on_unreadable"] = unreadable.__setitem__ if data.unreadable == "skip" else None
    with join_processes().main_process_first():
        if isinstance(opened, Stream):
            folds = {name: getattr(data, name) for name in SPLITTING if getattr(data, name) is not None}
            divide: Callable[[DatasetDict], DatasetDict] = partial(complete_splits, **folds, seed=seed)
            if data.split_file is not None:
                divide = partial(repeat_split, path=Path(data.split_file))
            splits, train = decode_stream(opened, image_size, divide, num_workers=data.num_workers, **settings)
        else:
            settings["num_proc"] = data.num_workers or None
            splits = DatasetDict({name: decode_once(rows, image_size, **settings) for name, rows in opened.items()})
            train = splits["train"]
    return Films(splits, train, unreadable)


def check_classes(splits: DatasetDict, data: DataArguments) -> None:
    """Every class must occur in every split, or it can't be learnt or measured. (A finding may be absent, but something
    has to be known.)

    Raises:
        ValueError: it names split and class.
    """
    for split, rows in splits.items():
        if is_multi_label(rows.features):
            if np.isnan(labels_of(rows)).all():
                raise ValueError(f"data.label_columns: nothing is known of any film in the {split} split.")
            continue
        for name, count in label_counts(rows).items():
            if count == 0:
                raise ValueError(f"data.source: the {split} split of {data.source} has no image of class {name}.")
