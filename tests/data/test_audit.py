"""A data set tells on itself."""

import csv
import json

import datasets
import numpy as np
import pytest
from data.drawn_sets import decoded, phantoms

from cxr_backbone.data.audit import audit, leaks, summary
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.kermany import load_kermany


@pytest.fixture(scope="module")
def kermany(shared):
    """The report on the whole Kermany set, 5,840 films without the official validation split."""
    splits = load_kermany(shared / "data/kermany224")
    return audit(datasets.DatasetDict({name: decode_once(films, 96) for name, films in splits.items()}))


@pytest.fixture(scope="module")
def real_films(shared):
    """Fifty adult films."""
    return sorted((shared / "data/rsna-normals/images").glob("*.jpg"))[:50]


def audit_of(train, **others):
    return audit(datasets.DatasetDict(train=train, **others))


def test_the_near_duplicates_listed_for_the_kermany_set_are_found_and_no_others(kermany, shared):
    with (shared / "data/kermany224/near_duplicates.csv").open(newline="") as file:
        expected = {frozenset((row["path_a"], row["path_b"])) for row in csv.DictReader(file)}
    listed = kermany["duplicates"]["listed"]
    found = {frozenset(film["image_id"] for film in pair["films"]) for pair in listed}
    assert len(expected) == 34 and found == expected
    assert kermany["duplicates"]["groups_across_splits"] == 0
    assert not any(pair["across_splits"] or pair["contradictory"] for pair in listed)


def test_the_patients_of_the_kermany_set_in_train_and_test_are_found(kermany):
    across = kermany["patients_across_splits"]
    assert across["count"] == 170
    assert all({"test"} < splits.keys() for splits in across["listed"].values())
    assert list(leaks(kermany)) == ["patients"]


def test_the_aspect_of_native_files_tells_the_label_and_that_of_square_copies_does_not(kermany, shared):
    paths = sorted((shared / "data/kermany-originals").rglob("*.jpeg"))
    native = audit_of(decoded(paths, labels=[int(path.parent.name == "PNEUMONIA") for path in paths]))
    assert "aspect" in native["metadata_baseline"]["alarm"]
    assert native["metadata_baseline"]["facts"]["aspect"]["auroc"] == pytest.approx(0.886, abs=0.001)
    assert native["sizes"]["width"] == [792, 1904]
    squares = kermany["metadata_baseline"]
    assert squares["facts"]["aspect"]["auroc"] == 0.5
    assert squares["alarm"] == ["file_bytes", "combined"]  # pneumonia blurs, and blurred films compress better
    assert kermany["sizes"]["most_frequent"] == {"height": 224, "width": 224, "films": 5840}


def test_real_films_look_right(kermany, real_films):
    assert kermany["intensity"] == {"counts": {}, "listed": []}
    assert audit_of(decoded(real_films))["intensity"] == {"counts": {}, "listed": []}


def test_a_film_with_a_wrong_photometric_tag_is_found_among_real_films(shared, real_films):
    pytest.importorskip("pydicom")
    dicom = shared / "data/dicom"
    films = decoded([*real_films, dicom / "rsna_cr_monochrome2.dcm", dicom / "rsna_cr_tagged_monochrome1.dcm"])
    found = audit_of(films)["intensity"]
    assert found["counts"] == {"probably inverted": 1}
    assert [(film["image_id"], film["correlation"] < -0.8) for film in found["listed"]] == [("film51", True)]


def test_negatives_published_as_films_are_found(shared, real_films):
    images = shared / "data/rsna-normals/images"
    negatives = [images / "00018175_002.jpg", images / "00015024_003.jpg"]
    others = [path for path in real_films if path not in negatives]
    found = audit_of(decoded([*negatives, *others]))["intensity"]
    assert [film["image_id"] for film in found["listed"]] == ["film0", "film1"]


def test_too_few_films_say_nothing_of_a_negative(real_films):
    film = phantoms(0, 1)[0]
    assert audit_of(decoded([*phantoms(1, 17), 255 - film]))["intensity"]["counts"] == {}
    found = audit_of(decoded([*phantoms(1, 19), 255 - film]))["intensity"]
    assert found["counts"] == {"probably inverted": 1}


def test_flat_white_and_black_films_are_found_with_each_reason():
    film = phantoms(0, 1)[0]
    white, black = film.copy(), film.copy()
    white[:52], black[:80] = 255, 0  # of 96 rows
    found = audit_of(decoded([film, film // 9 + 100, white, black, np.zeros_like(film)]))["intensity"]
    assert found["counts"] == {"nearly constant": 2, "mostly white": 1, "mostly black": 2}
    reasons = {listed["image_id"]: listed["reasons"] for listed in found["listed"]}
    assert reasons == {
        "film1": ["nearly constant"],
        "film2": ["mostly white"],
        "film3": ["mostly black"],
        "film4": ["nearly constant", "mostly black"],
    }
    assert found["listed"][0]["correlation"] is None


def test_a_patient_in_two_splits_is_a_leak():
    films = phantoms(0, 6)
    report = audit_of(
        decoded(films[:3], patients=["a", "a", "b"]),
        validation=decoded(films[3:4], patients=["c"]),
        test=decoded(films[4:], patients=["a", "d"]),
    )
    assert report["patients_across_splits"] == {
        "count": 1,
        "films_without_patient": 0,
        "listed": {"a": {"train": 2, "test": 1}},
    }
    assert leaks(report) == {"patients": "1 patient with films in more than one split, for instance a."}
    assert [split["patients"] for split in report["splits"].values()] == [2, 1, 2]


def test_a_film_in_two_splits_is_a_leak():
    films = phantoms(0, 5)
    test = decoded([films[4], films[2]], ids=["e", "f"], patients=["v", "w"])
    report = audit_of(decoded(films[:4], ids=["a", "b", "c", "d"]), test=test)
    sentence = "1 group of duplicate films in more than one split, for instance c (train) and f (test)."
    assert leaks(report) == {"duplicates": sentence}


def test_duplicates_and_patients_within_a_split_are_no_leak():
    films = phantoms(0, 3)
    report = audit_of(decoded([films[0], films[0]], patients=["a", "a"]), test=decoded(films[1:], patients=["b", "b"]))
    assert report["duplicates"]["exact"]["pairs"] == 1
    assert leaks(report) == {}


def test_where_patients_are_unknown_nothing_is_claimed():
    films = phantoms(0, 4)
    unknown = audit_of(decoded(films[:2], patients=[None, None]), test=decoded(films[2:], patients=[None, None]))
    assert [split["patients"] for split in unknown["splits"].values()] == [None, None]
    assert unknown["patients_across_splits"] == {"count": 0, "films_without_patient": 4, "listed": {}}
    assert "train: 2 films, patients unknown; NORMAL 1, PNEUMONIA 1" in summary(unknown)
    assert "4 films without a patient_id: such a patient may be in two splits" in summary(unknown)
    some = audit_of(decoded(films[:2], patients=["a", None]), test=decoded(films[2:], patients=[" ", "b"]))
    assert [split["patients"] for split in some["splits"].values()] == [1, 1]
    assert some["patients_across_splits"]["films_without_patient"] == 2


def test_sizes_are_those_of_the_files():
    film = phantoms(0, 1)[0]
    report = audit_of(decoded([film, film[:50], film[:, :40], film[:50] // 2]))
    assert report["sizes"] == {
        "most_frequent": {"height": 50, "width": 96, "films": 2},
        "height": [50, 96],
        "width": [40, 96],
    }


def test_findings_are_counted_and_tried_one_by_one_with_the_unknown_left_out():
    nan = float("nan")
    films = [np.full((40, 40), 20 + 5 * row, dtype=np.uint8) for row in range(40)]
    labels = [{"Mass": float(row >= 20), "Nodule": nan if row % 3 else float(row % 2)} for row in range(40)]
    report = audit_of(decoded(films, labels=labels, names=("Mass", "Nodule"), multi_label=True))
    assert report["splits"]["train"]["labels"] == {"Mass": 20, "Nodule": 7}
    mean = report["metadata_baseline"]["facts"]["mean"]
    assert (mean["label"], mean["auroc"]) == ("Mass", 1)


def test_each_of_three_classes_is_tried_against_the_rest():
    films = [np.full((40, 40), 20 + 5 * row, dtype=np.uint8) for row in range(30)]
    names = ("bacteria", "normal", "virus")
    report = audit_of(decoded(films, labels=[row // 10 for row in range(30)], names=names))
    assert report["metadata_baseline"]["facts"]["mean"]["auroc"] == 1
    assert report["metadata_baseline"]["facts"]["mean"]["label"] in ("bacteria", "virus")


def test_the_report_is_json_and_the_summary_says_what_it_says(kermany):
    film, *others = phantoms(0, 30)
    report = audit_of(decoded([film, *others, 255 - film]), test=decoded([film]))
    report |= {"unreadable": {"a/b.dcm": "a truncated file"}}
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    lines = summary(report).splitlines()
    assert all(line.startswith("- ") for line in lines)
    assert "- **LEAK**: " + leaks(report)["duplicates"] in lines
    assert "- grey range: 1 film probably inverted" in lines
    assert "- unreadable: 1 film" in lines
    lines = summary(kermany).splitlines()
    assert any(line.startswith("- test: 624 films, 427 patients; NORMAL 234, PNEUMONIA 390") for line in lines)
    assert "- **ALARM**: file_bytes alone tells PNEUMONIA, AUROC 0.90" in lines
    assert any(line.startswith("- duplicates: 34 exact pairs (0 across splits), 0 near pairs") for line in lines)


def test_unreadable_films_are_passed_on():
    unreadable = {"images/film7.png": "Can't read it as an image."}
    report = audit(datasets.DatasetDict(train=decoded(phantoms(0, 2))), unreadable)
    assert report["unreadable"] == unreadable


def test_a_data_set_without_train_is_refused():
    with pytest.raises(ValueError, match="needs a train split; found test"):
        audit(datasets.DatasetDict(test=decoded(phantoms(0, 2))))
