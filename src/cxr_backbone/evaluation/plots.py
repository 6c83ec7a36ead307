"""Pictures of a run and of what a model said. Needs matplotlib: pip install 'cxr-backbone[report]'.

Colours are those of Okabe & Ito ("Color Universal Design", 2008), which the colour-blind can tell apart; line styles
and markers say the same once more. Every figure is legible at a width of 600 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from cxr_backbone.evaluation.bootstrap import PatientBootstrap
from cxr_backbone.evaluation.calibration import adaptive_bins, reliability
from cxr_backbone.evaluation.operating_points import at_operating_point
from cxr_backbone.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from cxr_backbone.evaluation.saliency import SalientFilm

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
OPACITY = 0.65  # of a Grad-CAM map where it is strongest

Style = dict[str, Any]


def learning_curves(log: list[dict[str, Any]], overfitting: Mapping[str, Any] | None) -> Figure:
    """Loss in both phases, side by side on one scale; what was chosen in each has a ring.

    Left, the frozen phase: training and validation loss of the heads that were tried, in their order. Right, the
    fine-tuning phase: the loss of each step and, at each checkpoint, the mean of the steps since the one before (both
    on augmented images and smoothed labels, so they may lie above all others), and the validation loss. With
    `overfitting` the training and the test loss of each checkpoint stand beside it, all on images as they are.

    Args:
        log: the lines of a finished run's log.jsonl, oldest first.
        overfitting: of metrics.json, None if it has none.
    """
    figure = _figure(height=4.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    _draw_frozen_phase(left, [line for line in log if line["phase"] == "frozen"])
    _draw_fine_tuning(right, [line for line in log if line["phase"] == "fine_tuning"], overfitting)
    left.set(title="frozen phase", xlabel="L2 penalty", ylabel="loss (nats)", yscale="log")
    right.set(title="fine-tuning phase", xlabel="epochs since the switch")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    _finish(figure, [left, right], columns=3)
    return figure


def roc_and_precision_recall(
    predictions_by_model: Mapping[str, Predictions], target: str, operating_points: Mapping[str, Any], *, resamples: int
) -> Figure:
    """ROC and precision-recall curve of each model with its 95 % band, and the last model's operating points on them.

    Args:
        predictions_by_model: one or two, on the same films; the last is drawn strongest.
        target: what is asked; films with it and films without it must both occur.
        operating_points: the last model's, of this target: {name: {"threshold": ...}}.
        resamples: of the patients, for the bands.

    Raises:
        ValueError: if one of the two kinds of film does not occur.
    """
    figure = _figure(height=4.7)
    roc, precision_recall = figure.subplots(1, 2)
    styles = [{"color": ORANGE, "linestyle": "--", "linewidth": 1.3}, {"color": BLUE, "linewidth": 1.8}]
    for (name, predictions), style in zip(
        predictions_by_model.items(), styles[-len(predictions_by_model) :], strict=True
    ):
        _draw_curves(roc, precision_recall, name, predictions, target, style, resamples)
    _draw_operating_points(roc, precision_recall, predictions.question(target), operating_points)
    roc.plot([0, 1], [0, 1], **_CHANCE)
    precision_recall.axhline(predictions.question(target)[1].mean(), **_CHANCE)
    figure.suptitle(target, fontsize=11)
    roc.set(title="ROC", xlabel="1 − specificity", ylabel="sensitivity")
    precision_recall.set(title="precision-recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    for axes in (roc, precision_recall):
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    _finish(figure, [roc, precision_recall], columns=2)
    return figure


def reliability_diagram(before: Predictions | None, after: Predictions, target: str) -> Figure:
    """How often a film is positive, against how often its score says so, in bins of equally many films; under it, how
    many films have which score.

    Args:
        before: the model without its temperature; None if it has none.
        after: the model as it is.
        target: what is asked.
    """
    figure = _figure(height=5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    stages = [("calibrated" if before else "as it is", after, BLUE, "-", "o")]
    if before:
        stages.insert(0, ("before temperature scaling", before, ORANGE, "--", "s"))
    highest = max(predictions.question(target)[2].max() for _, predictions, *_ in stages)
    for name, predictions, color, line, marker in stages:
        _, truth, scores = predictions.question(target)
        means, shares, _ = reliability(truth, scores, adaptive_bins(scores))
        upper.plot(means, shares, color=color, linestyle=line, marker=marker, markersize=5, label=name)
        lower.hist(scores, _bins(highest), color=color, linestyle=line, linewidth=1.4, histtype="step")
    upper.plot([0, highest], [0, highest], **_CHANCE, label="score = share")
    upper.set(ylabel=f"share of films with\n{target}")
    lower.set(xlabel=f"score of {target} (probability)", ylabel="films")
    lower.set_yscale("symlog", linthresh=1)  # bins may be empty
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.yaxis.set_minor_formatter(NullFormatter())
    _finish(figure, [upper], columns=3)
    return figure


def score_histograms(predictions: Predictions, target: str, operating_points: Mapping[str, Any]) -> Figure:
    """The scores of films with the target and of films without it, each as shares of its kind; thresholds as lines.

    Args:
        predictions: of one model.
        target: what is asked.
        operating_points: of this target: {name: {"threshold": ...}}.
    """
    figure = _figure(height=4.2)
    axes = figure.add_subplot()
    _, truth, scores = predictions.question(target)
    without: Style = {"color": SKY, "alpha": 0.7, "label": f"not {target} ({(~truth).sum():,} films)"}
    with_it: Style = {"color": VERMILION, "hatch": "///", "linewidth": 1.5, "histtype": "step"}
    for these, style in ((~truth, without), (truth, with_it | {"label": f"{target} ({truth.sum():,} films)"})):
        if these.any():
            axes.hist(scores[these], _bins(scores.max()), weights=np.full(these.sum(), 100 / these.sum()), **style)
    lines = ("-", "--", "-.", ":")
    for (point, its), line in zip(operating_points.items(), lines, strict=False):
        label = f"{point}: {its['threshold']:.3f}"
        axes.axvline(its["threshold"], color=BLACK, linestyle=line, linewidth=1.2, label=label)
    axes.set(xlabel=f"score of {target} (probability)", ylabel="share of the films of its kind (%)")
    _finish(figure, [axes], columns=2)
    return figure


def confusion_matrices(matrices: Mapping[str, list[list[int]]], names: list[str]) -> Figure:
    """Films by what is true (rows) and what was called (columns): how many, and which share of the row.

    Args:
        matrices: {title: (classes, classes)}.
        names: of the classes.
    """
    columns = min(len(matrices), 3 if len(names) == 2 else 1)
    rows = -(-len(matrices) // columns)
    side = 2.4 if len(names) == 2 else 1.5 + 0.7 * len(names)
    figure = Figure(figsize=(max(columns * side, 4), rows * side), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=False):
        _draw_matrix(axes, np.array(matrix, dtype=int), names)
        axes.set_title(title, fontsize=10)
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    return figure


def inside_outside(results: Mapping[str, Mapping[str, Any]], target: str) -> Figure:
    """AUROC, and sensitivity and specificity at each operating point, of several splits side by side, with intervals.

    Args:
        results: what metrics.json says of each split, {split: result}. A figure that is not defined is left out.
        target: what is asked.
    """
    by_split = {split: _main_figures(result["targets"][target]) for split, result in results.items()}
    names = list(next(iter(by_split.values())))
    figure = _figure(height=1.4 + 0.5 * len(names))
    axes = figure.add_subplot()
    styles = [(BLUE, "o"), (VERMILION, "s"), (GREEN, "D"), (PURPLE, "^"), (ORANGE, "v"), (BLACK, "P")]
    for index, ((split, figures), (color, marker)) in enumerate(zip(by_split.items(), styles, strict=False)):
        for row, name in enumerate(names):
            value, low, high = (np.nan if figures[name][key] is None else figures[name][key] for key in _INTERVAL)
            place = row + 0.6 * ((index + 0.5) / len(by_split) - 0.5)  # splits lie side by side
            axes.plot([low, high], [place, place], color=color, linewidth=1.6)
            axes.plot(value, place, marker, color=color, markersize=6, label=split)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(target, fontsize=11)
    axes.set(xlim=(-0.03, 1.03), xlabel="value, with its 95 % interval", ylabel="figure")
    axes.invert_yaxis()
    _finish(figure, [axes], columns=3)
    return figure


_INTERVAL = ("value", "low", "high")
_CHANCE: Style = {"color": "gray", "linestyle": ":", "linewidth": 0.9}
_TRAIN: Style = {"color": ORANGE, "linestyle": "--", "marker": "s", "markersize": 4, "label": "train"}
_VALIDATION: Style = {"color": BLUE, "marker": "o", "markersize": 4, "label": "validation"}
_TEST: Style = {"color": GREEN, "linestyle": "-.", "marker": "D", "markersize": 4, "label": "test"}
_STEPS: Style = {"color": "gray", "alpha": 0.5, "linewidth": 0.6, "label": "each step (augmented)"}
_MEAN: Style = {"color": "dimgray", "linestyle": ":", "marker": "_", "label": "mean of the steps"}
_RING: Style = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": BLACK, "linestyle": "none"}
_CHOSEN = _RING | {"label": "chosen"}


def films_with_maps(films: Sequence[SalientFilm]) -> Figure:
    """A row of films as the model sees them, and under each what spoke for its answer (`overlay`)."""
    figure = _figure(height=3.05)
    panels = figure.subplots(2, len(films), squeeze=False)
    for (above, below), film in zip(panels.T, films, strict=True):
        _draw_film(above, film.pixels)
        above.set_title(f"{film.kind}\ntrue: {film.truth}\ncalled: {film.called}", fontsize=7.5)
        _draw_film(below, overlay(film))
        below.set_xlabel(f"score {film.score:.3f}", fontsize=7.5)
    return figure


def overlay(film: SalientFilm) -> np.ndarray:
    """The film with its map laid over it in colour, uint8 (size, size, 3)."""
    strength = OPACITY * film.map[..., np.newaxis]  # (size, size, 1)
    grey = film.pixels[..., np.newaxis]
    colors = 255 * colormaps["inferno"](film.map)[..., :3]  # (size, size, 3)
    return (grey * (1 - strength) + colors * strength).round().astype(np.uint8)


def _figure(height: float) -> Figure:
    return Figure(figsize=(7, height), layout="constrained")  # inches


def _draw_frozen_phase(axes: Axes, heads: list[dict[str, Any]]) -> None:
    if not heads:
        return
    tried, losses = range(len(heads)), [head["validation_loss"] for head in heads]
    axes.plot(tried, [head["train_loss"] for head in heads], **_TRAIN)
    axes.plot(tried, losses, **_VALIDATION)
    axes.plot(np.argmin(losses), min(losses), **_CHOSEN)
    axes.set_xticks(tried, [f"{head['l2']:g}" for head in heads], rotation=45)


def _draw_fine_tuning(axes: Axes, lines: list[dict[str, Any]], overfitting: Mapping[str, Any] | None) -> None:
    checkpoints = [line for line in lines if "after_steps" in line]
    if not checkpoints:  # a run that was stopped before
        return
    epochs_a_step = checkpoints[-1]["epoch"] / max(checkpoints[-1]["after_steps"], 1)
    steps = [line for line in lines if "step" in line]
    axes.plot([line["step"] * epochs_a_step for line in steps], [line["train_loss"] for line in steps], **_STEPS)
    trained = [line for line in checkpoints if line["train_loss"] is not None]
    axes.plot([line["epoch"] for line in trained], [line["train_loss"] for line in trained], **_MEAN)
    curves = [(_VALIDATION, "validation_loss")]
    chosen = min(checkpoints, key=lambda line: line.get("perturbed_loss", line["validation_loss"]))
    if overfitting is not None:
        checkpoints, curves = overfitting["curve"], [(_TRAIN, "train"), (_VALIDATION, "validation"), (_TEST, "test")]
        (chosen,) = (line for line in checkpoints if line["after_steps"] == overfitting["chosen"])
    for style, key in curves:
        axes.plot([line["epoch"] for line in checkpoints], [line[key] for line in checkpoints], **style)
    axes.plot(chosen["epoch"], chosen["validation_loss" if overfitting is None else "validation"], **_CHOSEN)
    axes.axvline(0, color=BLACK, linewidth=1, linestyle=":")
    axes.text(0, 0.98, " switch", transform=axes.get_xaxis_transform(), va="top", fontsize=9)


def _draw_curves(
    roc: Axes, precision_recall: Axes, name: str, predictions: Predictions, target: str, style: Style, resamples: int
) -> None:
    films, truth, scores = predictions.question(target)
    bands = PatientBootstrap(predictions.patient_ids, resamples=resamples).curve_bands(films, truth, scores)
    shade: Style = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
    roc.fill_between(bands.false_positive_rate, bands.sensitivity_low, bands.sensitivity_high, **shade)
    precision_recall.fill_between(bands.recall, bands.precision_low, bands.precision_high, **shade)
    false_positive_rate, sensitivity, _ = roc_curve(truth, scores)
    precision, recall = (values[:-1] for values in precision_recall_curve(truth, scores)[:2])  # the last is made up
    auroc, auprc = roc_auc_score(truth, scores), average_precision_score(truth, scores)
    roc.plot(false_positive_rate, sensitivity, **style, label=f"{name}: AUROC {auroc:.3f}, AUPRC {auprc:.3f}")
    precision_recall.plot(recall, precision, **style, drawstyle="steps-post")


def _draw_operating_points(
    roc: Axes,
    precision_recall: Axes,
    question: tuple[np.ndarray, np.ndarray, np.ndarray],
    operating_points: Mapping[str, Any],
) -> None:
    _, truth, scores = question
    for (point, its), marker in zip(operating_points.items(), "osD^", strict=False):
        tn, fp, fn, tp = at_operating_point(truth, scores, its["threshold"])
        place: Style = _RING | {"marker": marker, "markersize": 8, "zorder": 5}
        roc.plot(fp / (fp + tn), tp / (tp + fn), **place, label=point)
        if tp + fp:  # else there is no precision
            precision_recall.plot(tp / (tp + fn), tp / (tp + fp), **place)


def _draw_film(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])


def _draw_matrix(axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shares[row, column] > 0.5 else BLACK
        text = f"{count:,}\n{shares[row, column]:.0%}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=10)
    two_classes = len(names) == 2
    axes.set_xticks(range(len(names)), names, rotation=0 if two_classes else 90)
    axes.set_yticks(range(len(names)), names, rotation=90 if two_classes else 0, va="center")
    axes.set(xlabel="called", ylabel="true")


def _main_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    figures = {"AUROC": result["figures"]["auroc"]}
    for point, at_point in result["operating_points"].items():
        figures |= {f"{name}\nat {point}": at_point[name] for name in ("sensitivity", "specificity")}
    return figures


def _bins(highest_score: float) -> list[float]:
    """Edges; of rare findings even the highest score is far from 1."""
    return np.linspace(0, max(highest_score, 0.05), 26).tolist()


def _finish(figure: Figure, panels: list[Axes], columns: int) -> None:
    """A faint grid, and one legend for all panels with each label once."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        axes.grid(alpha=0.25)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5
    )
