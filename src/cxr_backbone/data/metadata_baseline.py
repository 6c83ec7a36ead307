"""How well facts about a file, which should not matter, tell the label of the film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

# What raises the alarm: a fact that tells the label this well, and not by chance. (Size and brightness always tell a
# little, since sick people are X-rayed otherwise than healthy ones.)
ALARM_AUROC = 0.65
ALARM_P = 0.01

NUM_FOLDS = 5
MIN_PATIENTS_A_SIDE = 20  # with and without the label: fewer say nothing about five facts together
MAX_FILMS_A_SIDE = 2_000  # the standard error of the AUROC is then below .01, and more films only take longer


def metadata_baseline(
    facts: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], patients: Sequence[str]
) -> dict[str, Any]:
    """AUROC of each fact, and of all together, for the label that it tells best.

    Each label is told from all the others. A fact alone may point either way, so its AUROC is .5 or more. `combined`
    is a gradient-boosted model of all facts (the sizes that one machine makes are values, not a trend, so a linear
    model would miss them), cross-validated by patient, on at most 2,000 films with the label and as many without;
    its AUROC is out of fold. It is left out where no label has 20 patients with and 20 without it.

    p is that of the Mann-Whitney test, multiplied by the number of tests made here (Bonferroni). It takes the films
    of a patient for independent, so it is a little too small where patients have many films.

    Args:
        facts: float array (films,) for each fact.
        targets: for each label, float array (films,): 1, 0, or NaN where it is not known (left out).
        patients: the patient of each film.

    Returns:
        `facts`: for each fact that could be tried `auroc`, `p` and the `label` it tells; `alarm`: the facts whose
        AUROC is .65 or more with p below .01.
    """
    tests = []
    for label, target in targets.items():
        known = np.flatnonzero(~np.isnan(target))
        shown, groups = target[known] == 1, np.asarray(patients)[known]
        if shown.all() or not shown.any():
            continue
        columns = np.stack([values[known] for values in facts.values()], axis=1)
        for fact, column in zip(facts, columns.T, strict=True):
            auroc, p = _auroc(column, shown)
            tests.append((fact, label, max(auroc, 1 - auroc), p))
        chosen = _at_most(MAX_FILMS_A_SIDE, shown)
        columns, shown, groups = columns[chosen], shown[chosen], groups[chosen]
        if min(len(np.unique(groups[shown])), len(np.unique(groups[~shown]))) >= MIN_PATIENTS_A_SIDE:
            tests.append(("combined", label, *_combined_auroc(columns, shown, groups)))

    best: dict[str, dict[str, Any]] = {}
    for fact, label, auroc, p in tests:
        result = {"auroc": round(auroc, 4), "p": min(1.0, p * len(tests)), "label": label}
        if fact not in best or (_alarms(result), auroc) > (_alarms(best[fact]), best[fact]["auroc"]):
            best[fact] = result
    return {"facts": best, "alarm": [fact for fact, result in best.items() if _alarms(result)]}


def _alarms(result: Mapping[str, Any]) -> bool:
    return result["auroc"] >= ALARM_AUROC and result["p"] < ALARM_P


def _auroc(values: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
    """AUROC and p: the Mann-Whitney statistic counts the pairs that `values` puts in the right order."""
    if (values == values[0]).all():
        return 0.5, 1.0
    test = mannwhitneyu(values[shown], values[~shown])
    return float(test.statistic / (shown.sum() * (~shown).sum())), float(test.pvalue)


def _at_most(number: int, shown: np.ndarray) -> np.ndarray:
    """Films by chance, so many of each side or all of them. (An AUROC does not depend on the shares of the sides.)"""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(np.flatnonzero(side))[:number] for side in (shown, ~shown)])


def _combined_auroc(columns: np.ndarray, shown: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    scores = cross_val_predict(
        # Its histogram sibling wants every core for films so few, and crawls where other programs have them.
        GradientBoostingClassifier(n_estimators=50, random_state=0),
        columns,
        shown,
        groups=groups,
        cv=StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=0),
        method="predict_proba",
    )[:, 1]
    return _auroc(scores, shown)
