"""Figures for a two-class model, from scikit-learn."""

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


def positive_scores(logits: Tensor) -> np.ndarray:
    """Probability of the positive class (index 1), float64 (images,), from logits (images, 2)."""
    return logits.double().softmax(dim=1)[:, 1].numpy()


def binary_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
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
