"""Splits that keep a patient's films together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold


def split_by_patient(
    patient_ids: Sequence[Any], strata: Sequence[Any], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of the films; no patient stands on two sides, and the strata keep their shares.

    Args:
        patient_ids: the patient of each film, any kind of identifier.
        strata: what to balance, film by film: a label or a subtype.
        fraction: share of films to hold out, above 0 and at most 0.5. It is met as one fold of
            `round(1 / fraction)`, so 0.1 is a tenth and 0.15 is a seventh.
        seed: the same seed and input give the same split.

    Returns:
        Two sorted int arrays of film indices: kept, and held out. Together they are 0 .. n - 1.

    Raises:
        ValueError: no films, lengths that differ, a missing patient id, a fraction out of range, or too few
            patients or films for that fraction.
    """
    if len(patient_ids) == 0:
        raise ValueError("There are no films to split: patient_ids is empty.")
    if len(patient_ids) != len(strata):
        raise ValueError(f"patient_ids has {len(patient_ids)} entries, strata {len(strata)}; expected as many.")
    if not 0 < fraction <= 0.5:
        raise ValueError(f"fraction must be above 0 and at most 0.5, not {fraction}.")
    for row, patient in enumerate(patient_ids):
        if is_missing(patient):
            raise ValueError(f"Row {row} has no patient_id, so patients can't be kept apart.")

    patients = [str(patient) for patient in patient_ids]
    folds = round(1 / fraction)
    num_patients = len(set(patients))
    if num_patients < folds:
        raise ValueError(f"A fraction of {fraction} needs {folds} patients or more; there are {num_patients}.")
    films_in_largest_stratum = max(Counter(strata).values())
    if films_in_largest_stratum < folds:
        raise ValueError(
            f"A fraction of {fraction} needs a stratum of at least {folds} films; "
            f"the largest has {films_in_largest_stratum}."
        )
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    names = [str(stratum) for stratum in strata]
    kept, held_out = next(splitter.split(np.zeros(len(patients)), names, patients))
    return np.sort(kept), np.sort(held_out)


def is_missing(patient_id: Any) -> bool:
    """Whether a patient id is None, NaN or blank."""
    return patient_id is None or patient_id != patient_id or not str(patient_id).strip()
