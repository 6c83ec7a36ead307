"""The script behind the README's results, on run directories whose figures are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cxr_backbone.evaluation.metrics import METRICS

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, frozen: float, fine_tuned: float) -> Path:
    """A run directory where every figure of a phase is the same number."""
    folder.mkdir()
    metrics = {
        phase: {split: dict.fromkeys(METRICS, value) for split in ("train", "validation", "test")} | {"seconds": 7.0}
        for phase, value in (("frozen", frozen), ("fine_tuned", fine_tuned))
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    log = [{"phase": "fine_tuning", "step": 0, "train_loss": 0.9}]
    for epoch, loss in enumerate((0.8, fine_tuned, fine_tuned + 0.05)):
        train_loss = 0.9 if epoch else None
        log.append({"phase": "fine_tuning", "epoch": epoch, "train_loss": train_loss, "validation_loss": loss})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "curves.png"


@pytest.fixture(scope="module")
def printed(curves):
    runs = [write_run(curves.parent / "first", 0.5, 0.6), write_run(curves.parent / "second", 0.5, 0.7)]
    command = [sys.executable, "benchmarks/two_phases.py", *runs, "--curves", curves]
    process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_has_its_mean_and_sample_deviation_over_the_runs(printed, name):
    (row,) = [line for line in printed.splitlines() if line.startswith(f"| {name.replace('_', ' ')} ")]
    assert [cell.strip() for cell in row.strip("|").split("|")[1:]] == [
        *("0.500 ± 0.000", "0.650 ± 0.071", "+0.150 ± 0.071")
    ]


def test_each_run_shows_the_gap_and_that_its_checkpoint_is_the_lowest(printed):
    (row,) = [line for line in printed.splitlines() if line.startswith("| second ")]
    train, validation, gap, lowest, last, *_ = [cell.strip() for cell in row.strip("|").split("|")[1:]]
    assert (train, validation, gap, lowest, last) == ("0.7000", "0.7000", "0.0000", "0.7000", "0.7500")


def test_the_curves_are_drawn(printed, curves):
    with Image.open(curves) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 3  # not a blank page
