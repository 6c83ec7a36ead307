"""A loss or gradient that is NaN or infinite: found at that step, kept with the films of its batch, and met as told."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from cxr_backbone.training.state import TrainingRun

MOST_IN_A_ROW = 10  # batches that are skipped; after that it is not the batches


class NonfiniteError(RuntimeError):
    """Training stopped because a loss or gradient is no number."""


class NonfiniteGuard:
    """Keeps the batches since the last update in mind, and what they would have changed.

    Args:
        reaction: `stop`, or `skip`: the weights stay as they were before the batch, BatchNorm's statistics too.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, reaction: str, run: TrainingRun):
        self.accelerator, self.reaction, self.run = accelerator, reaction, run
        self.buffers: list[Tensor] = list(model.buffers()) if reaction == "skip" else []
        self.before: list[Tensor] = []
        self.skipped = self.skipped_in_a_row = 0
        self.forget()

    def watch(self, loss: Tensor, image_ids: list[str]) -> None:
        """Keep a batch of this process in mind, until `forget`."""
        self.watched.append((loss, image_ids))

    def losses(self) -> Tensor:
        return torch.stack([loss for loss, _ in self.watched])

    def forget(self, *, is_skipped: bool = False) -> None:
        """An update has been made, or not."""
        self.watched: list[tuple[Tensor, list[str]]] = []
        if is_skipped:
            for buffer, before in zip(self.buffers, self.before, strict=True):
                buffer.copy_(before)
        self.before = [buffer.clone() for buffer in self.buffers]
        self.skipped += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0

    def react(self, step: int, norm: Tensor, watched: list[tuple[Tensor, list[str]]]) -> None:
        """Keep what is known of the batches that were `watched` up to an update, all processes', in the run directory;
        then stop unless told to skip.

        Raises:
            NonfiniteError: it names step, loss, gradient and that file.
        """
        process = self.accelerator.process_index
        batches: list[dict[str, Any]] = gather_object(
            [{"process": process, "loss": _number(loss), "image_ids": ids} for loss, ids in watched]
        )
        path = self.run.note_nonfinite(step, {"step": step, "gradient_norm": _number(norm), "batches": batches})
        losses = ", ".join(str(batch["loss"]) for batch in batches)
        found = (
            f"At step {step} the loss is {losses} and the norm of the gradient {_number(norm)}; {path} has the films."
        )
        if self.reaction == "stop":
            raise NonfiniteError(
                f"{found} Train again with a lower fine_tuning.learning_rate, or with --fine_tuning.nonfinite skip."
            )
        self.run.warn(f"{found} The batch is skipped.")
        if self.skipped_in_a_row + 1 >= MOST_IN_A_ROW:
            raise NonfiniteError(f"{found} So it was {MOST_IN_A_ROW} times in a row; try a lower learning rate.")


def _number(value: Tensor) -> float | str:
    """As JSON can hold it."""
    number = value.item()
    return number if math.isfinite(number) else str(number)
