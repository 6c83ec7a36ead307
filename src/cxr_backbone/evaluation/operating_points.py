"""Thresholds, chosen on the validation split, from which on a film is called positive."""

import logging

import numpy as np

from cxr_backbone.evaluation.predictions import Predictions

logger = logging.getLogger(__name__)

POINTS = ("youden", "sensitivity>=0.95", "specificity>=0.90", "f1")

# Above this Youden index (sensitivity + specificity - 1) thresholds far apart do equally well on validation.
NEARLY_SEPARATED = 0.98


def choose_operating_points(validation: Predictions) -> dict[str, dict[str, dict[str, float | int]]]:
    """The operating points of each target: of the positive class of two, each of several classes, each finding.

    youden: the highest sensitivity + specificity - 1 (Youden, Cancer 1950). f1: the highest F1.
    sensitivity>=0.95: the best specificity at no less than this sensitivity, and there the best sensitivity;
    specificity>=0.90: the other way round; the highest there is, if over a tenth of the negatives have a score of 1.

    A threshold lies midway between two neighbouring scores, so that no film sits on it; the widest gap is taken where
    several are equally good.

    Returns:
        {target: {point: {"threshold", "sensitivity", "specificity", "films"}}}: a threshold in [0, 1]; the next two
        are what it reached on validation; films, how many have a known label there. A target of which validation has
        only positives or only negatives is left out, with a warning.
    """
    points = {}
    for target in validation.targets:
        _, truth, scores = validation.question(target)
        if truth.all() or not truth.any():
            logger.warning(
                "%s gets no operating points: among the %d validation films where it is known, %d are positive.",
                target,
                len(truth),
                truth.sum(),
            )
            continue
        points[target] = _choose(target, truth, scores)
    return points


def at_operating_point(truth: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[int, int, int, int]:
    """How many films are true negatives, false positives, false negatives and true positives.

    Args:
        truth: bool (films,).
        scores: (films,); positive from `threshold` on.
    """
    tn, fp, fn, tp = np.bincount(2 * truth.astype(int) + (scores >= threshold), minlength=4).tolist()
    return tn, fp, fn, tp


def _choose(target: str, truth: np.ndarray, scores: np.ndarray) -> dict[str, dict[str, float | int]]:
    edges = np.concatenate([[0.0], np.unique(scores), [1.0]])
    thresholds, gaps = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    # (thresholds,): counted at the threshold itself, as two scores can be too close for a number between them
    tn = np.searchsorted(np.sort(scores[~truth]), thresholds)
    tp = positives - np.searchsorted(np.sort(scores[truth]), thresholds)
    sensitivity, specificity = tp / positives, tn / negatives
    youden = (tp * negatives + tn * positives) / (positives * negatives) - 1  # from integers, so that equal is equal
    f1 = 2 * tp / (tp + positives + negatives - tn)
    merits = {  # what counts, the most important first
        "youden": [youden],
        "sensitivity>=0.95": [np.minimum(sensitivity, 0.95), specificity, sensitivity],
        "specificity>=0.90": [np.minimum(specificity, 0.90), sensitivity, specificity],
        "f1": [f1],
    }
    if youden.max() > NEARLY_SEPARATED:
        logger.warning(
            "%s: validation tells its classes apart almost without error (Youden's index %.3f), so it can't place a "
            "threshold: others far from the chosen ones do as well there, and on other films may do better.",
            target,
            youden.max(),
        )
    points: dict[str, dict[str, float | int]] = {}
    for name in POINTS:
        best = np.lexsort([gaps, *reversed(merits[name])])[-1]  # the last key sorts first
        points[name] = {
            "threshold": float(thresholds[best]),
            "sensitivity": float(sensitivity[best]),
            "specificity": float(specificity[best]),
            "films": len(truth),
        }
    return points
