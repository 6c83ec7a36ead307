"""Labels are read as tables write them; what is uncertain or missing follows the stated policy, all else is refused."""

import logging

import numpy as np
import pytest

from cxr_backbone.data.table_labels import class_labels, finding_labels, log_classes

NAN = np.nan


def line(row):
    return f"table.csv, line {row + 2}"


def findings(*cells, uncertain="ignore", missing="ignore"):
    return finding_labels(cells, line, "Edema", uncertain=uncertain, missing=missing)


def classes(*cells, names=None, **policies):
    found, labels = class_labels(cells, line, "label", names, **policies)
    return found, labels.tolist()


@pytest.mark.parametrize(
    ("uncertain", "missing", "expected"),
    [
        ("ignore", "ignore", [1, 0, NAN, NAN]),
        ("zeros", "ignore", [1, 0, 0, NAN]),
        ("ones", "ignore", [1, 0, 1, NAN]),
        ("ignore", "zeros", [1, 0, NAN, 0]),
        ("ones", "zeros", [1, 0, 1, 0]),
        ("zeros", "ones", [1, 0, 0, 1]),
    ],
)
def test_each_policy_means_what_chexpert_calls_it(uncertain, missing, expected):
    for cells in (["1", "0", "-1", ""], ["1.0", "0.0", "-1.0", ""]):
        labels = findings(*cells, uncertain=uncertain, missing=missing)
        assert labels.dtype == np.float32
        np.testing.assert_array_equal(labels, np.float32(expected))


@pytest.mark.parametrize("cell", ["2", "0.5", "yes", "-2", "inf"])
def test_a_finding_that_is_none_is_refused_by_line(cell):
    with pytest.raises(ValueError, match=r"table\.csv, line 4 has '.*' in column Edema; expected 1, 0, -1 \(uncert"):
        findings("1", "0", cell, cell)


def test_a_policy_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"uncertain='zero' is no policy; expected one of ignore, zeros, ones"):
        findings("1", uncertain="zero")
    with pytest.raises(ValueError, match=r"missing='drop' is no policy"):
        classes("a", "b", missing="drop")


def test_class_names_are_sorted_unless_their_order_is_given():
    assert classes("PNEUMONIA", "NORMAL") == (["NORMAL", "PNEUMONIA"], [1, 0])
    assert classes("PNEUMONIA", "NORMAL", names=["PNEUMONIA", "NORMAL"]) == (["PNEUMONIA", "NORMAL"], [0, 1])
    assert classes("b", names=["a", "b", "c"]) == (["a", "b", "c"], [1])


def test_indices_are_classes_with_or_without_names():
    assert classes("1", "0.0", "1.0") == (["0", "1"], [1, 0, 1])
    assert classes("1", "0", names=["NORMAL", "PNEUMONIA"]) == (["NORMAL", "PNEUMONIA"], [1, 0])
    assert classes("2", "0", "1") == (["0", "1", "2"], [2, 0, 1])


def test_names_that_look_like_numbers_are_names_if_the_names_are_given():
    assert classes("1", "2", names=["2", "1"]) == (["2", "1"], [1, 0])


def test_uncertain_and_missing_classes_are_left_out_or_counted_in():
    cells = ["NORMAL", "PNEUMONIA", "-1", ""]
    np.testing.assert_array_equal(classes(*cells)[1], [0, 1, NAN, NAN])
    assert classes(*cells, uncertain="ones", missing="zeros")[1] == [0, 1, 1, 0]
    assert classes("1", "-1.0", "0", "", uncertain="zeros", missing="ones")[1] == [1, 0, 0, 1]


def test_more_than_two_classes_have_no_zeros_and_ones():
    with pytest.raises(ValueError, match=r"missing has to be 'ignore' for the label label, which has 3 classes"):
        classes("a", "b", "c", missing="zeros")


def test_an_unknown_class_is_refused_by_line():
    with pytest.raises(ValueError, match=r"line 3 has 'COVID' in column label; expected NORMAL, PNEUMONIA\."):
        classes("NORMAL", "COVID", names=["NORMAL", "PNEUMONIA"])
    with pytest.raises(ValueError, match=r"line 3 has '2' in column label; expected 0 to 1\."):
        classes("0", "2", names=["NORMAL", "PNEUMONIA"])


def test_indices_that_do_not_start_at_0_have_a_gap_or_are_fractions_are_refused():
    for cells in (["1", "2"], ["0", "2"], ["0", "0.5"], ["-2", "0"], ["0", "inf"]):
        with pytest.raises(ValueError, match=r"has '(2|0\.5|-2|inf)' in column label; expected 0 to 1"):
            classes(*cells)


@pytest.mark.parametrize("cells", [["NORMAL", "Normal"], ["NORMAL", "NORMAL"], ["", "-1"], ["1", "1"], []])
def test_classes_that_are_none_are_refused(cells):
    with pytest.raises(ValueError, match=r"(expected two or more that differ in more than case|expected 0 to 0)"):
        classes(*cells)


def test_a_column_of_names_or_reports_is_refused_without_a_word_of_it():
    with pytest.raises(ValueError, match=r"^Column label has 101 different values; expected 100 classes at most\.$"):
        classes(*(f"someone {number}" for number in range(101)))


def test_the_log_says_which_class_is_positive_and_how_many_films_are_left_out(caplog):
    with caplog.at_level(logging.INFO):
        log_classes("label", *class_labels(["sick", "well", "sick", ""], line, "label", None))
    assert "class 0 is sick (2 films); class 1 is well (1 films), the positive class." in caplog.text
    assert "Leaving out 1 films whose label label is uncertain or missing." in caplog.text


def test_classes_called_by_numbers_are_looked_up_by_value_and_not_by_position():
    names, labels = class_labels(["1.0", "0.0", "1"], str, "label", ["1", "0"])
    assert names == ["1", "0"] and labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="expected 1, 2"):
        class_labels(["0", "1"], str, "label", ["1", "2"])
