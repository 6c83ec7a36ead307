"""DeLong's test: do two models differ in AUROC on the same films?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from cxr_backbone.evaluation.bootstrap import number_patients


def delong_test(
    truth: np.ndarray, first: np.ndarray, second: np.ndarray, patient_ids: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Test, two-sided, that two models have the same AUROC.

    The variance of the difference is that of DeLong, DeLong & Clarke-Pearson (1988), by ranks (Sun & Xu 2014). With
    `patient_ids` it is that of Obuchowski (1997), which allows for the likeness of a patient's films and is DeLong's if
    every patient has one film. Both take the difference to be normal, which needs many patients.

    Args:
        truth: bool (films,), is it there?
        first, second: float (films,), the scores of the two models for the same films.
        patient_ids: whose film it is, for each film; a film of nobody known (None) counts as a patient of its own.

    Returns:
        auroc ([first, second]), difference (second minus first), low and high (its 95 % interval), z, p. Where the
        variance is zero (identical models, say) or can't be estimated, the last four are None; `undefined` says why.

    Raises:
        ValueError: lengths that differ, a score that is not finite, or a class that does not occur.
    """
    truth = np.asarray(truth).astype(bool)
    _check(truth, first, second, patient_ids)
    patients = np.arange(len(truth)) if patient_ids is None else number_patients(patient_ids)
    (auroc_first, components_first), (auroc_second, components_second) = (
        _components(truth, np.asarray(scores)) for scores in (first, second)
    )
    difference = auroc_second - auroc_first
    result: dict[str, Any] = {"auroc": [auroc_first, auroc_second], "difference": difference}
    undefined = {"low": None, "high": None, "z": None, "p": None}
    for name, films in (("positive", truth), ("negative", ~truth)):
        if len(np.unique(patients[films])) < 2:
            return {**result, **undefined, "undefined": f"{name} films of one patient only; the variance needs two"}
    error = math.sqrt(_variance(components_second - components_first, truth, patients))
    if error == 0:
        return {**result, **undefined, "undefined": "the variance of the difference is zero"}
    half_width, z = float(norm.ppf(0.975)) * error, difference / error
    p = 2 * float(norm.sf(abs(z)))
    return {**result, "low": difference - half_width, "high": difference + half_width, "z": z, "p": p}


def _check(truth: np.ndarray, first: np.ndarray, second: np.ndarray, patient_ids: Sequence[str | None] | None) -> None:
    values = {"first": first, "second": second} | ({} if patient_ids is None else {"patient_ids": patient_ids})
    for name, entries in values.items():
        if len(entries) != len(truth):
            raise ValueError(f"{name} has {len(entries)} entries; expected {len(truth)}, as many as truth.")
    for name, scores in (("first", first), ("second", second)):
        if not np.isfinite(scores).all():
            raise ValueError(f"{name} has a NaN or an infinite score; expected finite ones.")
    if not truth.any() or truth.all():
        raise ValueError(f"truth has no {'negative' if truth.any() else 'positive'} film; expected both.")


def _components(truth: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """AUROC, and for each film (films,) how many films of the other class its score is on the right side of.

    By midranks: the rank among all less the rank within the class counts the other class below; a tie is half.
    """
    below = rankdata(scores)
    for films in (truth, ~truth):
        below[films] -= rankdata(scores[films])
    components = np.where(truth, below, truth.sum() - below)
    return float(components[truth].mean() / (~truth).sum()), components


def _variance(components: np.ndarray, truth: np.ndarray, patients: np.ndarray) -> float:
    """Of the mean of the components: Obuchowski's sum of a term for the positive films of each patient, one for the
    negative ones, and one for both together."""
    residuals = components.astype(float)
    for films in (truth, ~truth):
        residuals[films] -= components[films].mean()
    pairs = int(truth.sum()) * int((~truth).sum())
    of_positives, of_negatives = (  # (patients,)
        np.bincount(patients, np.where(films, residuals, 0)) / pairs for films in (truth, ~truth)
    )
    both, positive, negative = (_small_sample(patients[films]) for films in (truth | ~truth, truth, ~truth))
    squares = (of_positives**2).sum(), (of_negatives**2).sum()
    # (a + b)² instead of a² + b² + 2ab: no factor is below zero, so rounding can't make the variance negative.
    variance = both * ((of_positives + of_negatives) ** 2).sum()
    variance += (positive - both) * squares[0] + (negative - both) * squares[1]
    return float(variance) if variance > 1e-20 * sum(squares) else 0.0  # zero but for rounding


def _small_sample(patients: np.ndarray) -> float:
    """n / (n - 1) for n patients: makes a variance from a sample unbiased."""
    count = len(np.unique(patients))
    return count / (count - 1)
