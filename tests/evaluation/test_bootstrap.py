"""Patients are drawn, and the figures of a resample are scikit-learn's of its films."""

import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from cxr_backbone.evaluation.bootstrap import PatientBootstrap, interval, number_patients


def draw_films(films=120, patients=40, seed=0, decimals=1):
    """patient_ids, truth, and scores, with ties unless there are many decimals."""
    generator = np.random.default_rng(seed)
    patient_ids = [f"patient {patient}" for patient in generator.integers(patients, size=films)]
    truth = generator.random(films) < 0.4
    return patient_ids, truth, np.round(truth + generator.normal(size=films), decimals)


def weights_of(bootstrap, patient_ids):
    """int (resamples, films): how often each film was drawn."""
    return bootstrap.counts[:, number_patients(patient_ids)].astype(int)


def figures_of_scikit_learn(truth, scores, weights):
    """AUROC and AUPRC (2, resamples) with weights (resamples, films)."""
    figures = roc_auc_score, average_precision_score
    return [[figure(truth, scores, sample_weight=drawn) for drawn in weights] for figure in figures]


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_rank_figures_of_a_resample_are_those_of_scikit_learn(decimals):
    patient_ids, truth, scores = draw_films(decimals=decimals)
    bootstrap = PatientBootstrap(patient_ids)
    auroc, auprc = bootstrap.rank_figures(np.arange(120), truth, scores)
    weights = weights_of(bootstrap, patient_ids)
    expected = figures_of_scikit_learn(truth, scores, weights[::40])
    np.testing.assert_allclose([auroc[::40], auprc[::40]], expected, atol=1e-12)


def test_a_film_may_occur_several_times_or_not_at_all():
    patient_ids, truth, scores = draw_films()
    bootstrap = PatientBootstrap(patient_ids)
    films = np.random.default_rng(1).integers(60, 120, size=300)
    truth, scores = truth[films] ^ (np.arange(300) % 7 == 0), scores[films] + np.arange(300) % 3
    auroc, auprc = bootstrap.rank_figures(films, truth, scores)
    weights = weights_of(bootstrap, patient_ids)[:, films]
    expected = figures_of_scikit_learn(truth, scores, weights[::40])
    np.testing.assert_allclose([auroc[::40], auprc[::40]], expected, atol=1e-12)


def test_sums_are_those_of_the_films_drawn():
    patient_ids, _, scores = draw_films(1500, 600)
    bootstrap = PatientBootstrap(patient_ids)
    values = np.stack([scores, np.ones(1500), scores > 0], axis=1)
    np.testing.assert_allclose(bootstrap.sums(values), weights_of(bootstrap, patient_ids) @ values, atol=1e-9)


def test_a_patient_is_drawn_with_all_films_and_a_film_of_nobody_alone():
    bootstrap = PatientBootstrap(["b", None, "a", "b", None], resamples=200)
    assert (bootstrap.num_films, bootstrap.num_patients, bootstrap.resamples) == (5, 4, 200)
    assert (bootstrap.counts.sum(axis=1) == 4).all()  # as many patients as there are
    drawn = bootstrap.sums(np.eye(5))
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 3])
    assert not np.array_equal(drawn[:, 1], drawn[:, 4])
    assert bootstrap.count_patients(np.array([0, 1, 3])) == 2


def test_one_patient_of_many_films_is_drawn_every_time():
    bootstrap = PatientBootstrap(["a"] * 500, resamples=20)
    assert (bootstrap.counts == 1).all()


def test_the_seed_alone_decides_on_the_draws():
    patient_ids, *_ = draw_films()
    counts = [PatientBootstrap(patient_ids, seed=seed).counts for seed in (0, 0, 1)]
    np.testing.assert_array_equal(counts[0], counts[1])
    assert not np.array_equal(counts[0], counts[2])


def test_two_models_on_the_same_films_are_paired():
    patient_ids, truth, scores = draw_films(400, 200)
    other = scores + np.random.default_rng(1).normal(scale=0.1, size=400)
    bootstrap = PatientBootstrap(patient_ids)
    first, second = (bootstrap.rank_figures(np.arange(400), truth, one)[0] for one in (scores, other))
    assert (second - first).std() < first.std() / 3


def test_copies_of_films_do_not_narrow_the_interval_of_their_patients():
    _, truth, scores = draw_films(100)
    patient_ids = [f"patient {film}" for film in range(100)]

    def interval_of(patient_ids, copies):
        bootstrap = PatientBootstrap(patient_ids)
        repeated = np.tile(truth, copies), np.tile(scores, copies)
        auroc, _ = bootstrap.rank_figures(np.arange(100 * copies), *repeated)
        figure = interval(roc_auc_score(truth, scores), auroc, bootstrap.num_patients)
        return figure["low"], figure["high"]

    once = interval_of(patient_ids, 1)
    assert interval_of(patient_ids * 10, 10) == pytest.approx(once)
    assert np.diff(interval_of([None] * 1000, 10)) < np.diff(once) / 2.5  # it should be the square root of 10


def test_nineteen_of_twenty_intervals_contain_the_truth():
    generator = np.random.default_rng(0)
    known = norm.cdf(1 / np.sqrt(2 * 2))  # normal scores, one apart; half of the variance of 2 is the patient's
    contained = 0
    for _ in range(200):
        patients = np.repeat(np.arange(75), 2)
        truth = generator.random(150) < 0.5
        scores = truth + generator.normal(size=75)[patients] + generator.normal(size=150)
        bootstrap = PatientBootstrap([str(patient) for patient in patients], resamples=300)
        figure = interval(0.76, bootstrap.rank_figures(np.arange(150), truth, scores)[0], 75)
        contained += figure["low"] <= known <= figure["high"]
    assert 0.90 <= contained / 200 <= 0.99


def test_a_resample_without_a_class_has_no_figures():
    truth, scores = np.array([True, *[False] * 11]), np.arange(12.0)
    bootstrap = PatientBootstrap([None] * 12)
    auroc, auprc = bootstrap.rank_figures(np.arange(12), truth, scores)
    np.testing.assert_array_equal(np.isnan(auroc), bootstrap.counts[:, 0] == 0)
    np.testing.assert_array_equal(np.isnan(auprc), np.isnan(auroc))
    for nothing in (truth & False, truth | True):
        assert np.isnan(bootstrap.rank_figures(np.arange(12), nothing, scores)).all()
    assert np.isnan(bootstrap.rank_figures(np.arange(0), truth[:0], scores[:0])).all()


def test_an_interval_holds_the_middle_95_percent():
    figure = interval(np.float64(0.5), np.arange(1001) / 1000, 10)
    assert figure == pytest.approx({"value": 0.5, "low": 0.025, "high": 0.975})
    assert {type(number) for number in figure.values()} == {float}
    few_missing = np.append(np.arange(1001) / 1000, [np.nan] * 50)
    assert interval(0.5, few_missing, 10) == figure


def test_what_is_not_defined_says_why():
    samples = np.arange(100) / 100
    nothing = {"value": None, "low": None, "high": None}
    assert interval(None, samples, 50, undefined="no negatives") == nothing | {"undefined": "no negatives"}
    assert interval(float("nan"), samples, 50) == nothing | {"undefined": "not defined for these films"}
    no_interval = nothing | {"value": 0.5}
    few = "only 7 patients; an interval needs 10"
    assert interval(0.5, samples, 7) == no_interval | {"undefined": few}
    samples[:12] = np.nan
    missing = "not defined in 12.0% of the resamples"
    assert interval(0.5, samples, 50) == no_interval | {"undefined": missing}
    json.dumps(interval(np.float32(0.5), samples[20:], 50), allow_nan=False)


@pytest.mark.parametrize("decimals", [1, 9])
def test_curves_pass_through_the_points_of_scikit_learn(decimals):
    patient_ids, truth, scores = draw_films(decimals=decimals)
    bands = PatientBootstrap(patient_ids, resamples=20).curve_bands(np.arange(120), truth, scores)
    false_positive_rate, sensitivity, _ = roc_curve(truth, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(truth, scores)
    for point, value in zip(bands.false_positive_rate, bands.sensitivity, strict=True):
        assert value == pytest.approx(np.interp(point, false_positive_rate, sensitivity))
    for point, value in zip(bands.recall[1:], bands.precision[1:], strict=True):
        reached = np.flatnonzero(recall >= point - 1e-9)[-1]  # recall falls from 1; the last has the highest threshold
        assert value == pytest.approx(precision[reached])


def test_bands_lie_about_the_curves_and_are_of_the_resamples():
    patient_ids, truth, scores = draw_films(600, 200, decimals=9)
    bootstrap = PatientBootstrap(patient_ids, resamples=300)
    bands = bootstrap.curve_bands(np.arange(600), truth, scores)
    assert (bands.sensitivity_low <= bands.sensitivity).all() and (bands.sensitivity <= bands.sensitivity_high).all()
    assert (bands.precision_low[5:] <= bands.precision[5:]).all()
    assert (bands.precision[5:] <= bands.precision_high[5:]).all()
    at_a_tenth = []
    for weights in weights_of(bootstrap, patient_ids):
        x, y, _ = roc_curve(truth, scores, sample_weight=weights, drop_intermediate=False)
        at_a_tenth.append(np.interp(0.1, x, y))
    assert bands.sensitivity_low[10] == pytest.approx(np.percentile(at_a_tenth, 2.5), abs=1e-9)
    assert bands.sensitivity_high[10] == pytest.approx(np.percentile(at_a_tenth, 97.5), abs=1e-9)


def test_a_few_patients_have_curves_and_no_bands():
    bootstrap = PatientBootstrap([str(patient) for patient in range(20)], resamples=20)
    bands = bootstrap.curve_bands(np.arange(9), np.arange(9) > 3, np.arange(9.0))
    assert (bands.sensitivity == 1).all() and (bands.precision == 1).all()
    for limit in (bands.sensitivity_low, bands.sensitivity_high, bands.precision_low, bands.precision_high):
        assert limit.shape == (101,) and np.isnan(limit).all()


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="patient_ids is empty"):
        PatientBootstrap([])
    bootstrap, three = PatientBootstrap(["a", "b", "c"]), np.arange(3)
    with pytest.raises(ValueError, match=r"values is \(2, 1\); expected \(3, columns\)"):
        bootstrap.sums(np.ones((2, 1)))
    with pytest.raises(ValueError, match="2 truth and 3 films"):
        bootstrap.rank_figures(three, np.array([True, False]), np.ones(3))
    with pytest.raises(ValueError, match="films has an index outside of the 3 films"):
        bootstrap.rank_figures(three + 1, three > 1, np.ones(3))
    with pytest.raises(ValueError, match="scores has a NaN"):
        bootstrap.rank_figures(three, three > 1, np.array([0, np.nan, 1]))
    with pytest.raises(ValueError, match="truth has one class only"):
        bootstrap.curve_bands(three, three > 5, np.ones(3))
