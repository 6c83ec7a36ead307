"""From predictions to metrics.json: figures with intervals, of each model and split, and of two models on one split.

A figure is {"value", "low", "high"}: its estimate and the limits of a 95 % interval from resampled patients. What is
not defined is None, and `undefined` says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest

from cxr_backbone.configuration_cxr_inception import CXRInceptionConfig
from cxr_backbone.evaluation.bootstrap import MIN_PATIENTS, RESAMPLES, PatientBootstrap, interval, number_patients
from cxr_backbone.evaluation.calibration import (
    adaptive_bins,
    calibration_figures,
    calibration_question,
    calibration_terms,
)
from cxr_backbone.evaluation.delong import delong_test
from cxr_backbone.evaluation.metrics import classification_figures, confusion_figures, counts_figures
from cxr_backbone.evaluation.operating_points import POINTS, at_operating_point
from cxr_backbone.evaluation.predictions import Predictions

Figure = dict[str, Any]
Samples = dict[str, np.ndarray]  # a figure's name: its value in each resample


def examine(
    models: Mapping[str, CXRInceptionConfig],
    predictions: Mapping[str, Mapping[str, Predictions]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """What metrics.json says of one model, or of two on the same films.

    Args:
        models: their configs, with temperature and operating points; the last is the one that counts.
        predictions: by model and split.
        resamples, seed: of the patients.
    """
    settings: dict[str, Any] = {"resamples": resamples, "seed": seed}
    metrics: dict[str, Any] = {"resamples": resamples, "models": {}}
    for name, config in models.items():
        decided: dict[str, Any] = {
            "temperature": config.temperature,
            "operating_points": config.operating_points or {},
        }
        splits = {split: split_results(said, **decided, **settings) for split, said in predictions[name].items()}
        metrics["models"][name] = {**decided, "splits": splits}
    if len(models) == 2:
        first, last = predictions.values()
        metrics["comparison"] = {split: compare(first[split], last[split], **settings) for split in last}
    return metrics


def split_results(
    predictions: Predictions,
    *,
    temperature: float | list[float] | None,
    operating_points: Mapping[str, Mapping[str, Mapping[str, float]]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """All that metrics.json says of one model on one split.

    Args:
        predictions: of the model as it is saved.
        temperature: what its logits were divided by (`config.temperature`); None if nothing was.
        operating_points: `config.operating_points`.
        resamples, seed: of the patients.

    Returns:
        films, patients (None if unknown), figures of the whole, targets (for each label that is asked for: films,
        positives, figures, operating points with their confusion matrix [[tn, fp], [fn, tp]], subgroups),
        confusion_matrix (rows truth, columns the label with the highest score; None for findings), calibration before
        and after the temperature.
    """
    bootstrap = PatientBootstrap(predictions.patient_ids, resamples=resamples, seed=seed)
    raw = uncalibrated(predictions, temperature) if temperature is not None else None
    return {
        "films": len(predictions),
        "patients": _num_patients(predictions),
        "figures": _figures(predictions, bootstrap),
        "targets": {
            target: _target_results(predictions, target, operating_points.get(target, {}), bootstrap)
            for target in predictions.targets
        },
        "confusion_matrix": None
        if predictions.is_multi_label
        else _confusion(predictions).sum(axis=0).astype(int).tolist(),
        "calibration": {
            "before": None if raw is None else _calibration(raw, bootstrap),
            "after": _calibration(predictions, bootstrap),
        },
    }


def compare(first: Predictions, last: Predictions, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Two models on the same films, film by film: how much more the last one has of each figure, and DeLong's test.

    Raises:
        ValueError: the films, their order or their labels differ.
    """
    if first.image_ids != last.image_ids or first.names != last.names:
        raise ValueError("Two models can be compared on the same films and labels only, in the same order.")
    if not np.array_equal(first.labels, last.labels, equal_nan=True):
        raise ValueError("The labels of the films that two models are compared on differ.")
    bootstrap = PatientBootstrap(last.patient_ids, resamples=resamples, seed=seed)
    values = [_values(one) for one in (first, last)]
    samples = [_samples(one, bootstrap) for one in (first, last)]
    differences = {}
    for name, value in values[1].items():
        other = values[0][name]
        difference = None if value is None or other is None else value - other
        of_samples = samples[1][name] - samples[0][name]
        if name == "ece" and difference is not None:
            of_samples = 2 * difference - of_samples  # as in _reflected
        differences[name] = interval(difference, of_samples, bootstrap.num_patients, undefined=_LACKING)
    return {
        "films": len(last),
        "patients": _num_patients(last),
        "figures": differences,
        "delong": {target: _delong(first, last, target) for target in last.targets},
    }


def uncalibrated(predictions: Predictions, temperature: float | list[float]) -> Predictions:
    """The same predictions before a temperature divided the logits."""
    return replace(predictions, logits=predictions.logits * np.asarray(temperature))


_LACKING = "a class does not occur"
_UNKNOWN = "the label is known of none of its films"


def _num_patients(predictions: Predictions) -> int | None:
    """None if some are not known."""
    return None if None in predictions.patient_ids else len(set(predictions.patient_ids))


def _figures(predictions: Predictions, bootstrap: PatientBootstrap) -> dict[str, Figure]:
    """The figures of the whole."""
    values, samples = _values(predictions), _samples(predictions, bootstrap)
    samples["ece"] = _reflected(samples["ece"], values["ece"] or 0)
    return {
        name: interval(value, samples[name], bootstrap.num_patients, undefined=_LACKING)
        for name, value in values.items()
    }


def _values(predictions: Predictions) -> dict[str, float | None]:
    figures = classification_figures(predictions.labels, predictions.scores)
    calibration = calibration_figures(_whole_terms(predictions).sum(axis=0))
    return {**figures, "ece": float(calibration["ece"]), "brier": float(calibration["brier"])}


def _samples(predictions: Predictions, bootstrap: PatientBootstrap) -> Samples:
    """The same figures as `_values`, of each resample."""
    calibration = calibration_figures(bootstrap.sums(_whole_terms(predictions)))
    samples = {"loss": calibration["nll"], "ece": calibration["ece"], "brier": calibration["brier"]}
    questions = [predictions.question(target) for target in predictions.targets]
    if predictions.is_multi_label:
        auroc_micro, auprc_micro = bootstrap.rank_figures(*map(np.concatenate, zip(*questions, strict=True)))
        # As in the figures themselves, a finding that is in all films or in none has no part in the mean.
        questions = [question for question in questions if len(set(question[1])) == 2]
        # Nor has one in a resample that lacks its few positive films.
        auroc_macro, auprc_macro = _mean_rank_figures(questions, bootstrap, skip_undefined=True)
        return samples | {
            "auroc_macro": auroc_macro,
            "auroc_micro": auroc_micro,
            "auprc_macro": auprc_macro,
            "auprc_micro": auprc_micro,
        }
    confusion = _confusion(predictions)  # (films, classes, classes)
    counts = bootstrap.sums(confusion.reshape(len(predictions), -1)).reshape(-1, *confusion.shape[1:])
    auroc, auprc = _mean_rank_figures(questions, bootstrap)
    return samples | confusion_figures(counts) | {"auroc": auroc, "auprc": auprc}


def _mean_rank_figures(
    questions: Sequence[tuple[np.ndarray, ...]], bootstrap: PatientBootstrap, *, skip_undefined: bool = False
) -> np.ndarray:
    """AUROC and AUPRC (2, resamples), the mean over the questions, or over those that are defined in the resample; NaN
    if there is none."""
    if not questions:
        return np.full((2, bootstrap.resamples), np.nan)
    figures = np.array([bootstrap.rank_figures(*question) for question in questions])  # (questions, 2, resamples)
    defined = np.isfinite(figures) if skip_undefined else np.ones_like(figures, dtype=bool)
    with np.errstate(invalid="ignore"):
        return np.where(defined, figures, 0).sum(axis=0) / defined.sum(axis=0)


def _target_results(
    predictions: Predictions, target: str, points: Mapping[str, Mapping[str, float]], bootstrap: PatientBootstrap
) -> dict[str, Any]:
    films, truth, scores = predictions.question(target)
    groups = {
        column: {
            value: _subgroup(predictions, target, points, np.array([cell == value for cell in cells]), bootstrap)
            for value in sorted({cell for cell in cells if cell is not None})
        }
        for column, cells in predictions.groups.items()
    }
    return {
        "films": len(films),
        "positives": int(truth.sum()),
        "figures": _target_figures(films, truth, scores, bootstrap),
        "operating_points": _at_points(films, truth, scores, points, bootstrap),
        "subgroups": groups,
    }


def _subgroup(
    predictions: Predictions,
    target: str,
    points: Mapping[str, Mapping[str, float]],
    members: np.ndarray,
    bootstrap: PatientBootstrap,
) -> dict[str, Any]:
    """The figures of the films in a subgroup. One that only ill people can be in, a kind of the illness, is compared
    with all who are not ill; and the other way round."""
    films, truth, scores = predictions.question(target)
    chosen = members[films]
    compared_with = None
    if chosen.any() and len(set(truth[chosen])) == 1:
        all_positive = bool(truth[chosen][0])
        compared_with = "all negatives" if all_positive else "all positives"
        chosen = chosen | (truth != all_positive)
    films, truth, scores = films[chosen], truth[chosen], scores[chosen]
    figures = _target_figures(films, truth, scores, bootstrap)
    at_points = _at_points(films, truth, scores, points, bootstrap)
    if compared_with is not None:  # the others depend on how many of the other kind were added
        figures = {"auroc": figures["auroc"]}
        own = "sensitivity" if compared_with == "all negatives" else "specificity"
        at_points = {name: {key: its[key] for key in ("threshold", own)} for name, its in at_points.items()}
    return {
        "films": int(members.sum()),
        "positives": int((truth & members[films]).sum()),
        "compared_with": compared_with,
        "figures": figures,
        "operating_points": at_points,
    }


def _target_figures(
    films: np.ndarray, truth: np.ndarray, scores: np.ndarray, bootstrap: PatientBootstrap
) -> dict[str, Figure]:
    if len(films) == 0:
        nothing = np.full(bootstrap.resamples, np.nan)
        return {
            name: interval(None, nothing, 0, undefined=_UNKNOWN) for name in ("auroc", "auprc", "ece", "brier", "nll")
        }
    patients = bootstrap.count_patients(films)
    both = np.stack([1 - scores, scores], axis=1)
    values = classification_figures(truth.astype(int), both)
    auroc, auprc = bootstrap.rank_figures(films, truth, scores)
    figures = {
        "auroc": interval(values["auroc"], auroc, patients, undefined=_LACKING),
        "auprc": interval(values["auprc"], auprc, patients, undefined=_LACKING),
    }
    terms = calibration_terms(truth, scores, adaptive_bins(scores))
    return figures | _calibration_intervals(terms, films, bootstrap)


def _at_points(
    films: np.ndarray,
    truth: np.ndarray,
    scores: np.ndarray,
    points: Mapping[str, Mapping[str, float]],
    bootstrap: PatientBootstrap,
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if len(films) == 0:
        return results
    for name in [*filter(points.__contains__, POINTS), *sorted(points.keys() - set(POINTS))]:
        threshold = points[name]["threshold"]
        tn, fp, fn, tp = at_operating_point(truth, scores, threshold)
        called = scores >= threshold
        outcomes = np.stack([~truth & ~called, ~truth & called, truth & ~called, truth & called], axis=1)
        samples = counts_figures(*bootstrap.sums(_spread(outcomes, films, bootstrap)).T)
        values = counts_figures(*np.array([tn, fp, fn, tp], dtype=float))
        counted = {"sensitivity": truth, "specificity": ~truth, "ppv": called, "npv": ~called}
        figures = {}
        for figure, value in values.items():
            patients = bootstrap.count_patients(films[counted[figure]] if figure in counted else films)
            figures[figure] = interval(float(value), samples[figure], patients, undefined="no film to count")
            if figure in counted and value in (0, 1) and patients >= MIN_PATIENTS:
                # Resamples of patients without an error have none either; what binomial chance allows is known.
                exact = binomtest(int(value) * patients, patients).proportion_ci()
                figures[figure] = {"value": float(value), "low": float(exact.low), "high": float(exact.high)}
        results[name] = {"threshold": threshold, **figures, "confusion_matrix": [[tn, fp], [fn, tp]]}
    return results


def _calibration(predictions: Predictions, bootstrap: PatientBootstrap) -> dict[str, Figure]:
    return _calibration_intervals(_whole_terms(predictions), np.arange(len(predictions)), bootstrap)


def _calibration_intervals(terms: np.ndarray, films: np.ndarray, bootstrap: PatientBootstrap) -> dict[str, Figure]:
    values = calibration_figures(terms.sum(axis=0))
    samples = calibration_figures(bootstrap.sums(_spread(terms, films, bootstrap)))
    samples["ece"] = _reflected(samples["ece"], float(values["ece"]))
    patients = bootstrap.count_patients(films)
    return {
        name: interval(float(value), samples[name], patients, undefined="nothing is known")
        for name, value in values.items()
    }


def _whole_terms(predictions: Predictions) -> np.ndarray:
    """Calibration terms (films, bins + 3) of what `calibration_question` asks, with the loss of the true label."""
    films, truth, scores = calibration_question(predictions.labels, predictions.scores)
    terms = _add_up(calibration_terms(truth, scores, adaptive_bins(scores)), films, len(predictions))
    if not predictions.is_multi_label and len(predictions.names) > 2:
        # Of several classes the question is about the called one, and its likelihood is not the loss.
        terms[:, -2] = -log_softmax(predictions.logits, axis=1)[np.arange(len(predictions)), predictions.labels]
    return terms


def _reflected(samples: np.ndarray, value: float) -> np.ndarray:
    """ECE adds up absolute errors, so noise makes it larger: that of the films than the truth, and that of a resample
    than that of the films, by about as much. So the distances are taken the other way round (the basic bootstrap;
    Davison & Hinkley 1997, section 5.2), and the interval may lie below the value."""
    return np.maximum(2 * value - samples, 0)


def _spread(values: np.ndarray, films: np.ndarray, bootstrap: PatientBootstrap) -> np.ndarray:
    """Values of some films as rows for all of them; 0 for the others."""
    return _add_up(values.astype(float), films, bootstrap.num_films)


def _add_up(values: np.ndarray, films: np.ndarray, num_films: int) -> np.ndarray:
    sums = np.zeros((num_films, values.shape[1]))
    np.add.at(sums, films, values)
    return sums


def _confusion(predictions: Predictions) -> np.ndarray:
    """One-hot (films, classes, classes): truth, and what has the highest score."""
    classes = len(predictions.names)
    confusion = np.zeros((len(predictions), classes, classes))
    confusion[np.arange(len(predictions)), predictions.labels, predictions.scores.argmax(axis=1)] = 1
    return confusion


def _delong(first: Predictions, last: Predictions, target: str) -> dict[str, Any]:
    films, truth, scores = first.question(target)
    if len(set(truth)) < 2:
        return {"undefined": _LACKING}
    patients = [last.patient_ids[film] for film in films]
    result = delong_test(truth, scores, last.question(target)[2], patients)
    if (number := int(number_patients(patients).max()) + 1) < MIN_PATIENTS:
        result |= dict.fromkeys(("low", "high", "z", "p")) | {"undefined": f"only {number} patients, of {MIN_PATIENTS}"}
    return result
