"""Phase two keeps the best model it comes by, and says what it did at every step."""

import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from narrow import PROCESSOR, accelerator, all_pixel_values, deaf_interruption, tiny_model, training_run
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.training import loop
from cxr_backbone.training.arguments import FineTuningArguments
from cxr_backbone.training.augmentation import SEEDS_A_RUN, Augmentation
from cxr_backbone.training.loop import Trainer, predict
from cxr_backbone.training.nonfinite import NonfiniteError
from cxr_backbone.training.phases import fine_tune, parameter_groups
from cxr_backbone.training.state import read_log


class Run:
    """A fine-tuning with its log and what it saved."""

    def __init__(self, phantoms, model=None, accumulation=1, method=fine_tune, seed=0, **arguments):
        self.model, self.accelerator = model or tiny_model(), accelerator(accumulation)
        settings = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "ema_decay": 0.8, "patience": 100}
        settings["gradient_accumulation_steps"] = accumulation
        self.error = None
        with tempfile.TemporaryDirectory() as folder:
            run = training_run(Path(folder) / "run", self.accelerator, seed=seed)
            try:
                method(
                    self.model,
                    phantoms["train"],
                    phantoms["validation"],
                    PROCESSOR,
                    self.accelerator,
                    FineTuningArguments(**(settings | arguments)),
                    run=run,
                    interruption=deaf_interruption(),
                )
            except NonfiniteError as error:
                self.error = str(error)
            self.lines = read_log(run.path)
            self.evaluated = {int(file.stem): load_file(file) for file in sorted(run.evaluated.glob("*"))}
            best = run.fine_tuned / "model.safetensors"
            self.best = load_file(best) if best.is_file() else None

    @property
    def evaluations(self):
        return [line for line in self.lines if "validation_loss" in line]

    @property
    def steps(self):
        return [line for line in self.lines if "step" in line]


@pytest.fixture(scope="module")
def tuned(phantoms):
    return Run(phantoms, epochs=4)


def validation_loss(state_dict, phantoms):
    model = tiny_model()
    model.load_state_dict(state_dict)
    prepared = accelerator()
    logits, labels = predict(model, phantoms["validation"], PROCESSOR, prepared, batch_size=8)
    return F.cross_entropy(logits, labels).item()


def test_the_weights_of_every_evaluation_are_kept(tuned, phantoms):
    assert list(tuned.evaluated) == [line["after_steps"] for line in tuned.evaluations]
    for line in tuned.evaluations:
        loss = validation_loss(tuned.evaluated[line["after_steps"]], phantoms)
        assert loss == pytest.approx(line["validation_loss"], abs=1e-5)


def test_the_head_is_asked_in_full_precision_whatever_the_backbone_runs_in(phantoms):
    half = SimpleNamespace(
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        device=torch.device("cpu"),
        mixed_precision="bf16",
        **{"num_processes": 1, "process_index": 0, "is_main_process": True},
        **{"gather": lambda tensor: tensor, "pad_across_processes": lambda tensor, dim: tensor},
    )
    logits, _ = predict(tiny_model(), phantoms["train"], PROCESSOR, half, batch_size=8)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_findings_are_fine_tuned_by_the_same_function():
    generator = np.random.default_rng(0)
    levels = [0, 100] * 16
    names = [f"film {number}" for number in range(32)]
    films = [generator.integers(level, level + 100, (75, 75), dtype=np.uint8) for level in levels]
    labels = [{"bright": float(level > 0), "never known": float("nan")} for level in levels]
    rows = Dataset.from_dict({"pixels": [film.tobytes() for film in films], "label": labels, "image_id": names})
    model = tiny_model(2, problem_type="multi_label_classification")
    run = Run({"train": rows, "validation": rows}, model=model, epochs=12, evaluations_per_epoch=1, augmentation=0.0)
    losses = [line["train_loss"] for line in run.steps]
    quarter = len(losses) // 4
    assert run.error is None and sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])


def test_fine_tuning_learns_dark_from_bright():
    generator = np.random.default_rng(0)
    labels = [0, 1] * 16
    films = [generator.integers(100 * label, 100 * label + 100, (75, 75), dtype=np.uint8) for label in labels]
    names = [f"film {number}" for number in range(32)]
    pixels = [film.tobytes() for film in films]
    dark_and_bright = Dataset.from_dict({"pixels": pixels, "label": labels, "image_id": names})
    run = Run(
        {"train": dark_and_bright, "validation": dark_and_bright}, epochs=12, evaluations_per_epoch=1, augmentation=0.0
    )
    losses = [line["train_loss"] for line in run.steps]
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])


def test_a_class_that_no_film_of_a_batch_has_does_no_harm(phantoms):
    healthy = [film for film, label in enumerate(phantoms["train"]["label"][:]) if label == 0]
    run = Run(phantoms | {"train": phantoms["train"].select(healthy)}, epochs=1, batch_size=4)
    assert run.error is None and len(run.steps) == len(healthy) // 4  # a last batch that is not full is left out
    assert all(isinstance(line["train_loss"], float) for line in run.steps)
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


def test_the_model_that_is_kept_has_the_lowest_validation_loss_of_the_log(tuned, phantoms):
    losses = [line["validation_loss"] for line in tuned.evaluations]
    assert min(losses) < losses[-1]  # the best is not the last
    assert validation_loss(tuned.best, phantoms) == pytest.approx(min(losses), abs=1e-6)
    chosen = tuned.evaluated[tuned.evaluations[losses.index(min(losses))]["after_steps"]]
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in tuned.best.items())


def test_the_start_is_evaluated_and_saved_before_the_first_step(tuned):
    assert tuned.evaluations[0]["epoch"] == 0 and tuned.evaluations[0]["train_loss"] is None
    start = tiny_model().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in tuned.evaluated[0].items())


def test_the_log_has_each_step_and_each_evaluation(tuned, phantoms):
    steps_per_epoch = len(phantoms["train"]) // 8
    assert [line["step"] for line in tuned.steps] == list(range(4 * steps_per_epoch))
    assert [line["epoch"] for line in tuned.evaluations][::2] == [0, 1, 2, 3, 4]
    assert len(tuned.evaluations) == 1 + 4 * 2
    assert {line["phase"] for line in tuned.lines} == {"fine_tuning"}
    between = [line["train_loss"] for line in tuned.steps[: round(steps_per_epoch / 2)]]
    assert tuned.evaluations[1]["train_loss"] == pytest.approx(sum(between) / len(between), abs=1e-6)


def test_the_average_that_is_kept_is_not_the_raw_model(tuned):
    raw, kept = tuned.model.state_dict(), tuned.best
    assert raw.keys() == kept.keys()
    changed = [name for name, tensor in kept.items() if not torch.equal(tensor, raw[name])]
    assert set(changed) >= {name for name in kept if name.endswith(("convolution.weight", "running_mean"))}


def test_the_seed_repeats_a_run_to_the_bit_and_another_changes_it(phantoms):
    runs = [Run(phantoms, epochs=1, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].lines == runs[1].lines != runs[2].lines
    raw = [run.model.state_dict() for run in runs]
    assert all(torch.equal(tensor, raw[1][name]) for name, tensor in raw[0].items())


def test_fine_tuning_that_never_helps_leaves_the_start(phantoms, monkeypatch):
    worse = iter([1.0, 0.5, 0.2, 0.1])

    def answer_less_and_less(model, films, *rest, **options):
        labels = torch.tensor(films["label"])
        return next(worse) * F.one_hot(labels, 2).float(), labels

    monkeypatch.setattr(loop, "predict", answer_less_and_less)
    run = Run(phantoms, epochs=1, evaluations_per_epoch=3)
    assert len(run.evaluations) == len(run.evaluated) == 4
    start = tiny_model().state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in run.best.items())


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_after_that_many_evaluations_without_a_lower_loss(phantoms, monkeypatch, patience):
    def answer_nothing(model, films, *rest, **options):
        return torch.zeros(len(films), 2), torch.tensor(films["label"])

    monkeypatch.setattr(loop, "predict", answer_nothing)
    run = Run(phantoms, epochs=50, patience=patience)
    assert len(run.evaluations) == 1 + patience
    assert len(run.steps) < 50 * len(phantoms["train"]) // 8


def train_frozen(to_stage, model, *rest, **keywords):
    """`fine_tune` for a model whose lower stages stay frozen."""
    model.freeze_backbone(to_stage)
    optimizer = torch.optim.AdamW(parameter_groups(model, rest[-1]))
    Trainer(model, *rest, optimizer, lambda updates: LambdaLR(optimizer, lambda update: 1.0), **keywords).train()


def train_counting(counts, model, *rest, **keywords):
    """`fine_tune` that notes how many updates are announced and how many are made."""
    optimizer = torch.optim.AdamW(parameter_groups(model, rest[-1]))
    scheduler = LambdaLR(optimizer, lambda update: 1.0)

    def make_scheduler(updates):
        counts["announced"] = updates
        return scheduler

    Trainer(model, *rest, optimizer, make_scheduler, **keywords).train()
    counts["scheduled"] = scheduler.last_epoch
    counts["made"] = {int(state["step"]) for state in optimizer.state.values()}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("accumulation, an_epoch", [(1, 5), (2, 3), (5, 1), (7, 1)])
def test_accumulated_batches_make_one_update(phantoms, accumulation, an_epoch, streamed):
    """Five batches an epoch; the last ones of an epoch make an update of their own."""
    counts = {}
    if streamed:
        rows = phantoms["train"]
        phantoms = phantoms | {"train": FilmStream(rows.to_iterable_dataset(num_shards=2), len(rows), "phantoms")}
    run = Run(phantoms, accumulation=accumulation, method=partial(train_counting, counts), evaluations_per_epoch=2)
    assert len(phantoms["train"]) // 8 == 5 and len(run.steps) == 10
    assert counts == {"announced": 2 * an_epoch, "scheduled": 2 * an_epoch, "made": {2 * an_epoch}}


def test_a_frozen_stage_does_not_move_by_one_bit(phantoms):
    start = tiny_model().state_dict()
    run = Run(phantoms, epochs=1, method=partial(train_frozen, "stage1"), weight_decay=0.5)
    for states in (run.model.state_dict(), run.best, *run.evaluated.values()):
        frozen = [name for name in start if ".stem." in name or ".stage1." in name]
        assert any("running_mean" in name for name in frozen)
        assert all(torch.equal(states[name], start[name]) for name in frozen)
    later = [name for name in start if ".stage2." in name and name.endswith(("convolution.weight", "running_mean"))]
    assert later and not any(torch.equal(run.model.state_dict()[name], start[name]) for name in later)


def test_fine_tuning_unfreezes_what_phase_one_froze(phantoms):
    model = tiny_model()
    model.freeze_backbone()
    run = Run(phantoms, model=model, epochs=1, warmup_ratio=0.0)
    start, end = tiny_model().state_dict(), run.model.state_dict()
    stem = [name for name in start if ".stem." in name and name.endswith(("weight", "running_mean", "running_var"))]
    assert stem and not any(torch.equal(end[name], start[name]) for name in stem)


def test_frozen_batch_norm_keeps_its_statistics_while_everything_else_learns(phantoms):
    start, end = tiny_model().state_dict(), Run(phantoms, epochs=1, freeze_batch_norm=True).model.state_dict()
    statistics = [name for name in start if "running_" in name]
    assert statistics and all(torch.equal(end[name], start[name]) for name in statistics)
    learnt = [name for name, parameter in tiny_model().named_parameters() if parameter.ndim > 1]
    assert not any(torch.equal(end[name], start[name]) for name in learnt)


def test_perturbed_views_of_validation_choose_when_they_are_asked_for_and_are_the_same_at_each_look(phantoms):
    run = Run(phantoms, epochs=2, perturbed_validation=True, stretch=True, seed=3)
    losses = {}
    for steps, weights in run.evaluated.items():
        model, views = tiny_model(), Augmentation(1.0, stretch=True)
        model.load_state_dict(weights)
        seeds = count(3 * SEEDS_A_RUN)
        change = lambda images: views(images, seed=next(seeds))  # noqa: B023, E731
        asked = predict(model, phantoms["validation"], PROCESSOR, accelerator(), batch_size=8, change=change)
        losses[steps] = F.cross_entropy(*asked).item()
    assert [line["perturbed_loss"] for line in run.evaluations] == pytest.approx(list(losses.values()), abs=1e-5)
    assert all(line["perturbed_loss"] != line["validation_loss"] for line in run.evaluations)
    chosen = run.evaluated[min(losses, key=losses.get)]
    assert all(torch.equal(run.best[name], chosen[name]) for name in chosen)


def test_images_grow_from_the_first_epoch_to_the_last():
    generator = np.random.default_rng(0)
    films = [generator.integers(0, 255, (150, 150), dtype=np.uint8).tobytes() for _ in range(8)]
    names = [f"film {number}" for number in range(8)]
    rows = Dataset.from_dict({"pixels": films, "label": [0, 1] * 4, "image_id": names})
    model, seen = tiny_model(), []

    def note(module, args, kwargs):
        if module.training:
            seen.append(tuple(kwargs.get("pixel_values", args[0] if args else None).shape[-2:]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    run = Run({"train": rows, "validation": rows}, model=model, epochs=3, start_scale=0.6)
    assert run.error is None and seen == [(90, 90), (120, 120), (150, 150)]


@pytest.mark.parametrize("scale, side", [(1.0, 150), (0.6, 90), (0.1, 75)])
def test_an_image_is_never_shrunk_below_what_the_network_takes(scale, side):
    bright_left = torch.zeros(1, 1, 150, 150)
    bright_left[..., :75] = 1.0
    small = loop.shrink(bright_left, scale)
    assert small.shape == (1, 1, side, side) and small.mean().item() == pytest.approx(0.5, abs=0.01)
    assert small[..., : side // 3].min() > 0.99 and small[..., -side // 3 :].max() < 0.01


def test_gradient_checkpointing_gives_the_same_run(phantoms):
    plain, checkpointed = (Run(phantoms, epochs=1, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.error is None
    for one, other in zip(plain.steps, checkpointed.steps, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    assert checkpointed.evaluations[-1]["validation_loss"] == pytest.approx(
        plain.evaluations[-1]["validation_loss"], abs=1e-4
    )


def test_a_learning_rate_that_explodes_stops_the_run_and_leaves_what_was_saved(phantoms):
    run = Run(phantoms, learning_rate=1e30, warmup_ratio=0.0)
    assert run.error.startswith("At step 1 the loss is nan") and "fine_tuning.learning_rate" in run.error
    assert list(run.evaluated) == [0] and all(tensor.isfinite().all() for tensor in run.best.values())
    assert [line["train_loss"] is None for line in run.steps] == [False, True]  # JSON has no NaN


def test_a_model_that_starts_broken_is_never_saved(phantoms):
    model = tiny_model()
    nn.init.constant_(model.classifier.output_layer.bias, float("nan"))
    run = Run(phantoms, model=model)
    assert run.error == "The validation loss is nan after 0 steps of fine-tuning."
    assert run.best is None and not run.evaluated


def test_predictions_are_in_order_and_leave_the_mode_as_it_was(phantoms):
    model, prepared = tiny_model(dropout=0.5).train(), accelerator()
    logits, labels = predict(model, phantoms["test"], PROCESSOR, prepared, batch_size=4)
    assert model.training
    assert labels.tolist() == phantoms["test"]["label"][:]
    with torch.no_grad():
        expected = model.eval()(all_pixel_values(phantoms["test"])).logits
    assert len(logits) == len(phantoms["test"]) and len(logits) % 4 != 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
