"""Two processes, which `torchrun` starts, make one training: that of one process with the same batches."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from narrow import accelerator
from running import ROOT, Recipe, Run

from cxr_backbone import CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training.loop import plain_loss, predict

TINY = {
    **{"data.num_patients": [40], "run.seed": [1]},  # 42, 11 and 9 films: no share is like the other
    **{"model.image_size": [75], "model.depth_multiplier": [0.1]},
    # Each process's share in a batch: features are equal to the bit only where batches are, and four updates turn a
    # difference in the seventh digit into one in the second.
    **{"frozen.batch_size": [21], "frozen.l2_strengths": [30, 100]},
    **{"fine_tuning.batch_size": [4], "fine_tuning.epochs": [3], "fine_tuning.evaluations_per_epoch": [1]},
    **{"fine_tuning.learning_rate": [1e-2], "fine_tuning.ema_decay": [0.3]},
    **{"run.save_minutes": [60], "evaluation.resamples": [100], "evaluation.report": ["false"]},
}
STEPS = 15
PATIENCE = 120  # seconds, after which a test fails that would wait for ever


def recipe(folder, processes):
    return Recipe(folder, "recipes/configs/sample.yaml", processes, **TINY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two processes from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    run = follow(recipe(folder, 2), folder)
    assert run.status == 0, run.output
    return run


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    """One process that does the work of two before each update."""
    twice = {"fine_tuning.gradient_accumulation_steps": [2]}
    return Run(tmp_path_factory.mktemp("one"), "recipes/configs/sample.yaml", **(TINY | twice))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose launcher gets SIGTERM in the first epoch, and that loses process 1 in the second; then one process
    tries to go on with it, and at last two do."""
    folder = tmp_path_factory.mktemp("stopped")
    two = recipe(folder, 2)
    return SimpleNamespace(
        asked=follow(two, folder, after=0, stop=lambda launcher: launcher.terminate()),
        killed=follow(two, folder, after=5, stop=lambda launcher: os.kill(child(launcher, 1), signal.SIGKILL)),
        alone=follow(recipe(folder, 1), folder),
        finished=follow(two, folder),
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What both processes of tests/training/two_processes.py say of their three trainings."""
    folder = tmp_path_factory.mktemp("told")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(folder / "hf-home")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "tests/training/two_processes.py"), str(folder)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            _, errors = launcher.communicate(timeout=PATIENCE)
        finally:
            launcher.terminate()  # which ends its processes too
    files = [folder / f"told by process {number}.json" for number in range(2)]
    assert all(file.is_file() for file in files), errors
    first, second = (json.loads(file.read_text()) for file in files)
    return SimpleNamespace(folder=folder, status=launcher.returncode, first=first, second=second)


def test_two_processes_take_the_steps_of_one_that_accumulates_two_batches(whole, accumulated):
    two, one = ([line["train_loss"] for line in run.log if "step" in line] for run in (whole.recipe, accumulated))
    assert len(two) == STEPS and len(one) == 2 * STEPS
    assert two == pytest.approx([sum(pair) / 2 for pair in zip(one[::2], one[1::2], strict=True)], rel=1e-5)
    assert max(two) > 1.1 * min(two)


def test_the_frozen_phase_of_two_processes_is_that_of_one(whole, accumulated):
    names = ("l2", "iterations", "train_loss", "validation_loss")
    two, one = (
        [[line[name] for name in names] for line in run.log if line["phase"] == "frozen"]
        for run in (whole.recipe, accumulated)
    )
    assert len(two) == 2
    for line, other in zip(two, one, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Those of the runs, by split."""
    cache = tmp_path_factory.mktemp("films")
    return {split: decode_once(rows, 75, cache) for split, rows in load_synthetic(40, image_size=75, seed=1).items()}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["frozen", "fine_tuned"])
def test_what_two_processes_measure_is_what_one_finds_for_the_saved_model(whole, films, name, split):
    rows = films[split]
    assert len(rows) % 2
    model = CXRInceptionForImageClassification.from_pretrained(whole.recipe.path / name)
    image_processor = CXRInceptionImageProcessor.from_pretrained(whole.recipe.path / name)
    logits, labels = predict(model, rows, image_processor, accelerator(), batch_size=len(rows))

    table = pq.read_table(whole.recipe.path / f"predictions/{name} {split}.parquet")
    measured = whole.recipe.read("metrics.json")["models"][name]["splits"][split]
    assert measured["films"] == len(rows)
    assert table["image_id"].to_pylist() == rows["image_id"][:]
    assert table["label"].to_pylist() == [model.config.id2label[label] for label in labels.tolist()]
    scores = logits.softmax(dim=1)[:, 1]
    assert table["score PNEUMONIA"].to_pylist() == pytest.approx(scores.tolist(), abs=1e-4)
    assert scores.std() > 2e-3  # so another order would show
    assert measured["figures"]["loss"]["value"] == pytest.approx(plain_loss(logits, labels).item(), rel=1e-5)


def test_only_the_main_process_writes_and_speaks(whole):
    assert [line["step"] for line in whole.recipe.log if "step" in line] == list(range(STEPS))
    assert whole.recipe.read("environment.json")["processes"] == 2
    for said in ("duplicates: ", "| auroc ", "after_steps=15", "says of a test image", "Decoding 42 films"):
        assert whole.output.count(said) == 1, said
    assert whole.output.count("Reading decoded 42 films") == 1  # by the other process


def test_a_process_other_than_the_main_one_writes_nothing(told):
    for name in ("sound", "skip", "stop"):
        assert (told.folder / f"{name} of process 0/log.jsonl").is_file()
        assert [file.name for file in (told.folder / f"{name} of process 1").iterdir()] == ["run.lock"]


def test_gradients_move_every_weight_after_the_phase_switch_and_alike_in_both_processes(told):
    first, second = told.first["sound"], told.second["sound"]
    assert any(".stages.stem." in name for name in first["start"])
    assert not [name for name, digest in first["end"].items() if digest == first["start"][name]]
    assert first["end"] == second["end"]


def test_a_loss_of_one_process_that_is_nan_stops_both(told):
    assert told.status != 0
    for error in (told.first["error"], told.second["error"]):
        assert re.match(r"At step 3 the loss is 0\.\d+, nan ", error)


def test_a_loss_of_one_process_that_is_nan_is_skipped_by_both_and_they_stay_in_step(told):
    lines = [json.loads(line) for line in (told.folder / "skip of process 0/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line and line["train_loss"] is None] == [3]
    assert lines[-1]["skipped"] == 1
    assert told.first["skip"]["end"] == told.second["skip"]["end"] != told.first["sound"]["end"]


@pytest.mark.parametrize("name", ["skip", "stop"])
def test_the_films_of_all_processes_are_kept_when_a_loss_is_nan(told, name):
    (file,) = (told.folder / f"{name} of process 0/nonfinite").iterdir()
    batches = json.loads(file.read_text())["batches"]
    assert [(batch["process"], batch["loss"] == "nan") for batch in batches] == [(0, False), (1, True)]
    assert len({image_id for batch in batches for image_id in batch["image_ids"]}) == 8


def test_sigterm_to_the_launcher_lets_both_processes_save_and_end(stopped):
    asked = stopped.asked
    assert asked.status != 0
    assert asked.output.count("Stopped by SIGTERM") == 1
    steps = int(re.search(r"after step (\d+), which is saved", asked.output)[1])
    assert 0 < steps < 5
    assert [name[:9] for name in asked.checkpoints] == ["000000000", f"{steps:09d}"]
    assert f"Going on after {steps} steps" in stopped.killed.output


def test_a_process_that_is_killed_ends_the_other_and_the_launcher_says_why(stopped):
    killed = stopped.killed
    assert killed.status != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*SIGKILL", killed.output)
    assert max(killed.checkpoints)[:9] == "000000005"


def test_another_number_of_processes_is_refused(stopped):
    assert stopped.alone.status != 0
    assert f"{stopped.alone.recipe.path} can't go on: processes was 2 and is 1." in stopped.alone.output


def test_after_both_stops_the_run_ends_in_the_same_weights(whole, stopped):
    assert stopped.finished.status == 0, stopped.finished.output
    assert "Going on after 5 steps" in stopped.finished.output
    assert len(whole.evaluated) == 4 and stopped.finished.evaluated == whole.evaluated
    for name in ("log.jsonl", "frozen/model.safetensors", "fine_tuned/model.safetensors"):
        assert (stopped.finished.recipe.path / name).read_bytes() == (whole.recipe.path / name).read_bytes()


def follow(recipe, folder, after=None, stop=None):
    """Start the recipe, `stop` it as soon as it has evaluated `after` so many steps, and wait until it ends.

    Returns its status, its output, the checkpoints that are left, and digests of the weights of its evaluations, which
    a run removes in the end.
    """
    output, kept = folder / "output.txt", folder / "evaluated"
    kept.mkdir(exist_ok=True)
    launcher, end = recipe.start(output), time.monotonic() + PATIENCE
    try:
        while launcher.poll() is None:
            assert time.monotonic() < end, output.read_text()
            for file in recipe.path.glob("checkpoints/evaluated/*.safetensors"):
                if not (kept / file.name).exists():
                    (kept / file.name).hardlink_to(file)
            if stop and (kept / f"{after:09d}.safetensors").exists():
                stop(launcher)
                stop = None
            time.sleep(0.01)
    finally:
        if launcher.poll() is None:
            launcher.terminate()  # which ends its processes too
            launcher.wait()
    checkpoints = sorted(file.name for file in recipe.path.glob("checkpoints/resume/*"))
    evaluated = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in kept.iterdir()}
    return SimpleNamespace(
        status=launcher.returncode,
        output=output.read_text(),
        checkpoints=checkpoints,
        evaluated=evaluated,
        recipe=recipe,
    )


def child(launcher, rank):
    """The process id of a process that the launcher has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {int(number): Path(f"/proc/{number}/environ").read_bytes().split(b"\0") for number in children}
    (found,) = [number for number, environment in ranks.items() if f"RANK={rank}".encode() in environment]
    return found
