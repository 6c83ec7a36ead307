"""Published splits of the Kermany set are dealt out as published, and what is wrong with them is said."""

import logging
from collections import Counter

import datasets
import pytest
from releases import needs_balanced_folds

from cxr_backbone.data.audit import audit, leaks
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.kermany import load_kermany
from cxr_backbone.data.protocols import PROTOCOLS, divide
from cxr_backbone.data.splits import all_films, repeat_split, write_split


@pytest.fixture(scope="module")
def real(shared):
    """The real set, divided by each protocol."""
    return {protocol: load_kermany(shared / "data/kermany224", protocol=protocol) for protocol in PROTOCOLS}


def sizes(splits):
    return {name: len(split) for name, split in splits.items()}


def shared_by(splits, column):
    """How many patients or films train and validation, train and test, validation and test share."""
    train, validation, test = (set(splits[name][column]) for name in ("train", "validation", "test"))
    return len(train & validation), len(train & test), len(validation & test)


def test_the_official_protocol_is_the_default(real, shared):
    default = load_kermany(shared / "data/kermany224")
    assert all(real["official"][name]["image_id"][:] == split["image_id"][:] for name, split in default.items())


def test_pooled_by_image_has_the_published_sizes_and_children_on_all_sides(real):
    assert sizes(real["pooled_by_image"]) == {"train": 3350, "validation": 372, "test": 2134}
    assert shared_by(real["pooled_by_image"], "image_id") == (0, 0, 0)
    assert min(shared_by(real["pooled_by_image"], "patient_id")) > 100


@needs_balanced_folds
def test_pooled_by_patient_has_about_these_sizes_and_no_child_on_two_sides(real):
    splits = real["pooled_by_patient"]
    assert len(all_films(splits)) == 5856
    assert len(splits["test"]) == pytest.approx(2134, abs=15)
    assert len(splits["validation"]) == pytest.approx(372, abs=15)
    assert shared_by(splits, "patient_id") == (0, 0, 0)


@needs_balanced_folds
@pytest.mark.parametrize("protocol", ["pooled_by_image", "pooled_by_patient"])
def test_pooling_keeps_the_shares_of_the_subtypes_and_obeys_the_seed(real, protocol, shared):
    everything = Counter(all_films(real[protocol])["subtype"])
    assert everything == {"normal": 1583, "bacteria": 2780, "virus": 1493}
    for split in real[protocol].values():
        for subtype, films in Counter(split["subtype"]).items():
            assert films / len(split) == pytest.approx(everything[subtype] / 5856, abs=0.01)
    again, other = (load_kermany(shared / "data/kermany224", protocol=protocol, seed=seed) for seed in (0, 1))
    for name in ("validation", "test"):
        assert again[name]["image_id"][:] == real[protocol][name]["image_id"][:] != other[name]["image_id"][:]


def test_the_folds_of_a_pooled_protocol_are_its_validation_splits(shared):
    splits = [
        load_kermany(shared / "data/kermany224", protocol="pooled_by_image", num_folds=2, fold=fold) for fold in (0, 1)
    ]
    assert sorted(splits[0]["validation"]["image_id"]) == sorted(splits[1]["train"]["image_id"])
    assert splits[0]["test"]["image_id"][:] == splits[1]["test"]["image_id"][:]


def test_selected_on_test_has_the_test_split_for_validation_and_says_so_loudly(real, shared, caplog):
    splits = real["selected_on_test"]
    assert sizes(splits) == {"train": 5216, "validation": 624, "test": 624}
    assert splits["validation"]["image_id"][:] == splits["test"]["image_id"][:]
    load_kermany(shared / "data/kermany224", protocol="selected_on_test")
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "VALIDATION IS THE TEST SPLIT" in warning and "For comparison only" in warning


def films(split, number):
    rows = {
        "image_id": [f"{split}/{film}" for film in range(number)],
        "patient_id": [f"{split}{film // 2}" for film in range(number)],
        "subtype": [["normal", "bacteria", "virus"][film // 2 % 3] for film in range(number)],
    }
    return datasets.Dataset.from_dict(rows)


@pytest.fixture
def small():
    return datasets.DatasetDict(train=films("train", 180), val=films("val", 6), test=films("test", 34))


def test_a_set_of_another_size_is_pooled_in_proportion(small):
    by_image, by_patient = (
        divide(small, protocol, num_folds=5, fold=0, seed=0) for protocol in ("pooled_by_image", "pooled_by_patient")
    )
    assert sizes(by_image) == {"train": 112, "validation": 28, "test": 80}
    assert sizes(by_patient) == pytest.approx(sizes(by_image), abs=3) and len(all_films(by_patient)) == 220


def test_a_protocol_or_fold_that_does_not_exist_is_refused(small):
    with pytest.raises(ValueError, match="protocol='kaggle' is none; expected one of official, pooled_by_image"):
        divide(small, "kaggle", num_folds=10, fold=0, seed=0)
    with pytest.raises(ValueError, match="fold=10 must be 0 or more and below num_folds=10"):
        divide(small, "pooled_by_image", num_folds=10, fold=10, seed=0)
    with pytest.raises(ValueError, match="fold=1 means nothing: the source brings its validation"):
        divide(small, "selected_on_test", num_folds=10, fold=1, seed=0)


@needs_balanced_folds
def test_the_audit_finds_what_a_protocol_does_and_its_split_can_be_repeated(real, tmp_path):
    for protocol, expected in {"pooled_by_image": {"patients"}, "selected_on_test": {"patients", "duplicates"}}.items():
        # Some of each split, of the same children where there are any.
        some = datasets.DatasetDict(
            {name: split.sort("patient_id").select(range(60)) for name, split in real[protocol].items()}
        )
        decoded = datasets.DatasetDict({name: decode_once(split, 32) for name, split in some.items()})
        assert expected <= set(leaks(audit(decoded)))
        write_split(some, tmp_path / "split.csv")
        repeated = repeat_split(some, tmp_path / "split.csv")
        assert all(repeated[name]["image_id"][:] == split["image_id"][:] for name, split in some.items())
