"""A fine-tuning that takes a second, with everything that has a state: momentum, schedule, moving average, dropout,
augmentation, several evaluations."""

import shutil

import torch
from narrow import PROCESSOR, accelerator, deaf_interruption, tiny_model, training_run

from cxr_backbone.training.arguments import FineTuningArguments
from cxr_backbone.training.phases import fine_tune
from cxr_backbone.training.state import read_log

SETTINGS = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.3, "warmup_ratio": 0.2, "patience": 100}


def few(phantoms):
    """Five batches of four an epoch, and what they are validated on."""
    return {"train": phantoms["train"].select(range(22)), "validation": phantoms["validation"].select(range(6))}


class Tuning:
    """A fine-tuning in a folder, whose state is saved after each update."""

    def __init__(self, folder, films, *, joint=None, save_minutes=0.0, **arguments):
        self.films, self.joint, self.arguments = films, joint, FineTuningArguments(**(SETTINGS | arguments))
        self.accelerator = accelerator(self.arguments.gradient_accumulation_steps)
        self.run = training_run(folder, self.accelerator, save_minutes=save_minutes)

    def train(self, model=None, interruption=None):
        """To the end, from the newest state if there is one."""
        fine_tune(
            model or tiny_model(dropout=0.3),
            self.films["train"],
            self.films["validation"],
            PROCESSOR,
            self.accelerator,
            self.arguments,
            run=self.run,
            interruption=interruption or deaf_interruption(),
            joint=self.joint,
            state=self.run.newest_state(),
        )
        return self

    @property
    def saved(self):
        """After how many steps a state was saved; `checkpoints.KEPT` says how many are kept."""
        return [int(file.name[:9]) for file in sorted(self.run.checkpoints.folder.glob("*.pt"))]

    def state(self, steps):
        (file,) = self.run.checkpoints.folder.glob(f"{steps:09d}-*.pt")
        return torch.load(file, weights_only=True)

    @property
    def log(self):
        return read_log(self.run.path)

    @property
    def evaluations(self):
        return [line for line in self.log if "after_steps" in line]


def forget_after(whole, steps, folder):
    """A copy of a run as if it had been killed just before the state after the next update was there."""
    shutil.copytree(whole.run.path, folder)
    for file in [*folder.glob("checkpoints/resume/*"), *folder.glob("checkpoints/evaluated/*")]:
        if int(file.name[:9]) > steps:
            file.unlink()
    return folder


def same(one, other):
    """Whether two states are the same to the bit, but for the seconds that they took."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
