"""The films of a run: loaded, split by patient, decoded, and ready to be audited."""

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict, Features

from cxr_backbone.configuration_cxr_inception import CXRInceptionConfig
from cxr_backbone.data.audit import audit, leaks, summary
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.duplicates import group_duplicates
from cxr_backbone.data.film_table import read_films
from cxr_backbone.data.labels import is_multi_label, label_counts, label_names, labels_of
from cxr_backbone.data.shards import Stream, open_stream
from cxr_backbone.data.sources import check_options, load_films
from cxr_backbone.data.splits import all_films, complete_splits, permute_labels, repeat_split
from cxr_backbone.data.streaming import FilmStream, decode_stream
from cxr_backbone.training.arguments import DataArguments, EvaluationArguments, JointArguments, parse_arguments
from cxr_backbone.training.hardware import join_processes, main_process_first
from cxr_backbone.training.joint import JointTargets

logger = logging.getLogger(__name__)

# Fields of the data section that say what is done with the films, whatever their source.
NOT_FOR_LOADERS = {
    "format",
    "provenance",
    "streaming",
    "num_workers",
    "split_file",
    "decoding",
    "unreadable",
    "allow_leaks",
    "cache_dir",
    "permute_labels",
}
SPLITTING = {"num_folds", "fold"}


@dataclass
class Films:
    """Decoded films.

    splits: train, validation and test, with labels, ids and the facts that the audit reads; `pixels` only of
        validation, and of train unless it is a stream.
    train: what training reads: the train split, or its stream.
    train_sample: films drawn at random from train, as many as validation has, to measure the model on.
    sealed_test: the test split with its `pixels`; `open_test` hands it out.
    unreadable: path and reason of each film that was left out.
    joint: what is learnt beside the labels, `decode_joint`.
    """

    splits: DatasetDict
    train: Dataset | FilmStream
    train_sample: Dataset
    sealed_test: Dataset = field(repr=False)
    unreadable: dict[str, str] = field(default_factory=dict)
    joint: JointTargets | None = None

    def open_test(self, *configs: CXRInceptionConfig) -> Dataset:
        """The test split with its pixels, for models that have nothing left to choose.

        Raises:
            RuntimeError: a model has no temperature or no operating points yet; they come from validation.
        """
        if not configs or any(config.temperature is None or config.operating_points is None for config in configs):
            raise RuntimeError(
                "The test split opens after the temperature and the operating points of each model are fixed."
            )
        return self.sealed_test


def open_films(data: DataArguments, *, image_size: int, seed: int) -> DatasetDict | Stream:
    """Find the films that `data` names, without decoding any: split by patient, or, if they are to be streamed, as the
    shards bring them.

    Raises:
        FileNotFoundError, ValueError: as the loader and the split.
    """
    if data.streaming:
        options = _options_of_loader(data)
        options = {name: value for name, value in options.items() if name not in SPLITTING}
        check_options(open_stream, options, "data.streaming")
        return open_stream(**options)
    films = load_films(data.format, seed=seed, image_size=image_size, **_options_of_loader(data))
    if data.split_file is not None:
        films = repeat_split(films, Path(data.split_file))
    return permute_labels(films, seed) if data.permute_labels else films


def decode_films(opened: DatasetDict | Stream, data: DataArguments, *, image_size: int, seed: int) -> Films:
    """Decode what `open_films` found; a stream is divided here, after a first look at it.

    On several processes the first one decodes and the others read its cache.

    Raises:
        ValueError: films that can't be read, unless `data.unreadable` is `skip`; of a stream, as `complete_splits`.
    """
    unreadable: dict[str, str] = {}
    settings: dict[str, Any] = {"cache_dir": data.cache_dir, "reduced": data.decoding == "reduced"}
    settings["on_unreadable"] = unreadable.__setitem__ if data.unreadable == "skip" else None
    with main_process_first():
        if isinstance(opened, Stream):
            folds = {name: getattr(data, name) for name in SPLITTING if getattr(data, name) is not None}
            divide: Callable[[DatasetDict], DatasetDict] = partial(complete_splits, **folds, seed=seed)
            if data.split_file is not None:
                divide = partial(repeat_split, path=Path(data.split_file))

            def divide_and_sample(films: DatasetDict) -> DatasetDict:
                splits = divide(films)
                return DatasetDict({**splits, "train_sample": _sample(splits["train"], len(splits["validation"]))})

            splits, train = decode_stream(
                opened, image_size, divide_and_sample, num_workers=data.num_workers, **settings
            )
            train_sample = splits.pop("train_sample")
        else:
            settings["num_proc"] = data.num_workers or None
            splits = DatasetDict({name: decode_once(rows, image_size, **settings) for name, rows in opened.items()})
            train = splits["train"]
            train_sample = _sample(train, len(splits["validation"]))
    sealed_test = splits["test"]
    splits["test"] = sealed_test.remove_columns("pixels")
    return Films(splits, train, train_sample, sealed_test, unreadable)


def decode_external(evaluation: EvaluationArguments, config: CXRInceptionConfig) -> dict[str, Dataset]:
    """All films of the set that `evaluation.external` names, whatever their split, under `external <file name>`;
    nothing if it names none.

    Raises:
        FileNotFoundError: no such YAML file, or as the loader.
        ValueError: the labels of the set are not those of the model, films can't be read, or as the loader.
    """
    if evaluation.external is None:
        return {}

    def check(features: Features) -> None:
        check_labels(features, config, str(evaluation.external))

    films = _decode_all(evaluation.external, evaluation.external_source, config.image_size, check)
    return {f"external {Path(evaluation.external).stem}": films}


def decode_joint(joint: JointArguments, films: Films, *, image_size: int, seed: int) -> JointTargets | None:
    """What is learnt beside the labels of `films`: of all films of the set that `joint.films` names, whatever their
    split, and of `joint.subgroups`. None if there is neither.

    Raises:
        FileNotFoundError: no such YAML file, or as the loader.
        ValueError: one of them stands in validation or test, films can't be read, or as the loader and `JointTargets`.
    """
    if joint.films is None:
        return JointTargets(films.train, None, joint, seed=seed) if joint.subgroups else None
    decoded = _decode_all(joint.films, joint.films_source, image_size)
    asked = DatasetDict({name: films.splits[name] for name in ("validation", "test")})
    with main_process_first():
        tables = [read_films(asked), read_films(DatasetDict(joint=decoded))]
        group = group_duplicates(
            [name for table in tables for name in table.pixel_hash],
            [name for table in tables for name in table.perceptual_hash],
            np.concatenate([table.thumbnails for table in tables]),
        )
    measured = len(tables[0].row)
    seen = np.flatnonzero(np.isin(group[measured:], group[:measured]))
    if len(seen):
        raise ValueError(
            f"{joint.films}: {len(seen)} films stand in validation or test too, for instance "
            f"{decoded[int(seen[0])]['image_id']}; expected films that the model is not measured on."
        )
    return JointTargets(films.train, decoded, joint, seed=seed)


def _decode_all(
    file: str, source: str | None, image_size: int, check: Callable[[Features], None] = lambda _: None
) -> Dataset:
    """All films that the data section of a YAML file names, whatever their split.

    Args:
        source: its data.source, where that is elsewhere.
        check: raises if the features of the films, which are not decoded yet, are not what they must be.
    """
    data = parse_arguments([file, "--run.output_dir", "unused", *(["--data.source", source] if source else [])]).data
    if data.streaming:
        raise ValueError(f"{file}: data.streaming has no place in a set that is taken whole.")
    films = all_films(load_films(data.format, seed=0, image_size=image_size, carve=False, **_options_of_loader(data)))
    check(films.features)
    with main_process_first():
        return decode_once(
            films,
            image_size,
            data.cache_dir,
            reduced=data.decoding == "reduced",
            on_unreadable=_warn_of_unreadable if data.unreadable == "skip" else None,
            num_proc=data.num_workers or None,
        )


def audit_films(films: Films, data: DataArguments) -> dict[str, Any]:
    """What the films tell on themselves (`data.audit.audit`), printed in short; the same on every process.

    Raises:
        ValueError: a patient or a film stands in two splits, and `data.allow_leaks` doesn't say that it may.
    """
    is_main_process = join_processes().is_main_process
    with main_process_first():  # the others wait for as long as it takes
        report = audit(films.splits, films.unreadable) if is_main_process else {}
    (report,) = broadcast_object_list([report])
    if is_main_process:
        print(summary(report))
    for kind, sentence in leaks(report).items():
        if kind not in data.allow_leaks:
            raise ValueError(
                f"{sentence} Look at them with recipes/audit.py; to go on all the same: --data.allow_leaks {kind}"
            )
    return report


def check_labels(features: Features, config: CXRInceptionConfig, source: str) -> None:
    """A model can be tested on films that have its labels, in its order and of its kind.

    Raises:
        ValueError: they have others.
    """
    kinds = {False: "one class a film", True: "several findings a film"}
    wanted = [str(name) for name in (config.id2label or {}).values()]
    is_multi = config.problem_type == "multi_label_classification"
    if (found := label_names(features)) != wanted or is_multi_label(features) != is_multi:
        raise ValueError(
            f"{source} has the labels {', '.join(found)} ({kinds[is_multi_label(features)]}), and the model "
            f"{', '.join(wanted)} ({kinds[is_multi]}); expected the same, in the same order. For a table, "
            "data.label_values says what its values mean."
        )


def check_not_trained_on(films: Films, split_file: Path) -> None:
    """Films that a model was trained on say nothing of it. Where there is no such file, nothing is known.

    Args:
        split_file: split.csv of the run that trained the model; joint.csv, if there is one, lies beside it.

    Raises:
        ValueError: validation or test films stood in its train split, or were trained on jointly.
    """
    trained = set()
    for listing in (split_file, split_file.with_name("joint.csv")):
        if listing.is_file():
            with listing.open(newline="", encoding="utf-8") as file:
                lines = [line for line in csv.DictReader(file) if line["split"] in ("train", "joint")]
            trained |= {(line["image_id"], line["patient_id"]) for line in lines}
    for split in ("validation", "test"):
        rows = films.splits[split]
        ids = zip(rows["image_id"][:], (patient or "" for patient in rows["patient_id"][:]), strict=True)
        if seen := len(trained.intersection(ids)):
            raise ValueError(
                f"{seen} films of the {split} split stood in train when the model was trained ({split_file}); expected "
                f"the same split: --data {split_file.parent / 'config.yaml'}, or --data.split_file {split_file}"
            )


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


def _options_of_loader(data: DataArguments) -> dict[str, Any]:
    return {
        name: value for name, value in vars(data).items() if name not in NOT_FOR_LOADERS and value not in (None, [])
    }


def _warn_of_unreadable(path: str, reason: str) -> None:
    logger.warning("Leaving out %s: %s", path, reason)


def _sample(films: Dataset, number: int) -> Dataset:
    """As many films, drawn at random, in their order."""
    drawn = np.random.default_rng(0).permutation(len(films))[:number]
    return films.select(np.sort(drawn))
