"""The run directory of a training: one process at a time, which goes on with the same settings, films and machine."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import DatasetDict
from narrow import PROCESSOR, tiny_model
from safetensors.torch import load_file

from cxr_backbone import CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.audit import audit
from cxr_backbone.training import state
from cxr_backbone.training.arguments import JointArguments
from cxr_backbone.training.joint import JointTargets
from cxr_backbone.training.state import RunDirectory, TrainingRun, read_log


@pytest.fixture(autouse=True)
def be_impatient(monkeypatch):
    monkeypatch.setattr(state, "LOCK_SECONDS", 0.2)


@pytest.fixture
def begin(tmp_path, arguments, films):
    """Start the run in a folder, or take it up; as a process would that finds these things."""

    def begin(folder="run", films=films, processes=1, **settings):
        now = replace(arguments, run=replace(arguments.run, output_dir=str(tmp_path / folder), **settings))
        accelerator = Accelerator(cpu=True)
        if processes != 1:
            known = {"device": accelerator.device, "mixed_precision": "no", "num_processes": processes}
            accelerator = SimpleNamespace(**known, is_main_process=True)
        run = TrainingRun(now)
        run.start(now, films, audit(films.splits, films.unreadable), accelerator)
        return run

    return begin


def end(run):
    """As when its process ends, whatever ends it."""
    run._lock.release()
    return run


def read(path):
    return json.loads(path.read_text())


def a_state(steps):
    return {"progress": {"steps": steps}, "model": {"weight": torch.full((3,), float(steps))}}


def in_child(work):
    """Do it in a process of its own, which then lives on; its id, once it is done."""
    done, tell = os.pipe()
    if (child := os.fork()) == 0:
        try:
            held = work()  # noqa: F841 - with what nobody holds the lock would go
            os.write(tell, b"1")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(done, 1) == b"1"
    os.close(done)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_models_have_their_places(begin, tmp_path):
    run = begin()
    assert (run.frozen, run.fine_tuned) == (tmp_path / "run/frozen", tmp_path / "run/fine_tuned")


def test_the_start_writes_what_is_known_before_training_and_a_lock(begin):
    assert {path.name for path in begin().path.iterdir()} == {
        *("config.yaml", "environment.json", "split.csv", "audit.json", "audit.html", "unreadable.csv", "run.lock")
    }


def test_a_second_process_is_refused_while_the_first_lives(begin, tmp_path):
    child = in_child(begin)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    try:
        with pytest.raises(ValueError, match=f"Another process is at work on {tmp_path / 'run'}; wait until"):
            begin()
    finally:
        kill(child)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    assert begin().path == tmp_path / "run"  # the lock of a process that was killed is free


def test_a_process_that_is_about_to_end_is_waited_for(begin, monkeypatch):
    monkeypatch.setattr(state, "LOCK_SECONDS", 30)
    ending = threading.Timer(0.3, kill, [in_child(begin)])
    ending.start()
    begin()
    ending.join()


def test_other_settings_are_refused_with_what_is_different(begin, tmp_path):
    before = (end(begin()).path / "config.yaml").read_bytes()
    with pytest.raises(
        ValueError, match=r"other settings: run\.seed was 4 and is 5; run\.save_minutes was 5\.0 and is 1"
    ):
        begin(seed=5, save_minutes=1.0)
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_a_run_may_be_moved(begin, tmp_path):
    end(begin()).path.rename(tmp_path / "moved")
    assert begin("moved").path == tmp_path / "moved"


def test_a_run_that_was_stopped_before_it_began_may_have_other_settings(begin, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.lock").touch()
    begin(seed=9)


def test_what_is_no_training_is_refused(begin, arguments, films, tmp_path):
    """Such as the results of recipes/evaluate.py."""
    RunDirectory(tmp_path / "run").start(arguments, films, audit(films.splits), Accelerator(cpu=True))
    with pytest.raises(ValueError, match="already holds files"):
        begin()


def fewer(rows):
    return rows.select(range(1, len(rows)))


def in_another_order(rows):
    return rows.select(range(len(rows) - 1, -1, -1))


@pytest.mark.parametrize(("change", "lines"), [(fewer, "1 lines"), (in_another_order, "the order of the lines")])
def test_other_films_are_refused(begin, films, change, lines):
    end(begin())
    splits = DatasetDict(films.splits | {"train": change(films.splits["train"])})
    with pytest.raises(ValueError, match=f"data.source has other films than when .*: {lines} of its split.csv differ"):
        begin(films=replace(films, splits=splits))


def test_other_films_of_joint_training_are_refused(begin, films):
    def joint(rows):
        return replace(films, joint=JointTargets(films.train, rows, JointArguments(batch_size=2), seed=0))

    end(begin(films=joint(films.splits["train"])))
    with pytest.raises(ValueError, match=r"joint\.films has other films than when .*: 1 lines of its joint\.csv"):
        begin(films=joint(fewer(films.splits["train"])))


def test_other_initial_weights_are_refused(begin, arguments, tmp_path):
    arguments.model.init = str(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"some weights")
    end(begin())
    (tmp_path / "weights.pth").write_bytes(b"others")
    was, now = (hashlib.sha256(content).hexdigest() for content in (b"some weights", b"others"))
    with pytest.raises(ValueError, match=f"can't go on: initial_weights_sha256 was '{was}' and is '{now}'"):
        begin()


def test_another_number_of_processes_is_refused(begin):
    end(begin())
    with pytest.raises(ValueError, match="can't go on: processes was 1 and is 2"):
        begin(processes=2)


def test_other_versions_are_warned_of_and_recorded(begin, tmp_path, caplog):
    environment = tmp_path / "run/environment.json"
    original = read(end(begin()).path / "environment.json")
    for versions in ({"torch": "1.0"}, {"torch": "1.0", "numpy": "1.1"}):
        before = read(environment)
        environment.write_text(json.dumps(before | {"packages": original["packages"] | versions}))
        caplog.clear()
        end(begin())
        assert f"packages.torch was '1.0' and is '{original['packages']['torch']}'" in caplog.text
    first, second = read(environment)["resumed"]
    assert [len(first), len(second)] == [1, 2] and second[1].startswith("packages.numpy was '1.1' and is ")


def test_where_nothing_has_changed_nothing_is_recorded_but_for_another_command(begin, tmp_path, caplog, monkeypatch):
    before = (end(begin()).path / "environment.json").read_bytes()
    monkeypatch.setattr("sys.argv", [sys.argv[0], "another.yaml"])
    begin()
    assert (tmp_path / "run/environment.json").read_bytes() == before and not caplog.messages


def test_the_log_grows_a_line_at_a_time_and_has_null_for_what_json_cannot_hold(begin):
    run = begin()
    run.log(phase="frozen", l2=0.1, validation_loss=float("inf"))
    run.log(phase="fine_tuning", step=0, train_loss=float("nan"))
    expected = [
        {"phase": "frozen", "l2": 0.1, "validation_loss": None},
        {"phase": "fine_tuning", "step": 0, "train_loss": None},
    ]
    assert [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()] == expected
    assert read_log(run.path) == expected


def test_the_numbers_go_to_the_tracker_as_they_are(begin, monkeypatch):
    run, tracked = begin(), []
    monkeypatch.setattr(run.accelerator, "log", lambda numbers, step: tracked.append((numbers, step)))
    run.log(phase="frozen", l2=0.1)
    run.log(phase="fine_tuning", step=7, train_loss=0.5)
    run.log(phase="fine_tuning", after_steps=8, epoch=1.0, skipped=3)
    expected = [({"frozen/l2": 0.1}, None), ({"fine_tuning/train_loss": 0.5}, 7), ({"fine_tuning/epoch": 1.0}, 8)]
    assert tracked == expected


def test_a_log_that_is_not_there_has_no_lines_and_a_half_written_line_is_none(begin, tmp_path):
    assert read_log(tmp_path) == []
    run = begin()
    run.log(phase="frozen", l2=0.1)
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"phase": "fro')
    assert read_log(run.path) == [{"phase": "frozen", "l2": 0.1}]


def test_the_log_goes_back_to_the_state_that_is_taken_up(begin):
    run = begin()
    run.log(phase="fine_tuning", step=0)
    run.save_state(a_state(1))
    run.log(phase="fine_tuning", step=1)
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"phase": "fi')
    end(run)
    again = begin()
    found = again.newest_state()
    assert found["progress"] == {"steps": 1} and torch.equal(found["model"]["weight"], torch.ones(3))
    again.log(phase="fine_tuning", step=1)
    assert [line["step"] for line in read_log(run.path)] == [0, 1]


def test_without_a_state_the_log_begins_anew(begin):
    run = begin()
    run.log(phase="frozen", l2=0.1)
    assert run.newest_state() is None and read_log(run.path) == []


def test_the_seconds_of_a_phase_are_counted_over_its_stops(begin, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(state, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    run = begin()
    run.log(phase="frozen", l2=0.1)
    with run.timed("frozen"):
        clock.now += 3
    with pytest.raises(KeyboardInterrupt), run.timed("fine_tuned"):
        clock.now += 4
        run.save_state(a_state(1))
        clock.now += 2  # lost, as the work that was done in it
        raise KeyboardInterrupt
    end(run)
    clock.now += 5000
    again = begin()
    again.newest_state()
    with again.timed("fine_tuned"):
        clock.now += 5
    assert again.seconds == {"frozen": 3, "fine_tuned": 9}


def test_an_evaluation_keeps_the_weights_and_sorts_by_its_steps(begin):
    run, model = begin(), tiny_model().to(memory_format=torch.channels_last)
    for steps in (1000, 20):
        run.save_evaluated(model, steps)
    first, last = sorted(run.evaluated.iterdir())
    assert (int(first.stem), int(last.stem)) == (20, 1000)
    kept = load_file(first)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_takes_the_place_of_the_one_before(begin):
    run = begin()
    for bias in (1.0, 2.0):
        model = tiny_model()
        torch.nn.init.constant_(model.classifier.output_layer.bias, bias)
        run.save_model(run.fine_tuned, model, PROCESSOR)
        (run.fine_tuned / "leftover").touch()
    opened = CXRInceptionForImageClassification.from_pretrained(run.fine_tuned)
    assert opened.classifier.output_layer.bias.tolist() == [2.0, 2.0]
    assert CXRInceptionImageProcessor.from_pretrained(run.fine_tuned).size == PROCESSOR.size


def test_a_run_is_complete_when_it_has_figures_and_nothing_left_to_go_on_with(begin):
    run = begin()
    assert not run.is_complete
    run.log(phase="frozen")
    run.save_state(a_state(0))
    run.save_evaluated(tiny_model(), 0)
    run.write_json("metrics.json", {})
    assert not run.is_complete
    run.complete()
    assert run.is_complete and not list(run.path.glob("checkpoints*"))
    assert TrainingRun(run.arguments).is_complete


def test_only_the_main_process_writes_during_a_training(tmp_path, arguments, films):
    run = TrainingRun(replace(arguments, run=replace(arguments.run, output_dir=str(tmp_path / "run"))))
    other = SimpleNamespace(is_main_process=False, log=lambda numbers, step: None)
    run.start(arguments, films, audit(films.splits), other)
    run.log(phase="frozen", l2=0.1)
    run.save_state(a_state(1))
    run.save_evaluated(tiny_model(), 1)
    run.save_model(run.frozen, tiny_model(), PROCESSOR)
    assert run.note_nonfinite(3, {}) == tmp_path / "run/nonfinite/000000003.json"
    assert not run.path.exists()
