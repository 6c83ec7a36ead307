"""What validation decides, and what is made of it."""

import numpy as np
import pytest
import torch
from narrow import PROCESSOR, accelerator, tiny_model
from safetensors.torch import save_file
from sklearn.metrics import log_loss

from cxr_backbone import CXRInceptionImageProcessor
from cxr_backbone.evaluation.calibration import fit_temperature
from cxr_backbone.evaluation.operating_points import choose_operating_points
from cxr_backbone.training.arguments import EvaluationArguments
from cxr_backbone.training.examine import Candidate, Examiner, chosen_evaluation, is_complete, overfitting


def examiner(**arguments):
    return Examiner(accelerator(), EvaluationArguments(**arguments), batch_size=8, seed=0)


@pytest.fixture
def candidate(phantoms):
    """Untrained, but for a last layer that makes its logits spread."""
    model = tiny_model(id2label=dict(enumerate(phantoms["train"].features["label"].names))).eval()
    with torch.no_grad():
        model.classifier.output_layer.weight *= 30
    return Candidate(model, PROCESSOR)


def test_predictions_have_the_ids_the_labels_and_the_logits_of_their_films(phantoms, candidate):
    said = examiner().predictions(candidate, phantoms["test"])
    assert said.image_ids == phantoms["test"]["image_id"][:] and said.patient_ids == phantoms["test"]["patient_id"][:]
    assert said.labels.tolist() == phantoms["test"]["label"][:]
    alone = examiner().predictions(candidate, phantoms["test"].select([3]))
    np.testing.assert_allclose(alone.logits[0], said.logits[3], rtol=1e-4)


def test_temperature_and_operating_points_come_from_validation(phantoms, candidate):
    raw = examiner().predictions(candidate, phantoms["validation"])
    examiner().settle(candidate, phantoms["validation"])
    assert candidate.config.temperature == pytest.approx(fit_temperature(raw.logits, raw.labels), rel=1e-3)
    settled = examiner().predictions(candidate, phantoms["validation"])
    np.testing.assert_allclose(settled.logits * candidate.config.temperature, raw.logits, rtol=1e-3, atol=1e-3)
    assert log_loss(settled.labels, settled.scores) <= log_loss(raw.labels, raw.scores)
    expected = choose_operating_points(settled)["PNEUMONIA"]
    for name, point in candidate.config.operating_points["PNEUMONIA"].items():
        assert point["threshold"] == pytest.approx(expected[name]["threshold"], abs=1e-3)


def test_perturbed_views_are_asked_for_instead_and_are_the_same_each_time(phantoms, candidate):
    decided = []
    for views in (0, 3, 3):
        copy = Candidate(tiny_model(id2label=candidate.config.id2label).eval(), PROCESSOR)
        copy.model.load_state_dict(candidate.model.state_dict())
        examiner(perturbed_views=views).settle(copy, phantoms["validation"])
        decided.append((copy.config.temperature, copy.config.operating_points))
    films = len(phantoms["validation"])
    assert [points["PNEUMONIA"]["youden"]["films"] for _, points in decided] == [films, 3 * films, 3 * films]
    thresholds = [points["PNEUMONIA"]["youden"]["threshold"] for _, points in decided]
    assert thresholds[0] != thresholds[1] and decided[1] == decided[2]


def test_a_temperature_that_a_model_has_is_kept(phantoms, candidate):
    examiner().settle(candidate, phantoms["validation"])
    decided, weight = candidate.config.operating_points, candidate.model.classifier.output_layer.weight.clone()
    candidate.config.operating_points = None
    examiner().settle(candidate, phantoms["validation"])
    assert torch.equal(candidate.model.classifier.output_layer.weight, weight)
    for name, point in candidate.config.operating_points["PNEUMONIA"].items():
        assert point["threshold"] == pytest.approx(decided["PNEUMONIA"][name]["threshold"], abs=1e-3)


def test_every_checkpoint_is_measured_on_every_split(phantoms, candidate, tmp_path):
    expected = []
    for steps, factor in ((20, 1.0), (100, 0.5)):
        with torch.no_grad():
            candidate.model.classifier.output_layer.weight *= factor
        weights = {name: tensor.contiguous() for name, tensor in candidate.model.state_dict().items()}
        save_file(weights, tmp_path / f"{steps:09d}.safetensors")
        said = {split: examiner().predictions(candidate, phantoms[split]) for split in ("train", "test")}
        expected.append({split: pytest.approx(log_loss(it.labels, it.scores), rel=1e-4) for split, it in said.items()})
    lines = examiner().checkpoint_losses(tmp_path, candidate, {split: phantoms[split] for split in ("train", "test")})
    assert lines == [{"after_steps": 20, **expected[0]}, {"after_steps": 100, **expected[1]}]


LOG = [
    {"phase": "frozen", "l2": 0.1, "validation_loss": 0.1},
    {"phase": "fine_tuning", "after_steps": 0, "epoch": 0, "validation_loss": 0.9},
    {"phase": "fine_tuning", "step": 0, "train_loss": 3.0},
    {"phase": "fine_tuning", "after_steps": 5, "epoch": 1, "validation_loss": 0.4},
    {"phase": "fine_tuning", "after_steps": 10, "epoch": 2, "validation_loss": 0.5},
    {"phase": "checkpoints", "after_steps": 0, "train": 0.8, "test": 0.95},
    {"phase": "checkpoints", "after_steps": 5, "train": 0.3, "test": 0.7},
    {"phase": "checkpoints", "after_steps": 10, "train": 0.1, "test": 0.6},
]


def test_the_gap_is_that_of_the_checkpoint_which_validation_chose():
    found = overfitting(LOG)
    assert found["chosen"] == 5 and found["gap"] == pytest.approx(0.1)
    assert found["curve"][2] == {"after_steps": 10, "epoch": 2, "train": 0.1, "validation": 0.5, "test": 0.6}
    assert len(found["curve"]) == 3


def test_of_two_evaluations_with_the_same_loss_the_first_is_chosen():
    """As in training, which keeps a model for a lower loss only."""
    again = {"phase": "fine_tuning", "after_steps": 15, "epoch": 3, "validation_loss": 0.4}
    assert chosen_evaluation(LOG) == chosen_evaluation([*LOG, again]) == 5


def test_a_model_is_restored_as_it_was_at_an_evaluation(phantoms, candidate, tmp_path):
    expected = examiner().predictions(candidate, phantoms["test"])
    weights = {name: tensor.contiguous() for name, tensor in candidate.model.state_dict().items()}
    save_file(weights, tmp_path / "000000005.safetensors")
    restored = examiner().restore(tmp_path / "000000005.safetensors", candidate.config, PROCESSOR)
    np.testing.assert_allclose(examiner().predictions(restored, phantoms["test"]).logits, expected.logits, rtol=1e-4)
    examiner().settle(restored, phantoms["validation"])
    assert restored.config.temperature and candidate.config.temperature is None  # each has a config of its own


def test_perturbed_views_choose_the_evaluation_where_there_are_any():
    perturbed = {0: 0.9, 5: 0.8, 10: 0.7}
    log = [line | {"perturbed_loss": perturbed[line["after_steps"]]} if "epoch" in line else line for line in LOG]
    assert chosen_evaluation(LOG) == 5 and chosen_evaluation(log) == 10


def test_a_log_of_a_run_that_was_stopped_says_nothing_of_overfitting():
    assert is_complete(LOG)
    assert not any(is_complete(LOG[:end]) for end in range(len(LOG)))


def test_each_model_gets_its_own_image_processor(phantoms, candidate, tmp_path):
    darker = CXRInceptionImageProcessor(size={"height": 75, "width": 75}, image_mean=[0.9], image_std=[0.5])
    Candidate(candidate.model, darker).save(tmp_path / "darker")
    candidate.save(tmp_path / "as it was")
    loaded = [examiner().load(tmp_path / name) for name in ("as it was", "darker")]
    assert [list(one.image_processor.image_mean) for one in loaded] == [list(PROCESSOR.image_mean), [0.9]]
    said = examiner().ask(dict(enumerate(loaded)), {"test": phantoms["test"]})
    np.testing.assert_allclose(
        said[0]["test"].logits, examiner().predictions(candidate, phantoms["test"]).logits, rtol=1e-4
    )
    assert not np.allclose(said[1]["test"].logits, said[0]["test"].logits)


def test_findings_with_unknown_labels_are_settled_too(phantoms):
    rows = phantoms["validation"]
    findings = [
        {"opacity": float(label), "rare": float("nan") if film % 2 else 0.0}
        for film, label in enumerate(rows["label"][:])
    ]
    rows = rows.remove_columns("label").add_column("label", findings)
    model = tiny_model(2, problem_type="multi_label_classification", id2label={0: "opacity", 1: "rare"}).eval()
    candidate = Candidate(model, PROCESSOR)
    examiner().settle(candidate, rows)
    assert len(candidate.config.temperature) == 2 and candidate.config.temperature[1] == 1.0
    assert set(candidate.config.operating_points) == {"opacity"}
