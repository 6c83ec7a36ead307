"""An evaluation as one page with pictures. Needs matplotlib and captum: pip install 'cxr-backbone[report]'."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cxr_backbone.evaluation import plots
from cxr_backbone.evaluation.bootstrap import MAX_UNDEFINED, MIN_PATIENTS
from cxr_backbone.evaluation.calibration import NUM_BINS
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.evaluation.report import figure_name
from cxr_backbone.evaluation.results import uncalibrated
from cxr_backbone.evaluation.saliency import SalientFilm

MAIN_POINT = "youden"  # the operating point that is shown where there is room for one
SHOWN_TARGETS = 6  # in pictures; tables have all
SHOWN_FILM_SIZE = 224  # pixels
FILMS_IN_A_ROW = 2  # of each kind, in films.png
DPI = 150

Picture = dict[str, Any]  # the attributes of an <img>


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    predictions: Mapping[str, Mapping[str, Predictions]],
    *,
    log: list[dict[str, Any]],
    saliency: Sequence[SalientFilm],
) -> Path:
    """Write `report.html`, one file that needs nothing else (no network, no script), and `figures/*.png`.

    Of more than six targets, those with the most positive test films have pictures. Films stand in the page, and a row
    of them in `films.png` beside it, but not among the figures: whoever has no right to publish films has none to
    publish these two.

    Args:
        folder: is made if it is not there; a report that is there is replaced.
        metrics: the content of metrics.json. Every model has a split `test`; the last model is the one that counts.
        predictions: by model and split; what `metrics` comes from.
        log: the lines of a finished run's log.jsonl; empty if there was no training.
        saliency: test films, with maps of what the last model goes by; may be empty.

    Returns:
        The path of the page.

    Raises:
        OSError: a file can't be written.
    """
    *_, last = metrics["models"]
    test = predictions[last]["test"]
    targets = _shown_targets(test)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    page = _ENVIRONMENT.get_template("report_page.html").render(
        metrics=metrics,
        last=last,
        model=metrics["models"][last],
        external=[split for split in metrics["models"][last]["splits"] if split.startswith("external ")],
        is_multi_label=test.is_multi_label,
        names=test.names,
        all_targets=test.targets,
        shown_targets=targets,
        learning_curves=_learning_curves(figures, log, metrics.get("overfitting")),
        pictures=_target_pictures(figures, metrics, predictions, targets),
        confusion=_confusion(figures, metrics, targets, test),
        saliency=_film_rows(saliency),
        reasons=reasons,
        number_reason=lambda reason: _number(reason, reasons),
    )
    if saliency:
        _save(plots.films_with_maps(_first_of_each_kind(saliency)), folder / "films.png", "Films with Grad-CAM")
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _shown_targets(test: Predictions) -> list[str]:
    """Those with the most positive films, in the model's order; without any of one kind there is nothing to draw."""
    positives = {target: int(truth.sum()) for target in test.targets for truth in [test.question(target)[1]]}
    both = [target for target in test.targets if 0 < positives[target] < len(test.question(target)[0])]
    most = sorted(both, key=positives.__getitem__, reverse=True)[:SHOWN_TARGETS]
    return [target for target in both if target in most]


def _learning_curves(folder: Path, log: list[dict[str, Any]], overfitting: Mapping[str, Any] | None) -> Picture | None:
    if not log:
        return None
    alt = "Training and validation loss of the frozen phase and of the fine-tuning phase"
    return _save(plots.learning_curves(log, overfitting), folder / "learning_curves.png", alt)


def _target_pictures(
    folder: Path, metrics: Mapping[str, Any], predictions: Mapping[str, Mapping[str, Predictions]], targets: list[str]
) -> dict[str, list[Picture]]:
    """For each kind of picture, one of each target."""
    *_, (last, model) = metrics["models"].items()
    test = predictions[last]["test"]
    before = None if model["temperature"] is None else uncalibrated(test, model["temperature"])
    by_model = {_plain(name): splits["test"] for name, splits in predictions.items()}
    sides = {name: its for name, its in model["splits"].items() if name == "test" or name.startswith("external ")}
    pictures: dict[str, list[Picture]] = {"roc": [], "reliability": [], "scores": [], "inside_outside": []}
    for target in targets:
        points = model["splits"]["test"]["targets"][target]["operating_points"]
        drawn = {
            "roc": (
                plots.roc_and_precision_recall(by_model, target, points, resamples=metrics["resamples"]),
                "ROC and precision-recall curves",
            ),
            "reliability": (plots.reliability_diagram(before, test, target), "Reliability diagram"),
            "scores": (plots.score_histograms(test, target, points), "Histogram of scores"),
        }
        if len(sides) > 1:
            drawn["inside_outside"] = (plots.inside_outside(sides, target), "Test split and external films")
        for kind, (figure, what) in drawn.items():
            path = folder / f"{kind}{_suffix(target, test.targets)}.png"
            pictures[kind].append(_save(figure, path, f"{what}: {target}"))
    return pictures


def _confusion(folder: Path, metrics: Mapping[str, Any], targets: list[str], test: Predictions) -> Picture | None:
    """Of two classes at each operating point, of several classes for each model, of findings at the main one."""
    *_, model = metrics["models"].values()
    results = model["splits"]["test"]["targets"]
    matrices: dict[str, Any] = {}
    if test.is_multi_label:
        for target in targets:
            if at_point := results[target]["operating_points"].get(MAIN_POINT):
                matrices[f"{target}, {MAIN_POINT}"] = at_point["confusion_matrix"]
    elif len(test.names) == 2:
        matrices["highest score"] = model["splits"]["test"]["confusion_matrix"]
        points = results[test.targets[0]]["operating_points"]
        matrices |= {point: its["confusion_matrix"] for point, its in points.items()}
    else:
        matrices = {_plain(name): its["splits"]["test"]["confusion_matrix"] for name, its in metrics["models"].items()}
    if not matrices:
        return None
    figure = plots.confusion_matrices(matrices, ["absent", "present"] if test.is_multi_label else test.names)
    return _save(figure, folder / "confusion.png", "Confusion matrices")


def _first_of_each_kind(saliency: Sequence[SalientFilm]) -> list[SalientFilm]:
    counts: Counter[str] = Counter()
    row = []
    for film in saliency:
        counts[film.kind] += 1
        if counts[film.kind] <= FILMS_IN_A_ROW:
            row.append(film)
    return row


def _film_rows(saliency: Sequence[SalientFilm]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Films by target and kind, in the order given."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for film in saliency:
        with_map = _film_picture(plots.overlay(film), f"{film.image_id} with map")
        pictures = [_film_picture(film.pixels, film.image_id), with_map]
        entry = {"film": film, "pictures": pictures, "is_empty": not film.map.any()}
        rows.setdefault((film.target, film.kind), []).append(entry)
    return rows


def _film_picture(pixels: np.ndarray, alt: str) -> Picture:
    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN_FILM_SIZE, SHOWN_FILM_SIZE))
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return _picture(png.getvalue(), alt, image.width, image.height)


def _save(figure: Figure, path: Path, alt: str) -> Picture:
    figure.savefig(path, dpi=DPI)
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return _picture(path.read_bytes(), alt, width, height)


def _picture(png: bytes, alt: str, width: int, height: int) -> Picture:
    src = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"src": src, "alt": alt, "width": width, "height": height}


def _suffix(target: str, targets: list[str]) -> str:
    """Tells the files of several targets apart, whatever their names are."""
    if len(targets) == 1:
        return ""
    return f"-{targets.index(target) + 1}-" + re.sub(r"\W+", "_", target.lower(), flags=re.ASCII)


def _number(reason: str, reasons: list[str]) -> int:
    """Of a note at the foot of the page; equal reasons share one."""
    if reason not in reasons:
        reasons.append(reason)
    return reasons.index(reason) + 1


def _plain(name: str) -> str:
    return name.replace("_", "-")


def _format_p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(plain=_plain, figure_name=figure_name, p=_format_p)
_ENVIRONMENT.globals.update(
    MAIN_POINT=MAIN_POINT,
    MIN_PATIENTS=MIN_PATIENTS,
    MAX_UNDEFINED=MAX_UNDEFINED,
    NUM_BINS=NUM_BINS,
)
