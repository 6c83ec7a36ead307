"""The page holds all of the evaluation, and nothing that leaves it; a browser shows it."""

import base64
import io
import re
from itertools import cycle

import numpy as np
import pytest
from browser import measure, screenshot
from evaluation.drawn_predictions import FINDINGS, drawn_run, findings, several_classes, two_classes
from evaluation.test_plots import LOG, OVERFITTING
from page import Page
from PIL import Image

from cxr_backbone.evaluation.report_page import SHOWN_TARGETS, write_report
from cxr_backbone.evaluation.saliency import SalientFilm

HOSTILE = "<script>alert('1')</script>\" onerror=\"x"
SPLITS = ("train", "validation", "test", "external nih")
SECTIONS = [
    *("Test split", "Operating points", "Learning curves", "ROC and precision-recall", "Calibration"),
    *("Scores by label", "Confusion matrices", "Subgroups", "Inside and outside", "Where the model finds what it says"),
    "How it was made",
]


def salient_films():
    """Twelve films, dark on the left; the map is bright there. One has an empty map, and one a hostile name."""
    ramp = np.tile(np.linspace(0, 1, 224, dtype=np.float32), (224, 1))
    kinds = zip(cycle(["surest right", "surest wrong", "least sure"]), range(12), strict=False)
    return [
        SalientFilm(
            kind=kind,
            target="PNEUMONIA",
            image_id=HOSTILE if film == 0 else f"film{film}",
            truth="NORMAL",
            called="PNEUMONIA",
            score=0.987,
            explained="PNEUMONIA",
            pixels=(200 * ramp).astype(np.uint8),
            map=np.zeros_like(ramp) if film == 1 else 1 - ramp,
        )
        for kind, film in kinds
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with something in every section."""
    metrics, predictions = drawn_run(two_classes, splits=SPLITS)
    metrics["overfitting"] = OVERFITTING
    folder = tmp_path_factory.mktemp("report")
    return Page(write_report(folder, metrics, predictions, log=LOG, saliency=salient_films()))


@pytest.fixture(scope="module")
def page_of_findings(tmp_path_factory):
    metrics, predictions = drawn_run(findings)
    return Page(write_report(tmp_path_factory.mktemp("findings"), metrics, predictions, log=[], saliency=[]))


def test_the_sections_come_in_order_under_what_the_model_is_not_for(page):
    assert page.sections == SECTIONS
    assert page.text.index("Research software, not a medical device.") < page.text.index("Test split")


def test_the_first_table_has_the_models_their_difference_and_delongs_p(page):
    table = page.text[page.text.index("Test split") : page.text.index("The difference is")]
    assert "figure frozen fine-tuned difference p (DeLong)" in table
    number = r"[+-]?\d\.\d{3} \( ?[+-]?\d\.\d{3} to [+-]?\d\.\d{3}\)"
    assert re.search(rf"AUROC {number} {number} {number} (< )?0\.\d{{4}}", table)
    assert "difference is fine-tuned minus frozen" in page.text


def test_operating_points_stand_with_what_chose_them(page):
    metrics, _ = drawn_run(two_classes, splits=SPLITS)
    chosen = metrics["models"]["fine_tuned"]["operating_points"]["PNEUMONIA"]["youden"]
    row = " ".join(f"{chosen[name]:.3f}" for name in ("threshold", "sensitivity", "specificity"))
    assert f"youden {row}" in page.text


def test_the_gap_of_the_chosen_checkpoint_is_told(page):
    assert "after 50 steps was chosen" in page.text and "+0.0200 nats" in page.text


def test_subgroups_and_outside_stand_beside_the_whole(page):
    assert page.text.count("sex: F 60") == page.text.count("sex: M 60") == 2  # inside and outside
    assert "figure test external nih films 120 120" in page.text


def test_each_salient_film_stands_beside_its_map_with_what_is_true_and_called(page):
    assert page.text.count("true: NORMAL, called: PNEUMONIA score of PNEUMONIA: 0.987") == 12
    assert page.text.count("map: what speaks for PNEUMONIA") == 11 and "nothing speaks for PNEUMONIA" in page.text
    films = [picture for picture in page.pictures if picture["width"] == "224"]
    film, overlay = (np.asarray(decoded(picture).convert("RGB"), dtype=int) for picture in films[-2:])
    changed = np.abs(film - overlay).sum(axis=(0, 2))
    assert changed[:50].min() > changed[-50:].max()
    assert np.array_equal(decoded(films[8]), decoded(films[9]).convert("L"))  # an empty map hides nothing


def test_names_from_outside_are_text_and_nothing_else(page):
    assert HOSTILE in page.text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_needs_nothing_from_outside(page):
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags
    links = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links if link)
    assert "http:" not in page.html and "https:" not in page.html and "url(" not in page.html
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower()) and "None" not in page.text


def test_figures_are_there_as_files_and_films_are_not(page):
    names = {path.name for path in (page.path.parent / "figures").iterdir()}
    figures = ("learning_curves", "roc", "reliability", "scores", "confusion", "inside_outside")
    assert names == {f"{name}.png" for name in figures}
    assert all(Image.open(page.path.parent / "figures" / name).width >= 600 for name in names)
    assert (page.path.parent / "films.png").is_file()
    assert "Do not publish" in page.text


def test_of_many_findings_the_most_frequent_have_pictures_and_tables_have_all(page_of_findings):
    page = page_of_findings
    assert all(page.text.count(name) >= 2 for name in FINDINGS)
    roc = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("ROC")]
    assert len(roc) == SHOWN_TARGETS and not any("Hernia" in alt for alt in roc)
    assert len({path.name for path in (page.path.parent / "figures").iterdir()}) == 3 * SHOWN_TARGETS + 1


def test_what_is_not_defined_says_why(page_of_findings):
    page = page_of_findings
    row = page.text[page.text.index("Hernia", page.text.index("Each finding")) :]
    assert re.match(r"Hernia \d+ 0 not defined (\d) not defined \1 not defined \1", row)
    assert "Not defined: a class does not occur." in page.text
    assert "a class does not occur" in {attributes.get("title") for tag, attributes in page.tags if tag == "a"}


def test_without_films_and_training_nothing_is_said_of_them(page_of_findings):
    assert not {"Learning curves", "Subgroups", "Inside and outside"} & set(page_of_findings.sections)
    assert "This page shows no film" in page_of_findings.text


def test_several_classes_have_a_matrix_and_each_its_own_figures(tmp_path):
    metrics, predictions = drawn_run(several_classes)
    page = Page(write_report(tmp_path, metrics, predictions, log=[], saliency=[]))
    assert "Each label against all others" in page.text
    assert sum("Confusion" in picture["alt"] for picture in page.pictures) == 1


def test_one_model_that_was_never_calibrated_has_a_page(tmp_path):
    metrics, predictions = drawn_run(two_classes, models=("tested",), temperature=None, with_points=False)
    page = Page(write_report(tmp_path, metrics, predictions, log=[], saliency=[]))
    assert "Operating points" not in page.sections and "difference" not in page.text
    assert "tested none" in page.text


def test_a_test_split_of_one_label_has_a_page_without_curves(tmp_path):
    metrics, predictions = drawn_run(only_negatives_in_test)
    page = Page(write_report(tmp_path, metrics, predictions, log=[], saliency=[]))
    assert "ROC and precision-recall" not in page.sections and "Calibration" in page.sections
    assert "not defined" in page.text


def only_negatives_in_test(seed, skill):
    predictions = two_classes(seed, skill=skill)
    return predictions.select(np.flatnonzero(predictions.labels == 0)) if seed == 2 else predictions


@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_all_pictures_and_nothing_sticks_out(page, width):
    shown = measure(page.path, width)
    assert shown["width"] <= width and shown["wide"] == []
    assert len(shown["pictures"]) == len(page.pictures)
    figures = [shown for width, _, shown in shown["pictures"] if width > 224]
    assert all(height > 0 for _, height, _ in shown["pictures"])
    assert min(figures) >= 400  # on a phone they scroll sideways rather than shrink
    assert "Research software, not a medical device." in shown["text"]


def test_findings_fit_a_phone(page_of_findings):
    shown = measure(page_of_findings.path, 390)
    assert shown["width"] <= 390 and shown["wide"] == []


def test_a_browser_draws_text_and_figures(page):
    pixels = screenshot(page.path, 1100, 2000).astype(int)
    assert pixels.shape == (2000, 1100, 3)
    written = (pixels < 128).all(axis=2).any(axis=1)
    assert 0.2 < written.mean() < 0.95  # rows with ink
    blue = np.abs(pixels - (0x00, 0x72, 0xB2)).max(axis=2) < 10  # of the curves
    assert blue.sum() > 200


def decoded(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))))
