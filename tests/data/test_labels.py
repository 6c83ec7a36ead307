"""Labels say what they are: a class, or findings that are present, absent or unknown."""

import math

import datasets
import numpy as np
import pytest

from cxr_backbone.data.labels import (
    is_multi_label,
    label_counts,
    label_names,
    labels_of,
    make_features,
    stack_labels,
    strata_of,
)

FINDINGS = ["Effusion", "Mass"]


@pytest.fixture
def classes():
    rows = {"image": [None] * 3, "label": [1, 0, 1], "patient_id": list("abc"), "image_id": list("xyz")}
    return datasets.Dataset.from_dict(rows, features=make_features(["NORMAL", "PNEUMONIA"]))


@pytest.fixture
def findings():
    values = [(1, 0), (0, 0), (math.nan, 1), (1, 1), (1, math.nan)]
    rows = {
        "image": [None] * 5,
        "label": [dict(zip(FINDINGS, map(float, value), strict=True)) for value in values],
        "patient_id": list("abcde"),
        "image_id": list("vwxyz"),
    }
    return datasets.Dataset.from_dict(rows, features=make_features(FINDINGS, multi_label=True))


def test_names_travel_with_the_features_even_through_a_file(classes, findings, tmp_path):
    assert label_names(classes.features) == ["NORMAL", "PNEUMONIA"] and not is_multi_label(classes.features)
    findings.save_to_disk(str(tmp_path / "saved"))
    features = datasets.load_from_disk(str(tmp_path / "saved")).features
    assert label_names(features) == FINDINGS and is_multi_label(features)


def test_classes_are_integers(classes):
    assert labels_of(classes).tolist() == [1, 0, 1] and labels_of(classes).dtype == np.int64
    assert stack_labels([classes[0], classes[1]]).tolist() == [1, 0]


def test_findings_are_floats_a_column_each_and_unknown_stays_nan(findings):
    expected = np.array([[1, 0], [0, 0], [math.nan, 1], [1, 1], [1, math.nan]], dtype=np.float32)
    np.testing.assert_array_equal(labels_of(findings), expected)
    np.testing.assert_array_equal(stack_labels(findings.__getitems__([0, 1, 2, 3, 4])), expected)
    np.testing.assert_array_equal(labels_of(findings.select([4, 2])), expected[[4, 2]])
    assert labels_of(findings).dtype == stack_labels([findings[0]]).dtype == np.float32


def test_counts_are_of_what_is_shown(classes, findings):
    assert label_counts(classes) == {"NORMAL": 1, "PNEUMONIA": 2}
    assert label_counts(findings) == {"Effusion": 3, "Mass": 2}


def test_the_stratum_is_the_class_or_the_rarest_finding(classes, findings):
    assert strata_of(classes) == ["PNEUMONIA", "NORMAL", "PNEUMONIA"]
    assert strata_of(findings) == ["Effusion", "none", "Mass", "Mass", "Effusion"]
