"""Subgroups of films: what a source tells of each beyond its label, such as age, sex, view or subtype."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import datasets

from cxr_backbone.data.table_rows import as_text

logger = logging.getLogger(__name__)

# What films have for themselves, in one stage or another: columns that group nothing.
OF_EVERY_FILM = ("image", "pixels", "film", "error", "label", "patient_id", "image_id")
BELOW = {"under 18": 18, "18 to 39": 40, "40 to 64": 65, "65 and over": math.inf}  # years
OLDEST = 120
MOST_WORDS, MOST_NUMBERS = 20, 10


def subgroups_of(rows: datasets.Dataset) -> dict[str, list[str | None]]:
    """For each column that divides films into subgroups, the subgroup of each film; None where it is in none.

    Words stay as they are. Numbers in a column called age (in any case) are years and come in bands: under 18,
    18 to 39, 40 to 64, 65 and over; below 0 and above 120 they are taken for unknown. Other numbers are names.
    A column of more than 20 different words or 10 different numbers tells films apart rather than groups them: it is
    left out, which the log says.
    """
    subgroups = {}
    for column in rows.column_names:
        if column in OF_EVERY_FILM:
            continue
        is_number = rows.features[column].dtype.startswith(("int", "uint", "float"))
        if is_number and column.lower() == "age":
            subgroups[column] = [_age_band(age) for age in rows[column]]
            continue
        names = [as_text(cell, where=f"Column {column}") or None for cell in rows[column]]
        if (different := len({*names} - {None})) > (MOST_NUMBERS if is_number else MOST_WORDS):
            logger.info("Column %s makes no subgroups: it has %d different values.", column, different)
            continue
        subgroups[column] = names
    return subgroups


def subgroup_column(cells: Sequence[str]) -> tuple[datasets.Value, list[str | None] | list[float | None]]:
    """Cells of a table as a column of films: of numbers, if none of them is anything else; blank becomes None."""
    try:
        return datasets.Value("float64"), [float(cell) if cell else None for cell in cells]
    except ValueError:
        return datasets.Value("string"), [cell or None for cell in cells]


def _age_band(age: float | None) -> str | None:
    if age is None or not 0 <= age <= OLDEST:
        return None
    return next(band for band, end in BELOW.items() if age < end)
