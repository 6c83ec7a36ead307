"""The training loop of phase two, and the evaluation pass that both phases share."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from cxr_backbone.configuration_cxr_inception import SMALLEST_IMAGE
from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import FineTuningArguments
from cxr_backbone.training.augmentation import SEEDS_A_RUN, Augmentation
from cxr_backbone.training.batches import Batch, run_through, to_images, to_pixel_values, training_loader
from cxr_backbone.training.hardware import inference_copy
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.joint import JointBatch, JointModel, JointTargets
from cxr_backbone.training.nonfinite import NonfiniteError, NonfiniteGuard
from cxr_backbone.training.state import TrainingRun


def predict(
    model: CXRInceptionForImageClassification,
    films: Dataset | FilmStream,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    batch_size: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (images, num_labels) in eval mode, float32 on the CPU, and the labels beside them, in the order of
    `batches.run_through`, which also says what `change` is.

    The head runs in float32 whatever the backbone does: logits of bfloat16 have three digits, and scores would tie."""

    backbone = inference_copy(model.cxr_inception, accelerator)
    head = copy.deepcopy(model.classifier).float().eval()

    def forward(pixel_values: Tensor) -> Tensor:
        features = backbone(pixel_values).pooler_output
        with torch.autocast(features.device.type, enabled=False):
            return head(features.float())

    return run_through(
        forward, films, image_processor, accelerator, batch_size=batch_size, desc="predict", change=change
    )


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What models are compared by: the mean negative log-likelihood (nats) of the labels that are known, without the
    label smoothing and weights of the training loss.

    Args:
        logits: (images, num_labels).
        labels: class indices (images,), or findings (images, num_labels): 1, 0, or NaN for unknown.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    known = ~labels.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], labels[known])


@dataclass
class Progress:
    """How far a training is.

    steps: batches that each process has trained on.
    lowest: validation loss so far (of perturbed views, if those choose); `evaluations_since` then.
    losses: of the steps since the last evaluation, means over processes.
    overflows: steps that fp16's scaler has left out.
    """

    steps: int = 0
    lowest: float = math.inf
    evaluations_since: int = 0
    losses: list[float] = field(default_factory=list)
    overflows: int = 0


class Trainer:
    """Phase two's loop: all weights that ask for gradients are trained, and at each evaluation the averaged model is
    kept, in `run.evaluated`, and in `run.fine_tuned` if its validation loss is the lowest so far. That of the start is
    one of them: fine-tuning that never helps leaves what it started from.

    Every few minutes and before each evaluation its state goes to `run.save_state`, and a training that takes up such a
    state ends in the same weights as one that was never stopped. So nothing random hangs on what came before: order,
    augmentation and dropout of a batch follow from the seed and from the batch's number.
    """

    def __init__(
        self,
        model: CXRInceptionForImageClassification | JointModel,
        train_films: Dataset | FilmStream,
        validation_films: Dataset,
        image_processor: CXRInceptionImageProcessor,
        accelerator: Accelerator,
        arguments: FineTuningArguments,
        optimizer: torch.optim.Optimizer,
        make_scheduler: Callable[[int], torch.optim.lr_scheduler.LRScheduler],
        *,
        run: TrainingRun,
        interruption: Interruption,
        joint: JointTargets | None = None,
    ):
        """`make_scheduler` takes the number of updates that the whole training makes; `joint` goes with a
        `JointModel`."""
        self.validation_films, self.image_processor = validation_films, image_processor
        self.accelerator, self.arguments, self.run, self.interruption = accelerator, arguments, run, interruption
        self.settings = run.arguments.run
        self.loader = training_loader(train_films, arguments.batch_size, accelerator, seed=self.settings.seed)
        _take_from_main_process(model, accelerator)
        # Copied before `prepare`, which patches the forward method of what it is given.
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay), use_buffers=True)
        averaged = self.average.module.model if joint else self.average.module
        self.averaged, self.joint = cast(CXRInceptionForImageClassification, averaged), joint
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.steps_per_epoch = len(self.loader)
        # `accumulate` updates at an epoch's last batch too, however few came before it.
        updates = arguments.epochs * math.ceil(self.steps_per_epoch / arguments.gradient_accumulation_steps)
        self.scheduler = make_scheduler(updates)
        self.augmentation = Augmentation(arguments.augmentation, stretch=arguments.stretch)
        self.guard = NonfiniteGuard(self.model, accelerator, arguments.nonfinite, run)
        # To wait for a GPU at each step leaves it idle. But what is to be skipped, or scaled, must be known at once.
        waits = accelerator.device.type == "cpu" or arguments.nonfinite == "skip" or accelerator.scaler is not None
        self.reads_late, self.unread = not waits, cast("_Update | None", None)
        self.progress = Progress()
        an_epoch = arguments.evaluations_per_epoch
        self.evaluated_after = {round(self.steps_per_epoch * part / an_epoch) for part in range(1, an_epoch + 1)}
        self.unlogged: list[Tensor] = []  # losses on the device, so that a step does not wait for them
        self.saved_at: tuple[int, float] = (-1, time.monotonic())  # steps and time of the last state

    def train(self, state: dict[str, Any] | None = None) -> None:
        """Train to the end, from a state of `run.newest_state` if there is one.

        Raises:
            NonfiniteError: as `NonfiniteGuard`, or for a validation loss. What was saved before stays.
        """
        if state is not None:
            self._take_up(state)
        with self.interruption.deferred():
            self._train()
        if self.interruption.is_asked:  # during the last evaluation; all that is left is to measure
            self.interruption.exit()

    def _train(self) -> None:
        progress, epochs = self.progress, self.arguments.epochs
        if self._is_to_be_evaluated() and self._evaluate():
            return
        disable = None if self.accelerator.is_main_process else True
        total = epochs * self.steps_per_epoch
        with tqdm(total=total, initial=progress.steps, desc="fine-tuning", disable=disable) as bar:
            for epoch in range(progress.steps // self.steps_per_epoch, epochs):
                self.model.train()
                self.loader.set_epoch(epoch)
                for batch in islice(self.loader, progress.steps - epoch * self.steps_per_epoch, None):
                    self._step(batch)
                    bar.update()
                    if self._is_to_be_evaluated() and self._evaluate():
                        return

    def _step(self, batch: Batch) -> None:
        # The number of the batch among those of all processes: one process that accumulates gradients over two batches
        # draws what two processes draw.
        number = self.progress.steps * self.accelerator.num_processes + self.accelerator.process_index
        films = self.joint.beside(batch, number) if self.joint else JointBatch(batch["pixels"], batch["image_id"], {})
        images = self.augmentation(to_images(films.pixels), seed=self.settings.seed * SEEDS_A_RUN + number)
        pixel_values = to_pixel_values(shrink(images, self._scale()), self.image_processor)
        with self.accelerator.accumulate(self.model):
            if self.joint:
                loss, beside = self.model(pixel_values, batch["label"], films.targets)
                objective = loss + self.joint.weight * beside
            else:
                loss = objective = self.model(pixel_values, labels=batch["label"]).loss
            self.accelerator.backward(objective)
            self.unlogged.append(loss.detach())
            self.guard.watch(objective.detach(), films.image_ids)
            self.progress.steps += 1
            if self.accelerator.sync_gradients:
                self._update()

    def _scale(self) -> float:
        """Of this epoch's images: from `start_scale` in the first to 1 in the last."""
        start, last = self.arguments.start_scale, self.arguments.epochs - 1
        return start + (1 - start) * (self.progress.steps // self.steps_per_epoch / last) if last else 1.0

    def _update(self) -> None:
        """One step of the optimizer; then the state is saved if it is time to, or to stop."""
        accelerator = self.accelerator
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        since = time.monotonic() - self.saved_at[1]
        is_time = accelerator.is_main_process and since >= 60 * self.settings.save_minutes
        seen = self._any_process(
            ~self.guard.losses().isfinite().all(), ~norm.isfinite(), is_time, self.interruption.is_asked
        )
        update: _Update | None = _Update(self.progress.steps - 1, norm, self.guard.watched, seen)
        if self.reads_late:
            update, self.unread = self.unread, update
        is_bad, is_overflow, is_time, is_asked = (False,) * 4 if update is None else self._heed(update)
        if not is_bad or accelerator.scaler is not None:
            self.optimizer.step()
        if not is_bad and not is_overflow:
            self.scheduler.step()
            self.average.update_parameters(accelerator.unwrap_model(self.model))
        self.optimizer.zero_grad()
        self.guard.forget(is_skipped=is_bad)
        if is_time or is_asked:
            self._save_state()
        if is_asked:
            self._exit()

    def _heed(self, update: "_Update") -> tuple[bool, bool, bool, bool]:
        """Whether an update is bad, whether it is an overflow, whether it is time to save, and whether to stop."""
        bad_loss, bad_gradient, is_time, is_asked = update.seen.read()
        # A gradient that is too large for fp16 is normal: its scaler leaves this step out and scales less from then on.
        is_overflow = self.accelerator.scaler is not None and not bad_loss and bad_gradient
        is_bad = bad_loss or (bad_gradient and not is_overflow)
        self.progress.overflows += is_overflow
        if is_bad:
            self._log_steps()
            self.guard.react(update.step, update.norm, update.watched)
        return is_bad, is_overflow, is_time, is_asked

    def _is_to_be_evaluated(self) -> bool:
        steps = self.progress.steps
        return steps == 0 or (steps - 1) % self.steps_per_epoch + 1 in self.evaluated_after

    def _evaluate(self) -> bool:
        """Look at validation, and keep the averaged model; True if training should stop."""
        progress, run = self.progress, self.run
        self._save_state()
        if self._any_process(self.interruption.is_asked).read()[0] and self.saved_at[0] == progress.steps:
            self._exit()  # rather than look at all of validation first
        self._log_steps()
        _take_from_main_process(self.averaged, self.accelerator)  # statistics of BatchNorm, of which each has its own
        with self.interruption.deferred(False):  # there is nothing to save meanwhile
            losses = {"validation_loss": self._validation_loss()}
            if self.arguments.perturbed_validation:
                losses["perturbed_loss"] = self._validation_loss(perturbed=True)
        *_, loss = losses.values()
        finite = [loss for loss in progress.losses if math.isfinite(loss)]
        counts = {"skipped": self.guard.skipped, "overflows": progress.overflows}
        run.log(
            phase="fine_tuning",
            after_steps=progress.steps,
            epoch=progress.steps / self.steps_per_epoch,
            train_loss=sum(finite) / len(finite) if finite else None,
            **losses,
            **{name: count for name, count in counts.items() if count},
        )
        progress.losses.clear()
        progress.evaluations_since += 1
        run.save_evaluated(self.averaged, progress.steps)
        if loss < progress.lowest:
            progress.lowest, progress.evaluations_since = loss, 0
            run.save_model(run.fine_tuned, self.averaged, self.image_processor)
        return progress.evaluations_since >= self.arguments.patience

    def _validation_loss(self, *, perturbed: bool = False) -> float:
        logits, labels = predict(
            self.averaged,
            self.validation_films,
            self.image_processor,
            self.accelerator,
            batch_size=self.arguments.batch_size,
            change=self.augmentation.of_batches(self.settings.seed * SEEDS_A_RUN) if perturbed else None,
        )
        loss = plain_loss(logits, labels).item()
        if not math.isfinite(loss):
            raise NonfiniteError(f"The validation loss is {loss} after {self.progress.steps} steps of fine-tuning.")
        return loss

    def _log_steps(self) -> None:
        """One line for each step that has none yet; the loss is the mean over processes."""
        if not self.unlogged:
            return
        means = self.accelerator.reduce(torch.stack(self.unlogged), reduction="mean").tolist()
        self.unlogged.clear()
        for step, loss in enumerate(means, start=self.progress.steps - len(means)):
            self.run.log(phase="fine_tuning", step=step, train_loss=loss)
        self.progress.losses += means

    def _save_state(self) -> None:
        """(Between two updates there is a gradient that no state holds.)"""
        if self.saved_at[0] == self.progress.steps or not self.accelerator.sync_gradients:
            return
        if self.unread is not None:
            self._heed(self.unread)
            self.unread = None
        self._log_steps()
        scaler = self.accelerator.scaler
        state = {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "progress": asdict(self.progress),
            "skipped": (self.guard.skipped, self.guard.skipped_in_a_row),
        }
        self.run.save_state(state)
        self.saved_at = (self.progress.steps, time.monotonic())

    def _exit(self) -> None:
        self.accelerator.wait_for_everyone()  # the first to end takes the others with it, who may be writing still
        self.interruption.exit(f" after step {self.progress.steps}, which is saved")

    def _take_up(self, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.guard.forget()  # (it counts from 0 again)
        self.guard.skipped, self.guard.skipped_in_a_row = state["skipped"]
        self.saved_at = (self.progress.steps, time.monotonic())

    def _any_process(self, *flags: Tensor | bool) -> "_Flags":
        """For each flag, whether any process has it set."""
        numbers = torch.stack([torch.as_tensor(flag, device=self.accelerator.device).float() for flag in flags])
        return _Flags(self.accelerator.reduce(numbers))


def shrink(images: Tensor, scale: float) -> Tensor:
    """Images (batch, 1, height, width), smaller by a factor of at most 1, but not too small for the network."""
    size = [max(round(side * scale), SMALLEST_IMAGE) for side in images.shape[-2:]]
    return images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=True)


class _Flags:
    """Yes or no to several questions, on their way from the device to the host."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrival = torch.Event(numbers.device) if numbers.device.type != "cpu" else None
        if self.arrival is not None:
            self.arrival.record()

    def read(self) -> list[bool]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return [number > 0 for number in self.numbers.tolist()]


@dataclass
class _Update:
    """An update of the weights, the batches that went into it, and what the processes saw in making it."""

    step: int
    norm: Tensor
    watched: list[tuple[Tensor, list[str]]]
    seen: _Flags


def _take_from_main_process(model: nn.Module, accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            broadcast(tensor)
