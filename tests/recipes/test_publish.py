"""From a training to the Hub and back, in processes of their own, as a user would go."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from hub.loopback import LoopbackHub
from PIL import Image
from running import ROOT, sample_run
from safetensors.torch import load_file, save_file

from cxr_backbone.data.synthetic import draw_phantom

REPO = "org/cxr-inception"
# On a machine that has never heard of this package.
ASK = """
import json, sys
sys.modules["cxr_backbone"] = None
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], revision=sys.argv[2], trust_remote_code=True)
answer = classify(sys.argv[3], top_k=None)
print(json.dumps([answer, classify.model.config.decide(answer, "youden")]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sample_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(tokens={"hf_write": "org"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def publish(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")

    def publish(run_directory, *options, repo_id=REPO, token="hf_write"):
        command = [sys.executable, "recipes/publish.py", "--run", run_directory, "--repo_id", repo_id, *options]
        environment = hub.environment(home, token)
        return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)

    return publish


@pytest.fixture(scope="module")
def looked_at(run, hub, publish):
    return publish(run.path, "--dry_run", token=None), list(hub.requests)


@pytest.fixture(scope="module")
def published(looked_at, run, hub, publish):
    return publish(run.path), hub.repos[REPO].commits[:]


def test_a_dry_run_shows_what_would_be_published_and_asks_nothing_of_the_network(looked_at, run):
    process, requests = looked_at
    assert process.returncode == 0, process.stderr
    assert f"Not published (--dry_run). What would be is in {run.path / 'hub'}" in process.stdout
    assert "model.safetensors" in process.stdout and "figures/roc.png" in process.stdout
    assert requests == []


def test_one_commit_has_the_model_its_card_its_figures_and_nothing_else(published):
    process, (commit,) = published
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].endswith(f"/{REPO}/commit/{commit.sha}")
    assert {name for name in commit.files if not name.startswith("figures/")} == {
        *("config.json", "preprocessor_config.json", "model.safetensors", "guard.safetensors"),
        *("metrics.json", "README.md", "LICENSE"),
        *("configuration_cxr_inception.py", "layers_cxr_inception.py", "modeling_cxr_inception.py"),
        "image_processing_cxr_inception.py",
        "input_contract.json",
    }
    pictures = {name for name in commit.files if name.startswith("figures/")}
    assert {"figures/roc.png", "figures/learning_curves.png", "figures/reliability.png"} <= pictures
    assert json.loads(commit.files["metrics.json"])["models"]["fine_tuned"]["splits"]["test"]["figures"]


def test_nothing_that_names_a_film_a_patient_or_a_folder_is_published(published, run):
    _, (commit,) = published
    with (run.path / "split.csv").open(newline="") as file:
        ids = {row[column].encode() for row in csv.DictReader(file) for column in ("image_id", "patient_id")}
    texts = [content for name, content in commit.files.items() if name.endswith((".md", ".json"))]
    assert len(ids) > 40 and len(texts) == 5
    for private in (*ids, str(run.path.parent).encode(), str(ROOT).encode(), b"hf_write"):
        assert not any(private in text for text in texts)


def test_the_model_answers_by_its_id_and_commit_where_this_package_is_not_installed(published, run, hub, tmp_path):
    _, (commit,) = published
    film = draw_phantom(0, opacity=True, image_size=96)
    Image.fromarray(film).save(tmp_path / "film.png")
    command = [sys.executable, "-c", ASK, REPO, commit.sha, str(tmp_path / "film.png")]
    child = subprocess.run(command, env=hub.environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    answer, decision = json.loads(child.stdout.splitlines()[-1])
    scores = {each["label"]: each["score"] for each in answer}
    assert sum(scores.values()) == pytest.approx(1)
    points = json.loads((run.path / "fine_tuned/config.json").read_text())["operating_points"]
    assert decision == {"PNEUMONIA": scores["PNEUMONIA"] >= points["PNEUMONIA"]["youden"]["threshold"]}


def test_a_second_time_nothing_changes(published, run, hub, publish):
    process = publish(run.path)
    assert process.returncode == 0, process.stderr
    assert hub.repos[REPO].commits == published[1]


@pytest.fixture(scope="module")
def worse(run, tmp_path_factory):
    """The same run with a worse model, on file."""
    path = tmp_path_factory.mktemp("worse") / "run"
    shutil.copytree(run.path, path)
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["models"]["fine_tuned"]["splits"]["validation"]["figures"]["auroc"]["value"] -= 0.01
    (path / "metrics.json").write_text(json.dumps(metrics))
    weights = load_file(path / "fine_tuned/model.safetensors")
    weights["classifier.output_layer.bias"] += torch.tensor([1.0, -1.0])
    save_file(weights, path / "fine_tuned/model.safetensors", {"format": "pt"})
    return path


def test_a_worse_run_takes_the_place_of_a_better_one_only_when_told_to(published, worse, hub, publish):
    process = publish(worse)
    assert process.returncode == 1 and "holds a better model" in process.stderr and "--overwrite" in process.stderr
    assert hub.repos[REPO].commits == published[1]
    process = publish(worse, "--overwrite")
    assert process.returncode == 0, process.stderr
    assert hub.repos[REPO].files["model.safetensors"] == (worse / "fine_tuned/model.safetensors").read_bytes()


def test_a_pull_request_is_opened_when_asked_for(published, worse, hub, publish):
    hub.add_repo("org/reviewed", {"README.md": b"# Ours"})
    process = publish(worse, "--create_pr", repo_id="org/reviewed")
    assert process.stdout.splitlines()[-1] == f"Published: {hub.endpoint}/org/reviewed/discussions/1"
    assert hub.repos["org/reviewed"].files == {"README.md": b"# Ours"}
    assert "model.safetensors" in hub.repos["org/reviewed"].at("refs/pr/1").files


def test_a_private_repository_is_made_when_asked_for(published, worse, hub, publish):
    assert publish(worse, "--private", repo_id="org/hidden").returncode == 0
    assert hub.repos["org/hidden"].private


def test_a_run_that_has_not_come_to_its_end_is_refused_by_the_file_it_lacks(worse, hub, publish, tmp_path):
    shutil.copytree(worse, tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()
    process = publish(tmp_path / "run", repo_id="org/unfinished")
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "run/metrics.json" in process.stderr
    assert "org/unfinished" not in hub.repos


def test_a_damaged_config_is_refused_by_its_name(worse, publish, tmp_path):
    shutil.copytree(worse, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("data: [")
    process = publish(tmp_path / "run", "--dry_run")
    assert process.returncode == 1 and "run/config.yaml" in process.stderr and "Traceback" not in process.stderr


def test_a_control_run_is_refused(worse, hub, publish, tmp_path):
    shutil.copytree(worse, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["data"]["permute_labels"] = True
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    process = publish(tmp_path / "run", repo_id="org/control")
    assert process.returncode == 1 and "not to be published" in process.stderr
    assert "org/control" not in hub.repos


def test_without_a_token_it_says_how_to_get_one(worse, publish):
    process = publish(worse, token=None)
    assert process.returncode == 1 and "hf auth login" in process.stderr
    assert "Traceback" not in process.stderr


def test_no_token_is_printed(published):
    assert "hf_write" not in published[0].stdout + published[0].stderr
