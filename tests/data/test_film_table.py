"""One table of all films, whatever the splits look like."""

import datasets
import numpy as np
import pytest
from data.drawn_sets import decoded, phantoms

from cxr_backbone.data.film_table import read_films


@pytest.fixture(scope="module")
def films():
    return decoded(phantoms(0, 6), labels=[0, 0, 0, 1, 1, 1])


def test_each_film_keeps_its_facts_where_rows_are_chosen_and_mixed(films):
    train = films.select([5, 3, 1])
    table = read_films(datasets.DatasetDict(train=train, test=films.select([0])))
    assert table.split.tolist() == ["train", "train", "train", "test"]
    assert table.row.tolist() == [0, 1, 2, 0]
    assert table.image_id == ["film5", "film3", "film1", "film0"]
    assert table.numbers["mean"].tolist() == [film["mean"] for film in [*train["film"], films[0]["film"]]]
    assert bytes(table.thumbnails[1]) == films[3]["film"]["thumbnail"]
    assert table.describe(1) == {
        "split": "train",
        "row": 1,
        "image_id": "film3",
        "patient_id": "patient3",
        "label": "PNEUMONIA",
    }


def test_pixels_are_not_needed(films):
    table = read_films(datasets.DatasetDict(train=films.remove_columns("pixels").with_format("torch")))
    assert table.targets.tolist() == [[1, 0]] * 3 + [[0, 1]] * 3


def test_a_split_without_films_is_passed_over(films):
    table = read_films(datasets.DatasetDict(train=films.select([]), test=films))
    assert table.split.tolist() == ["test"] * 6 and len(table.thumbnails) == 6


def test_unknown_findings_stay_unknown_and_a_film_may_show_none():
    labels = [{"Mass": 1.0, "Nodule": 1.0}, {"Mass": 0.0, "Nodule": float("nan")}]
    names = ("Mass", "Nodule")
    films = decoded(phantoms(0, 2), labels=labels, patients=[None, "a"], names=names, multi_label=True)
    table = read_films(datasets.DatasetDict(train=films))
    assert np.array_equal(table.targets, [[1, 1], [0, np.nan]], equal_nan=True)
    assert [table.describe(film)["label"] for film in (0, 1)] == ["Mass | Nodule", "none"]
    assert table.describe(0)["patient_id"] is None


def test_what_was_not_decoded_is_refused_by_split_and_column(films):
    with pytest.raises(ValueError, match="The test split lacks film, patient_id; expected what decode_once returns"):
        read_films(datasets.DatasetDict(train=films, test=films.remove_columns(["film", "patient_id"])))
    with pytest.raises(ValueError, match="no films to audit: every split is empty"):
        read_films(datasets.DatasetDict(train=films.select([])))
