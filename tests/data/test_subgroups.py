"""What a table tells of films beyond their label divides them into subgroups, unless it tells each film apart."""

import logging
import math
from collections import Counter

import datasets
import pytest

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.kermany import load_kermany
from cxr_backbone.data.subgroups import subgroup_column, subgroups_of
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.data.table import load_table


def subgroups(**columns):
    return subgroups_of(datasets.Dataset.from_dict(columns))


def test_words_are_subgroups_as_they_are_and_blank_is_none():
    assert subgroups(view=["PA", " ", "AP", None, ""]) == {"view": ["PA", None, "AP", None, None]}


@pytest.mark.parametrize("name", ["age", "Age", "AGE"])
def test_ages_come_in_bands(name):
    ages = [0, 17.9, 18, 39, 40, 64, 65, 120, None, math.nan, -1, 411]
    assert subgroups(**{name: ages})[name] == [
        *("under 18", "under 18", "18 to 39", "18 to 39", "40 to 64", "40 to 64", "65 and over", "65 and over"),
        *(None, None, None, None),
    ]


def test_other_numbers_are_names():
    assert subgroups(scanner=[2.0, 1.5, None, math.nan]) == {"scanner": ["2", "1.5", None, None]}
    assert subgroups(scanner=[1234567, 1234568]) == {"scanner": ["1234567", "1234568"]}


def test_what_tells_films_apart_is_no_subgroup_and_the_log_says_so(caplog):
    columns = {
        "few_words": [f"w{film % 20}" for film in range(42)],
        "many_words": [f"w{film % 21}" for film in range(42)],
        "few_numbers": [film % 10 for film in range(42)],
        "many_numbers": [film % 11 for film in range(42)],
        "age": list(range(42)),
    }
    with caplog.at_level(logging.INFO):
        assert list(subgroups(**columns)) == ["few_words", "few_numbers", "age"]
    assert "Column many_words makes no subgroups: it has 21 different values" in caplog.text
    assert "Column many_numbers makes no subgroups: it has 11 different values" in caplog.text


def test_decoding_changes_no_subgroup_and_makes_none():
    films = load_synthetic(20, image_size=32)["train"]
    assert subgroups_of(decode_once(films, 32)) == {"subtype": films["subtype"][:]} == subgroups_of(films)


def test_cells_are_numbers_only_if_all_of_them_are():
    assert subgroup_column(["1", "", "2.5"]) == (datasets.Value("float64"), [1, None, 2.5])
    assert subgroup_column(["1", "", "058Y"]) == (datasets.Value("string"), ["1", None, "058Y"])


def test_real_sets_have_the_subgroups_that_their_tables_tell(shared):
    assert Counter(subgroups_of(load_kermany(shared / "data/kermany224")["test"])["subtype"]) == {
        "normal": 234,
        "bacteria": 242,
        "virus": 148,
    }
    nih = load_table(
        shared / "data/nih-subset/labels.csv",
        image_column="path",
        label_columns=["label"],
        subgroup_columns=["age", "sex", "view", "finding_labels"],
    )
    found = subgroups_of(nih["train"])
    assert list(found) == ["age", "sex", "view"]  # combinations of findings are many
    assert set(found["age"]) == {"under 18", "18 to 39", "40 to 64", "65 and over"}
    assert set(found["sex"]) == {"F", "M"} and set(found["view"]) == {"AP", "PA"}
