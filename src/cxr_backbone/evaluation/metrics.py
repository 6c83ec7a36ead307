"""Figures for a split, from scikit-learn: two classes, several classes, or several findings."""

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    log_loss,
    recall_score,
    roc_auc_score,
)
from torch import Tensor

METRICS = ("loss", "accuracy", "balanced_accuracy", "auroc", "sensitivity", "specificity")

Figures = dict[str, float | int | None]


def classification_metrics(labels: np.ndarray, logits: Tensor, names: list[str]) -> Figures:
    """The figures that fit the labels: those of `binary_metrics`, `multiclass_metrics` or `multilabel_metrics`.

    Args:
        labels: int (images,), or float (images, findings) with NaN for unknown.
        logits: (images, len(names)).
        names: classes or findings.
    """
    if labels.ndim == 2:
        return multilabel_metrics(labels, logits.double().sigmoid().numpy(), names)
    if len(names) == 2:
        return binary_metrics(labels, positive_scores(logits))
    return multiclass_metrics(labels, logits.double().softmax(dim=1).numpy())


def positive_scores(logits: Tensor) -> np.ndarray:
    """Probability of the positive class (index 1), float64 (images,), from logits (images, 2)."""
    return logits.double().softmax(dim=1)[:, 1].numpy()


def binary_metrics(labels: np.ndarray, scores: np.ndarray) -> Figures:
    """The figures in `METRICS`, and how many images they come from.

    Args:
        labels: 0 or 1, (images,); both must occur.
        scores: probability of class 1, (images,). From 0.5 on an image is called positive: the label that the
            pipeline puts first.

    Returns:
        loss (negative log-likelihood, nats), accuracy, balanced_accuracy, auroc, sensitivity (recall of class 1),
        specificity (recall of class 0), images.

    Raises:
        ValueError: if only one class occurs, so that AUROC is not defined.
    """
    if len(np.unique(labels)) != 2:
        raise ValueError(f"Both classes must occur among the labels; found only {np.unique(labels).tolist()}.")
    called = scores >= 0.5
    return {
        "loss": float(log_loss(labels, scores)),
        "accuracy": float(accuracy_score(labels, called)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, called)),
        "auroc": float(roc_auc_score(labels, scores)),
        "sensitivity": float(recall_score(labels, called, pos_label=1)),
        "specificity": float(recall_score(labels, called, pos_label=0)),
        "images": len(labels),
    }


def multiclass_metrics(labels: np.ndarray, scores: np.ndarray) -> Figures:
    """Loss, accuracy, balanced accuracy, AUROC (mean over the classes, each against the rest) and the number of images.

    Args:
        labels: 0 to classes - 1, (images,); every class must occur.
        scores: probabilities, (images, classes).

    Raises:
        ValueError: if a class does not occur.
    """
    if absent := sorted(set(range(scores.shape[1])) - set(labels.tolist())):
        raise ValueError(f"Every class must occur among the labels; {absent} do not.")
    called = scores.argmax(axis=1)
    return {
        "loss": float(log_loss(labels, scores)),
        "accuracy": float(accuracy_score(labels, called)),
        "balanced_accuracy": float(balanced_accuracy_score(labels, called)),
        "auroc": float(roc_auc_score(labels, scores, multi_class="ovr")),
        "images": len(labels),
    }


def multilabel_metrics(labels: np.ndarray, scores: np.ndarray, names: list[str]) -> Figures:
    """Loss, the mean AUROC, and the AUROC of each finding, from the images where the finding is known.

    Args:
        labels: 1, 0, or NaN for unknown, (images, findings).
        scores: probabilities, (images, findings).
        names: the findings.

    Returns:
        loss (mean negative log-likelihood over the known labels, nats), mean_auroc, one `auroc <finding>` each, images.
        A finding that is nowhere present or nowhere absent has no AUROC: None, and it does not enter the mean, which is
        None if no finding has one.
    """
    known = ~np.isnan(labels)
    aurocs: dict[str, float | None] = {}
    for column, name in enumerate(names):
        seen = labels[known[:, column], column]
        both = len(np.unique(seen)) == 2
        aurocs[f"auroc {name}"] = float(roc_auc_score(seen, scores[known[:, column], column])) if both else None
    defined = [value for value in aurocs.values() if value is not None]
    return {
        "loss": float(log_loss(labels[known], scores[known], labels=[0, 1])) if known.any() else None,
        "mean_auroc": float(np.mean(defined)) if defined else None,
        **aurocs,
        "images": len(labels),
    }
