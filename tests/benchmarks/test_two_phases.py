"""The script behind the README's results, on run directories whose figures are known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation.drawn_predictions import drawn_run, two_classes

ROOT = Path(__file__).parents[2]
CURVE = [
    {"after_steps": 0, "epoch": 0, "train": 0.5, "validation": 0.6, "test": 0.7},
    {"after_steps": 10, "epoch": 1, "train": 0.2, "validation": 0.25, "test": 0.4},
    {"after_steps": 20, "epoch": 2, "train": 0.1, "validation": 0.35, "test": 0.5},
]


def write_run(folder, trained=True, **settings):
    metrics, _ = drawn_run(two_classes, **settings)
    if trained:
        for seconds, model in zip((7.0, 61.0), metrics["models"].values(), strict=True):
            model["seconds"] = seconds
        metrics["overfitting"] = {"curve": CURVE, "chosen": 10, "gap": 0.05}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    splits = ("train", "validation", "test", "external elsewhere")
    metrics = [write_run(folder / "first", splits=splits), write_run(folder / "second", False, splits=splits[::-1])]
    write_run(folder / "noise")
    words = [sys.executable, "benchmarks/two_phases.py", folder / "first", folder / "second"]
    command = [*words, "--permuted", folder / "noise"]
    process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return metrics, process.stdout


def row(printed, *begins_with):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    (found,) = [cells for cells in rows if tuple(cells[: len(begins_with)]) == begins_with]
    return found


@pytest.mark.parametrize("split", ["test", "external elsewhere"])
def test_each_figure_has_its_mean_and_sample_deviation_over_the_runs(run, split):
    metrics, printed = run
    table = printed.split(f"{split}, mean")[1].split(", each run")[0]
    values = [
        [one["models"][model]["splits"][split]["figures"]["auroc"]["value"] for one in metrics]
        for model in ("frozen", "fine_tuned")
    ]
    assert row(table, "auroc")[1:] == [
        *(f"{np.mean(its):.3f} ± {np.std(its, ddof=1):.3f}" for its in values),
        f"{np.mean(values[1]) - np.mean(values[0]):+.3f} ± {np.std(np.subtract(*values), ddof=1):.3f}",
    ]


def test_each_run_has_its_interval_and_the_test_of_delong(run):
    metrics, printed = run
    table = printed.split("test, each run")[1].split("external")[0]
    shown = row(table, "first", "PNEUMONIA")
    delong = metrics[0]["comparison"]["test"]["delong"]["PNEUMONIA"]
    assert shown[4] == f"{delong['difference']:+.3f} ({delong['low']:+.3f} to {delong['high']:+.3f})"
    assert shown[5] == f"{delong['p']:.3f}"


def test_the_losses_are_those_of_the_checkpoint_that_was_kept(run):
    table = run[1].split("Overfitting")[1]
    assert row(table, "first")[1:6] == ["10 of 20", "0.200", "0.250", "0.050", "0.400"]
    assert row(table, "first")[-2:] == ["7", "61"]
    assert "second" not in table  # the results of evaluate.py, which trains nothing
    assert row(table, "noise, permuted labels")
