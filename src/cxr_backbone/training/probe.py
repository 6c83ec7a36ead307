"""A linear probe: what logistic regression makes of features that nobody trains any more."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn

STRENGTHS = np.logspace(-5, 1, 13)  # C of scikit-learn, for features of unit variance
FOLDS = 5


def fit_probe(
    features: Tensor, labels: Tensor, patient_ids: Sequence[str | None], *, seed: int = 0
) -> tuple[nn.Linear, list[float]]:
    """Logistic regression on frozen features; C is chosen by cross-validation with each patient in one fold.

    Args:
        features: (images, width), float32.
        labels: class indices (images,), or findings (images, findings): 1, 0, or NaN for unknown.
        patient_ids: None for an unknown patient, who is taken for one of their own.
        seed: of the folds.

    Returns:
        A linear layer from features to logits, as `CXRInceptionHead` has one (of two classes, the second's logit minus
        the first's is the regression's), and C, for each finding or once.

    Raises:
        ValueError: a class, or one side of a finding, is seen in fewer patients than there are folds.
    """
    patients = np.array([patient or f"unknown {row}" for row, patient in enumerate(patient_ids)])
    # One scale for all: a scale for each would blow up those that hardly vary.
    mean = features.mean(dim=0)
    scale = (features - mean).square().mean().sqrt()
    scaled = ((features - mean) / scale).numpy()
    truth = labels.numpy()
    questions = [(np.ones(len(truth), dtype=bool), truth)]
    if truth.ndim == 2:
        questions = [(~np.isnan(column), column) for column in truth.T]
    weights, biases, strengths = [], [], []
    for known, answers in questions:
        fitted = _fit(scaled[known], answers[known].astype(int), patients[known], seed)
        weight, bias = fitted.coef_, fitted.intercept_  # (1, width) for two classes, else (classes, width)
        if truth.ndim == 1 and len(weight) == 1:
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        weights.append(weight)
        biases.append(bias)
        strengths.append(float(fitted.C_))
    weight = torch.from_numpy(np.concatenate(weights)).float() / scale
    layer = nn.Linear(features.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.from_numpy(np.concatenate(biases)).float() - weight @ mean)
    return layer, strengths


def _fit(features: np.ndarray, answers: np.ndarray, patients: np.ndarray, seed: int) -> LogisticRegressionCV:
    for answer in np.unique(answers):
        if (seen := len(np.unique(patients[answers == answer]))) < FOLDS:
            raise ValueError(f"label {answer} is seen in {seen} patients; {FOLDS} folds need one each.")
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(features, answers, patients)
    probe = LogisticRegressionCV(
        Cs=STRENGTHS,
        l1_ratios=(0,),
        cv=list(folds),
        scoring="neg_log_loss",
        max_iter=1000,
        use_legacy_attributes=False,
    )
    return probe.fit(features, answers)
