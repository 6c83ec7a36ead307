"""The folder that is published holds what can be published, and says for machines what the model takes and gives."""

import json
import re

import numpy as np
import pytest
import torch
from finished_run import REPO, TEMPLATE, FinishedRun
from narrow import tiny_model
from running import ROOT

from cxr_backbone import CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.guard import Guard
from cxr_backbone.package import assemble, check_worth_publishing, describe_inputs


@pytest.fixture
def run(tmp_path):
    run = FinishedRun(tmp_path)
    run.finish()
    model = tiny_model(id2label={0: "NORMAL", 1: "PNEUMONIA"})
    model.save_pretrained(run.path / "fine_tuned")
    CXRInceptionImageProcessor(size={"height": 75, "width": 75}).save_pretrained(run.path / "fine_tuned")
    Guard.fit(torch.randn(9, 4), torch.randn(3, 4)).save(run.path / "fine_tuned")
    (run.path / "figures").mkdir()
    (run.path / "figures/roc.png").write_bytes(b"a picture")
    (run.path / "fine_tuned/notes.txt").write_text("Mrs Miller, born 1950")
    for name in ("films.png", "report.html", "split.csv"):
        (run.path / name).write_text("films and names")
    return run


def package(run, **options):
    return assemble(run.path, repo_id=REPO, template=TEMPLATE, licence=ROOT / "LICENSE", **options)


def test_it_holds_the_model_and_what_can_be_known_of_it_and_nothing_else_of_the_run(run):
    folder = package(run)
    assert folder == run.path / "hub"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *("model.safetensors", "config.json", "preprocessor_config.json", "guard.safetensors"),
        *("metrics.json", "input_contract.json"),
        *("configuration_cxr_inception.py", "layers_cxr_inception.py", "modeling_cxr_inception.py"),
        "image_processing_cxr_inception.py",
        *("README.md", "LICENSE", "figures/roc.png"),
    }
    assert (folder / "metrics.json").read_text() == (run.path / "metrics.json").read_text()
    assert "figures/roc.png" in (folder / "README.md").read_text()


def test_made_again_it_holds_nothing_of_before(run):
    (package(run) / "figures/old.png").write_bytes(b"")
    (run.path / "hub/model-00001-of-00002.safetensors").write_bytes(b"")
    assert not list(package(run).rglob("*o*ld*.png")) and not list(package(run).glob("model-*"))


def test_weights_take_half_the_bytes_in_float16_and_are_computed_in_float32(run):
    whole = (package(run) / "model.safetensors").stat().st_size
    opened = CXRInceptionForImageClassification.from_pretrained(run.path / "hub").state_dict()
    halved = package(run, float16=True)
    assert (halved / "model.safetensors").stat().st_size < 0.6 * whole
    for name, values in CXRInceptionForImageClassification.from_pretrained(halved).state_dict().items():
        assert values.dtype == opened[name].dtype
        torch.testing.assert_close(values, opened[name], rtol=1e-3, atol=1e-6)


def test_a_weight_too_large_for_float16_is_refused_by_name(run):
    model = CXRInceptionForImageClassification.from_pretrained(run.path / "fine_tuned")
    torch.nn.init.constant_(model.classifier.output_layer.bias, 1e5)
    model.save_pretrained(run.path / "fine_tuned")
    with pytest.raises(ValueError, match=r"classifier\.output_layer\.bias .* float16"):
        package(run, float16=True)


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.json", "audit.json", "fine_tuned/model.safetensors", "fine_tuned/preprocessor_config.json"),
        *("fine_tuned/modeling_cxr_inception.py", "fine_tuned/layers_cxr_inception.py"),
        "fine_tuned/guard.safetensors",
    ],
)
def test_a_run_without_a_file_is_refused_by_its_name(run, name):
    (run.path / name).unlink()
    with pytest.raises(ValueError, match=f"run/{name}"):
        package(run)


@pytest.mark.parametrize("repo_id", ["cxr-inception", "org/my model", 'org/x"), y=("'])
def test_what_is_no_org_and_name_is_refused(run, repo_id):
    with pytest.raises(ValueError, match=re.escape(repo_id)):
        assemble(run.path, repo_id=repo_id, template=TEMPLATE, licence=ROOT / "LICENSE")
    assert not (run.path / "hub/README.md").exists()


@pytest.mark.parametrize("data", [{"permute_labels": True}, {"permute_labels": False, "protocol": "selected_on_test"}])
def test_control_runs_are_not_worth_publishing(data):
    with pytest.raises(ValueError, match="not to be published"):
        check_worth_publishing(data)


def test_other_runs_are():
    check_worth_publishing({"permute_labels": False, "protocol": "official"})


def contract(image_processor=None, **config):
    model = tiny_model(**config)
    return describe_inputs(model.config, image_processor or CXRInceptionImageProcessor())


@pytest.mark.parametrize(
    ("num_channels", "mean", "std"), [(1, [0.5], [0.5]), (1, [0.0], [1.0]), (3, [0.485, 0.456, 0.406], [0.2, 0.3, 0.4])]
)
def test_pixel_values_are_what_the_image_processor_gives(num_channels, mean, std):
    size = {"height": 80, "width": 96}
    image_processor = CXRInceptionImageProcessor(num_channels=num_channels, image_mean=mean, image_std=std, size=size)
    described = contract(image_processor, num_channels=num_channels)["network_data_format"]["inputs"]["pixel_values"]
    films = [np.full((90, 100), value, np.uint8) for value in (0, 255)]
    pixel_values = image_processor(films, return_tensors="pt").pixel_values
    assert [described["num_channels"], *described["spatial_shape"]] == list(pixel_values.shape[1:])
    assert f"torch.{described['dtype']}" == str(pixel_values.dtype)
    assert described["value_range"] == pytest.approx([pixel_values.min().item(), pixel_values.max().item()], abs=1e-6)
    assert len(described["channel_def"]) == num_channels


@pytest.mark.parametrize("dtype", contract()["image"]["dtype"])
def test_every_type_that_an_image_may_have_is_taken(dtype):
    values = np.linspace(0, 1, 90 * 100).reshape(90, 100) * (1 if dtype.startswith("float") else 255)
    pixel_values = CXRInceptionImageProcessor()(values.astype(dtype), return_tensors="pt").pixel_values
    assert pixel_values.min() < -0.95 and pixel_values.max() > 0.95


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [("single_label_classification", "softmax"), ("multi_label_classification", "sigmoid")],
)
def test_logits_are_what_the_model_gives(problem_type, activation):
    model = tiny_model(id2label={0: "Effusion", 1: "Mass", 2: "Hernia"}, problem_type=problem_type)
    described = describe_inputs(model.config, CXRInceptionImageProcessor())["network_data_format"]["outputs"]["logits"]
    logits = model.eval()(torch.zeros(1, 1, 75, 75)).logits
    assert described["num_channels"] == logits.shape[1] and f"torch.{described['dtype']}" == str(logits.dtype)
    assert described["channel_def"] == {"0": "Effusion", "1": "Mass", "2": "Hernia"}
    assert described["activation"] == activation


def test_it_names_the_temperature_that_is_in_the_logits():
    for temperature in (None, 1.5):
        described = contract(temperature=temperature)["network_data_format"]["outputs"]["logits"]
        assert described["temperature"] == temperature


def test_the_contract_is_json_for_any_reader(run):
    assert set(json.loads((package(run) / "input_contract.json").read_text())) == {"image", "network_data_format"}
