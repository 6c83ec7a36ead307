"""Calibration figures agree with counting, and a fitted temperature is the one that was put in."""

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from narrow import tiny_model
from scipy.special import expit, softmax
from sklearn.metrics import brier_score_loss, log_loss

from cxr_backbone.evaluation.calibration import (
    adaptive_bins,
    calibration_figures,
    calibration_question,
    calibration_terms,
    fit_temperature,
    fold_temperature,
    reliability,
)

scores_lists = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def drawn_films(films, temperature, classes=3):
    """Logits that are `temperature` times too large."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(films, classes)) * 2
    labels = np.array([generator.choice(classes, p=row) for row in softmax(logits, axis=1)])
    return logits * temperature, labels


# Bins


def test_bins_hold_equally_many_films_by_rising_score():
    scores = np.array([0.9, 0.1, 0.5, 0.3, 0.7, 0.2])
    assert adaptive_bins(scores, 3).tolist() == [2, 0, 1, 1, 2, 0]


def test_equal_scores_share_the_bin_of_their_middle():
    assert adaptive_bins(np.array([0.1, 0.5, 0.5, 0.5, 0.5, 0.9]), 3).tolist() == [0, 1, 1, 1, 1, 2]


@given(scores_lists, st.integers(1, 20))
def test_bins_never_split_equal_scores_and_never_turn_back(scores, num_bins):
    scores = np.array(scores)
    bins = adaptive_bins(scores, num_bins)
    order = scores.argsort()
    assert (np.diff(bins[order]) >= 0).all()
    assert (np.diff(bins[order])[np.diff(scores[order]) == 0] == 0).all()
    assert 0 <= bins.min() <= bins.max() < num_bins
    if len(set(scores)) == len(scores):
        counts = np.bincount(bins, minlength=num_bins)
        assert counts.max() - counts.min() <= 1


# Figures

TRUTH = np.array([False, True, False, True, True, True])
SCORES = np.array([0.1, 0.3, 0.4, 0.5, 0.8, 0.9])


def test_figures_agree_with_counting():
    bins = adaptive_bins(SCORES, 3)
    figures = calibration_figures(calibration_terms(TRUTH, SCORES, bins, 3).sum(axis=0))
    # Sums of truth - score: 1 - .4 in the first bin, 1 - .9 in the second, 2 - 1.7 in the third.
    assert figures["ece"] == pytest.approx((0.6 + 0.1 + 0.3) / 6)
    assert figures["brier"] == pytest.approx(brier_score_loss(TRUTH, SCORES))
    assert figures["nll"] == pytest.approx(log_loss(TRUTH, SCORES))
    mean_score, share, films = reliability(TRUTH, SCORES, bins)
    np.testing.assert_allclose(mean_score, [0.2, 0.45, 0.85])
    np.testing.assert_allclose(share, [0.5, 0.5, 1.0])
    assert films.tolist() == [2, 2, 2]


@given(scores_lists, st.data())
def test_the_ece_is_the_mean_gap_in_the_reliability_diagram(scores, data):
    scores = np.array(scores)
    truth = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    bins = adaptive_bins(scores)
    mean_score, share, films = reliability(truth, scores, bins)
    ece = calibration_figures(calibration_terms(truth, scores, bins).sum(axis=0))["ece"]
    assert ece == pytest.approx(np.average(np.abs(mean_score - share), weights=films), abs=1e-12)


def test_resamples_are_weighted_sums():
    terms = calibration_terms(TRUTH, SCORES, adaptive_bins(SCORES))
    weights = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    figures = calibration_figures(weights @ terms)
    assert figures["brier"][0] == pytest.approx(brier_score_loss(TRUTH, SCORES))
    assert figures["ece"][1] == pytest.approx(0.1)  # two films off by .1 one way, and one the other way
    assert np.isnan(figures["nll"][2])


def test_a_sure_mistake_costs_much_but_not_infinitely_much():
    terms = calibration_terms(np.array([True]), np.array([0.0]), np.array([0]))
    assert terms[0, -2] == pytest.approx(log_loss([1], [0.0], labels=[0, 1])) == pytest.approx(36.04, abs=0.01)


def test_a_model_is_asked_for_the_positive_class_its_call_or_each_known_finding():
    films, truth, scores = calibration_question(np.array([0, 1]), np.array([[0.7, 0.3], [0.6, 0.4]]))
    assert (films.tolist(), truth.tolist(), scores.tolist()) == ([0, 1], [False, True], [0.3, 0.4])
    films, truth, scores = calibration_question(np.array([2, 1]), np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]))
    assert (films.tolist(), truth.tolist(), scores.tolist()) == ([0, 1], [False, True], [0.5, 0.6])
    findings = np.array([[1, math.nan], [0, 1]])
    films, truth, scores = calibration_question(findings, np.array([[0.5, 0.2], [0.1, 0.6]]))
    assert (films.tolist(), truth.tolist(), scores.tolist()) == ([0, 1, 1], [True, False, True], [0.5, 0.1, 0.6])


# Temperature


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature):
    assert fit_temperature(*drawn_films(4000, temperature)) == pytest.approx(temperature, rel=0.06)


def test_no_temperature_near_the_fitted_one_is_more_likely():
    logits, labels = drawn_films(300, 2.0)
    best = fit_temperature(logits, labels)
    losses = [log_loss(labels, softmax(logits / near, axis=1)) for near in (0.99 * best, best, 1.01 * best)]
    assert min(losses) == losses[1]


def test_each_finding_has_its_own_temperature_from_the_labels_that_are_known():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 2)) * 2
    labels = (generator.random((4000, 2)) < expit(logits)).astype(float)
    labels[:500, 0] = math.nan
    logits[:500, 0] = -50.0  # where the label is unknown, what the model says does not count
    temperatures = fit_temperature(logits * [3.0, 0.5], labels)
    assert temperatures == pytest.approx([3.0, 0.5], rel=0.1)


@pytest.mark.parametrize(
    "logits",
    [
        [[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 4.0]],  # perfectly separated
        [[900.0, 0.0], [800.0, 0.0], [0.0, 700.0], [0.0, 900.0]],  # and so far that the loss is 0 in floating point
        [[0.0, 3.0], [0.0, 2.0], [1.0, 0.0], [4.0, 0.0]],  # the wrong way round
        [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],  # the same for all
    ],
)
def test_where_no_temperature_is_the_most_likely_it_is_1_with_a_warning(logits, caplog):
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(np.array(logits), np.array([0, 0, 1, 1])) == 1.0
    assert "No temperature is fitted: none between 0.05 and 20" in caplog.text


def test_a_finding_without_positives_or_without_labels_keeps_its_scores_with_a_warning(caplog):
    logits = np.array([[1.0, 1.0, 2.0], [2.0, 0.5, 0.5], [3.0, 1.0, 1.0], [-1.0, 1.0, -1.0]])
    labels = np.array([[0, math.nan, 1], [0, math.nan, 0], [0, math.nan, 1], [0, math.nan, 1]])
    with caplog.at_level(logging.WARNING):
        temperatures = fit_temperature(logits, labels)
    assert temperatures[:2] == [1.0, 1.0]
    assert temperatures[2] != 1.0
    for finding in (0, 1):
        assert f"for finding {finding}: fewer than two classes occur" in caplog.text
    assert len(caplog.records) == 2


# Folding


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [({}, 2.5), ({"problem_type": "multi_label_classification", "labels": 3}, [0.5, 2.0, 4.0])],
)
def test_a_folded_temperature_divides_the_logits(settings, temperature):
    model = tiny_model(use_auxiliary_head=True, **settings).eval()
    auxiliary = {name: tensor.clone() for name, tensor in model.auxiliary_classifier.state_dict().items()}
    torch.nn.init.normal_(model.classifier.output_layer.bias)
    pixel_values = torch.rand(2, 1, 75, 75)
    with torch.no_grad():
        before = model(pixel_values).logits
        fold_temperature(model, temperature)
        after = model(pixel_values).logits
    torch.testing.assert_close(after, before / torch.tensor(temperature))
    assert model.config.temperature == temperature
    assert all(torch.equal(auxiliary[name], now) for name, now in model.auxiliary_classifier.state_dict().items())


def test_a_temperature_survives_saving_and_is_folded_only_once(tmp_path):
    model = tiny_model()
    fold_temperature(model, 2.0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"divided by 2\.0 already; expected a model without one"):
        fold_temperature(again, 1.5)


def test_too_few_temperatures_are_refused():
    model = tiny_model(labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="there are 2; expected 3, one a label"):
        fold_temperature(model, [1.0, 2.0])
