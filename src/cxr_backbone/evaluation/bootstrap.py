"""95 % intervals from resampled patients.

Films of one patient resemble each other, so drawing them one by one pretends to more evidence than there is. Here
patients are drawn with replacement, each with all films of theirs (Davison & Hinkley, Bootstrap Methods and their
Application, 1997, section 3.8), and the 2.5th and 97.5th percentile of a figure over the resamples are its interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

RESAMPLES = 2000
MIN_PATIENTS = 10  # fewer can't stand for those who were not seen
MAX_UNDEFINED = 0.05  # the share of resamples in which a figure may be undefined and still have an interval

_LIMITS = (2.5, 97.5)  # percentiles
_CHUNK_NUMBERS = 250_000  # float64 in the largest array of a chunk of resamples: 2 MB, which stays in the cache


class PatientBootstrap:
    """Resamples of the patients of some films.

    The patients are drawn once, from `seed`, so all figures of one object are of the same resamples. Those of two
    models on the same films are therefore paired: subtract them resample by resample to compare the models.

    Args:
        patient_ids: whose film it is, for each film. A film of nobody known (None) counts as a patient of its own.
        resamples: how often as many patients are drawn as there are.
        seed: of the draws.

    Attributes:
        num_patients, num_films, resamples: how many there are.
        counts: uint8 (resamples, patients), how often each was drawn; patients in the order of their first films.

    Raises:
        ValueError: no films.
    """

    def __init__(self, patient_ids: Sequence[str | None], *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        if len(patient_ids) == 0:
            raise ValueError("patient_ids is empty; expected an entry a film.")
        self._patients = number_patients(patient_ids)  # (films,)
        self.num_films = len(patient_ids)
        self.num_patients = int(self._patients.max()) + 1
        self.resamples = resamples
        generator = np.random.default_rng(seed)
        # A byte is enough: no patient of up to 255 can be drawn more often than that, and of more patients (with about
        # one draw each) the chance of 256 draws of the same one is below 1e-490.
        self.counts = np.empty((resamples, self.num_patients), np.uint8)
        for row in self.counts:
            row[:] = np.bincount(generator.integers(self.num_patients, size=row.size), minlength=row.size)

    def count_patients(self, films: np.ndarray) -> int:
        """How many patients these films (indices) are of."""
        return len(np.unique(self._patients[films]))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of each column over the films of each resample.

        Args:
            values: (films, columns), numbers.

        Returns:
            float64 (resamples, columns).

        Raises:
            ValueError: not a row a film.
        """
        if values.ndim != 2 or len(values) != self.num_films:
            raise ValueError(f"values is {values.shape}; expected ({self.num_films}, columns), a row a film.")
        of_patient = self._matrix(np.arange(self.num_films), self._patients, self.num_films).T @ values.astype(float)
        sums = np.empty((self.resamples, values.shape[1]))
        for rows in self._chunks(self.num_patients):
            sums[rows] = self.counts[rows].astype(float) @ of_patient  # (rows, patients) @ (patients, columns)
        return sums

    def rank_figures(self, films: np.ndarray, truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and AUPRC (average precision) of each resample, both as scikit-learn defines them.

        Exact, ties included. The films are sorted once; a resample only weighs them anew.

        Args:
            films: int (entries,), indices of films; a film may occur several times, once for each of its findings.
            truth: bool (entries,), is it there?
            scores: float (entries,), higher where it is more likely there.

        Returns:
            float64 (resamples,) each, in [0, 1]; NaN where a resample lacks a class.

        Raises:
            ValueError: lengths that differ, a film that does not exist, or a score that is not finite.
        """
        self._check(films, truth, scores)
        figures = np.full((2, self.resamples), np.nan)
        if truth.any() and not truth.all():
            for rows, positives, negatives in self._resampled(*self._steps(films, truth.astype(bool), scores)):
                figures[:, rows] = _rank_figures(positives, negatives)
        return figures[0], figures[1]

    def curve_bands(self, films: np.ndarray, truth: np.ndarray, scores: np.ndarray) -> CurveBands:
        """The ROC and the precision-recall curve, with the interval of each of their points.

        Args: those of `rank_figures`.

        Raises:
            ValueError: those of `rank_figures`, or a class does not occur.
        """
        self._check(films, truth, scores)
        if not truth.any() or truth.all():
            raise ValueError("truth has one class only; expected positives and negatives for a curve.")
        steps = self._steps(films, truth.astype(bool), scores)
        every_patient_once = np.ones((self.num_patients, 1))
        curve = _curves(*(of_class @ every_patient_once for of_class in steps))[0]  # (2, grid)
        samples = np.empty((self.resamples, *curve.shape))
        for rows, positives, negatives in self._resampled(*steps):
            samples[rows] = _curves(positives, negatives)
        low = high = np.full(curve.shape, np.nan)
        if not _why_no_interval(samples[:, 0, 0], self.count_patients(films)):
            low, high = np.percentile(samples[np.isfinite(samples[:, 0, 0])], _LIMITS, axis=0)
        return CurveBands(
            *(_GRID, curve[0], low[0], high[0]),
            *(_GRID, curve[1], low[1], high[1]),
        )

    def _check(self, films: np.ndarray, truth: np.ndarray, scores: np.ndarray) -> None:
        for name, values in (("truth", truth), ("scores", scores)):
            if len(values) != len(films):
                raise ValueError(f"there are {len(values)} {name} and {len(films)} films; expected as many.")
        if len(films) and not (films.min() >= 0 and films.max() < self.num_films):
            raise ValueError(f"films has an index outside of the {self.num_films} films of the bootstrap.")
        if not np.isfinite(scores).all():
            raise ValueError("scores has a NaN or an infinite number; expected finite ones.")

    def _steps(self, films: np.ndarray, truth: np.ndarray, scores: np.ndarray) -> tuple[csr_array, csr_array]:
        """A ranking as steps, highest score first: matrices (steps, patients) of how many of a patient's entries,
        positive and negative ones, a step holds.

        A step is the entries of one score. Neighbouring scores that only negatives have make one step together: neither
        figure, nor the line of either curve, depends on the order of negatives without a positive between them.
        """
        order = np.argsort(-scores)
        films, truth, scores = films[order], truth[order], scores[order]
        starts = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))  # (scores,), the first entry of each
        has_positive = np.logical_or.reduceat(truth, starts)  # (scores,)
        step = np.cumsum(has_positive | np.append(True, has_positive[:-1])) - 1  # (scores,)
        step = np.repeat(step, np.diff(starts, append=len(scores)))  # (entries,)
        steps, patients = int(step[-1]) + 1, self._patients[films]
        return (
            self._matrix(step[truth], patients[truth], steps),
            self._matrix(step[~truth], patients[~truth], steps),
        )

    def _matrix(self, rows: np.ndarray, patients: np.ndarray, num_rows: int) -> csr_array:
        """float64 (rows, patients), sparse: how often each pair occurs."""
        return csr_array((np.ones(len(rows)), (rows, patients)), shape=(num_rows, self.num_patients))

    def _resampled(self, positives: csr_array, negatives: csr_array) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Slices of the resamples, and the entries of each step in them (steps, rows)."""
        for rows in self._chunks(self.num_patients + 2 * positives.shape[0]):
            drawn = self.counts[rows].T.astype(float)  # (patients, rows)
            yield rows, positives @ drawn, negatives @ drawn

    def _chunks(self, numbers: int) -> Iterator[slice]:
        """Slices of the resamples, short enough if each of these takes so many numbers."""
        size = max(1, _CHUNK_NUMBERS // numbers)
        yield from (slice(start, start + size) for start in range(0, self.resamples, size))


@dataclass(frozen=True)
class CurveBands:
    """ROC and precision-recall curve of some films, with pointwise 95 % intervals; all float64 (101,) in [0, 1].

    The sensitivity is interpolated between thresholds. The precision is that of the highest threshold which reaches the
    recall, so that the area under it is the average precision. Limits are NaN where `interval` would give none.
    """

    false_positive_rate: np.ndarray
    sensitivity: np.ndarray
    sensitivity_low: np.ndarray
    sensitivity_high: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    precision_low: np.ndarray
    precision_high: np.ndarray


def interval(
    value: float | None, samples: np.ndarray, num_patients: int, *, undefined: str = "not defined for these films"
) -> dict[str, Any]:
    """A figure with its 95 % percentile interval, as metrics.json has it.

    Args:
        value: the figure of the films themselves; None or NaN if it is not defined.
        samples: (resamples,), the figure of each resample; NaN where it is not defined.
        num_patients: that the figure is of.
        undefined: why, if `value` is not defined.

    Returns:
        value, low and high. What is not defined is None; then `undefined` says why. An interval is not defined for less
        than 10 patients, if more than 5 % of the resamples have no value, or if it would have no width.
    """
    if value is None or not math.isfinite(value):
        return {"value": None, "low": None, "high": None, "undefined": undefined}
    if why := _why_no_interval(samples, num_patients):
        return {"value": float(value), "low": None, "high": None, "undefined": why}
    low, high = np.percentile(samples[np.isfinite(samples)], _LIMITS)
    if high - low < 1e-12:
        why = "nearly all resamples agree, which says nothing of its uncertainty"
        return {"value": float(value), "low": None, "high": None, "undefined": why}
    return {"value": float(value), "low": float(low), "high": float(high)}


def number_patients(patient_ids: Sequence[str | None]) -> np.ndarray:
    """int64 (films,): patients numbered from 0 in the order of their first films; None is a new one each time."""
    numbers: dict[str | int, int] = {}
    keys = (film if patient is None else patient for film, patient in enumerate(patient_ids))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _why_no_interval(samples: np.ndarray, num_patients: int) -> str:
    """Empty if there is one."""
    if num_patients < MIN_PATIENTS:
        return f"only {num_patients} patient{'s' * (num_patients != 1)}; an interval needs {MIN_PATIENTS}"
    missing = 1 - np.isfinite(samples).mean()
    return f"not defined in {missing:.1%} of the resamples" if missing > MAX_UNDEFINED else ""


def _rank_figures(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """AUROC and AUPRC (2, resamples), from the entries of each step (steps, resamples), highest score first."""
    found, false = np.cumsum(positives, axis=0), np.cumsum(negatives, axis=0)  # at this threshold
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample lacks a class
        # Each negative has a share of the positives above it, and half of those in its own step.
        auroc = np.einsum("sr,sr->r", negatives, found - positives / 2) / (found[-1] * false[-1])
        precision = np.divide(found, found + false, out=np.zeros_like(found), where=found > 0)
        auprc = np.einsum("sr,sr->r", positives, precision) / found[-1]
    return np.stack([auroc, np.where(false[-1] > 0, auprc, np.nan)])


_GRID = np.arange(101) / 100


def _curves(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Sensitivity and precision (resamples, 2, grid), from the entries of each step (steps, resamples)."""
    found, false = np.cumsum(positives, axis=0).T, np.cumsum(negatives, axis=0).T  # (resamples, steps)
    curves = np.full((len(found), 2, len(_GRID)), np.nan)
    for curve, hits, errors in zip(curves, found, false, strict=True):
        if hits[-1] == 0 or errors[-1] == 0:
            continue
        # Of several points with the same false positive rate, interp takes the last: the highest.
        curve[0] = np.interp(_GRID, np.append(0, errors) / errors[-1], np.append(0, hits) / hits[-1])
        # Whole numbers, times 100, so that a recall is reached without rounding. Recall 0 is the first hit.
        reached = np.searchsorted(hits * 100, np.maximum(np.arange(101) * hits[-1], 1))
        curve[1] = hits[reached] / (hits[reached] + errors[reached])
    return curves
