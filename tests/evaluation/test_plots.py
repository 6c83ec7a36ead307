"""Figures show what was given, and stay legible."""

import io
import itertools

import matplotlib
import numpy as np
import pytest
from evaluation.drawn_predictions import drawn_run, findings, several_classes, two_classes
from matplotlib.container import BarContainer
from sklearn.metrics import roc_auc_score

from cxr_backbone.evaluation.plots import (
    confusion_matrices,
    films_with_maps,
    inside_outside,
    learning_curves,
    overlay,
    reliability_diagram,
    roc_and_precision_recall,
    score_histograms,
)
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.evaluation.saliency import SalientFilm

HEADS = [(0.03, 0.11, 0.14), (0.01, 0.09, 0.12), (0.003, 0.08, 0.13)]  # L2, training and validation loss
CHECKPOINTS = [(0, 0.0, None, 0.12), (50, 1.0, 0.8, 0.08), (100, 2.0, 0.6, 0.10)]
LOG = [
    *({"phase": "frozen", "l2": l2, "iterations": 9, "train_loss": a, "validation_loss": b} for l2, a, b in HEADS),
    *({"phase": "fine_tuning", "step": step, "train_loss": 1 / (1 + step)} for step in range(100)),
    *(
        {"phase": "fine_tuning", "after_steps": steps, "epoch": epoch, "train_loss": a, "validation_loss": b}
        for steps, epoch, a, b in CHECKPOINTS
    ),
]
OVERFITTING = {
    "curve": [
        {"after_steps": 0, "epoch": 0.0, "train": 0.09, "validation": 0.12, "test": 0.3},
        {"after_steps": 50, "epoch": 1.0, "train": 0.06, "validation": 0.08, "test": 0.2},
        {"after_steps": 100, "epoch": 2.0, "train": 0.01, "validation": 0.10, "test": 0.4},
    ],
    "chosen": 50,
    "gap": 0.02,
}
POINTS = {"youden": {"threshold": 0.4}, "sensitivity>=0.95": {"threshold": 0.1}}


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def assert_legible(figure):
    """Labelled axes, 9 points or more, all of the legend on the figure, and no tick label over another."""
    figure.savefig(io.BytesIO(), dpi=100)
    for axes in (axes for axes in figure.axes if axes.axison):
        assert axes.get_xlabel() or axes.get_shared_x_axes().get_siblings(axes) != [axes]
        assert axes.get_ylabel() or axes.get_shared_y_axes().get_siblings(axes) != [axes]
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()]
        assert min(text.get_fontsize() for text in texts) >= 9
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [text.get_window_extent() for text in labels if text.get_text() and text.get_rotation() in (0, 90)]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    for box in (legend.get_window_extent() for legend in figure.legends):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0


def test_learning_curves_show_both_phases_on_one_scale():
    figure = learning_curves(LOG, None)
    left, right = figure.axes
    assert left.get_shared_y_axes().joined(left, right)
    assert lines(left)["train"] == [[0, 0.11], [1, 0.09], [2, 0.08]]
    assert [label.get_text() for label in left.get_xticklabels()] == ["0.03", "0.01", "0.003"]
    assert lines(right)["validation"] == [[0, 0.12], [1, 0.08], [2, 0.10]]
    assert lines(right)["each step (augmented)"][50] == [1.0, 1 / 51]
    assert_legible(figure)


def test_what_was_chosen_has_a_ring_in_each_phase():
    left, right = learning_curves(LOG, None).axes
    assert lines(left)["chosen"] == [[1, 0.12]] and lines(right)["chosen"] == [[1.0, 0.08]]


def test_losses_of_the_checkpoints_on_plain_images_stand_beside_each_other():
    figure = learning_curves(LOG, OVERFITTING)
    right = lines(figure.axes[1])
    assert right["train"] == [[0, 0.09], [1, 0.06], [2, 0.01]] and right["test"][2] == [2, 0.4]
    assert right["chosen"] == [[1.0, 0.08]]
    assert_legible(figure)


@pytest.fixture(scope="module")
def binary():
    return {"frozen": two_classes(0, skill=1.0), "fine-tuned": two_classes(0, skill=2.0)}


def test_each_model_has_its_curves_with_bands_and_areas(binary):
    figure = roc_and_precision_recall(binary, "PNEUMONIA", POINTS, resamples=100)
    assert [len(axes.collections) for axes in figure.axes] == [2, 2]
    areas = [roc_auc_score(*predictions.question("PNEUMONIA")[1:]) for predictions in binary.values()]
    assert [text.split(",")[0] for text in legend(figure)[:2]] == [
        f"{name}: AUROC {area:.3f}" for name, area in zip(binary, areas, strict=True)
    ]
    assert_legible(figure)


def test_operating_points_lie_on_the_last_models_curves(binary):
    figure = roc_and_precision_recall(binary, "PNEUMONIA", POINTS, resamples=100)
    roc, precision_recall = figure.axes
    assert legend(figure)[2:] == list(POINTS)
    curve = next(points for label, points in lines(roc).items() if label.startswith("fine-tuned"))
    ((false_positive_rate, sensitivity),) = lines(roc)["youden"]
    assert any(
        x0 <= false_positive_rate <= x1 and y0 <= sensitivity <= y1 for (x0, y0), (x1, y1) in itertools.pairwise(curve)
    )
    _, truth, scores = binary["fine-tuned"].question("PNEUMONIA")
    marks = [line.get_xydata()[0] for line in precision_recall.get_lines() if len(line.get_xydata()) == 1]
    assert np.allclose(marks[0], [(scores[truth] >= 0.4).mean(), truth[scores >= 0.4].mean()])


def test_curves_of_one_label_only_are_refused():
    one = Predictions(["a", "b"], np.ones(20, int), np.zeros((20, 2)), list("x" * 20), [None] * 20)
    with pytest.raises(ValueError, match="truth has one class only"):
        roc_and_precision_recall({"model": one}, "b", {}, resamples=100)


def test_reliability_is_drawn_before_and_after(binary):
    before, after = binary["fine-tuned"], binary["frozen"]
    figure = reliability_diagram(before, after, "PNEUMONIA")
    assert legend(figure) == ["before temperature scaling", "calibrated", "score = share"]
    means, shares = np.transpose(lines(figure.axes[0])["calibrated"])
    assert len(means) == 15 and np.all(np.diff(means) > 0) and shares.max() <= 1
    assert_legible(figure)
    assert legend(reliability_diagram(None, after, "PNEUMONIA")) == ["as it is", "score = share"]


def test_histograms_are_shares_of_each_kind_with_the_thresholds(binary):
    figure = score_histograms(binary["frozen"], "PNEUMONIA", POINTS)
    (axes,) = figure.axes
    (bars,) = (each for each in axes.containers if isinstance(each, BarContainer) and len(each) > 1)
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    assert legend(figure)[:2] == ["not PNEUMONIA (80 films)", "PNEUMONIA (40 films)"]
    assert "youden: 0.400" in legend(figure)
    assert_legible(figure)


def test_long_names_of_findings_and_rare_ones_stay_legible():
    predictions = findings(0)
    assert_legible(score_histograms(predictions, "Pleural_Thickening", POINTS))
    assert_legible(reliability_diagram(predictions, predictions, "Pleural_Thickening"))
    assert_legible(roc_and_precision_recall({"fine-tuned": predictions}, "Pleural_Thickening", POINTS, resamples=100))


def test_confusion_matrices_show_counts_and_shares_of_the_row():
    figure = confusion_matrices({"youden": [[90, 10], [1, 3]], "f1": [[100, 0], [0, 0]]}, ["NORMAL", "PNEUMONIA"])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[0] == ["90\n90%", "10\n10%", "1\n25%", "3\n75%"]
    assert texts[1][2:] == ["0\n0%", "0\n0%"]
    assert_legible(figure)


def test_matrices_of_several_classes_stay_legible():
    predictions = several_classes(0)
    assert_legible(confusion_matrices({"frozen": np.eye(4, dtype=int) * 12345}, predictions.names))
    assert_legible(confusion_matrices({"frozen": np.ones((14, 14), int)}, [f"disease number {i}" for i in range(14)]))


def test_inside_stands_beside_outside_with_intervals():
    metrics, _ = drawn_run(two_classes, splits=("train", "validation", "test", "external nih"), models=("one",))
    splits = {name: metrics["models"]["one"]["splits"][name] for name in ("test", "external nih")}
    figure = inside_outside(splits, "PNEUMONIA")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["AUROC", "sensitivity\nat youden"]
    assert legend(figure) == ["test", "external nih"]
    inside = splits["test"]["targets"]["PNEUMONIA"]["figures"]["auroc"]
    interval, value = (line.get_xdata().tolist() for line in axes.get_lines()[:2])
    assert value == [inside["value"]] and interval == [inside["low"], inside["high"]]
    assert_legible(figure)


def test_a_figure_that_is_not_defined_is_left_out():
    nothing = {"value": None, "low": None, "high": None, "undefined": "a class does not occur"}
    result = {"targets": {"PNEUMONIA": {"figures": {"auroc": nothing}, "operating_points": {}}}}
    figure = inside_outside({"test": result, "external": result}, "PNEUMONIA")
    assert all(np.isnan(line.get_xdata()).all() for line in figure.axes[0].get_lines())
    assert_legible(figure)


def test_drawing_leaves_the_settings_of_matplotlib_alone(binary):
    before = dict(matplotlib.rcParams)
    score_histograms(binary["frozen"], "PNEUMONIA", POINTS)
    assert dict(matplotlib.rcParams) == before


def film(pixels, strength):
    said = {"target": "PNEUMONIA", "truth": "NORMAL", "called": "PNEUMONIA", "score": 0.9, "explained": "PNEUMONIA"}
    return SalientFilm(kind="surest wrong", image_id="film", pixels=pixels, map=strength, **said)


def test_a_film_shows_its_map_where_something_speaks_and_itself_elsewhere():
    strength = np.zeros((8, 8), np.float32)
    strength[:4] = 1
    pixels = overlay(film(np.full((8, 8), 100, np.uint8), strength))
    assert (pixels[4:] == 100).all()
    assert np.ptp(pixels[:4], axis=-1).min() > 20  # in colour


def test_a_row_of_films_stands_over_their_maps():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    figure = films_with_maps([film(pixels, np.zeros((8, 8), np.float32))] * 3)
    assert len(figure.axes) == 6
    above, below = (axes.get_images()[0].get_array() for axes in (figure.axes[0], figure.axes[3]))
    assert (above == pixels).all() and (below == pixels[..., np.newaxis]).all()
    assert "true: NORMAL" in figure.axes[0].get_title() and figure.axes[3].get_xlabel() == "score 0.900"
