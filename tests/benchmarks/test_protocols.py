"""The table of protocols is that of runs which the recipe made, on a small set of drawn films."""

import csv
import json
import os
import subprocess
import sys

import pytest
from running import ROOT


@pytest.fixture(scope="module")
def printed(real_films, tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocols")
    quick = ["--model.init", "null", "--model.image_size", "75", "--model.depth_multiplier", "0.1"]
    quick += ["--fine_tuning.batch_size", "8", "--evaluation.report", "false", "--evaluation.resamples", "100"]
    quick += ["--run.mixed_precision", "no", "--run.cpu_threads", "1", "--data.cache_dir", str(folder / "cache")]
    sources = ["--kermany", str(real_films), "--pneumoniamnist", "none"]
    command = [sys.executable, "benchmarks/protocols.py", *sources, "--output_dir", str(folder)]
    command += ["--only", "pooled_by_image", *quick]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    outputs = []
    for _ in range(2):
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        outputs.append(process.stdout)
    return folder, outputs


def rows_of(output):
    lines = output.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("| protocol ")]
    return {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:])}


def test_each_protocol_stands_beside_what_was_published_under_it(printed):
    folder, (output, _) = printed
    row = rows_of(output)["pooled_by_image"]
    metrics = json.loads((folder / "pooled_by_image/metrics.json").read_text())
    tuned = metrics["models"]["fine_tuned"]["splits"]["test"]["figures"]
    assert row[4].startswith(f"{tuned['auroc']['value']:.3f} (")
    assert row[5].startswith(f"{tuned['accuracy']['value']:.3f} (")
    assert "Stephen et al. 2019" in row[-1]


def test_it_says_how_many_patients_stand_in_train_and_test(printed):
    folder, (output, _) = printed
    with (folder / "pooled_by_image/split.csv").open(newline="") as file:
        films = list(csv.DictReader(file))
    patients = {split: {film["patient_id"] for film in films if film["split"] == split} for split in ("train", "test")}
    shared = len(patients["train"] & patients["test"])
    assert rows_of(output)["pooled_by_image"][2] == str(shared) and shared > 0


def test_a_run_that_is_finished_is_not_repeated(printed):
    folder, (first, second) = printed
    assert "Decoding" not in second and rows_of(first) == rows_of(second)
    assert len(list(folder.glob("*/metrics.json"))) == 1
