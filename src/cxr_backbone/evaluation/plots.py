"""Pictures of a run. Needs matplotlib: pip install 'cxr-backbone[report]'."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def read_log(run: Path, phase: str) -> list[dict[str, Any]]:
    """The evaluations of one phase (`frozen` or `fine_tuning`) in a run's log.jsonl, oldest first."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase and "validation_loss" in line]


def learning_curves(runs: list[Path], path: Path) -> None:
    """Validation and training loss over the fine-tuning phase, one pair of lines a run, saved as an image at `path`.

    Epoch 0 is the frozen phase's model. A dot marks the checkpoint that was kept. The training loss is the one that is
    minimised, on augmented images and smoothed labels, so it may lie above the validation loss.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, run in enumerate(runs):
        evaluations = read_log(run, "fine_tuning")
        epochs = [line["epoch"] for line in evaluations]
        validation = [line["validation_loss"] for line in evaluations]
        trained = [line for line in evaluations if line["train_loss"] is not None]
        kept = min(range(len(validation)), key=validation.__getitem__)
        axes.plot(epochs, validation, color="#0072B2", label="validation" if index == 0 else None)
        axes.plot(
            [line["epoch"] for line in trained],
            [line["train_loss"] for line in trained],
            "--",
            color="#E69F00",
            label="training (augmented images, smoothed labels)" if index == 0 else None,
        )
        axes.plot(epochs[kept], validation[kept], "o", color="black", label="kept" if index == 0 else None)
    axes.set(xlabel="epochs of fine-tuning (0: the frozen phase's model)", ylabel="loss (nats)", yscale="log")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
