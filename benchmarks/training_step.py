"""How long does a training step take? The recipe's own, loader and augmentation included, beside others' bare networks.

python benchmarks/training_step.py [--image_size 299] [--batch_size 16] [--repetitions 5] [--threads 1]

Ours is a step of `training.loop.Trainer`: a batch from the loader, forward and backward pass, clipping, AdamW and the
moving average of the weights; without augmentation, and with it. The others get a batch that is ready, and make a
forward and a backward pass and a step of AdamW. Ratios are to torchvision's network in float32, as most examples train
it, within one repetition.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from timing import interleaved, machine, ratio, spread, wait_for_device
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.batches import Batch
from cxr_backbone.training.films import decode_films, open_films
from cxr_backbone.training.hardware import choose_precision
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.loop import Trainer
from cxr_backbone.training.phases import make_optimizer
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import TrainingRun

ROOT = Path(__file__).parents[1]
PEER = "torchvision, float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=299)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth_multiplier", type=float, default=1.0, help="a narrower network, to try the script out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    precision = choose_precision("auto")
    accelerator = Accelerator(mixed_precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for name, strength in (("without augmentation", 0.0), ("augmented", 1.0)):
            trainer = make_trainer(given, strength, accelerator, Path(folder) / name)
            steps[f"the recipe's step, {precision}, {name}"] = RecipeSteps(trainer)
        peers = peer_steps(accelerator.device, given.batch_size, given.image_size)
        ours = {name: recipe_steps.make for name, recipe_steps in steps.items()}
        seconds = interleaved(peers | ours, given.repetitions)

    rows = [[name, spread(seconds[name] / given.batch_size * 1000), ratio(seconds, name, PEER)] for name in seconds]
    print(f"{given.image_size} x {given.image_size} pixels, batches of {given.batch_size}, {given.threads} thread(s), ")
    print(f"on {accelerator.device}; median (interquartile range) of {given.repetitions} repetitions:\n")
    print(markdown_table(["step", "ms an image", "times as fast"], rows))
    waiting, total = (
        sum(values) for values in zip(*[(step.waiting, step.total) for step in steps.values()], strict=True)
    )
    print(f"\nOf the recipe's time, {waiting / total:.2%} is waiting for the loader.")
    print(machine("torch", "accelerate", "kornia", "torchvision", "timm"))


class RecipeSteps:
    """Steps of a trainer, epoch after epoch, and the time that they wait for a batch."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.waiting, self.total = trainer, 0.0, 0.0
        self.batches = self._batches()
        trainer.model.train()

    def make(self) -> None:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waiting += time.perf_counter() - start
        self.trainer._step(batch)
        wait_for_device()
        self.total += time.perf_counter() - start

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self.trainer.loader


def make_trainer(given: argparse.Namespace, strength: float, accelerator: Accelerator, folder: Path) -> Trainer:
    options = {
        "run.output_dir": folder,
        "run.save_minutes": 1000,
        "data.num_patients": 12 * given.batch_size,
        "model.image_size": given.image_size,
        "model.depth_multiplier": given.depth_multiplier,
        "fine_tuning.batch_size": given.batch_size,
        "fine_tuning.augmentation": strength,
        "evaluation.report": "false",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    arguments = parse_arguments([str(ROOT / "recipes/configs/sample.yaml"), *words])
    settings = {"image_size": given.image_size, "seed": 0}
    films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    model, image_processor = start_model(arguments.model, ["NORMAL", "OPACITY"], multi_label=False)
    model.to(accelerator.device, memory_format=torch.channels_last)
    run = TrainingRun(arguments)
    run.accelerator = accelerator
    run.claim()
    optimizer = make_optimizer(model, arguments.fine_tuning, accelerator)
    return Trainer(
        model,
        films.train,
        films.splits["validation"],
        image_processor,
        accelerator,
        arguments.fine_tuning,
        optimizer,
        lambda updates: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        run=run,
        interruption=Interruption(),
    )


def peer_steps(device: torch.device, batch_size: int, image_size: int) -> dict[str, Callable[[], None]]:
    """Of the peers that are installed."""
    images = torch.rand(batch_size, 3, image_size, image_size, device=device)
    labels = torch.arange(batch_size, device=device) % 2
    steps = {}
    if find_spec("torchvision"):
        from torchvision.models import inception_v3

        for name, memory_format in ((PEER, torch.contiguous_format), ("channels last", torch.channels_last)):
            network = inception_v3(weights=None, aux_logits=False, num_classes=2, init_weights=False).to(device)
            name = name if name == PEER else f"{PEER}, {name}"
            steps[name] = plain_step(network.to(memory_format=memory_format), images, labels, memory_format)
    if find_spec("timm"):
        import timm

        network = timm.create_model("inception_v3", num_classes=2).to(device)
        steps["timm, float32"] = plain_step(network, images, labels, torch.contiguous_format)
    return steps


def plain_step(
    network: nn.Module, images: Tensor, labels: Tensor, memory_format: torch.memory_format
) -> Callable[[], None]:
    images, optimizer = images.contiguous(memory_format=memory_format), torch.optim.AdamW(network.parameters())
    network.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
