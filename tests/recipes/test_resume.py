"""Stopped at any moment, the same command goes on, and ends where a run ends that was never stopped: to the bit.

Eight kills by default; for a soak of sixty, with a table of what they hit:

    CXR_KILLS=60 python -m pytest -s tests/recipes/test_resume.py -k killed
"""

import glob
import json
import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from killing import Starter

KILLS = int(os.environ.get("CXR_KILLS", "8"))
# Narrow and short, but with everything that has a state: momentum, schedule, moving average, augmentation, dropout,
# several evaluations of which the last is not the best, and a checkpoint after each step.
TINY = [
    "recipes/configs/sample.yaml",
    *("--data.num_patients", "40"),
    *("--model.image_size", "75"),
    *("--model.depth_multiplier", "0.1"),
    *("--frozen.l2_strengths", "1e-3", "3e-3"),
    *("--fine_tuning.epochs", "2"),
    *("--fine_tuning.batch_size", "4"),
    *("--fine_tuning.learning_rate", "1e-3"),
    *("--fine_tuning.ema_decay", "0.3"),
    *("--fine_tuning.evaluations_per_epoch", "2"),
    *("--run.save_minutes", "0"),
    *("--run.mixed_precision", "no"),
    *("--run.cpu_threads", "1"),
    *("--evaluation.resamples", "100"),
    *("--evaluation.perturbed_views", "1"),
]
STEPS = 20


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    starter = Starter(tmp_path_factory.mktemp("starter"))
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def run_whole(starter, tmp_path_factory):
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert starter.run(*TINY, "--run.output_dir", run) == 0, starter.output.read_text()
    return run


@pytest.fixture
def command(tmp_path):
    return [*TINY, "--run.output_dir", tmp_path / "run"]


def outcome(run):
    """All that a run leaves but its times, its name and its command."""
    metrics = json.loads((run / "metrics.json").read_text())
    for model in metrics["models"].values():
        assert model.pop("seconds") > 0
    files = [run / name for name in ("log.jsonl", "split.csv", "audit.json")]
    for model in ("frozen", "fine_tuned", "hub"):
        files += sorted((run / model).glob("*.safetensors")) + sorted((run / model).glob("*.json"))
    tables = {file.name: pq.read_table(file).to_pylist() for file in sorted((run / "predictions").iterdir())}
    assert len(tables) == 6 and (run / "report.html").is_file() and (run / "hub/README.md").is_file()
    assert not list(run.rglob("*unfinished*")) and not (run / "checkpoints").exists()
    contents = {str(file.relative_to(run)): file.read_bytes() for file in files}
    del contents["hub/metrics.json"]  # the same again, with its times
    return metrics, contents, str(tables)


def evaluations(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == "fine_tuning" and "after_steps" in line]


def newest_steps(run):
    """Of the checkpoints of a run."""
    return max((int(Path(file).name[:9]) for file in found(run, "checkpoints/resume/*.pt")), default=None)


def found(run, pattern):
    """As Path.glob, but folders may go while it looks."""
    return glob.glob(f"{run}/{pattern}", recursive=True)  # noqa: PTH207


def stage(run):
    """Where a run is, from what it has written."""
    if found(run, "checkpoints/resume/unfinished"):
        return "writing a checkpoint"
    if found(run, "**/*.unfinished"):
        return "writing another file"
    if (run / "metrics.json").is_file():
        return "the report and the package"
    if newest_steps(run) is not None:
        return "the last evaluation" if newest_steps(run) == STEPS else "phase two"
    return "phase one" if (run / "config.yaml").is_file() else "preparation"


def test_the_run_is_one_that_shows_whether_it_went_on_rightly(run_whole):
    losses = [line["validation_loss"] for line in evaluations(run_whole)]
    assert len(losses) == 5 and losses[-1] > min(losses) + 0.1  # a run that forgot the lowest would keep another
    assert len(outcome(run_whole)[1]) > 8


def test_killed_at_any_moment_it_ends_in_the_same_weights(starter, run_whole, tmp_path):
    seed = random.randrange(10**6)
    print(f"\nseed {seed}")
    draw, expected, hit = random.Random(seed), outcome(run_whole), Counter()
    number = 0
    while hit.total() < KILLS:
        number += 1
        run = tmp_path / f"run{number}"
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            starter.start(*TINY, "--run.output_dir", run)
            if hit.total() < KILLS:
                wait_for_a_moment(starter, run, draw)
                hit[stage(run)] += starter.is_running()
                starter.send(signal.SIGKILL)
            status = starter.wait()
        assert status == 0, starter.output.read_text()[-3000:]
        assert outcome(run) == expected
    print("\n".join(f"{count:4} kills in {where}" for where, count in hit.most_common()), f"\n{number} runs")


def wait_for_a_moment(starter, run, draw):
    """Some time; or some steps; or until a file is being written, for which one would else have to be lucky."""
    kind = draw.choice(["seconds", "steps", "checkpoints/resume/unfinished", "**/*.unfinished"])
    if kind == "seconds":
        starter.wait_for(draw.uniform(0, 4))
        return
    steps = draw.randrange(-STEPS // 4, STEPS)  # below 0: at once
    starter.wait_until(lambda: (newest_steps(run) or -1) >= steps)
    if kind == "steps":
        starter.wait_for(draw.uniform(0, 0.3))
    else:
        starter.wait_until(lambda: found(run, kind))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_training_saves_what_there_is_and_ends_the_process(
    starter, run_whole, command, tmp_path, number
):
    command += ["--run.save_minutes", "60"]  # but for the signal, only evaluations would save anything
    run = tmp_path / "run"
    starter.start(*command)
    assert starter.wait_until(lambda: (newest_steps(run) or 0) >= 5)
    starter.send(number)
    assert starter.wait() == 128 + number
    assert f"Stopped by {number.name}" in starter.output.read_text()
    assert newest_steps(run) < STEPS
    assert starter.run(*command) == 0
    assert outcome(run) == outcome(run_whole)


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_taken(starter, run_whole, command, tmp_path):
    run = tmp_path / "run"
    starter.start(*command)
    assert starter.wait_until(lambda: (newest_steps(run) or 0) >= 8)
    starter.send(signal.SIGKILL)
    starter.wait()
    *_, older, newest = sorted(run.glob("checkpoints/resume/*.pt"))  # a third, if killed before it was removed
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert starter.run(*command) == 0
    assert f"{newest} is damaged" in starter.output.read_text()
    assert f"Going on after {int(older.name[:9])} steps" in starter.output.read_text()
    assert outcome(run) == outcome(run_whole)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, with room for a part of a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_a_sentence_and_with_more_room_the_run_goes_on(starter, run_whole, small_disk):
    run = small_disk / "run"
    command = [*TINY, "--run.output_dir", run]
    assert starter.run(*command) == 1
    *_, sentence = starter.output.read_text().strip().splitlines()
    assert sentence.startswith(f"two_stage.py: {run}") and "No space left on device" in sentence
    assert "the same command goes on" in sentence
    before = {file: file.read_bytes() for file in run.glob("checkpoints/resume/*.pt")}
    assert before
    assert starter.run(*command) == 1  # and again, with nothing lost
    assert before == {file: file.read_bytes() for file in run.glob("checkpoints/resume/*.pt")}
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert starter.run(*command) == 0, starter.output.read_text()[-3000:]
    assert outcome(run) == outcome(run_whole)


def test_a_complete_run_is_left_alone(starter, run_whole):
    before = outcome(run_whole)
    assert starter.run(*TINY, "--run.output_dir", run_whole) == 0
    assert f"{run_whole} is complete" in starter.output.read_text()
    assert outcome(run_whole) == before


def test_other_settings_are_refused_with_what_is_different(starter, run_whole):
    assert starter.run(*TINY, "--run.output_dir", run_whole, "--fine_tuning.learning_rate", "2e-3") == 1
    *_, sentence = starter.output.read_text().strip().splitlines()
    assert "fine_tuning.learning_rate was 0.001 and is 0.002" in sentence
