"""The figures are what one finds by counting on the fingers."""

import math

import numpy as np
import pytest
import torch

from cxr_backbone.evaluation.metrics import (
    METRICS,
    binary_metrics,
    classification_metrics,
    multiclass_metrics,
    multilabel_metrics,
    positive_scores,
)

#                  negatives            positives
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
SCORES = np.array([0.1, 0.2, 0.3, 0.8, 0.25, 0.4, 0.6, 0.7, 0.9, 0.95])


def test_every_figure_agrees_with_counting():
    figures = binary_metrics(LABELS, SCORES)
    assert set(figures) == {*METRICS, "images"}
    assert figures["images"] == 10
    assert figures["sensitivity"] == pytest.approx(4 / 6)  # 0.6, 0.7, 0.9 and 0.95 of six
    assert figures["specificity"] == pytest.approx(3 / 4)  # all but 0.8
    assert figures["accuracy"] == pytest.approx(7 / 10)
    assert figures["balanced_accuracy"] == pytest.approx((4 / 6 + 3 / 4) / 2)
    # Pairs in order: six positives lie above 0.1 and 0.2, five above 0.3, two above 0.8.
    assert figures["auroc"] == pytest.approx((6 + 6 + 5 + 2) / 24)
    given_to_the_truth = [0.9, 0.8, 0.7, 0.2, 0.25, 0.4, 0.6, 0.7, 0.9, 0.95]
    assert figures["loss"] == pytest.approx(-sum(map(math.log, given_to_the_truth)) / 10)


def test_figures_are_plain_numbers_that_json_takes():
    assert {type(value) for value in binary_metrics(LABELS, SCORES).values()} == {float, int}


def test_a_score_of_one_half_is_called_positive():
    figures = binary_metrics(np.array([0, 0, 1, 1]), np.array([0.499, 0.5, 0.499, 0.5]))
    assert (figures["sensitivity"], figures["specificity"]) == (0.5, 0.5)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(label):
    with pytest.raises(ValueError, match=rf"Both classes must occur .* only \[{label}\]"):
        binary_metrics(np.full(4, label), SCORES[:4])


def test_scores_are_the_probability_of_class_1():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [1000.0, 0.0], [-5.0, 95.0]])
    scores = positive_scores(logits)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, [0.5, 0.75, 0.0, 1.0], atol=1e-7)


def test_scores_keep_images_apart_that_float32_would_not():
    scores = positive_scores(torch.tensor([[0.0, 20.0], [0.0, 21.0]]))
    assert scores[0] < scores[1] < 1


# Several classes


def test_figures_of_three_classes_agree_with_counting():
    labels = np.array([0, 0, 1, 1, 2])
    scores = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    figures = multiclass_metrics(labels, scores)
    assert figures["images"] == 5
    assert figures["accuracy"] == pytest.approx(4 / 5)
    assert figures["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    # Pairs in order, each class against the rest: 6 of 6, 5 of 6 (0.6 lies above 0.5), 4 of 4.
    assert figures["auroc"] == pytest.approx((1 + 5 / 6 + 1) / 3)
    assert figures["loss"] == pytest.approx(-sum(map(math.log, [0.7, 0.3, 0.8, 0.5, 0.7])) / 5)


def test_a_class_that_does_not_occur_is_refused():
    with pytest.raises(ValueError, match=r"Every class must occur .*; \[1\] do not"):
        multiclass_metrics(np.array([0, 2]), np.full((2, 3), 1 / 3))


# Findings

UNKNOWN = math.nan
FINDINGS = np.array([[1, 0], [0, UNKNOWN], [1, 0], [0, 0], [UNKNOWN, 0]])
FINDING_SCORES = np.array([[0.9, 0.2], [0.4, 0.9], [0.3, 0.1], [0.2, 0.5], [0.99, 0.3]])


def test_figures_of_findings_come_from_the_images_where_they_are_known():
    figures = multilabel_metrics(FINDINGS, FINDING_SCORES, ["Effusion", "Mass"])
    assert figures["auroc Effusion"] == pytest.approx(3 / 4)  # of 0.9, 0.3 over 0.4, 0.2 one pair is wrong
    known = [0.9, 0.6, 0.3, 0.8, 0.8, 0.9, 0.5, 0.7]
    assert figures["loss"] == pytest.approx(-sum(map(math.log, known)) / len(known))
    assert figures["images"] == 5


def test_a_finding_that_is_nowhere_present_has_no_auroc_and_no_part_in_the_mean():
    figures = multilabel_metrics(FINDINGS, FINDING_SCORES, ["Effusion", "Mass"])
    assert figures["auroc Mass"] is None
    assert figures["mean_auroc"] == figures["auroc Effusion"]


def test_findings_of_which_nothing_is_known_have_no_figures():
    figures = multilabel_metrics(np.full((3, 1), UNKNOWN), np.full((3, 1), 0.5), ["Mass"])
    assert figures == {"loss": None, "mean_auroc": None, "auroc Mass": None, "images": 3}


def test_the_labels_decide_which_figures_there_are():
    logits = torch.tensor([[2.0, -1.0], [-1.0, 1.0], [0.5, -2.0], [-2.0, 0.0], [3.0, -1.0]])
    two = classification_metrics(np.array([0, 1, 0, 1, 1]), logits, ["NORMAL", "PNEUMONIA"])
    assert two == binary_metrics(np.array([0, 1, 0, 1, 1]), positive_scores(logits))
    findings = classification_metrics(FINDINGS, logits, ["Effusion", "Mass"])
    assert findings == multilabel_metrics(FINDINGS, logits.double().sigmoid().numpy(), ["Effusion", "Mass"])
    three = torch.cat([logits, torch.zeros(5, 1)], dim=1)
    several = classification_metrics(np.array([0, 1, 0, 2, 1]), three, ["a", "b", "c"])
    assert several == multiclass_metrics(np.array([0, 1, 0, 2, 1]), three.double().softmax(dim=1).numpy())
