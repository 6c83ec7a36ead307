"""What a data set tells on itself before it trains a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from cxr_backbone.data.duplicates import find_duplicates, standardise
from cxr_backbone.data.film_table import FilmTable, read_films
from cxr_backbone.data.labels import is_multi_label, label_counts
from cxr_backbone.data.metadata_baseline import metadata_baseline
from cxr_backbone.data.splits import is_missing

# Where the grey range of a film looks wrong. Of the 10,142 films of the Kermany set, RSNA's normals and an NIH subset
# none comes near the first three: the narrowest range is 85 levels, the most white 3 %, the most black 56 %.
MIN_RANGE = 32  # grey levels from the 1st to the 99th percentile
MAX_WHITE = 0.5  # share of pixels
MAX_BLACK = 0.8
# Two of those films correlate less than this with the mean film of their set, and those two are negatives. Of their
# negatives 98 % (NIH) to 99.9 % (Kermany) would.
INVERTED_BELOW = -0.3
MIN_FILMS_FOR_MEAN = 20

MAX_LISTED = 1000  # patients, and films with a wrong grey range; they are counted all
THUMBNAILS_PER_BATCH = 1024


def audit(data: datasets.DatasetDict, unreadable: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Look for what misleads a training or an evaluation: leaks between splits, duplicates, labels that the shape of
    a file tells, films that were read wrongly.

    No image file is opened. Memory stays bounded (the thumbnails go to a temporary file, 9 KB a film).

    Args:
        data: splits, train among them, with `label`, `patient_id` (may be null), `image_id` and the struct `film`
            that `decode_once` adds.
        unreadable: path and reason of each film that could not be read and that `data` lacks.

    Returns:
        What `json.dumps` takes:
            splits: for each its `films`, `patients` (null where no film of the data tells its patient) and `labels`,
                the number of films of each class or with each finding.
            patients_across_splits: `count`; `listed`, for such a patient the number of films in each split (at most
                1,000 patients); `films_without_patient`.
            duplicates: see `find_duplicates`.
            metadata_baseline: see `metadata_baseline`; of height, width, aspect (width / height), file_bytes and
                mean (grey level), on the train split.
            intensity: `counts` of each reason; `listed`, films with their `reasons` and their `correlation` with the
                mean film of the data (null below 20 films; at most 1,000 films).
            sizes: `most_frequent`, with the number of its `films`; `height` and `width`, each smallest and largest.
            unreadable: as given.

    Raises:
        ValueError: no train split, no films, or a split without one of the columns.
    """
    if "train" not in data:
        raise ValueError(f"A data set to audit needs a train split; found {', '.join(data) or 'none'}.")
    films = read_films(data)
    patients = _films_of_patients(films)
    return {
        "splits": _describe_splits(data, patients),
        "patients_across_splits": _patients_across_splits(films, patients),
        "duplicates": find_duplicates(films),
        "metadata_baseline": _metadata_baseline(films, multi_label=is_multi_label(data["train"].features)),
        "intensity": _wrong_intensities(films),
        "sizes": _describe_sizes(films),
        "unreadable": dict(unreadable or {}),
    }


def leaks(report: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each way by which one split knows another: `patients`, `duplicates`. Empty if there is none."""
    found = {}
    patients, duplicates = report["patients_across_splits"], report["duplicates"]
    if count := patients["count"]:
        examples = ", ".join(itertools.islice(patients["listed"], 3))
        found["patients"] = f"{count_of(count, 'patient')} with films in more than one split, for instance {examples}."
    if count := duplicates["groups_across_splits"]:
        example = " and ".join(f"{film['image_id']} ({film['split']})" for film in duplicates["listed"][0]["films"])
        groups = count_of(count, "group")
        found["duplicates"] = f"{groups} of duplicate films in more than one split, for instance {example}."
    return found


def summary(report: Mapping[str, Any]) -> str:
    """The report in a few lines of Markdown, for a terminal."""
    lines = []
    for name, split in report["splits"].items():
        patients = "patients unknown" if split["patients"] is None else count_of(split["patients"], "patient")
        labels = ", ".join(f"{label} {count:,}" for label, count in split["labels"].items())
        lines.append(f"{name}: {count_of(split['films'], 'film')}, {patients}; {labels}")
    lines += [f"**LEAK**: {sentence}" for sentence in leaks(report).values()]
    if unknown := report["patients_across_splits"]["films_without_patient"]:
        lines.append(f"{count_of(unknown, 'film')} without a patient_id: such a patient may be in two splits")

    found = report["duplicates"]
    lines.append(
        f"duplicates: {count_of(found['exact']['pairs'], 'exact pair')} ({found['exact']['across_splits']:,} across "
        f"splits), {count_of(found['near']['pairs'], 'near pair')} ({found['near']['across_splits']:,} across splits); "
        f"{count_of(found['contradictory_groups'], 'group')} with contradictory labels"
    )
    baseline = report["metadata_baseline"]
    aurocs = ", ".join(f"{fact} {result['auroc']:.2f}" for fact, result in baseline["facts"].items())
    lines.append(f"AUROC from metadata alone: {aurocs or 'none, for no label of train has films with and without it'}")
    for fact in baseline["alarm"]:
        result = baseline["facts"][fact]
        what = "all of it together" if fact == "combined" else f"{fact} alone"
        lines.append(f"**ALARM**: {what} tells {result['label']}, AUROC {result['auroc']:.2f}")
    wrong = ", ".join(f"{count_of(count, 'film')} {reason}" for reason, count in report["intensity"]["counts"].items())
    lines.append(f"grey range: {wrong or 'nothing unusual'}")
    lines.append(f"unreadable: {count_of(len(report['unreadable']), 'film')}")
    return "\n".join(f"- {line}" for line in lines)


def count_of(count: int, thing: str) -> str:
    """1 film, 5,856 films."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def _films_of_patients(films: FilmTable) -> dict[str, Counter[str]]:
    """For each patient the number of films in each split."""
    patients: dict[str, Counter[str]] = {}
    for patient, split in zip(films.patient_id, films.split.tolist(), strict=True):
        if not is_missing(patient):
            patients.setdefault(str(patient), Counter())[split] += 1
    return patients


def _describe_splits(data: datasets.DatasetDict, patients: Mapping[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    patients_in = Counter(itertools.chain.from_iterable(patients.values()))
    return {
        name: {
            "films": len(split),
            "patients": patients_in[name] if patients else None,
            "labels": label_counts(split),
        }
        for name, split in data.items()
    }


def _patients_across_splits(films: FilmTable, patients: Mapping[str, Counter[str]]) -> dict[str, Any]:
    across = {patient: dict(splits) for patient, splits in patients.items() if len(splits) > 1}
    return {
        "count": len(across),
        "films_without_patient": sum(is_missing(patient) for patient in films.patient_id),
        "listed": dict(itertools.islice(across.items(), MAX_LISTED)),
    }


def _metadata_baseline(films: FilmTable, *, multi_label: bool) -> dict[str, Any]:
    train = np.flatnonzero(films.split == "train")
    numbers = {name: values[train] for name, values in films.numbers.items()}
    facts = {
        "height": numbers["height"],
        "width": numbers["width"],
        "aspect": numbers["width"] / numbers["height"],
        "file_bytes": numbers["file_bytes"],
        "mean": numbers["mean"],
    }
    targets = dict(zip(films.label_names, films.targets[train].T, strict=True))
    if len(targets) == 2 and not multi_label:
        del targets[films.label_names[0]]  # the same question, asked the other way round
    # A film whose patient is unknown counts as a patient of its own.
    patients = [f"film {i}" if is_missing(films.patient_id[i]) else str(films.patient_id[i]) for i in train]
    return metadata_baseline(facts, targets, patients)


def _wrong_intensities(films: FilmTable) -> dict[str, Any]:
    correlations = _correlations_with_mean(films.thumbnails)
    found = {
        "nearly constant": films.numbers["high"] - films.numbers["low"] < MIN_RANGE,
        "mostly white": films.numbers["white"] > MAX_WHITE,
        "mostly black": films.numbers["black"] > MAX_BLACK,
        "probably inverted": np.full(len(films.row), False) if correlations is None else correlations < INVERTED_BELOW,
    }
    wrong = np.flatnonzero(np.any(list(found.values()), axis=0))
    return {
        "counts": {reason: int(where.sum()) for reason, where in found.items() if where.any()},
        "listed": [
            films.describe(film)
            | {
                "reasons": [reason for reason, where in found.items() if where[film]],
                "correlation": None if correlations is None else round(float(correlations[film]), 4),
            }
            for film in wrong[:MAX_LISTED].tolist()
        ],
    }


def _correlations_with_mean(thumbnails: np.ndarray) -> np.ndarray | None:
    """Of each film with the mean of all standardised films; None where they are too few for a mean."""
    if len(thumbnails) < MIN_FILMS_FOR_MEAN:
        return None
    starts = range(0, len(thumbnails), THUMBNAILS_PER_BATCH)
    batches = [slice(start, start + THUMBNAILS_PER_BATCH) for start in starts]
    total = np.sum([standardise(thumbnails[batch]).sum(axis=0) for batch in batches], axis=0)
    mean = total / max(np.linalg.norm(total), np.finfo(np.float32).tiny)
    return np.concatenate([standardise(thumbnails[batch]) @ mean for batch in batches])


def _describe_sizes(films: FilmTable) -> dict[str, Any]:
    heights, widths = films.numbers["height"].astype(int).tolist(), films.numbers["width"].astype(int).tolist()
    (height, width), count = Counter(zip(heights, widths, strict=True)).most_common(1)[0]
    return {
        "most_frequent": {"height": height, "width": width, "films": count},
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
    }
