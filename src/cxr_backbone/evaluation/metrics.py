"""Figures for a split: from scikit-learn, and from counts, for many resamples at once.

One convention for all: scores are probabilities, (films, classes) that sum to 1 or (films, findings) that need not.
Labels are class indices (films,), or (films, findings) of 1 present, 0 absent and NaN unknown.

A figure that is not defined is None, or NaN in an array. It is never what a library puts in its place. The same figures
as metrics of the evaluate library are in `evaluate_metrics`.
"""

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    roc_auc_score,
)

from cxr_backbone.evaluation.calibration import (
    adaptive_bins,
    calibration_figures,
    calibration_question,
    calibration_terms,
)

Figures = dict[str, float | None]


def classification_figures(labels: np.ndarray, scores: np.ndarray) -> Figures:
    """How well a model tells films apart, from scikit-learn.

    Of classes: loss (mean negative log-likelihood, nats), accuracy, balanced_accuracy, f1, mcc, auroc, auprc. The class
    with the highest score is the one called. Of two classes, f1, auroc and auprc are those of the positive one (1);
    of several, the mean over the classes, each against the rest. Where a class does not occur, all are None but loss,
    accuracy, mcc if two others occur, and f1 of two classes if it is the negative one.

    Of findings: loss, auroc_macro, auroc_micro, auprc_macro, auprc_micro, over the known labels. Macro is the mean over
    the findings of which some films are positive and some negative, micro takes all known labels as one list.

    auprc is the average precision: a sum of steps, not of trapezoids.

    Raises:
        ValueError: scores that are NaN or outside [0, 1], scores of classes that don't sum to 1, or labels that are no
            class, or for findings anything but 0, 1 and NaN.
    """
    labels, scores = _check(labels, scores)
    return _finding_figures(labels, scores) if labels.ndim == 2 else _class_figures(labels, scores)


def calibration_summary(labels: np.ndarray, scores: np.ndarray) -> Figures:
    """How far a model's scores can be taken at their word.

    ece and brier are those of `calibration.calibration_figures` on `calibration.calibration_question`; nll is the loss
    of `classification_figures`, in nats. None for findings of which no label is known.

    Raises:
        ValueError: as `classification_figures`.
    """
    labels, scores = _check(labels, scores)
    _, truth, asked = calibration_question(labels, scores)
    if len(truth) == 0:
        return {"ece": None, "brier": None, "nll": None}
    figures = calibration_figures(calibration_terms(truth, asked, adaptive_bins(asked)).sum(axis=0))
    return {"ece": float(figures["ece"]), "brier": float(figures["brier"]), "nll": _loss(labels, scores)}


def counts_figures(tn: np.ndarray, fp: np.ndarray, fn: np.ndarray, tp: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from the four counts of a yes-or-no question, or from their weights.

    Args:
        tn, fp, fn, tp: >= 0, all of one shape.

    Returns:
        sensitivity, specificity, ppv, npv, and the figures of `confusion_figures`, each float64 of that shape; NaN
        where not defined, such as ppv where nothing is called positive.
    """
    tn, fp, fn, tp = (np.asarray(count, dtype=np.float64) for count in (tn, fp, fn, tp))
    # (..., 2, 2)
    confusion = np.stack([np.stack([tn, fp], axis=-1), np.stack([fn, tp], axis=-1)], axis=-2)
    return {
        "sensitivity": _divide(tp, tp + fn),
        "specificity": _divide(tn, tn + fp),
        "ppv": _divide(tp, tp + fp),
        "npv": _divide(tn, tn + fn),
        **confusion_figures(confusion),
    }


def confusion_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from a confusion matrix, as scikit-learn defines it where all classes occur.

    Args:
        confusion: counts or weights (..., classes, classes), rows the truth, columns what is called.

    Returns:
        accuracy, balanced_accuracy, f1, mcc, each float64 (...). f1 is that of class 1 of two, or the mean over all.
        NaN where a class does not occur, except for accuracy, mcc if two others occur, and f1 of two classes if it is
        class 0. The mcc of a model that calls everything the same is 0 as in scikit-learn; the formula leaves it open.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    occurs, called = confusion.sum(axis=-1), confusion.sum(axis=-2)  # (..., classes)
    films = occurs.sum(axis=-1)
    f1 = _divide(2 * hits, np.where(occurs > 0, occurs + called, 0))
    # Gorodkin (2004): the correlation of truth and call as one-hot vectors, here times films squared
    covariance = hits.sum(axis=-1) * films - (occurs * called).sum(axis=-1)
    spread_of_truth, spread_of_calls = (
        counts.sum(axis=-1) ** 2 - (counts**2).sum(axis=-1) for counts in (occurs, called)
    )
    mcc = _divide(covariance, np.sqrt(spread_of_truth) * np.sqrt(spread_of_calls))
    return {
        "accuracy": _divide(hits.sum(axis=-1), films),
        "balanced_accuracy": _divide(hits, occurs).mean(axis=-1),
        "f1": f1[..., 1] if f1.shape[-1] == 2 else f1.mean(axis=-1),
        "mcc": np.where((spread_of_truth > 0) & (spread_of_calls == 0), 0.0, mcc),
    }


def _class_figures(labels: np.ndarray, scores: np.ndarray) -> Figures:
    called = scores.argmax(axis=1)
    classes = np.arange(scores.shape[1])
    occurring = np.unique(labels)
    all_occur, two = len(occurring) == len(classes), len(classes) == 2
    average, has_f1 = ("binary", 1 in occurring) if two else ("macro", all_occur)
    # (films, questions): of two classes only the positive one is asked for
    questions = classes[1:] if two else classes
    truth = labels[:, None] == questions
    return {
        "loss": _loss(labels, scores),
        "accuracy": float(accuracy_score(labels, called)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, called)) if all_occur else None,
        "f1": float(f1_score(labels, called, average=average)) if has_f1 else None,
        "mcc": float(matthews_corrcoef(labels, called)) if len(occurring) > 1 else None,
        "auroc": float(roc_auc_score(truth, scores[:, questions])) if all_occur else None,
        "auprc": float(average_precision_score(truth, scores[:, questions])) if all_occur else None,
    }


def _finding_figures(labels: np.ndarray, scores: np.ndarray) -> Figures:
    columns = zip(labels.T, scores.T, strict=True)
    each = [(truth[~np.isnan(truth)], asked[~np.isnan(truth)]) for truth, asked in columns]
    each = [(truth, asked) for truth, asked in each if _has_both(truth)]
    known = ~np.isnan(labels)
    pooled = [(labels[known], scores[known])] if _has_both(labels[known]) else []
    return {
        "loss": _loss(labels, scores),
        "auroc_macro": _mean(roc_auc_score(truth, asked) for truth, asked in each),
        "auroc_micro": _mean(roc_auc_score(truth, asked) for truth, asked in pooled),
        "auprc_macro": _mean(average_precision_score(truth, asked) for truth, asked in each),
        "auprc_micro": _mean(average_precision_score(truth, asked) for truth, asked in pooled),
    }


def _loss(labels: np.ndarray, scores: np.ndarray) -> float | None:
    if labels.ndim == 1:
        scores = scores / scores.sum(axis=1, keepdims=True)  # in float32 it is only nearly 1, which log_loss warns of
        return float(log_loss(labels, scores, labels=np.arange(scores.shape[1])))
    known = ~np.isnan(labels)
    return float(log_loss(labels[known], scores[known], labels=[0, 1])) if known.any() else None


def _has_both(truth: np.ndarray) -> bool:
    return len(np.unique(truth)) == 2


def _mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where nothing is divided by nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return numerator / denominator


def _check(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores as arrays: int64 (films,) and float64 (films, classes), or float64 (films, findings) twice."""
    try:
        labels, scores = (np.asarray(rows, dtype=np.float64) for rows in (labels, scores))
    except ValueError as error:
        raise ValueError("scores or labels: films differ in how many they have; expected as many.") from error
    if scores.ndim != 2 or not len(scores) or len(scores) != len(labels):
        raise ValueError(
            f"scores: they are {scores.shape}; expected a row for each of the {len(labels)} labels, 1 or more."
        )
    if bad := int((~((scores >= 0) & (scores <= 1)).all(axis=1)).sum()):
        raise ValueError(f"scores: {bad} films have a score that is NaN or outside [0, 1]; expected none.")
    if labels.ndim == 2:
        if labels.shape != scores.shape:
            raise ValueError(f"labels: they are {labels.shape}; expected {scores.shape}, like the scores.")
        if not np.isin(labels[~np.isnan(labels)], (0, 1)).all():
            raise ValueError("labels: a finding is none of 1 (present), 0 (absent) and NaN (unknown).")
        return labels, scores
    num_classes = scores.shape[1]
    if not np.isin(labels, np.arange(num_classes)).all():
        raise ValueError(f"labels: a label is none of the {num_classes} classes, 0 to {num_classes - 1}.")
    if num_classes < 2 or (np.abs(scores.sum(axis=1) - 1) > 0.01).any():
        raise ValueError("scores: they don't sum to 1 over two or more classes; expected (films, classes).")
    return labels.astype(np.int64), scores
