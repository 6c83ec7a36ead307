"""The page holds all of the report, and nothing that leaves it."""

import base64
import io
import re

import datasets
import numpy as np
import pytest
from data.drawn_sets import decoded, phantoms
from page import Page
from PIL import Image

from cxr_backbone.data.audit import audit
from cxr_backbone.data.audit_page import SHOWN_PAIRS, write_audit_page

HOSTILE = "<script>alert('1')</script>\" onerror=\"x"


def page_of(folder, unreadable=None, **splits):
    data = datasets.DatasetDict(splits)
    write_audit_page(audit(data, unreadable), data, folder / "audit.html")
    return Page(folder / "audit.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with something in every section."""
    films = phantoms(0, 30)
    flat = np.full_like(films[0], 30)
    return page_of(
        tmp_path_factory.mktemp("page"),
        train=decoded([*films, flat], ids=[HOSTILE, *(f"film{row}" for row in range(1, 31))]),
        test=decoded([films[0], films[3]], labels=[1, 0], patients=["patient0", HOSTILE], ids=["t0", "t1"]),
        unreadable={HOSTILE: "<b>reason</b>"},
    )


def test_leaks_come_first_in_a_red_box(page):
    boxes = [attributes["class"] for tag, attributes in page.tags if "box" in attributes.get("class", "").split()]
    assert boxes == ["box leak"]
    assert "1 patient with films in more than one split, for instance patient0." in page.text
    assert "2 groups of duplicate films in more than one split" in page.text
    assert page.text.index("groups of duplicate") < page.text.index("Films, patients and labels")


def test_a_clean_data_set_says_so(tmp_path):
    page = page_of(tmp_path, train=decoded(phantoms(0, 4)))
    assert ("div", {"class": "box"}) in page.tags
    assert "Leaks between splits A model knows" in page.text and "None found." in page.text
    assert not [tag for tag, attributes in page.tags if "alarm" in attributes.get("class", "")]


def test_names_from_outside_are_text_and_nothing_else(page):
    assert "<script" not in page.html and 'onerror="x' not in page.html and "<b>" not in page.html
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
    assert page.text.count(HOSTILE) == 3  # as the example of a leak, in a pair, and among the unreadable files
    assert HOSTILE in [picture["alt"] for picture in page.pictures]


def test_nothing_is_loaded_from_elsewhere(page):
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in page.pictures)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    assert not re.search(r"https?:|url\(|@import", page.html)


def test_duplicates_stand_side_by_side_as_the_films_they_are(page):
    exact = phantoms(0, 1)[0]
    left, right = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1]))))
        for picture in page.pictures[:2]
    )
    assert (left == exact).all() and (right == exact).all()
    assert f"train: {HOSTILE} (NORMAL) test: t0 (PNEUMONIA)" in page.text
    assert "exact, correlation 1.0000, across splits , contradictory labels train:" in page.text


def test_every_section_is_there(page):
    assert "train 31 31 16 15 test 2 2 1 1" in page.text  # films, patients, NORMAL, PNEUMONIA
    assert "Split by patient, never by film. patient_id films in train films in test patient0 1 1" in page.text
    assert "2 exact pairs (2 across splits) and 0 near pairs (0 across splits), in 2 groups" in page.text
    assert "1 film nearly constant" in page.text and "nearly constant correlation" in page.text
    assert re.search(r"mean PNEUMONIA 0\.\d{3}", page.text)
    assert f"{HOSTILE}: <b>reason</b>" in page.text
    assert "train, NORMAL test" not in page.text and "train, NORMAL" in page.text and "test, PNEUMONIA" in page.text
    assert "Do not publish" in page.text


def test_a_picture_has_the_aspect_of_its_film(tmp_path):
    wide = np.tile(phantoms(0, 1)[0], (1, 3))[:, :144]
    page = page_of(tmp_path, train=decoded([wide]))
    assert [(picture["width"], picture["height"]) for picture in page.pictures] == [("144", "96")]


def test_a_fact_that_tells_the_label_has_a_red_bar(tmp_path):
    films = [np.full((40, 40 + row % 2), 20 + 5 * row, dtype=np.uint8) for row in range(30)]
    page = page_of(tmp_path, train=decoded(films))
    assert ("div", {"class": "over", "style": "width:100%"}) in page.tags
    assert "aspect PNEUMONIA 1.000 < 0.0001" in page.text


def test_pairs_that_find_no_room_are_counted(tmp_path):
    films = list(np.random.default_rng(0).integers(0, 256, size=(SHOWN_PAIRS + 10, 32, 32), dtype=np.uint8))
    page = page_of(tmp_path, train=decoded(films), test=decoded(films))
    assert sum(tag == "figure" for tag, _ in page.tags) == SHOWN_PAIRS
    assert "10 more pairs not shown." in page.text


def test_a_multi_label_set_with_unknown_patients_has_a_page_too(tmp_path):
    labels = [{"Mass": float(row % 2), "Nodule": float("nan")} for row in range(6)]
    films = decoded(phantoms(0, 6), labels=labels, patients=[None] * 6, names=("Mass", "Nodule"), multi_label=True)
    page = page_of(tmp_path, train=films, test=films.select([]))
    assert "Patients unknown: 6 films without a patient_id." in page.text
    assert "train 6 unknown 3 0 test 0 unknown 0 0" in page.text
    assert [picture["alt"] for picture in page.pictures] == ["film1", "film3", "film5"]


def test_a_page_is_light(page):
    assert len(page.pictures) > 15
    assert len(page.html) / len(page.pictures) < 15_000  # bytes a picture, base64 included
