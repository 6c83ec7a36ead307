"""A training that takes up a saved state ends, to the bit, where one ends that was never stopped."""

import itertools
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from narrow import tiny_model
from safetensors.torch import load_file
from training.tuning import Tuning, few, forget_after, same

from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.training import checkpoints, loop
from cxr_backbone.training.interruption import Interruption

ACCUMULATING = {"gradient_accumulation_steps": 4}  # updates after 4 and 5 of 5 steps, an evaluation after 2


@pytest.fixture(autouse=True)
def keep_every_state(monkeypatch):
    monkeypatch.setattr(checkpoints, "KEPT", 1000)


@pytest.fixture(scope="module")
def films(phantoms):
    return few(phantoms)


@pytest.fixture(scope="module")
def whole(films, tmp_path_factory):
    """A training that was never stopped."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "KEPT", 1000)
        return Tuning(tmp_path_factory.mktemp("whole"), films).train()


def broken_model():
    """None of its weights is what the training began with."""
    model = tiny_model(dropout=0.3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


def assert_same_end(run, whole):
    assert run.saved[-1] == whole.saved[-1] and same(run.state(run.saved[-1]), whole.state(whole.saved[-1]))
    assert (run.run.path / "log.jsonl").read_bytes() == (whole.run.path / "log.jsonl").read_bytes()
    weights = [{file.name: load_file(file) for file in one.run.evaluated.iterdir()} for one in (run, whole)]
    assert len(weights[0]) == len(whole.evaluations) and same(*weights)
    best = [load_file(one.run.fine_tuned / "model.safetensors") for one in (run, whole)]
    assert same(*best)


def assert_goes_on(whole, saved, folder, films, **arguments):
    """From each of these states of a training to its end."""
    for steps in saved:
        torch.manual_seed(steps)  # nothing hangs on what is drawn before
        again = Tuning(forget_after(whole, steps, folder / str(steps)), films, save_minutes=60, **arguments)
        assert_same_end(again.train(broken_model()), whole)


def test_any_state_that_is_taken_up_ends_where_the_whole_training_ends(whole, films, tmp_path):
    assert whole.saved == list(range(11))
    assert_goes_on(whole, [1, 5, 9, 10], tmp_path, films)


def test_accumulated_gradients_are_never_between_two_states(films, tmp_path):
    whole = Tuning(tmp_path / "whole", films, **ACCUMULATING).train()
    assert whole.saved == [0, 4, 5, 9, 10]
    assert_goes_on(whole, [0, 4, 5], tmp_path, films, **ACCUMULATING)


def test_a_stream_goes_on_in_the_middle_of_an_epoch(films, tmp_path):
    rows = films["train"]
    films = films | {"train": FilmStream(rows.to_iterable_dataset(num_shards=2), len(rows), "phantoms")}
    whole = Tuning(tmp_path / "whole", films).train()
    assert_goes_on(whole, [3, 8], tmp_path, films)


def test_a_training_that_differs_a_little_does_not_pass_for_the_same(whole, films, tmp_path):
    assert whole.arguments.augmentation == 1.0
    other = Tuning(tmp_path / "other", films, save_minutes=60, augmentation=0.99999).train()
    with pytest.raises(AssertionError):
        assert_same_end(other, whole)


def test_the_evaluations_without_a_lower_loss_are_counted_on(films, tmp_path, monkeypatch):
    def answer_nothing(model, films, *rest, **options):
        return torch.zeros(len(films), 2), torch.tensor(films["label"])

    monkeypatch.setattr(loop, "predict", answer_nothing)
    whole = Tuning(tmp_path / "whole", films, patience=2, epochs=50).train()
    assert [line["after_steps"] for line in whole.evaluations] == [0, 2, 5]
    assert_goes_on(whole, [2, 3, 5], tmp_path, films, patience=2, epochs=50)


# When a state is saved


def test_between_evaluations_a_state_is_saved_every_few_minutes(films, tmp_path, monkeypatch):
    now, forward = [0.0], loop.to_pixel_values

    def a_minute_later(*given):
        now[0] += 60
        return forward(*given)

    monkeypatch.setattr(loop, "to_pixel_values", a_minute_later)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    once_an_epoch = {"evaluations_per_epoch": 1}
    assert Tuning(tmp_path / "3", films, save_minutes=3, **once_an_epoch).train().saved == [0, 3, 5, 8, 10]
    assert Tuning(tmp_path / "60", films, save_minutes=60, **once_an_epoch).train().saved == [0, 5, 10]


@pytest.fixture
def interruption():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Interruption()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def strike(monkeypatch, name, call):
    """SIGTERM for this process in the middle of a call of a function of the loop; those that came to its end."""
    function, calls, ended = getattr(loop, name), itertools.count(1), []

    def struck(*given, **named):
        number = next(calls)
        if number == call:
            os.kill(os.getpid(), signal.SIGTERM)
        ended.append(number)
        return function(*given, **named)

    monkeypatch.setattr(loop, name, struck)
    return ended


@pytest.mark.parametrize(("arguments", "struck", "saved"), [({}, 3, 3), ({}, 10, 10), (ACCUMULATING, 3, 4)])
def test_sigterm_in_a_step_saves_the_state_after_its_update(
    films, tmp_path, monkeypatch, interruption, caplog, arguments, struck, saved
):
    stopped = Tuning(tmp_path / "stopped", films, save_minutes=60, **arguments)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ending:
        strike(patched, "to_pixel_values", struck)
        stopped.train(interruption=interruption)
    assert ending.value.code == 128 + signal.SIGTERM
    assert f"Stopped by SIGTERM after step {saved}, which is saved." in caplog.text
    assert stopped.saved[-1] == saved and stopped.log[-1]["step"] == saved - 1


def test_a_training_that_was_stopped_so_ends_where_the_whole_one_ends(
    whole, films, tmp_path, monkeypatch, interruption
):
    stopped = Tuning(tmp_path, films, save_minutes=60)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        strike(patched, "to_pixel_values", 4)
        stopped.train(interruption=interruption)
    assert_same_end(stopped.train(broken_model()), whole)


def test_sigterm_during_an_evaluation_ends_at_once_with_the_state_that_was_saved_before(
    whole, films, tmp_path, monkeypatch, interruption
):
    stopped = Tuning(tmp_path, films, save_minutes=60)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ending:
        ended = strike(patched, "predict", 2)
        stopped.train(interruption=interruption)
    assert ending.value.code == 128 + signal.SIGTERM
    assert ended == [1] and stopped.saved[-1] == 2
    assert [line["after_steps"] for line in stopped.evaluations] == [0]
    assert_same_end(stopped.train(broken_model()), whole)
