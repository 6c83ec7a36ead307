"""The figures are what one finds by counting on the fingers, what scikit-learn says, and what torchmetrics says."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
)
from torchmetrics.functional import auroc, average_precision
from torchmetrics.functional import matthews_corrcoef as torch_mcc

from cxr_backbone.evaluation.metrics import (
    calibration_summary,
    classification_figures,
    confusion_figures,
    counts_figures,
)

UNKNOWN = math.nan

#                  negatives            positives
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
POSITIVE = np.array([0.1, 0.2, 0.3, 0.8, 0.25, 0.4, 0.6, 0.7, 0.9, 0.95])
SCORES = np.stack([1 - POSITIVE, POSITIVE], axis=1)

FINDINGS = np.array([[1, 0], [0, UNKNOWN], [1, 0], [0, 1], [UNKNOWN, 0]])
FINDING_SCORES = np.array([[0.9, 0.2], [0.4, 0.9], [0.3, 0.1], [0.2, 0.5], [0.99, 0.6]])


def classification(scores, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return classification_figures(labels, scores)


def random_films(classes, films=300, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=films)
    scores = softmax(generator.normal(size=(films, classes)) + np.eye(classes)[labels], axis=1)
    scores = (scores + 0.01).round(2)  # with ties
    return labels, scores / scores.sum(axis=1, keepdims=True)


# By hand


def test_figures_of_two_classes_agree_with_counting():
    figures = classification(SCORES, LABELS)
    assert figures["accuracy"] == pytest.approx(7 / 10)  # wrong: 0.8, 0.25 and 0.4
    assert figures["balanced_accuracy"] == pytest.approx((4 / 6 + 3 / 4) / 2)
    assert figures["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert figures["mcc"] == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))
    # Pairs in order: six positives lie above 0.1 and 0.2, five above 0.3, two above 0.8.
    assert figures["auroc"] == pytest.approx((6 + 6 + 5 + 2) / 24)
    # The precision at each positive, from the surest: 0.8 comes before 0.7, 0.6 and 0.4, and 0.3 before 0.25 as well.
    assert figures["auprc"] == pytest.approx((1 + 1 + 3 / 4 + 4 / 5 + 5 / 6 + 6 / 8) / 6)
    given_to_the_truth = [0.9, 0.8, 0.7, 0.2, 0.25, 0.4, 0.6, 0.7, 0.9, 0.95]
    assert figures["loss"] == pytest.approx(-sum(map(math.log, given_to_the_truth)) / 10)


def test_figures_of_three_classes_agree_with_counting():
    labels = np.array([0, 0, 1, 1, 2])
    scores = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    figures = classification(scores, labels)
    assert figures["accuracy"] == pytest.approx(4 / 5)
    assert figures["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert figures["f1"] == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)
    # Pairs in order, each class against the rest: 6 of 6, 5 of 6 (0.6 lies above 0.5), 4 of 4.
    assert figures["auroc"] == pytest.approx((1 + 5 / 6 + 1) / 3)
    assert figures["auprc"] == pytest.approx((1 + (1 + 2 / 3) / 2 + 1) / 3)
    assert figures["loss"] == pytest.approx(-sum(map(math.log, [0.7, 0.3, 0.8, 0.5, 0.7])) / 5)


def test_figures_of_findings_come_from_the_labels_that_are_known():
    figures = classification(FINDING_SCORES, FINDINGS)
    # Of 0.9 and 0.3 over 0.4 and 0.2 one pair is wrong; of 0.5 over 0.2, 0.1 and 0.6, one.
    assert figures["auroc_macro"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert figures["auprc_macro"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    # Positive 0.9, 0.5, 0.3; negative 0.6, 0.4, 0.2, 0.2, 0.1.
    assert figures["auroc_micro"] == pytest.approx((5 + 4 + 3) / 15)
    assert figures["auprc_micro"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    known = [0.9, 0.6, 0.3, 0.8, 0.8, 0.9, 0.5, 0.4]
    assert figures["loss"] == pytest.approx(-sum(map(math.log, known)) / len(known))


def test_calibration_agrees_with_counting():
    figures = calibration_summary(LABELS, SCORES)  # ten films: a bin each
    wrong = [0.1, 0.2, 0.3, 0.8, 0.75, 0.6, 0.4, 0.3, 0.1, 0.05]
    assert figures["ece"] == pytest.approx(sum(wrong) / 10)
    assert figures["brier"] == pytest.approx(sum(error**2 for error in wrong) / 10)
    assert figures["nll"] == classification(SCORES, LABELS)["loss"]


# Against others


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_ranking_and_mcc_agree_with_torchmetrics(classes):
    labels, scores = random_films(classes)
    figures = classification(scores, labels)
    asked, truth = torch.from_numpy(scores), torch.from_numpy(labels)
    task = {"task": "multiclass", "num_classes": classes}
    assert figures["mcc"] == pytest.approx(torch_mcc(asked, truth, **task).item(), abs=1e-6)
    if classes == 2:
        task, asked = {"task": "binary"}, asked[:, 1]
    assert figures["auroc"] == pytest.approx(auroc(asked, truth, **task).item(), abs=1e-6)
    assert figures["auprc"] == pytest.approx(average_precision(asked, truth, **task).item(), abs=1e-6)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_findings_with_unknown_labels_agree_with_torchmetrics(average):
    generator = np.random.default_rng(0)
    scores = generator.random((200, 4)).round(2)
    labels = (generator.random((200, 4)) < scores).astype(float)
    labels[generator.random((200, 4)) < 0.2] = UNKNOWN
    figures = classification(scores, labels)
    truth = torch.from_numpy(np.nan_to_num(labels, nan=-1)).long()
    task = {"task": "multilabel", "num_labels": 4, "average": average, "ignore_index": -1}
    asked = torch.from_numpy(scores)
    assert figures[f"auroc_{average}"] == pytest.approx(auroc(asked, truth, **task).item(), abs=1e-6)
    assert figures[f"auprc_{average}"] == pytest.approx(average_precision(asked, truth, **task).item(), abs=1e-6)


def test_the_brier_score_is_that_of_scikit_learn():
    labels, scores = random_films(2)
    figures = calibration_summary(labels, scores)
    assert figures["brier"] == pytest.approx(brier_score_loss(labels, scores[:, 1]))


# From counts


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4).flatmap(lambda k: st.lists(st.integers(0, 6), min_size=k * k, max_size=k * k)))
def test_figures_from_a_confusion_matrix_are_those_of_scikit_learn(counts):
    classes = math.isqrt(len(counts))
    confusion = np.reshape(counts, (classes, classes))
    figures = confusion_figures(confusion)
    truth, called = (np.repeat(axis.ravel(), counts) for axis in np.indices(confusion.shape))
    occurring = set(truth)
    if len(occurring) < classes:
        assert np.isnan(figures["balanced_accuracy"])
    else:
        average = "binary" if classes == 2 else "macro"
        assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, called))
        assert figures["f1"] == pytest.approx(f1_score(truth, called, average=average))
    if len(occurring) > 1:
        assert figures["mcc"] == pytest.approx(matthews_corrcoef(truth, called), abs=1e-9)
    else:
        assert np.isnan(figures["mcc"])
    if occurring:
        assert figures["accuracy"] == pytest.approx(accuracy_score(truth, called))


def test_figures_of_many_weighted_resamples_are_those_of_each():
    labels, scores = random_films(2)
    called = scores.argmax(axis=1)
    weights = np.random.default_rng(1).integers(0, 4, size=(3, 5, len(labels)))
    each = np.eye(4)[2 * labels + called]  # (films, 4): tn, fp, fn, tp
    figures = counts_figures(*np.moveaxis(weights @ each, -1, 0))
    for index in np.ndindex(3, 5):
        of = {"sample_weight": weights[index]}
        expected = {
            "sensitivity": recall_score(labels, called, **of),
            "specificity": recall_score(labels, called, pos_label=0, **of),
            "ppv": precision_score(labels, called, **of),
            "npv": precision_score(labels, called, pos_label=0, **of),
            "accuracy": accuracy_score(labels, called, **of),
            "balanced_accuracy": balanced_accuracy_score(labels, called, **of),
            "f1": f1_score(labels, called, **of),
            "mcc": matthews_corrcoef(labels, called, **of),
        }
        assert {name: values[index] for name, values in figures.items()} == pytest.approx(expected)


def test_counts_that_leave_a_figure_open_give_nan_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        #                        no positives, none called positive, no films
        figures = counts_figures(np.array([3, 3, 0]), np.array([1, 0, 0]), np.array([0, 2, 0]), np.array([0, 0, 0]))
    nan = np.nan
    np.testing.assert_array_equal(figures["sensitivity"], [nan, 0, nan])
    np.testing.assert_array_equal(figures["specificity"], [0.75, 1, nan])
    np.testing.assert_array_equal(figures["ppv"], [0, nan, nan])
    np.testing.assert_array_equal(figures["f1"], [nan, 0, nan])
    np.testing.assert_array_equal(figures["mcc"], [nan, 0, nan])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("missing", [0, 1])
def test_scikit_learn_and_the_counts_agree_on_what_is_not_defined(classes, missing):
    labels, scores = random_films(classes)
    labels, scores = labels[labels != missing], scores[labels != missing]
    figures = classification(scores, labels)
    from_counts = confusion_figures(confusion_matrix(labels, scores.argmax(axis=1), labels=range(classes)))
    for name, value in from_counts.items():
        assert figures[name] == (None if np.isnan(value) else pytest.approx(value)), name
    assert figures["balanced_accuracy"] is figures["auroc"] is figures["auprc"] is None
    assert figures["loss"] > 0


# What is not defined, and what is refused


def test_a_finding_that_is_nowhere_present_has_no_part_in_the_mean():
    with_it = classification(np.hstack([FINDING_SCORES, np.full((5, 1), 0.3)]), np.hstack([FINDINGS, np.zeros((5, 1))]))
    without = classification(FINDING_SCORES, FINDINGS)
    assert (with_it["auroc_macro"], with_it["auprc_macro"]) == (without["auroc_macro"], without["auprc_macro"])


def test_findings_of_which_nothing_is_known_have_no_figures():
    labels, scores = np.full((3, 1), UNKNOWN), np.full((3, 1), 0.5)
    assert set(classification(scores, labels).values()) == {None}
    assert set(calibration_summary(labels, scores).values()) == {None}


@pytest.mark.parametrize("figures", [classification_figures, calibration_summary])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[0.5, UNKNOWN], [0.5, 0.5]], [0, 1], "scores: 1 films have a score that is NaN or outside"),
        ([[-3.0, 2.0], [1.0, 0.5]], [0, 1], r"scores: 1 films .* outside \[0, 1\]"),
        ([[0.2, 0.2], [0.5, 0.5]], [0, 1], "don't sum to 1"),
        ([[1.0], [1.0]], [0, 0], "two or more classes"),
        ([[0.5, 0.5], [1.0]], [0, 1], "films differ in how many"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], "none of the 2 classes, 0 to 1"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 0.9], "none of the 2 classes"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, UNKNOWN], "none of the 2 classes"),
        ([[0.5, 0.5], [0.5, 0.5]], [[0, 1], [0, -1]], r"none of 1 \(present\)"),
        ([[0.5, 0.5], [0.5, 0.5]], [[0], [1]], r"they are \(2, 1\); expected \(2, 2\)"),
        ([0.5, 0.5], [0, 1], "expected a row for each of the 2 labels"),
    ],
)
def test_what_makes_no_sense_is_refused(figures, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        figures(labels, scores)


def test_scores_in_float32_are_taken_and_those_that_float32_can_not_hold_are_kept_apart():
    labels, scores = random_films(5)
    assert classification(scores.astype(np.float32), labels)["loss"] == pytest.approx(
        classification(scores, labels)["loss"], abs=1e-6
    )
    close = np.array([1e-9, 2e-9])  # 1 - these are the same in float32
    assert classification(np.stack([close, 1 - close], axis=1), [1, 0])["auroc"] == 1.0
