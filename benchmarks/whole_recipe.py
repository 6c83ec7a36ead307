"""How long does the whole recipe take, beside the straightforward way to train the same network on the same films?

python benchmarks/whole_recipe.py recipes/configs/pneumonia.yaml [--frozen_epochs 10] [--section.field value ...]

The straightforward way decodes each film in every epoch, runs the frozen backbone in every epoch of phase one, and
computes in float32 with channels first. It has the recipe's epochs, batch size, augmentation, learning rates and
schedule, and looks at validation once an epoch. The recipe is run as a user runs it, in a process of its own, with the
audit, the evaluation and the package that it ends with; its seconds of training are its own report's. Ratios are of
whole wall times. One after the other: leave the machine alone meanwhile. Needs one label a film, two classes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sklearn.metrics import roc_auc_score
from timing import machine
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from cxr_backbone import CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.labels import label_names
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.augmentation import Augmentation
from cxr_backbone.training.films import open_films
from cxr_backbone.training.hardware import use_threads
from cxr_backbone.training.phases import parameter_groups
from cxr_backbone.training.start import start_model

RECIPE = Path(__file__).parents[1] / "recipes/two_stage.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the recipe")
    parser.add_argument("--frozen_epochs", type=int, default=10, help="of the straightforward way")
    given, others = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        # Films that are decoded already would be a head start, so the recipe gets a cache of its own.
        places = ["--run.output_dir", f"{folder}/run", "--data.cache_dir", f"{folder}/cache"]
        begin = time.perf_counter()
        subprocess.run([sys.executable, RECIPE, given.config, *others, *places], check=True)
        recipe = time.perf_counter() - begin
        measured = json.loads(Path(folder, "run/metrics.json").read_text())["models"]
    seconds = [measured[phase]["seconds"] for phase in ("frozen", "fine_tuned")]
    (of_validation,) = measured["fine_tuned"]["splits"]["validation"]["targets"].values()
    auroc = of_validation["figures"]["auroc"]["value"]

    plain_seconds, plain_auroc = straightforward(given.config, others, given.frozen_epochs)
    plain = sum(plain_seconds)
    header = ["way", "phase one, s", "phase two, s", "all, s", "times as fast", "AUROC, validation"]
    rows = [
        ["straightforward", *(f"{part:.0f}" for part in plain_seconds), f"{plain:.0f}", "1.0", f"{plain_auroc:.4f}"],
        ["the recipe", *(f"{part:.0f}" for part in seconds), f"{recipe:.0f}", f"{plain / recipe:.1f}", f"{auroc:.4f}"],
    ]
    print(f"\n{given.frozen_epochs} epochs of phase one, {torch.get_num_threads()} threads:\n")
    print(markdown_table(header, rows))
    print(
        f"\nTraining alone, {plain / sum(seconds):.1f} times as fast.\n{machine('torch', 'transformers', 'datasets')}"
    )


def straightforward(config: str, others: list[str], frozen_epochs: int) -> tuple[list[float], float]:
    """Seconds of the two phases, and the last AUROC on validation."""
    arguments = parse_arguments([config, "--evaluation.report", "false", *others])
    torch.manual_seed(arguments.run.seed)
    use_threads(arguments.run.cpu_threads)
    size, tuning = arguments.model.image_size, arguments.fine_tuning
    films = open_films(arguments.data, image_size=size, seed=arguments.run.seed)
    assert isinstance(films, dict), "expected data.streaming=false"
    train, validation = films["train"], films["validation"]
    model, image_processor = start_model(arguments.model, label_names(train.features), multi_label=False)
    augmentation, seconds = Augmentation(tuning.augmentation, stretch=tuning.stretch), []
    for frozen in (True, False):
        begin = time.perf_counter()
        if frozen:
            model.freeze_backbone()
            optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
        else:
            model.unfreeze_backbone()
            optimizer = torch.optim.AdamW(parameter_groups(model, tuning))
        epochs = frozen_epochs if frozen else tuning.epochs
        steps = epochs * (len(train) // tuning.batch_size)
        scheduler = get_cosine_schedule_with_warmup(optimizer, round(tuning.warmup_ratio * steps), steps)
        for epoch in range(epochs):
            model.train()
            for number, (images, labels) in enumerate(batches(train, size, tuning.batch_size, shuffle=True)):
                if not frozen:
                    images = augmentation(images, seed=epoch * steps + number)
                loss = model(normalised(images, image_processor), labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), tuning.max_grad_norm)
                optimizer.step()
                scheduler.step()
            auroc = auroc_of(model, validation, image_processor, size)
            print(f"straightforward: frozen {frozen}, epoch {epoch + 1}, validation AUROC {auroc:.4f}", flush=True)
        seconds.append(time.perf_counter() - begin)
    return seconds, auroc


@torch.no_grad()
def auroc_of(
    model: CXRInceptionForImageClassification, films: Dataset, image_processor: CXRInceptionImageProcessor, size: int
) -> float:
    model.eval()
    scores: list[Tensor] = []
    for images, _ in batches(films, size, 32, shuffle=False):
        logits = model(normalised(images, image_processor)).logits
        scores.append(logits[:, 1] - logits[:, 0])
    return roc_auc_score(films["label"][:], torch.cat(scores))


def batches(films: Dataset, size: int, batch_size: int, *, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [0, 1] (batch, 1, size, size), decoded from their files now, and labels (batch,)."""

    def collate(rows: list[dict]) -> tuple[Tensor, Tensor]:
        squares = [row["image"].convert("L").resize((size, size), Image.Resampling.BILINEAR) for row in rows]
        pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).unsqueeze(1)
        return pixels.float() / 255, torch.tensor([row["label"] for row in rows])

    rows = films.select_columns(["image", "label"])
    loader: DataLoader = DataLoader(rows, batch_size, shuffle=shuffle, drop_last=shuffle, collate_fn=collate)
    return iter(loader)


def normalised(images: Tensor, image_processor: CXRInceptionImageProcessor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (images - mean) / std


if __name__ == "__main__":
    main()
