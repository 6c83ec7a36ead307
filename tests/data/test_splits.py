"""Splits keep a patient's films together, balance the labels, and can be repeated from a file."""

import csv

import datasets
import numpy as np
import pytest
from releases import needs_balanced_folds

from cxr_backbone.data.labels import label_counts, labels_of, make_features
from cxr_backbone.data.splits import (
    all_films,
    complete_splits,
    folds_by_patient,
    permute_labels,
    repeat_split,
    write_split,
)
from cxr_backbone.data.synthetic import load_synthetic

PATIENTS = [f"p{film // 3}" for film in range(120)]  # 40 patients with three films each
STRATA = ["normal" if film // 3 % 4 else "virus" for film in range(120)]


def films(start, stop, multi_label=False):
    """Films of patients with two films each; every third patient is ill."""
    rows = []
    for film in range(start, stop):
        ill = film // 2 % 3 == 0
        label = {"rare": float(film // 2 % 9 == 0), "common": float(ill)} if multi_label else int(ill)
        rows.append({"image": None, "label": label, "patient_id": f"p{film // 2}", "image_id": f"{film}.png"})
    names = ["rare", "common"] if multi_label else ["NORMAL", "ILL"]
    return datasets.Dataset.from_list(rows, features=make_features(names, multi_label=multi_label))


def image_ids(splits):
    return {name: split["image_id"][:] for name, split in splits.items()}


def patients(splits):
    return {name: set(split["patient_id"]) for name, split in splits.items()}


# Folds


def test_a_patient_has_one_fold_and_every_fold_its_share():
    folds = folds_by_patient(PATIENTS, STRATA, 5, seed=0)
    assert np.bincount(folds).tolist() == [24] * 5
    assert all(len(set(folds[3 * patient : 3 * patient + 3])) == 1 for patient in range(40))


def test_the_seed_decides_the_folds():
    first, again, other = (folds_by_patient(PATIENTS, STRATA, 5, seed=seed).tolist() for seed in (3, 3, 4))
    assert first == again != other


def test_patients_are_told_apart_by_any_kind_of_identifier():
    numbers = np.arange(120) // 3
    folds = folds_by_patient(numbers, np.array(STRATA), 4, seed=0)
    assert all(len(set(folds[numbers == number])) == 1 for number in range(40))


@needs_balanced_folds
def test_strata_keep_their_shares_in_every_fold_of_real_films(shared):
    with (shared / "data/kermany224/labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    subtypes = np.array([row["subtype"] for row in rows])
    folds = folds_by_patient([row["patient_id"] for row in rows], subtypes, 10, seed=0)
    for fold in range(10):
        for subtype in np.unique(subtypes):
            share = np.mean(subtypes[folds == fold] == subtype)
            assert share == pytest.approx(np.mean(subtypes == subtype), abs=0.02)


@pytest.mark.parametrize("missing", [None, float("nan"), "", " "])
def test_a_missing_patient_is_refused_by_row(missing):
    with pytest.raises(ValueError, match="Row 7 has no patient_id"):
        folds_by_patient([*PATIENTS[:7], missing, *PATIENTS[8:]], STRATA, 5, seed=0)


@pytest.mark.parametrize(
    ("patient_ids", "strata", "num_folds", "message"),
    [
        ([], [], 10, "patient_ids is empty"),
        (PATIENTS, STRATA[:-1], 10, "patient_ids has 120 entries, strata 119"),
        (PATIENTS, STRATA, 1, "num_folds must be 2 or more, not 1"),
        (PATIENTS[:12], STRATA[:12], 10, "10 folds need 10 patients or more; there are 4"),
        (range(10), range(10), 10, "a stratum of at least 10 films; the largest has 1"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(patient_ids, strata, num_folds, message):
    with pytest.raises(ValueError, match=message):
        folds_by_patient(patient_ids, strata, num_folds, seed=0)


# Train, validation and test


def test_validation_is_carved_from_train_and_the_rest_stays():
    given = datasets.DatasetDict(train=films(0, 100), test=films(100, 120))
    splits = complete_splits(given)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"]["image_id"][:] == given["test"]["image_id"][:]
    assert len(splits["validation"]) == 10
    assert sorted(splits["train"]["image_id"][:] + splits["validation"]["image_id"][:]) == sorted(
        given["train"]["image_id"]
    )
    assert not patients(splits)["train"] & patients(splits)["validation"]


def test_without_a_test_split_two_folds_are_carved():
    splits = complete_splits(datasets.DatasetDict(train=films(0, 120)), num_folds=4)
    sides = patients(splits)
    assert {name: len(split) for name, split in splits.items()} == {"train": 60, "validation": 30, "test": 30}
    assert not sides["train"] & sides["validation"] and not (sides["train"] | sides["validation"]) & sides["test"]


@pytest.mark.parametrize("brings_test", [True, False])
def test_k_folds_hold_out_every_film_once(brings_test):
    given = datasets.DatasetDict(train=films(0, 120), **({"test": films(120, 130)} if brings_test else {}))
    held_out = [image_ids(complete_splits(given, num_folds=5, fold=fold)) for fold in range(5)]
    for name in ("validation",) if brings_test else ("validation", "test"):
        assert sorted(image for fold in held_out for image in fold[name]) == sorted(given["train"]["image_id"])


def test_a_set_that_brings_all_splits_is_left_alone():
    given = datasets.DatasetDict(train=films(0, 40), validation=films(40, 60), test=films(60, 80))
    assert image_ids(complete_splits(given)) == image_ids(given)


@needs_balanced_folds
def test_findings_are_balanced_by_the_rarest_that_a_film_shows():
    splits = complete_splits(datasets.DatasetDict(train=films(0, 360, multi_label=True)), num_folds=4)
    for split in splits.values():
        shares = np.mean([[label["rare"], label["common"]] for label in split["label"]], axis=0)
        assert shares == pytest.approx([1 / 9, 1 / 3], abs=0.03)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"test": films(0, 20)}, {}, "has a train split, .* found test"),
        ({"train": films(0, 20), "extra": films(20, 40)}, {}, "found train, extra"),
        ({"train": films(0, 20), "test": films(0, 2).select([])}, {}, "test split has no films"),
        ({"train": films(0, 40)}, {"fold": 10}, "fold=10 must be 0 or more and below num_folds=10"),
        ({"train": films(0, 40)}, {"fold": -1}, "fold=-1"),
        ({"train": films(0, 40)}, {"num_folds": 2}, "leaves nothing to train on"),
        (
            {"train": films(0, 20), "validation": films(20, 30), "test": films(30, 40)},
            {"fold": 1},
            "fold=1 means nothing: the source brings its validation and its test split",
        ),
    ],
)
def test_splits_that_cannot_be_completed_are_refused(given, settings, message):
    with pytest.raises(ValueError, match=message):
        complete_splits(datasets.DatasetDict(given), **settings)


# From a file


@pytest.fixture
def split_file(tmp_path):
    write_split(complete_splits(datasets.DatasetDict(train=films(0, 80)), seed=1), tmp_path / "split.csv")
    return tmp_path / "split.csv"


def test_a_split_is_repeated_film_by_film_whatever_the_seed(split_file):
    expected = complete_splits(datasets.DatasetDict(train=films(0, 80)), seed=1)
    other = complete_splits(datasets.DatasetDict(train=films(0, 80)), seed=2)
    assert image_ids(other) != image_ids(expected)
    assert image_ids(repeat_split(other, split_file)) == image_ids(expected)


def test_films_that_the_file_does_not_list_are_left_out(split_file):
    larger = datasets.DatasetDict(train=films(0, 100))
    assert sum(len(ids) for ids in image_ids(repeat_split(larger, split_file)).values()) == 80


def test_the_file_names_split_film_and_patient(split_file):
    with split_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    assert all(row["patient_id"] == f"p{int(row['image_id'].removesuffix('.png')) // 2}" for row in rows)


def test_a_real_run_can_be_repeated(tmp_path):
    splits = load_synthetic(20, image_size=32)
    write_split(splits, tmp_path / "split.csv")
    repeated = repeat_split(splits, tmp_path / "split.csv")
    assert all(repeated[name][:] == split[:] for name, split in splits.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("split,image_id", "side,film"), "is no split file"),
        (lambda text: text.replace("validation,", "dev,"), "has the split 'dev'"),
        (lambda text: text.replace("3.png,p1", "3.png,p9", 1), "as a film of another patient"),
        (lambda text: text + "train,999.png,p1\n", r"line 82 lists 999\.png, which the data set lacks"),
        (lambda text: text.replace("test,", "train,"), "lists no film of the test split"),
        (lambda text: "\0\ufffd" + text, "is no split file"),
        (lambda text: text + "train,3.png,p1\n", r"line 82 lists 3\.png, which the data set lacks or lists before"),
    ],
)
def test_a_faulty_split_file_is_refused_by_line(split_file, change, message):
    split_file.write_text(change(split_file.read_text()))
    with pytest.raises(ValueError, match=message):
        repeat_split(datasets.DatasetDict(train=films(0, 80)), split_file)


def test_a_missing_split_file_and_doubled_ids_are_refused(split_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no split file .*gone\.csv"):
        repeat_split(datasets.DatasetDict(train=films(0, 80)), tmp_path / "gone.csv")
    doubled = datasets.concatenate_datasets([films(0, 80), films(3, 4)])
    with pytest.raises(ValueError, match="image_id is not unique: 81 films of the train split share 80"):
        repeat_split(datasets.DatasetDict(train=doubled), split_file)


def test_a_film_that_stands_in_two_splits_is_repeated_in_both(tmp_path):
    given = datasets.DatasetDict(train=films(0, 40), validation=films(40, 60), test=films(40, 60))
    write_split(given, tmp_path / "split.csv")
    assert image_ids(repeat_split(given, tmp_path / "split.csv")) == image_ids(given)
    with pytest.raises(ValueError, match=r"line 62 lists 40\.png, which the data set lacks or lists before"):
        repeat_split(datasets.DatasetDict(train=films(0, 80)), tmp_path / "split.csv")


# Noise for labels


@pytest.mark.parametrize("multi_label", [False, True])
def test_labels_are_permuted_within_train_and_validation_and_nothing_else_moves(multi_label):
    def without_labels(split):
        return split.remove_columns("label")[:]

    given = complete_splits(datasets.DatasetDict(train=films(0, 200, multi_label)), num_folds=4)
    permuted = permute_labels(given, seed=0)
    assert list(permuted) == list(given)
    for name in given:
        assert permuted[name].features == given[name].features
        assert permuted[name].column_names == given[name].column_names
        assert without_labels(permuted[name]) == without_labels(given[name])
        old, new = labels_of(given[name]), labels_of(permuted[name])
        assert sorted(old.tolist()) == sorted(new.tolist())  # findings as a whole
        assert label_counts(permuted[name]) == label_counts(given[name])
        assert (old.tolist() == new.tolist()) == (name == "test")


def test_permuted_labels_agree_with_the_true_ones_as_chance_would():
    given = datasets.DatasetDict(train=films(0, 3000), validation=films(0, 20), test=films(0, 20))
    old, new = (labels_of(splits["train"]) for splits in (given, permute_labels(given, seed=0)))
    assert np.corrcoef(old, new)[0, 1] == pytest.approx(0, abs=0.06)  # three standard errors


def test_the_seed_decides_the_noise():
    given = datasets.DatasetDict(train=films(0, 40), validation=films(40, 60), test=films(60, 80))
    first, again, other = (labels_of(permute_labels(given, seed=seed)["train"]).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_unknown_findings_stay_unknown_when_labels_are_permuted():
    rows = films(0, 40, multi_label=True)[:]
    for label in rows["label"][::2]:
        label["rare"] = float("nan")
    split = datasets.Dataset.from_dict(rows, features=make_features(["rare", "common"], multi_label=True))
    permuted = permute_labels(datasets.DatasetDict(train=split, validation=split, test=split), seed=0)
    assert np.isnan(labels_of(permuted["train"])).sum(axis=0).tolist() == [20, 0]


# All of it


def test_all_films_are_those_of_every_split():
    given = datasets.DatasetDict(train=films(0, 80))
    everything = all_films(complete_splits(given))
    assert sorted(everything["image_id"]) == sorted(given["train"]["image_id"])


def test_films_may_be_carved_by_image_which_parts_the_films_of_a_patient():
    splits = complete_splits(datasets.DatasetDict(train=films(0, 120)), num_folds=4, group_by="image_id")
    sides = patients(splits)
    assert {name: len(split) for name, split in splits.items()} == {"train": 60, "validation": 30, "test": 30}
    assert sides["train"] & sides["test"] and sides["train"] & sides["validation"]
