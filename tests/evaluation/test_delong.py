"""The test is that of R's pROC, and of the papers' own definitions."""

import csv
from pathlib import Path

import numpy as np
import pytest

from cxr_backbone.evaluation.bootstrap import PatientBootstrap
from cxr_backbone.evaluation.delong import delong_test


@pytest.fixture(scope="module")
def asah():
    """outcome, wfns and s100b of 113 patients with a subarachnoid haemorrhage (Turck et al. 2010, Intensive Care
    Medicine 36:107-115, doi:10.1007/s00134-009-1641-y), as distributed with pROC."""
    with (Path(__file__).parents[1] / "references/asah.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    truth = np.array([row["outcome"] == "Poor" for row in rows])
    return truth, *(np.array([float(row[name]) for row in rows]) for name in ("wfns", "s100b"))


@pytest.fixture
def films():
    """60 films of 20 patients: truth, two models' scores with ties, and the patients, whose films are alike."""
    generator = np.random.default_rng(0)
    patients = generator.permutation(np.repeat(np.arange(20), 3))
    truth = generator.random(60) < 0.2 + 0.6 * (patients % 2)
    likeness = generator.normal(size=(2, 20))[:, patients]
    first, second = np.round(truth + likeness + generator.normal(size=(2, 60)), 1)
    return truth, first, second, [f"patient {patient}" for patient in patients]


def test_it_agrees_with_proc(asah):
    truth, wfns, s100b = asah
    result = delong_test(truth, s100b, wfns)
    # What roc.test(wfns, s100b) of pROC gives (tests/testthat/test-roc.test.R there).
    assert result["auroc"] == pytest.approx([0.731368563685637, 0.823678861788618], abs=1e-14)
    assert result["z"] == pytest.approx(2.20898359144091, abs=1e-12)
    assert result["p"] == pytest.approx(0.0271757822291882, abs=1e-14)
    assert [result["low"], result["high"]] == pytest.approx([0.0104061769564846, 0.174214419249478], abs=1e-14)


def test_the_other_order_changes_the_sign_alone(asah):
    truth, wfns, s100b = asah
    there, back = delong_test(truth, s100b, wfns), delong_test(truth, wfns, s100b)
    assert (back["difference"], back["z"], back["p"]) == (-there["difference"], -there["z"], there["p"])
    assert (back["low"], back["high"]) == (-there["high"], -there["low"])


def test_patients_with_a_film_each_change_nothing(asah):
    truth, wfns, s100b = asah
    alone = delong_test(truth, wfns, s100b)
    assert delong_test(truth, wfns, s100b, [f"patient {film}" for film in range(113)]) == alone
    assert delong_test(truth, wfns, s100b, [None] * 113) == alone


def test_the_variance_of_clusters_is_that_of_the_definition(films):
    truth, first, second, patients = films
    result = delong_test(*films)
    assert result["z"] == pytest.approx(result["difference"] / obuchowski_error(truth, first, second, patients))
    assert result["z"] != pytest.approx(delong_test(truth, first, second)["z"], rel=0.05)  # the films are alike


def test_copies_of_a_patients_films_are_no_evidence(films):
    truth, first, second, patients = films
    copied = delong_test(np.tile(truth, 5), np.tile(first, 5), np.tile(second, 5), patients * 5)
    once = delong_test(*films)
    assert [copied["low"], copied["high"], copied["p"]] == pytest.approx([once["low"], once["high"], once["p"]])
    assert delong_test(np.tile(truth, 5), np.tile(first, 5), np.tile(second, 5))["p"] < copied["p"] / 2


def test_the_bootstrap_of_patients_finds_the_same_spread():
    generator = np.random.default_rng(1)
    patients = np.repeat(np.arange(200), 2)
    truth = generator.random(400) < 0.5
    first, second = truth + generator.normal(size=(2, 200))[:, patients] + generator.normal(size=(2, 400))
    names = [str(patient) for patient in patients]
    result, bootstrap = delong_test(truth, first, second, names), PatientBootstrap(names)
    samples = [bootstrap.rank_figures(np.arange(400), truth, scores)[0] for scores in (first, second)]
    assert result["difference"] / result["z"] == pytest.approx((samples[1] - samples[0]).std(), rel=0.05)


def test_models_that_rank_alike_have_no_z_and_no_p(films):
    truth, first, _, patients = films
    result = delong_test(truth, first, np.exp(first), patients)
    assert result["difference"] == 0
    assert {result[name] for name in ("low", "high", "z", "p")} == {None}
    assert result["undefined"] == "the variance of the difference is zero"
    # Every positive is as much better off as any other: no variance, and yet a difference.
    result = delong_test(np.array([False, True] * 3), np.zeros(6), np.array([0.1, 0.9] * 3))
    assert result["difference"] == 0.5 and result["z"] is None


def test_positives_of_one_patient_have_no_variance():
    result = delong_test([True, True, False, False], [4, 1, 2, 3], [3, 4, 1, 2], ["a", "a", "b", "c"])
    assert result["difference"] == 0.5
    assert result["p"] is None
    assert result["undefined"] == "positive films of one patient only; the variance needs two"


def test_the_figures_are_plain_numbers(films):
    result = delong_test(*films)
    assert list(result) == ["auroc", "difference", "low", "high", "z", "p"]
    assert {type(value) for value in [*result["auroc"], *list(result.values())[1:]]} == {float}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [1, 2], [1, 2]), "truth has no negative film"),
        (([0, 0], [1, 2], [1, 2]), "truth has no positive film"),
        (([0, 1], [1, 2], [1]), "second has 1 entries; expected 2"),
        (([0, 1], [1, np.nan], [1, 2]), "first has a NaN"),
        (([0, 1], [1, 2], [1, 2], ["a"]), "patient_ids has 1 entries; expected 2"),
    ],
)
def test_what_cannot_be_tested_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        delong_test(*arguments)


def obuchowski_error(truth, first, second, patients):
    """The standard error of the difference, pair by pair, with the matrices S10, S01 and S11 of Obuchowski 1997."""
    patients, scores = np.array(patients), np.stack([first, second])
    gaps = scores[:, truth][:, :, None] - scores[:, ~truth][:, None, :]  # (models, positives, negatives)
    wins = np.heaviside(gaps, 0.5)
    aurocs = wins.mean(axis=(1, 2))
    m, n = wins.shape[1:]
    sums = np.zeros((2, 2, 20))  # (class, model, patient)
    for cluster, patient in enumerate(np.unique(patients)):
        for side, (films, axis) in enumerate(((truth, 2), (~truth, 1))):
            mine = patients[films] == patient
            sums[side, :, cluster] = wins.mean(axis=axis)[:, mine].sum(axis=1) - mine.sum() * aurocs
    with_positives, with_negatives = len(set(patients[truth])), len(set(patients[~truth]))
    s10 = with_positives / ((with_positives - 1) * m) * sums[0] @ sums[0].T
    s01 = with_negatives / ((with_negatives - 1) * n) * sums[1] @ sums[1].T
    s11 = 20 / 19 * sums[0] @ sums[1].T
    covariance = s10 / m + s01 / n + (s11 + s11.T) / (m * n)
    return np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
