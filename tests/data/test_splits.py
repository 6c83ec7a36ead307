"""Splits keep a patient's films together."""

import csv

import numpy as np
import pytest

from cxr_backbone.data.splits import split_by_patient

PATIENTS = [f"p{film // 3}" for film in range(120)]  # 40 patients with three films each
STRATA = ["normal" if film // 3 % 4 else "virus" for film in range(120)]


def test_no_patient_stands_on_two_sides():
    kept, held_out = split_by_patient(PATIENTS, STRATA, 0.2, seed=0)
    assert not {PATIENTS[i] for i in kept} & {PATIENTS[i] for i in held_out}


def test_every_film_stands_on_one_side_in_sorted_order():
    kept, held_out = split_by_patient(PATIENTS, STRATA, 0.2, seed=0)
    assert sorted([*kept, *held_out]) == list(range(120))
    assert (np.diff(kept) > 0).all() and (np.diff(held_out) > 0).all()
    assert len(held_out) == 24


def test_the_seed_decides_the_split():
    first, again, other = (split_by_patient(PATIENTS, STRATA, 0.2, seed=seed)[1].tolist() for seed in (3, 3, 4))
    assert first == again != other


def test_patients_are_told_apart_by_any_kind_of_identifier():
    numbers = [film // 3 for film in range(120)]
    kept, held_out = split_by_patient(np.array(numbers), np.array(STRATA), 0.25, seed=0)
    assert not {numbers[i] for i in kept} & {numbers[i] for i in held_out}


def test_strata_keep_their_shares_on_real_films(shared):
    with (shared / "data/kermany224/labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    subtypes = np.array([row["subtype"] for row in rows])
    kept, held_out = split_by_patient([row["patient_id"] for row in rows], subtypes, 0.1, seed=0)
    for subtype in np.unique(subtypes):
        assert np.mean(subtypes[held_out] == subtype) == pytest.approx(np.mean(subtypes[kept] == subtype), abs=0.015)


@pytest.mark.parametrize("fraction", [0, -0.1, 0.51, 1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must be above 0"):
        split_by_patient(PATIENTS, STRATA, fraction, seed=0)


@pytest.mark.parametrize("missing", [None, float("nan"), "", " "])
def test_a_missing_patient_is_refused_by_row(missing):
    with pytest.raises(ValueError, match="Row 7 has no patient_id"):
        split_by_patient([*PATIENTS[:7], missing, *PATIENTS[8:]], STRATA, 0.2, seed=0)


def test_too_few_patients_are_refused():
    with pytest.raises(ValueError, match="needs 10 patients or more; there are 4"):
        split_by_patient(PATIENTS[:12], STRATA[:12], 0.1, seed=0)


def test_strata_too_small_for_the_fraction_are_refused():
    with pytest.raises(ValueError, match="the largest has 1"):
        split_by_patient(list(range(10)), list(range(10)), 0.1, seed=0)


def test_no_films_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="patient_ids is empty"):
        split_by_patient([], [], 0.1, seed=0)
    with pytest.raises(ValueError, match="expected as many"):
        split_by_patient(PATIENTS, STRATA[:-1], 0.1, seed=0)
