"""The audit as a user runs it: on the real set, on its full-size files, on a set with a leak."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from running import ROOT

from cxr_backbone.data.synthetic import draw_phantom


@pytest.fixture(scope="module")
def run_audit(tmp_path_factory):
    def run_audit(*argv):
        """The process, and the folder that it wrote to."""
        folder = tmp_path_factory.mktemp("audit")
        words = ["recipes/audit.py", *argv, "--run.output_dir", folder / "audit", "--data.cache_dir", folder / "cache"]
        environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True), folder / "audit"

    return run_audit


@pytest.fixture(scope="module")
def kermany(shared, run_audit):
    source = shared / "data/kermany224"
    return run_audit("recipes/configs/pneumonia.yaml", "--data.source", source, "--model.image_size", "96")


def test_the_real_set_tells_its_duplicates_and_shared_patient_numbers(kermany):
    process, folder = kermany
    assert process.returncode == 0, process.stderr  # pneumonia.yaml allows the patient numbers, and says why
    report = json.loads((folder / "audit.json").read_text())
    assert report["duplicates"]["exact"]["pairs"] + report["duplicates"]["near"]["pairs"] == 34
    assert report["duplicates"]["groups_across_splits"] == 0
    assert report["patients_across_splits"]["count"] == 170
    assert "**LEAK**: 170 patients" in process.stdout
    assert str(folder / "audit.html") in process.stdout


def test_the_page_stands_alone(kermany):
    _, folder = kermany
    page = (folder / "audit.html").read_text()
    assert "person1312_bacteria_3317.jpg" in page and "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_full_size_files_give_the_label_away_by_their_aspect(shared, run_audit, tmp_path):
    for film in (shared / "data/kermany-originals").rglob("*.jpeg"):
        (tmp_path / film.parent.name).mkdir(exist_ok=True)
        shutil.copy(film, tmp_path / film.parent.name)
    process, folder = run_audit(
        *("recipes/configs/table.yaml", "--data.format", "imagefolder"),
        *("--data.source", tmp_path, "--data.patient_pattern", r"person\d+|IM-\d+"),
        *("--data.num_folds", "5", "--model.image_size", "96"),
    )
    assert process.returncode == 0, process.stderr
    assert "aspect" in json.loads((folder / "audit.json").read_text())["metadata_baseline"]["alarm"]
    assert "**ALARM**: aspect alone tells" in process.stdout


@pytest.fixture
def leaking(tmp_path):
    """Phantoms in a folder of splits and classes; one film of train stands in test as well, and one file is broken."""
    for number in range(24):
        split, label = ("train", "test")[number >= 18], ("NORMAL", "PNEUMONIA")[number % 2]
        folder = tmp_path / "films" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        film = draw_phantom(number, opacity=number % 2 == 1, image_size=96)
        Image.fromarray(film).save(folder / f"p{number}.png")
    shutil.copy(tmp_path / "films/train/NORMAL/p2.png", tmp_path / "films/test/NORMAL/p40.png")
    (tmp_path / "films/train/NORMAL/p4.png").write_bytes(b"no image")
    return tmp_path / "films"


def test_a_leak_ends_in_status_2_and_a_broken_file_is_listed(leaking, run_audit):
    options = ["recipes/configs/table.yaml", "--data.format", "imagefolder", "--data.source", leaking]
    options += ["--data.patient_pattern", r"p\d+", "--data.num_folds", "3"]
    process, folder = run_audit(*options)
    assert process.returncode == 2, process.stderr
    assert "p2.png" in process.stdout and "**LEAK**" in process.stdout
    (unreadable,) = json.loads((folder / "audit.json").read_text())["unreadable"]
    assert unreadable.endswith("train/NORMAL/p4.png")
    assert "p4.png" in (folder / "unreadable.csv").read_text()
    assert run_audit(*options, "--data.allow_leaks", "duplicates")[0].returncode == 0


def test_what_cannot_be_audited_is_told_in_one_line(run_audit):
    process, folder = run_audit("recipes/configs/pneumonia.yaml", "--data.source", "/nowhere")
    assert process.returncode == 1 and process.stdout == "" and not folder.exists()
    assert process.stderr.splitlines()[-1].startswith("audit.py: There is no file or folder /nowhere")
