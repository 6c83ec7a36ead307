"""The figures are what one finds by counting on the fingers."""

import math

import numpy as np
import pytest
import torch

from cxr_backbone.evaluation.metrics import METRICS, binary_metrics, positive_scores

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
