"""Do scores mean what they say, and one number (for findings, one each) that makes them do so.

Of the films that get a score of 0.8, eight in ten should be positive. How far a model is from that is measured by the
expected calibration error (Guo et al., ICML 2017), here in bins of equally many films (Nixon et al., CVPR workshops
2019), and together with its discrimination by the Brier score (Brier, Monthly Weather Review 1950) and the negative
log-likelihood.
"""

import logging
import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification

logger = logging.getLogger(__name__)

NUM_BINS = 15
TEMPERATURE_BOUNDS = (0.05, 20.0)


def calibration_question(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is asked of a model as a whole: of two classes, the positive one; of several, whether the class that is
    called is right (its score is the confidence of Guo et al.); of findings, every known label.

    Args:
        labels: int (films,), or float (films, findings) with NaN for unknown.
        scores: probabilities (films, classes or findings).

    Returns:
        films: int64 (answers,), the film of each; findings have several a film.
        truth: bool (answers,).
        scores: float (answers,), the probability that it is true.
    """
    if labels.ndim == 2:
        films, columns = np.nonzero(~np.isnan(labels))
        return films, labels[films, columns] == 1, scores[films, columns]
    films = np.arange(len(labels))
    asked = np.ones_like(labels) if scores.shape[1] == 2 else scores.argmax(axis=1)
    return films, labels == asked, scores[films, asked]


def adaptive_bins(scores: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """The bin of each film: by rising score, equally many in each, except that equal scores share a bin.

    Args:
        scores: (films,).

    Returns:
        int64 (films,), 0 to num_bins - 1. Bins stay empty where there are fewer films than bins, or many equal scores.
    """
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    twice_middle_rank = 2 * (counts.cumsum() - counts) + counts - 1
    return (twice_middle_rank * num_bins // (2 * len(scores)))[which]


def calibration_terms(truth: np.ndarray, scores: np.ndarray, bins: np.ndarray, num_bins: int = NUM_BINS) -> np.ndarray:
    """What each film adds to the sums that `calibration_figures` takes, so that a resample is a weighted sum.

    Args:
        truth: bool (films,). For several classes: whether the called one is right (see `calibration_question`).
        scores: the probability that it is true, (films,).
        bins: of `adaptive_bins`, (films,).

    Returns:
        float64 (films, num_bins + 3): truth - score in the column of the film's bin, then the squared error, the
        negative log-likelihood (nats; scores are clipped a float64 epsilon from 0 and 1, as in scikit-learn), and 1.
    """
    terms = np.zeros((len(scores), num_bins + 3))
    terms[np.arange(len(scores)), bins] = truth - scores
    terms[:, -3] = (truth - scores) ** 2
    epsilon = np.finfo(np.float64).eps
    terms[:, -2] = -np.log(np.clip(np.where(truth, scores, 1 - scores), epsilon, 1 - epsilon))
    terms[:, -1] = 1
    return terms


def calibration_figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of one sum of `calibration_terms` over films, or of many.

    Args:
        sums: (..., num_bins + 3).

    Returns:
        ece (share of films by which the bins are off), brier (mean squared error), nll (nats), each (...); NaN where
        there is no film.
    """
    with np.errstate(invalid="ignore"):
        return {
            "ece": np.abs(sums[..., :-3]).sum(axis=-1) / sums[..., -1],
            "brier": sums[..., -3] / sums[..., -1],
            "nll": sums[..., -2] / sums[..., -1],
        }


def reliability(truth: np.ndarray, scores: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reliability diagram: for each bin that has films the mean score, the share that is true, and how many films.

    Args:
        truth, scores, bins: as for `calibration_terms`.
    """
    films = np.bincount(bins)
    filled = films > 0
    mean_score, share = (
        np.bincount(bins, weights=values)[filled] / films[filled] for values in (scores, truth.astype(float))
    )
    return mean_score, share, films[filled]


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | list[float]:
    """The number by which to divide the logits so that the negative log-likelihood is lowest (Guo et al. 2017).

    1.0, and a warning, where there is no such number between the `TEMPERATURE_BOUNDS`: the classes are perfectly
    separated, so that every smaller one is better still; the scores are worth nothing; or fewer than two classes occur.

    Args:
        logits: of the validation split, (films, classes or findings).
        labels: int (films,), or float (films, findings) with NaN for unknown.

    Returns:
        One temperature, or one a finding.
    """
    if labels.ndim == 1:
        return _fit_temperature(logits, labels, "")
    temperatures = []
    for column, (truth, logit) in enumerate(zip(labels.T, logits.T, strict=True)):
        known = ~np.isnan(truth)
        two_logits = np.stack([np.zeros(known.sum()), logit[known]], axis=1)  # their softmax is the sigmoid
        temperatures.append(_fit_temperature(two_logits, truth[known].astype(int), f" for finding {column}"))
    return temperatures


def fold_temperature(model: CXRInceptionForImageClassification, temperature: float | list[float]) -> None:
    """Divide the logits of `model` by `temperature`, in the weights of its last layer, and record it in the config.

    The auxiliary head, which has no part in inference, stays as it is.

    Args:
        temperature: of `fit_temperature`: one, or one for each label of the model.

    Raises:
        ValueError: if a temperature is in the model already, or there are too few or too many.
    """
    if model.config.temperature is not None:
        raise ValueError(
            f"temperature: the model's logits are divided by {model.config.temperature} already; expected a model "
            "without one, because a second would undo the calibration."
        )
    if isinstance(temperature, list) and len(temperature) != model.config.num_labels:
        raise ValueError(f"temperature: there are {len(temperature)}; expected {model.config.num_labels}, one a label.")
    layer = model.classifier.output_layer
    divisor = torch.tensor(temperature, device=layer.weight.device).reshape(-1)  # (1,) or (labels,)
    with torch.no_grad():
        layer.weight.div_(divisor[:, None])
        layer.bias.div_(divisor)
    model.config.temperature = temperature


def _fit_temperature(logits: np.ndarray, labels: np.ndarray, of_what: str) -> float:
    if len(np.unique(labels)) < 2:
        logger.warning("No temperature is fitted%s: fewer than two classes occur in validation.", of_what)
        return 1.0

    def loss(log_temperature: float) -> float:
        return -log_softmax(logits / math.exp(log_temperature), axis=1)[np.arange(len(labels)), labels].mean()

    # One minimum only: the loss is convex in 1 / T.
    bounds = [math.log(bound) for bound in TEMPERATURE_BOUNDS]
    best = minimize_scalar(loss, bounds=bounds, method="bounded")
    if min(map(loss, bounds)) <= best.fun:
        logger.warning(
            "No temperature is fitted%s: none between %g and %g makes validation most likely, as the model tells its "
            "classes apart perfectly or not at all; its scores stay uncalibrated.",
            of_what,
            *TEMPERATURE_BOUNDS,
        )
        return 1.0
    return math.exp(best.x)
