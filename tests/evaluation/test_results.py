"""What metrics.json says agrees with scikit-learn, and what it can't say it says it can't."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation.drawn_predictions import drawn_run, findings, several_classes, two_classes
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, log_loss, roc_auc_score

from cxr_backbone.evaluation.operating_points import choose_operating_points
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.evaluation.results import compare, split_results, uncalibrated

DRAWS = {"two classes": two_classes, "several classes": several_classes, "findings": findings}


def results_of(predictions, points=None, **settings):
    points = choose_operating_points(predictions) if points is None else points
    return split_results(predictions, temperature=2.0, operating_points=points, resamples=200, **settings)


@pytest.fixture(scope="module", params=DRAWS)
def drawn(request):
    predictions = DRAWS[request.param](0)
    return predictions, results_of(predictions)


def figures_in(node):
    """Every figure, wherever it stands, with its name."""
    for name, child in node.items() if isinstance(node, dict) else ():
        if isinstance(child, dict) and "value" in child:
            yield name, child
        else:
            yield from figures_in(child)


def test_every_figure_lies_in_its_interval_or_says_why_it_has_none(drawn):
    _, results = drawn
    found = list(figures_in(results))
    assert len(found) > 30
    for name, figure in found:
        if figure["low"] is None:
            assert figure["undefined"]
        elif name == "ece":  # which is too high, so that its interval may lie below it
            assert 0 <= figure["low"] <= figure["high"] and figure["low"] <= figure["value"]
        else:
            assert figure["low"] <= figure["value"] <= figure["high"], name


def test_nothing_is_nan_and_all_of_it_is_json(drawn):
    json.dumps(drawn[1], allow_nan=False)


def test_two_classes_agree_with_scikit_learn():
    predictions = two_classes(0)
    results = results_of(predictions)
    truth, scores = predictions.labels, predictions.scores[:, 1]
    values = {name: figure["value"] for name, figure in results["figures"].items()}
    assert values["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert values["auprc"] == pytest.approx(average_precision_score(truth, scores))
    assert values["brier"] == pytest.approx(brier_score_loss(truth, scores))
    assert values["loss"] == pytest.approx(log_loss(truth, scores))
    assert results["confusion_matrix"] == confusion_matrix(truth, scores >= 0.5).tolist()
    target = results["targets"]["PNEUMONIA"]
    assert (target["films"], target["positives"]) == (len(truth), truth.sum())
    assert target["figures"]["auroc"] == results["figures"]["auroc"]
    for name, point in target["operating_points"].items():
        (tn, fp), (fn, tp) = point["confusion_matrix"]
        assert [[tn, fp], [fn, tp]] == confusion_matrix(truth, scores >= point["threshold"]).tolist(), name
        assert point["sensitivity"]["value"] == tp / (tp + fn)
        assert point["specificity"]["value"] == tn / (tn + fp)
        assert point["npv"]["value"] == tn / (tn + fn)


def test_several_classes_are_asked_for_one_against_the_rest():
    predictions = several_classes(0)
    results = results_of(predictions)
    each = [results["targets"][name]["figures"]["auroc"]["value"] for name in predictions.names]
    assert each[1] == pytest.approx(roc_auc_score(predictions.labels == 1, predictions.scores[:, 1]))
    assert results["figures"]["auroc"]["value"] == pytest.approx(np.mean(each))
    loss = log_loss(predictions.labels, predictions.scores)
    assert results["calibration"]["after"]["nll"]["value"] == pytest.approx(loss)
    assert results["figures"]["loss"]["value"] == pytest.approx(loss)


def test_an_unknown_label_has_no_part_in_the_figures_of_its_finding():
    predictions = findings(0)
    known = ~np.isnan(predictions.labels[:, 2])
    target = results_of(predictions)["targets"][predictions.names[2]]
    assert target["films"] == known.sum() < len(predictions)
    expected = roc_auc_score(predictions.labels[known, 2], predictions.scores[known, 2])
    assert target["figures"]["auroc"]["value"] == pytest.approx(expected)


def test_a_finding_that_no_film_shows_is_not_defined_and_has_no_part_in_the_mean():
    results = results_of(findings(0))
    hernia = results["targets"]["Hernia"]
    assert hernia["positives"] == 0 and hernia["operating_points"] == {}
    assert hernia["figures"]["auroc"] == {
        **dict.fromkeys(("value", "low", "high")),
        "undefined": "a class does not occur",
    }
    others = [its["figures"]["auroc"]["value"] for name, its in results["targets"].items() if name != "Hernia"]
    assert results["figures"]["auroc_macro"]["value"] == pytest.approx(np.mean(others))


def test_the_temperature_is_what_lies_between_before_and_after():
    predictions = two_classes(0)
    raw = uncalibrated(predictions, 2.0)
    np.testing.assert_allclose(raw.logits, predictions.logits * 2)
    calibration = results_of(predictions)["calibration"]
    assert calibration["before"]["nll"]["value"] == pytest.approx(log_loss(raw.labels, raw.scores))
    assert calibration["before"]["nll"]["value"] != calibration["after"]["nll"]["value"]
    one_each = uncalibrated(findings(0), list(range(1, 15)))
    np.testing.assert_allclose(one_each.logits[:, 13], findings(0).logits[:, 13] * 14)


def test_a_subgroup_has_the_figures_of_its_films():
    predictions = two_classes(0)
    women = results_of(predictions)["targets"]["PNEUMONIA"]["subgroups"]["sex"]["F"]
    chosen = [value == "F" for value in predictions.groups["sex"]]
    assert women["films"] == sum(chosen) and women["compared_with"] is None
    truth, scores = predictions.labels[chosen], predictions.scores[chosen, 1]
    assert women["figures"]["auroc"]["value"] == pytest.approx(roc_auc_score(truth, scores))
    assert set(women["operating_points"]) == {"youden", "sensitivity>=0.95", "specificity>=0.90", "f1"}


def test_a_kind_of_the_illness_is_compared_with_all_who_are_not_ill():
    predictions = two_classes(0)
    kinds = [
        "none" if label == 0 else "virus" if film % 2 else "bacteria" for film, label in enumerate(predictions.labels)
    ]
    groups = results_of(replace(predictions, groups={"kind": kinds}))["targets"]["PNEUMONIA"]["subgroups"]["kind"]
    virus = groups["virus"]
    assert set(virus["figures"]) == {"auroc"} and set(virus["operating_points"]["youden"]) == {
        "threshold",
        "sensitivity",
    }
    assert virus["compared_with"] == "all negatives"
    assert virus["films"] == virus["positives"] == kinds.count("virus")
    chosen = [kind in ("virus", "none") for kind in kinds]
    expected = roc_auc_score(predictions.labels[chosen], predictions.scores[chosen, 1])
    assert virus["figures"]["auroc"]["value"] == pytest.approx(expected)
    assert groups["none"]["compared_with"] == "all positives" and groups["none"]["positives"] == 0


def test_an_ece_that_is_noise_alone_has_an_interval_that_reaches_down():
    """A calibrated model: its labels are drawn from its own scores."""
    generator = np.random.default_rng(0)
    evidence = 2 * generator.standard_normal(600)
    labels = (generator.random(600) < 1 / (1 + np.exp(-evidence))).astype(int)
    ids = [str(film) for film in range(600)]
    films = Predictions(["no", "yes"], labels, np.stack([np.zeros(600), evidence], axis=1), ids, ids)
    ece = results_of(films)["figures"]["ece"]
    assert ece["value"] > 0.03 and ece["low"] < 0.015


def test_no_error_among_few_patients_is_not_taken_for_certainty():
    """Of 40 patients with it, all found: the exact binomial interval, not one without a width."""
    evidence = np.repeat([-1.0, 1.0], 40)
    ids = [str(film) for film in range(80)]
    films = Predictions(["no", "yes"], (evidence > 0).astype(int), np.stack([np.zeros(80), evidence], axis=1), ids, ids)
    youden = results_of(films)["targets"]["yes"]["operating_points"]["youden"]
    assert youden["sensitivity"]["value"] == 1 and youden["sensitivity"]["low"] == pytest.approx(0.025 ** (1 / 40))
    assert youden["mcc"]["low"] is None and youden["mcc"]["undefined"]
    few = films.select(np.arange(35, 80))
    assert (
        "only 5 patients" in results_of(few)["targets"]["yes"]["operating_points"]["youden"]["specificity"]["undefined"]
    )


def test_a_finding_that_is_known_of_no_film_is_not_defined():
    predictions = findings(0)
    labels = predictions.labels.copy()
    labels[:, 4] = np.nan
    results = results_of(replace(predictions, labels=labels))
    mass = results["targets"]["Mass"]
    assert mass["films"] == 0 and "known of none" in mass["figures"]["auroc"]["undefined"]
    assert results["figures"]["auroc_macro"]["low"] is not None


def test_too_few_patients_have_figures_without_intervals():
    predictions = replace(two_classes(0), patient_ids=[f"patient{film % 9}" for film in range(120)])
    results = results_of(predictions)
    assert results["patients"] == 9
    assert results["figures"]["auroc"]["low"] is None
    assert "only 9 patients" in results["figures"]["auroc"]["undefined"]


def test_patients_that_are_not_known_are_not_counted():
    assert results_of(replace(two_classes(0), patient_ids=[None] * 120))["patients"] is None


def test_one_class_leaves_what_can_be_said():
    everything = two_classes(0)
    predictions = everything.select(np.flatnonzero(everything.labels == 1))
    results = results_of(predictions, points=choose_operating_points(everything))
    assert results["figures"]["auroc"]["value"] is None
    assert results["figures"]["accuracy"]["value"] is not None
    youden = results["targets"]["PNEUMONIA"]["operating_points"]["youden"]
    assert youden["specificity"]["undefined"] and youden["sensitivity"]["value"] > 0


def test_a_difference_is_paired():
    better, worse = two_classes(0, skill=1.5), two_classes(0, skill=1.0)
    comparison = compare(worse, better, resamples=200)
    difference = comparison["figures"]["auroc"]
    values = [results_of(one)["figures"]["auroc"] for one in (worse, better)]
    assert difference["value"] == pytest.approx(values[1]["value"] - values[0]["value"])
    assert difference["low"] > 0
    # The two models err on the same films, so their difference is surer than that of two figures of different films.
    widths = [figure["high"] - figure["low"] for figure in (*values, difference)]
    assert widths[2] < math.hypot(*widths[:2])
    assert comparison["delong"]["PNEUMONIA"]["difference"] == pytest.approx(difference["value"])
    assert comparison["delong"]["PNEUMONIA"]["p"] < 0.01


def test_films_of_few_patients_are_no_evidence_that_models_differ():
    better, worse = two_classes(0, skill=1.5), two_classes(0, skill=1.0)
    p_of_films = compare(worse, better, resamples=100)["delong"]["PNEUMONIA"]["p"]
    in_groups = [replace(one, patient_ids=[f"p{film // 10}" for film in range(120)]) for one in (worse, better)]
    assert compare(*in_groups, resamples=100)["delong"]["PNEUMONIA"]["p"] != pytest.approx(p_of_films)
    few = [replace(one, patient_ids=[f"p{film % 4}" for film in range(120)]) for one in (worse, better)]
    assert compare(*few, resamples=100)["delong"]["PNEUMONIA"]["p"] is None


def test_a_model_does_not_differ_from_itself():
    same = compare(two_classes(0), two_classes(0), resamples=100)
    assert {it["value"] for it in same["figures"].values()} == {0}
    assert all("nearly all resamples agree" in it["undefined"] for it in same["figures"].values())
    assert same["delong"]["PNEUMONIA"]["p"] is None


def test_models_are_compared_on_the_same_films_only():
    one = two_classes(0)
    with pytest.raises(ValueError, match="the same films and labels"):
        compare(one, one.select(np.arange(119)))
    with pytest.raises(ValueError, match=r"labels of the films .* differ"):
        compare(one, replace(one, labels=1 - one.labels))


def test_a_run_has_its_models_in_order_and_a_comparison_of_each_split():
    metrics, predictions = drawn_run(two_classes)
    assert list(metrics["models"]) == ["frozen", "fine_tuned"]
    for split in ("train", "validation", "test"):
        values = [metrics["models"][model]["splits"][split]["figures"]["auroc"]["value"] for model in predictions]
        assert metrics["comparison"][split]["figures"]["auroc"]["value"] == pytest.approx(values[1] - values[0])
    assert metrics["models"]["frozen"]["temperature"] == 1.7
    assert "comparison" not in drawn_run(two_classes, models=("fine_tuned",))[0]


def test_the_interval_of_many_films_is_as_wide_as_theory_says():
    """Hanley & McNeil (Radiology 1982), for normal evidence that is one standard deviation higher where it is there."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=30_000)
    logits = np.stack([np.zeros(30_000), labels + generator.standard_normal(30_000)], axis=1)
    ids = [str(film) for film in range(30_000)]
    films = Predictions(["no", "yes"], labels, logits, ids, ids)
    auroc = split_results(films, temperature=None, operating_points={}, resamples=1000)["figures"]["auroc"]
    area, positives = auroc["value"], labels.sum()
    negatives = len(labels) - positives
    q1, q2 = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    variance = (area * (1 - area) + (positives - 1) * q1 + (negatives - 1) * q2) / (positives * negatives)
    assert auroc["high"] - auroc["low"] == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.1)
