"""Predictions hold together films, labels and scores, and refuse what does not fit."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from cxr_backbone.evaluation.predictions import Predictions

TWO_CLASSES = Predictions(
    names=["NORMAL", "PNEUMONIA"],
    labels=np.array([0, 1, 1]),
    logits=np.array([[0.0, 0.0], [0.0, np.log(3)], [np.log(4), 0.0]]),
    image_ids=["a", "b", "c"],
    patient_ids=["p", "p", None],
    groups={"view": ["PA", None, "AP"]},
)
FINDINGS = Predictions(
    names=["Effusion", "Mass"],
    labels=np.array([[1, np.nan], [0, 1], [np.nan, 0]]),
    logits=np.array([[0.0, 1.0], [np.log(3), 0.0], [2.0, -np.log(4)]]),
    image_ids=["a", "b", "c"],
    patient_ids=["p", "q", "r"],
)


def test_scores_are_those_of_the_pipeline():
    np.testing.assert_allclose(TWO_CLASSES.scores, [[0.5, 0.5], [0.25, 0.75], [0.8, 0.2]])
    np.testing.assert_allclose(FINDINGS.scores[:, 0], [0.5, 0.75, 1 / (1 + np.exp(-2))])


def test_of_two_classes_the_second_is_asked_for_and_of_several_each():
    assert TWO_CLASSES.targets == ["PNEUMONIA"]
    several = replace(TWO_CLASSES, names=["a", "b", "c"], logits=np.zeros((3, 3)))
    assert several.targets == ["a", "b", "c"]
    assert FINDINGS.targets == ["Effusion", "Mass"]


def test_a_question_is_put_to_the_films_whose_answer_is_known():
    films, truth, scores = TWO_CLASSES.question("PNEUMONIA")
    assert films.tolist() == [0, 1, 2] and truth.tolist() == [False, True, True]
    np.testing.assert_allclose(scores, [0.5, 0.75, 0.2])
    films, truth, scores = FINDINGS.question("Mass")
    assert films.tolist() == [1, 2] and truth.tolist() == [True, False]
    np.testing.assert_allclose(scores, [0.5, 0.2])


def test_some_films_can_be_taken_with_all_that_is_known_of_them():
    some = TWO_CLASSES.select(np.array([2, 0]))
    assert some.image_ids == ["c", "a"] and some.patient_ids == [None, "p"] and some.groups == {"view": ["AP", "PA"]}
    assert some.labels.tolist() == [1, 0]
    np.testing.assert_allclose(some.scores[:, 1], [0.2, 0.5])


def test_a_row_a_film_is_written_as_parquet(tmp_path):
    TWO_CLASSES.write(tmp_path / "classes.parquet")
    rows = pq.read_table(tmp_path / "classes.parquet").to_pylist()
    assert rows[1] == {
        **{"image_id": "b", "patient_id": "p", "subgroup view": None, "label": "PNEUMONIA"},
        **{"score NORMAL": pytest.approx(0.25), "score PNEUMONIA": pytest.approx(0.75)},
    }
    assert rows[2]["patient_id"] is None
    FINDINGS.write(tmp_path / "findings.parquet")
    rows = pq.read_table(tmp_path / "findings.parquet").to_pylist()
    assert [row["label Mass"] for row in rows] == [None, 1, 0]
    assert rows[2]["score Mass"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": ["a"]}, "3 labels and 1 image_ids"),
        ({"groups": {"sex": ["F"]}}, r"3 labels and 1 groups\['sex'\]"),
        ({"logits": np.zeros((3, 4))}, r"\(3, 4\); expected \(3, 2\) for the labels NORMAL, PNEUMONIA"),
        ({"labels": np.array([0, 1, 2])}, "none of the 2 classes"),
        ({"logits": np.array([[0, 0], [0, np.nan], [np.inf, 0]])}, "2 films are not finite; the first is b"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TWO_CLASSES, **change)


def test_findings_are_present_absent_or_unknown_and_nothing_else():
    with pytest.raises(ValueError, match="0, 1 and NaN"):
        replace(FINDINGS, labels=np.array([[1, -1], [0, 1], [0, 0]]))
    with pytest.raises(ValueError, match=r"labels are \(3, 1\)"):
        replace(FINDINGS, labels=np.zeros((3, 1)))
