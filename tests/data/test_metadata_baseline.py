"""A fact that tells the label is found out, and chance is not."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxr_backbone.data.metadata_baseline import metadata_baseline

RNG = np.random.default_rng(0)
NUM_FILMS = 400
LABEL = (np.arange(NUM_FILMS) % 4 == 0).astype(np.float32)
NOISE = RNG.normal(size=NUM_FILMS)
PATIENTS = [f"patient{film // 2}" for film in range(NUM_FILMS)]


def test_a_fact_that_tells_the_label_raises_the_alarm_whichever_way_it_points():
    facts = {"up": NOISE + 2 * LABEL, "down": NOISE - 2 * LABEL, "noise": NOISE}
    found = metadata_baseline(facts, {"PNEUMONIA": LABEL}, PATIENTS)
    assert found["alarm"] == ["up", "down", "combined"]
    assert found["facts"]["up"]["label"] == "PNEUMONIA"
    assert found["facts"]["up"]["auroc"] == pytest.approx(roc_auc_score(LABEL, facts["up"]), abs=1e-4)
    assert found["facts"]["down"]["auroc"] == pytest.approx(roc_auc_score(LABEL, -facts["down"]), abs=1e-4)
    assert found["facts"]["noise"]["auroc"] < 0.6


def test_chance_raises_none_however_many_labels_are_tried():
    facts = {name: RNG.normal(size=100) for name in ("height", "width", "mean")}
    targets = {f"finding{number}": (RNG.random(100) < 0.08).astype(np.float32) for number in range(14)}
    found = metadata_baseline(facts, targets, [f"patient{film}" for film in range(100)])
    assert max(result["auroc"] for result in found["facts"].values()) > 0.65  # only the tests made together tell
    assert found["alarm"] == []


def test_p_counts_every_test_that_was_made():
    one = metadata_baseline({"mean": NOISE + 0.3 * LABEL}, {"a": LABEL}, ["same"] * NUM_FILMS)
    two = metadata_baseline({"mean": NOISE + 0.3 * LABEL, "width": NOISE}, {"a": LABEL}, ["same"] * NUM_FILMS)
    assert two["facts"]["mean"]["p"] == pytest.approx(2 * one["facts"]["mean"]["p"])


def test_a_fact_is_reported_for_the_label_that_it_tells_best():
    targets = {"Mass": LABEL, "Nodule": np.roll(LABEL, 1), "Hernia": np.roll(LABEL, 2)}
    found = metadata_baseline({"height": NOISE + 3 * targets["Nodule"]}, targets, PATIENTS)
    assert found["facts"]["height"]["label"] == "Nodule"


def test_a_fact_that_is_the_same_for_all_films_tells_nothing():
    found = metadata_baseline({"height": np.full(NUM_FILMS, 224.0)}, {"PNEUMONIA": LABEL}, PATIENTS)
    assert found["facts"]["height"] == {"auroc": 0.5, "p": 1.0, "label": "PNEUMONIA"}
    assert found["alarm"] == []


def test_films_whose_label_is_unknown_are_left_out():
    known = metadata_baseline({"mean": NOISE}, {"Mass": LABEL}, PATIENTS)
    target = np.concatenate([LABEL, np.full(100, np.nan, dtype=np.float32)])
    facts = {"mean": np.concatenate([NOISE, np.full(100, 1e6)])}
    assert metadata_baseline(facts, {"Mass": target}, [*PATIENTS, *["unknown"] * 100]) == known


def test_sizes_that_only_one_class_has_are_found_together_where_no_trend_is():
    heights = RNG.choice([1024.0, 2048.0, 3072.0], size=NUM_FILMS)
    heights[LABEL == 1] = 2048
    facts = {"height": heights, "mean": NOISE}
    found = metadata_baseline(facts, {"PNEUMONIA": LABEL}, PATIENTS)
    assert found["alarm"] == ["combined"]
    assert found["facts"]["combined"]["auroc"] > 0.8


def test_together_they_are_judged_on_other_patients():
    patient = np.arange(NUM_FILMS) // 4
    facts = {"file_bytes": RNG.normal(size=NUM_FILMS // 4)[patient]}  # tells the patient, not the label
    label = RNG.permutation(np.arange(NUM_FILMS // 4) % 2)[patient].astype(np.float32)
    by_patient = metadata_baseline(facts, {"PNEUMONIA": label}, patient.astype(str))
    by_film = metadata_baseline(facts, {"PNEUMONIA": label}, np.arange(NUM_FILMS).astype(str))
    assert by_patient["facts"]["combined"]["auroc"] < 0.65 < 0.8 < by_film["facts"]["combined"]["auroc"]


def test_a_rare_finding_of_a_large_set_is_asked_for_all_facts_together():
    rare = (np.arange(60_000) % 1000 == 0).astype(np.float32)
    facts = {"mean": RNG.normal(size=len(rare)) + 2 * rare}
    found = metadata_baseline(facts, {"Hernia": rare}, np.arange(len(rare)).astype(str))
    assert found["facts"]["combined"]["auroc"] > 0.8


def test_few_patients_are_not_asked_for_all_facts_together():
    patients = [f"patient{film % 8}" for film in range(NUM_FILMS)]
    found = metadata_baseline({"mean": NOISE}, {"PNEUMONIA": LABEL}, patients)
    assert list(found["facts"]) == ["mean"]


def test_a_label_that_all_films_share_is_not_tried():
    targets = {"NORMAL": np.ones(NUM_FILMS), "unknown": np.full(NUM_FILMS, np.nan)}
    assert metadata_baseline({"mean": NOISE}, targets, PATIENTS) == {"facts": {}, "alarm": []}
