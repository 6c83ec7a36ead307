"""The linear probe as a user runs it: a backbone that stays as it is, a new last layer, and everything measured."""

import json
import os
import subprocess
import sys

import pytest
import torch
from narrow import PROCESSOR, in_use, tiny_model
from PIL import Image
from running import ROOT

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.guard import guarded_pipeline


def probe(folder, *words):
    command = [sys.executable, "recipes/linear_probe.py", "recipes/configs/sample.yaml"]
    command += ["--run.output_dir", str(folder / "run"), "--run.mixed_precision", "no", "--run.cpu_threads", "1"]
    command += ["--data.num_patients", "60", "--model.image_size", "75", "--evaluation.resamples", "100"]
    command += map(str, words)
    environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    model = in_use(tiny_model())
    model.save_pretrained(folder / "start")
    PROCESSOR.save_pretrained(folder / "start")
    process = probe(folder, "--model.init", folder / "start", "--model.depth_multiplier", "0.1")
    assert process.returncode == 0, process.stderr
    return folder, process


def test_nothing_but_the_last_layer_is_trained(probed):
    folder, _ = probed
    before = CXRInceptionForImageClassification.from_pretrained(folder / "start").cxr_inception
    after = CXRInceptionForImageClassification.from_pretrained(folder / "run/linear_probe")
    for name, tensor in after.cxr_inception.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert after.classifier.output_layer.weight.abs().sum() > 0


def test_it_is_measured_as_a_training_is(probed):
    folder, process = probed
    metrics = json.loads((folder / "run/metrics.json").read_text())
    test = metrics["models"]["linear_probe"]["splits"]["test"]
    assert 0 <= test["figures"]["auroc"]["value"] <= 1 and metrics["models"]["linear_probe"]["temperature"] > 0
    assert {"audit.json", "split.csv", "environment.json", "config.yaml"} <= {
        p.name for p in (folder / "run").iterdir()
    }
    assert "C, chosen by cross-validation: " in process.stdout
    assert (folder / "run/report.html").is_file()


def test_the_pipeline_opens_it(probed):
    folder, _ = probed
    answers = guarded_pipeline(folder / "run/linear_probe")(
        Image.fromarray(draw_phantom(1, opacity=True, image_size=90))
    )
    assert {answer["label"] for answer in answers} == {"NORMAL", "PNEUMONIA"}
    assert not answers[0]["out_of_distribution"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.head_hidden_sizes", "8"], "model.head_hidden_sizes is not allowed"),
        (["--data.num_patients", "6"], "num_patients must be at least 20"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(tmp_path, words, message):
    process = probe(tmp_path, *words, "--model.depth_multiplier", "0.1")
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("linear_probe.py: ") and message in process.stderr
