"""Operating points are where a person with a pencil would put them."""

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from sklearn.metrics import f1_score

from cxr_backbone.evaluation.operating_points import POINTS, at_operating_point, choose_operating_points
from cxr_backbone.evaluation.predictions import Predictions


def predictions(labels, logits, names):
    ids = [f"film {index}" for index in range(len(labels))]
    return Predictions(names, np.asarray(labels), np.asarray(logits, dtype=float), ids, [None] * len(ids))


def two_classes(labels, scores):
    return predictions(labels, np.stack([np.zeros(len(scores)), logit(scores)], axis=1), ["normal", "ill"])


#         0    0    0    1    0    0    1    1    0    1    1    1
LABELS = [0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]
SCORES = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9]


def test_each_point_is_where_it_is_said_to_be():
    points = choose_operating_points(two_classes(LABELS, SCORES))["ill"]
    assert tuple(points) == POINTS
    # All six positives from 0.225 on, with three of six negatives; one positive fewer is .83 already.
    assert points["sensitivity>=0.95"] == pytest.approx(
        {"threshold": 0.225, "sensitivity": 1.0, "specificity": 0.5, "films": 12}
    )
    # .90 of six negatives is all of them.
    assert points["specificity>=0.90"] == pytest.approx(
        {"threshold": 0.65, "sensitivity": 0.5, "specificity": 1.0, "films": 12}
    )
    # 5/6 + 5/6 - 1 at 0.45 is the highest; F1 there is 10 / 12.
    for point in ("youden", "f1"):
        assert points[point] == pytest.approx(
            {"threshold": 0.45, "sensitivity": 5 / 6, "specificity": 5 / 6, "films": 12}
        )


def test_perfect_separation_puts_all_points_in_the_middle_of_the_gap_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        points = choose_operating_points(two_classes([0] * 30 + [1] * 30, np.r_[0.1:0.2:30j, 0.6:0.9:30j]))["ill"]
    for point in POINTS:
        assert points[point] == pytest.approx({"threshold": 0.4, "sensitivity": 1, "specificity": 1, "films": 60})
    assert len(caplog.records) == 1
    assert "ill: validation tells its classes apart almost without error (Youden's index 1.000)" in caplog.text


def test_of_equally_good_thresholds_the_one_in_the_widest_gap_is_taken():
    # Youden's index is 1/2 between the first two, and again between the last two, where the gap is wider.
    points = choose_operating_points(two_classes([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.9]))["ill"]
    assert points["youden"]["threshold"] == pytest.approx(0.6)


def test_several_classes_are_asked_for_one_against_the_rest():
    logits = [[2, 0, 0], [1, 1.5, 0], [0, 2, 0], [1, 0.5, 0], [0, 0, 2], [0, 1, 0.5]]
    chosen = choose_operating_points(predictions([0, 0, 1, 1, 2, 2], logits, ["a", "b", "c"]))
    assert list(chosen) == ["a", "b", "c"]
    assert {point["films"] for points in chosen.values() for point in points.values()} == {6}


def test_findings_are_chosen_for_where_they_are_known_and_left_out_where_they_can_not_be(caplog):
    unknown = math.nan
    labels = [[0, 0, unknown], [1, 0, unknown], [unknown, 0, 1], [0, 0, 1], [1, 0, unknown]]
    logits = [[-1, 0, 0], [-2, 1, 1], [3, 2, 1], [0, 1, 0], [2, 2, 2]]
    with caplog.at_level(logging.WARNING):
        chosen = choose_operating_points(predictions(labels, logits, ["Effusion", "Hernia", "Mass"]))
    assert list(chosen) == ["Effusion"]
    assert chosen["Effusion"]["youden"]["films"] == 4
    assert [record.getMessage() for record in caplog.records] == [
        "Hernia gets no operating points: among the 5 validation films where it is known, 0 are positive.",
        "Mass gets no operating points: among the 2 validation films where it is known, 2 are positive.",
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 99))))
def test_no_threshold_does_better_than_the_chosen_one(films):
    truth, percent = (np.array(column) for column in zip((False, 30), (True, 60), *films, strict=True))
    scores = percent / 100
    chosen = two_classes(truth.astype(int), scores)
    _, truth, scores = chosen.question("ill")
    points = choose_operating_points(chosen)["ill"]

    def reached(threshold):
        tn, fp, fn, tp = at_operating_point(truth, scores, threshold)
        return tp / (tp + fn), tn / (tn + fp)

    for point in points.values():
        assert 0 < point["threshold"] < 1
        assert reached(point["threshold"]) == (point["sensitivity"], point["specificity"])
    others = [(threshold, *reached(threshold)) for threshold in [0, *np.unique(scores), 1]]
    best = points["youden"]["sensitivity"] + points["youden"]["specificity"]
    assert best >= max(sensitivity + specificity for _, sensitivity, specificity in others) - 1e-12
    assert points["sensitivity>=0.95"]["sensitivity"] >= 0.95
    assert points["sensitivity>=0.95"]["specificity"] == max(sp for _, se, sp in others if se >= 0.95)
    assert points["specificity>=0.90"]["specificity"] >= 0.90
    assert points["specificity>=0.90"]["sensitivity"] == max(se for _, se, sp in others if sp >= 0.90)
    f1 = f1_score(truth, scores >= points["f1"]["threshold"])
    assert f1 >= max(f1_score(truth, scores >= threshold, zero_division=0) for threshold, *_ in others) - 1e-12


def test_scores_at_the_ends_of_the_range_keep_thresholds_inside_it():
    logits = [[0, -900], [0, -900], [0, 900], [0, 900], [0, 900]]
    points = choose_operating_points(predictions([0, 1, 0, 0, 1], logits, ["normal", "ill"]))["ill"]
    assert all(0 <= point["threshold"] <= 1 for point in points.values())
    assert points["sensitivity>=0.95"]["sensitivity"] == 1.0
    assert points["specificity>=0.90"]["specificity"] == pytest.approx(1 / 3)  # two of three negatives score 1


def test_a_film_on_the_threshold_is_positive():
    truth = np.array([False, False, False, True, True])
    assert at_operating_point(truth, np.array([0.1, 0.5, 0.2, 0.5, 0.4]), 0.5) == (2, 1, 1, 1)


def test_no_films_count_as_nothing():
    assert at_operating_point(np.array([], dtype=bool), np.array([]), 0.5) == (0, 0, 0, 0)
