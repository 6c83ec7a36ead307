"""A loss or gradient that is NaN or infinite is found at its step, with the films of its batch, and changes nothing."""

import itertools
import json

import pytest
import torch
from narrow import tiny_model
from training.tuning import Tuning, few, forget_after, same

from cxr_backbone.training import checkpoints, loop
from cxr_backbone.training.batches import training_loader
from cxr_backbone.training.nonfinite import MOST_IN_A_ROW, NonfiniteError


@pytest.fixture(autouse=True)
def keep_every_state(monkeypatch):
    monkeypatch.setattr(checkpoints, "KEPT", 1000)


@pytest.fixture(scope="module")
def films(phantoms):
    return few(phantoms)


@pytest.fixture
def poison(monkeypatch):
    """Makes a pixel of the batches of some steps NaN, as no film can, and with it all that it is mixed with."""

    forward = loop.to_pixel_values

    def poison(steps):
        calls = itertools.count()

        def poisoned(*given):
            pixel_values = forward(*given)
            if next(calls) in steps:
                pixel_values[0, 0, 40, 40] = float("nan")
            return pixel_values

        monkeypatch.setattr(loop, "to_pixel_values", poisoned)

    return poison


def noted(tuning):
    return {int(file.stem): json.loads(file.read_text()) for file in tuning.run.path.glob("nonfinite/*.json")}


def batches_of(tuning):
    """The names of the films of each batch, epoch after epoch."""
    arguments = tuning.arguments
    loader = training_loader(tuning.films["train"], arguments.batch_size, tuning.accelerator, seed=0)
    for epoch in range(arguments.epochs):
        loader.set_epoch(epoch)
        yield from (batch["image_id"] for batch in loader)


def test_training_stops_and_says_at_which_step_and_where_its_films_are_named(films, tmp_path, poison):
    poison([7])
    tuning = Tuning(tmp_path, films)
    with pytest.raises(NonfiniteError) as error:
        tuning.train()
    file = tmp_path / "nonfinite/000000007.json"
    assert str(error.value).startswith(
        f"At step 7 the loss is nan and the norm of the gradient nan; {file} has the films. Train again with a lower "
    )
    of_step_7 = list(batches_of(tuning))[7]
    batch = {"process": 0, "loss": "nan", "image_ids": of_step_7}
    assert noted(tuning) == {7: {"step": 7, "gradient_norm": "nan", "batches": [batch]}}
    assert tuning.log[-1] == {"phase": "fine_tuning", "step": 7, "train_loss": None}


def test_what_was_saved_before_the_stop_is_whole(films, tmp_path, poison):
    poison([7])
    tuning = Tuning(tmp_path, films)
    with pytest.raises(NonfiniteError):
        tuning.train()
    assert tuning.saved == list(range(8))
    assert all(tensor.isfinite().all() for tensor in tuning.state(7)["model"].values())
    poison([])
    assert tuning.train().evaluations[-1]["after_steps"] == 10


@pytest.fixture
def read_late(monkeypatch):
    """As on a GPU: what a step has seen is read at the next one, so that no step waits for it."""
    always = property(lambda self: True, lambda self, value: None)
    return lambda: monkeypatch.setattr(loop.Trainer, "reads_late", always, raising=False)


@pytest.mark.parametrize("save_minutes", [0.0, 100.0])
@pytest.mark.parametrize("step", [6, 7])
def test_read_late_it_is_found_a_step_later_but_before_a_state_is_saved(
    films, tmp_path, poison, read_late, step, save_minutes
):
    read_late()
    poison([step])
    tuning = Tuning(tmp_path, films, save_minutes=save_minutes)
    with pytest.raises(NonfiniteError, match=f"At step {step} the loss is nan"):
        tuning.train()
    (batch,) = noted(tuning)[step]["batches"]
    assert batch["image_ids"] == list(batches_of(tuning))[step]
    assert tuning.log[-1]["step"] in (step, step + 1) and max(tuning.saved) <= step
    assert all(tensor.isfinite().all() for tensor in tuning.state(max(tuning.saved))["model"].values())


def test_read_late_a_training_ends_in_the_same_weights(films, tmp_path, read_late):
    at_once = Tuning(tmp_path / "at once", films).train()
    read_late()
    late = Tuning(tmp_path / "late", films).train()
    assert late.log == at_once.log
    assert same(late.state(late.saved[-1]), at_once.state(at_once.saved[-1]))


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
def test_a_skipped_batch_changes_nothing_to_the_bit_and_training_goes_on(films, tmp_path, poison, caplog, arguments):
    poison([2])
    tuning = Tuning(tmp_path, films, nonfinite="skip", **arguments).train()
    before, skipped, after = (tuning.state(steps) for steps in ((2, 4, 5) if arguments else (2, 3, 4)))
    assert any("running_mean" in name for name in before["model"])
    for part in ("model", "average", "optimizer", "scheduler"):
        assert same(before[part], skipped[part]) and not same(skipped[part], after[part])
    assert "The batch is skipped." in caplog.text
    (step,) = noted(tuning)
    names = list(batches_of(tuning))
    assert [batch["image_ids"] for batch in noted(tuning)[step]["batches"]] == (names[2:4] if arguments else names[2:3])
    assert all(tensor.isfinite().all() for tensor in tuning.state(10)["model"].values())


def test_the_log_counts_what_was_skipped(films, tmp_path, poison):
    poison([0, 1, 6])
    tuning = Tuning(tmp_path, films, nonfinite="skip").train()
    assert [line.get("skipped") for line in tuning.evaluations] == [None, 2, 2, 3, 3]
    losses = [line["train_loss"] for line in tuning.log if "step" in line]
    assert [step for step, loss in enumerate(losses) if loss is None] == [0, 1, 6]
    assert tuning.evaluations[1]["train_loss"] is None  # both batches before it were skipped
    assert tuning.evaluations[3]["train_loss"] == pytest.approx(losses[5], abs=1e-6)


def test_many_in_a_row_are_not_the_fault_of_the_batches(films, tmp_path, poison):
    most = MOST_IN_A_ROW
    poison([*range(most - 1), *range(most, 3 * most)])
    with pytest.raises(NonfiniteError, match=rf"At step {2 * most - 1} .* {most} times in a row"):
        Tuning(tmp_path, films, nonfinite="skip", epochs=6).train()


def test_a_training_that_goes_on_counts_on(films, tmp_path, poison):
    poison(range(3, 30))
    tuning = Tuning(tmp_path, films, nonfinite="skip", epochs=6)
    with pytest.raises(NonfiniteError):
        tuning.train()
    assert (tuning.state(12)["skipped"], tuning.saved[-1]) == ((9, 9), 12)
    poison(range(30))
    with pytest.raises(NonfiniteError, match="At step 12 "):
        tuning.train()


def multiplying_gradients(by):
    """A model the gradient of whose head is multiplied by the next number."""
    model, factors = tiny_model(dropout=0.3), iter(by)
    model.classifier.output_layer.weight.register_hook(lambda gradient: gradient * next(factors))
    return model


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_is_found_though_the_loss_is_one(films, tmp_path, factor):
    tuning = Tuning(tmp_path, films)
    with pytest.raises(NonfiniteError, match=r"At step 4 the loss is 0\.\d+ and the norm of the gradient (inf|nan);"):
        tuning.train(multiplying_gradients([1.0] * 4 + [factor]))
    assert isinstance(noted(tuning)[4]["batches"][0]["loss"], float) and tuning.saved == list(range(5))


# fp16, whose gradients overflow now and then


SCALE = 4096.0  # of the gradients; so high that the first step overflows


@pytest.fixture
def fp16(films, monkeypatch):
    def fp16(folder, scale=SCALE, **arguments):
        """With the scaler of fp16, which Accelerate makes on GPUs only."""
        tuning = Tuning(folder, films, **arguments)
        tuning.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        tuning.accelerator.native_amp = True
        monkeypatch.setattr(tuning.accelerator.state, "_mixed_precision", "fp16")  # all accelerators share it
        return tuning

    return fp16


def test_an_overflow_of_fp16_is_counted_and_is_no_error(fp16, tmp_path):
    tuning = fp16(tmp_path).train()
    overflows = tuning.evaluations[-1]["overflows"]
    end = tuning.state(10)
    assert 0 < overflows < 10 and end["scheduler"]["last_epoch"] == 10 - overflows
    assert end["scaler"]["scale"] == SCALE / 2**overflows
    start, overflown = tuning.state(0), tuning.state(1)
    for part in ("optimizer", "scheduler", "average"):
        assert same(start[part], overflown[part]) and not same(overflown[part], end[part])
    assert not noted(tuning) and "skipped" not in tuning.evaluations[-1]


def test_a_training_with_fp16_goes_on_with_its_scale(fp16, tmp_path):
    whole = fp16(tmp_path / "whole").train()
    again = fp16(forget_after(whole, 4, tmp_path / "again"), scale=1.0, save_minutes=60)
    again.train()
    assert same(again.state(10), whole.state(10)) and again.log == whole.log


def test_a_loss_that_is_no_number_is_an_error_in_fp16_too(fp16, tmp_path, poison):
    poison([7])
    with pytest.raises(NonfiniteError, match="At step 7 the loss is nan"):
        fp16(tmp_path).train()


def test_fp16_skips_such_a_batch_and_scales_less_from_then_on(fp16, tmp_path, poison):
    poison([7])
    tuning = fp16(tmp_path, nonfinite="skip").train()
    before, skipped = tuning.state(7), tuning.state(8)
    for part in ("model", "average", "optimizer", "scheduler"):
        assert same(before[part], skipped[part])
    assert skipped["scaler"]["scale"] == before["scaler"]["scale"] / 2
    assert list(noted(tuning)) == [7] and tuning.evaluations[-1]["skipped"] == 1
