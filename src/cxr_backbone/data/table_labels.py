"""Labels as tables write them, uncertain and missing ones by a stated policy."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

logger = logging.getLogger(__name__)

# CheXpert's words (Irvin et al. 2019, U-Ignore, U-Zeros, U-Ones), here for missing labels too.
POLICIES = {"ignore": math.nan, "zeros": 0.0, "ones": 1.0}
UNCERTAIN = -1.0
# A column with more values holds no classes: names, say, or reports, which must not get into a message either.
MOST_CLASSES = 100


def finding_labels(
    cells: Sequence[str], where: Callable[[int], str], column: str, *, uncertain: str, missing: str
) -> np.ndarray:
    """Float32 (films,) of one finding: 1 present, 0 absent, NaN unknown.

    Args:
        cells: 1, 0, -1 (uncertain) or blank (missing), whole or as 1.0.
        where: what a message calls a row.
        uncertain, missing: ignore (NaN), zeros or ones.

    Raises:
        ValueError: any other cell or policy.
    """
    policies = _policies(uncertain, missing)
    meaning: dict[float | None, float] = {0.0: 0.0, 1.0: 1.0, UNCERTAIN: policies["uncertain"]}
    values = {}
    for cell in set(cells):
        values[cell] = policies["missing"] if cell == "" else meaning.get(_number(cell))
    return _look_up(cells, values, where, column, expected="1, 0, -1 (uncertain) or blank")


def class_labels(
    cells: Sequence[str],
    where: Callable[[int], str],
    column: str,
    label_names: Sequence[str] | None,
    *,
    uncertain: str = "ignore",
    missing: str = "ignore",
) -> tuple[list[str], np.ndarray]:
    """The class names, index 0 first, and float32 (films,): the class of each film, NaN where it is to be left out.

    Args:
        cells: class names; or indices, 0 to the number of classes - 1. -1 is uncertain, blank is missing.
        where: what a message calls a row.
        label_names: the classes in order; by default the names found, sorted, or the indices.
        uncertain, missing: ignore (the film is left out), or with two classes zeros or ones.

    Raises:
        ValueError: fewer than two classes or more than MOST_CLASSES, names that differ in case alone, indices with a
            gap, an unknown class, a policy that is none or needs two classes.
    """
    policies = _policies(uncertain, missing)
    found = sorted(cell for cell in set(cells) if cell and _number(cell) != UNCERTAIN)
    if len(found) > MOST_CLASSES:
        raise ValueError(f"Column {column} has {len(found)} different values; expected {MOST_CLASSES} classes at most.")
    names = list(label_names or [])
    are_numbers = bool(found) and all(_number(cell) is not None for cell in found) and not set(found) <= set(names)
    indices: Mapping[str, float | None]
    if are_numbers and names and all(_number(name) is not None for name in names):
        index_of = {_number(name): float(index) for index, name in enumerate(names)}  # 1.0 is the class called 1
        indices = {cell: index_of.get(_number(cell)) for cell in found}
        expected = ", ".join(names)
    elif are_numbers:
        indices = {cell: _number(cell) for cell in found}
        if not names:
            num_classes = len(set(indices.values()))
            names = [str(index) for index in range(num_classes)]
        expected = f"0 to {len(names) - 1}"
    else:
        names = names or found
        indices = {name: float(index) for index, name in enumerate(names)}
        expected = ", ".join(names)
    _check_names(names, column)
    for argument, value in policies.items():
        if not math.isnan(value) and len(names) != 2:
            raise ValueError(f"{argument} has to be 'ignore' for the label {column}, which has {len(names)} classes.")

    in_range = {float(index) for index in range(len(names))}
    values: dict[str, float | None] = {}
    for cell in set(cells):
        if cell == "":
            values[cell] = policies["missing"]
        elif _number(cell) == UNCERTAIN:
            values[cell] = policies["uncertain"]
        else:
            index = indices.get(cell)
            values[cell] = index if index in in_range else None
    labels = _look_up(cells, values, where, column, expected=expected)
    return names, labels


def labels_by_value(cells: Sequence[str], column: str, label_values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """As `class_labels`, for a column of which some values name a class, in words of its own, and others don't.

    Args:
        label_values: `value=CLASS` for each value that counts, such as `Lung Opacity=PNEUMONIA`. Classes have the
            order in which they first appear here; several values may name one class.

    Raises:
        ValueError: an entry of another form, a value that is listed twice or that no film has, fewer than two classes.
    """
    class_of: dict[str, str] = {}
    for entry in label_values:
        value, _, name = (part.strip() for part in entry.rpartition("="))
        if not (value and name):
            raise ValueError(f"label_values has {entry!r}; expected value=CLASS, such as 'Lung Opacity=PNEUMONIA'.")
        if value in class_of:
            raise ValueError(f"label_values has the value {value!r} twice; expected one class for each.")
        class_of[value] = name
    if unseen := [value for value in class_of if value not in cells]:
        raise ValueError(f"label_values has the value {unseen[0]!r}, which no film has in column {column}.")
    names = list(dict.fromkeys(class_of.values()))
    _check_names(names, column)
    indices = {value: names.index(name) for value, name in class_of.items()}
    return names, np.array([indices.get(cell, math.nan) for cell in cells], dtype=np.float32)


def log_classes(column: str, names: Sequence[str], labels: np.ndarray, left_out: str = "uncertain or missing") -> None:
    """Say which class has which index: the order of two decides what "positive" means. And how many films have no
    class, since their label is what `left_out` says.
    """
    counts = Counter(labels[~np.isnan(labels)].astype(int).tolist())
    described = [f"class {index} is {name} ({counts[index]} films)" for index, name in enumerate(names)]
    if len(names) == 2:
        described[1] += ", the positive class"
    logger.info("Label %s: %s.", column, "; ".join(described))
    if unlabelled := int(np.isnan(labels).sum()):
        logger.info("Leaving out %d films whose label %s is %s.", unlabelled, column, left_out)


def _check_names(names: Sequence[str], column: str) -> None:
    if len(names) < 2 or len({name.casefold() for name in names}) < len(names):
        raise ValueError(
            f"The label {column} has the classes {names}; expected two or more that differ in more than case."
        )


def _policies(uncertain: str, missing: str) -> dict[str, float]:
    given = {"uncertain": uncertain, "missing": missing}
    for argument, policy in given.items():
        if policy not in POLICIES:
            raise ValueError(f"{argument}={policy!r} is no policy; expected one of {', '.join(POLICIES)}.")
    return {argument: POLICIES[policy] for argument, policy in given.items()}


def _look_up(
    cells: Sequence[str],
    values: Mapping[str, float | None],
    where: Callable[[int], str],
    column: str,
    *,
    expected: str,
) -> np.ndarray:
    if unknown := {cell for cell, value in values.items() if value is None}:
        row = next(row for row, cell in enumerate(cells) if cell in unknown)
        raise ValueError(f"{where(row)} has {_quoted(cells[row])} in column {column}; expected {expected}.")
    return np.array([values[cell] for cell in cells], dtype=np.float32)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _quoted(cell: str) -> str:
    """A cell, unless it may be a sentence or a name: a column that was named by mistake must not end up in a log."""
    return repr(cell) if len(cell) <= 20 and " " not in cell else "a text"
