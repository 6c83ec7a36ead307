"""What does each part of a training cost with ten times the films, with larger images, and with more processes?

python benchmarks/scaling.py recipes/configs/pneumonia.yaml [--section.field value ...]

Seconds of each part with a tenth of the films and with all of them; of the search for duplicates alone, with random
hashes; milliseconds an image at several sizes, in the precision of the hardware; and seconds of both phases, on drawn
films, with one process of one thread and with several. docs/scaling.md extrapolates from them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from timing import interleaved, machine, spread

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification
from cxr_backbone.data.audit import audit
from cxr_backbone.data.duplicates import group_duplicates
from cxr_backbone.data.labels import label_names
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import Arguments, parse_arguments
from cxr_backbone.training.batches import training_loader
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.films import decode_films, open_films
from cxr_backbone.training.hardware import choose_precision, inference_copy
from cxr_backbone.training.phases import fit_head
from cxr_backbone.training.start import start_model

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the recipe; one label a film")
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[150, 224, 299, 448])
    parser.add_argument("--hashes", type=int, default=200_000, help="films to search for duplicates")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--patients", type=int, default=1000, help="drawn, for the table of processes")
    given, others = parser.parse_known_args()
    arguments = parse_arguments([given.config, "--evaluation.report", "false", *others])
    accelerator = Accelerator(mixed_precision=choose_precision("auto"))
    print(f"{accelerator.mixed_precision}, {torch.get_num_threads()} threads.\n")
    print(f"{table_of_films(arguments, accelerator)}\n")
    print(f"{table_of_duplicates(given.hashes)}\n")
    print(f"{table_of_image_sizes(arguments, accelerator, given.image_sizes)}\n")
    print(f"{table_of_processes(given.processes, given.patients, arguments.model.depth_multiplier or 1.0)}\n")
    print(machine("torch", "accelerate", "datasets"))


def table_of_films(arguments: Arguments, accelerator: Accelerator) -> str:
    settings = {"image_size": arguments.model.image_size, "seed": 0}
    opened = open_films(arguments.data, **settings)
    assert isinstance(opened, DatasetDict), "expected data.streaming=false"
    tenth = DatasetDict({name: rows.shuffle(seed=0).select(range(len(rows) // 10)) for name, rows in opened.items()})
    columns = []
    for films in (tenth, opened):
        with tempfile.TemporaryDirectory() as folder:
            columns.append(seconds_of_parts(films, arguments, accelerator, Path(folder)))
    numbers = [f"{sum(map(len, films.values())):,} films, s" for films in (tenth, opened)]
    rows = [[part, *(f"{column[part]:.1f}" for column in columns)] for part in columns[0]]
    rows = [[*row, f"{columns[1][row[0]] / columns[0][row[0]]:.1f}"] for row in rows]
    return markdown_table(["part", *numbers, "times as long"], rows)


def seconds_of_parts(
    opened: DatasetDict, arguments: Arguments, accelerator: Accelerator, folder: Path
) -> dict[str, float]:
    seconds = {}

    def timed(part: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[part] = time.perf_counter() - start
        return result

    arguments.data.cache_dir = str(folder)
    settings = {"image_size": arguments.model.image_size, "seed": 0}
    films = timed("decode", lambda: decode_films(opened, arguments.data, **settings))
    timed("audit", lambda: audit(films.splits))
    model, image_processor = start_model(arguments.model, label_names(films.train.features), multi_label=False)
    model.to(accelerator.device, memory_format=torch.channels_last)

    def extract(rows: Dataset) -> Any:
        size = arguments.frozen.batch_size
        return extract_features(
            model.cxr_inception, rows, image_processor, accelerator, batch_size=size, cache_dir=folder
        )

    of_train = timed("features of train", lambda: extract(films.train))
    of_validation = extract(films.splits["validation"])
    timed("head", lambda: fit_head(model, [of_train], of_validation, arguments.frozen, lambda **line: None))
    loader = training_loader(films.train, arguments.fine_tuning.batch_size, accelerator, seed=0)
    timed("loading an epoch", lambda: [len(batch["label"]) for batch in loader])
    return seconds


def table_of_duplicates(films: int) -> str:
    random, rows = np.random.default_rng(0), []
    for number in (films // 10, films):
        hashes = [f"{value:016x}" for value in random.integers(0, 2**63, number)]
        thumbnails = random.integers(0, 256, (number, 16), dtype=np.uint8)
        start = time.perf_counter()
        group_duplicates([str(index) for index in range(number)], hashes, thumbnails)
        rows.append([f"{number:,}", f"{time.perf_counter() - start:.1f}"])
    return markdown_table(["films searched for duplicates", "s"], rows)


def table_of_image_sizes(arguments: Arguments, accelerator: Accelerator, sizes: list[int]) -> str:
    config = CXRInceptionConfig(depth_multiplier=arguments.model.depth_multiplier or 1.0)
    model = CXRInceptionForImageClassification(config).to(accelerator.device, memory_format=torch.channels_last)
    backbone, labels = inference_copy(model.cxr_inception, accelerator), torch.arange(BATCH_SIZE) % 2

    def train(images: torch.Tensor) -> None:
        with accelerator.autocast():
            loss = model(images, labels=labels).loss
        accelerator.backward(loss)

    @torch.inference_mode()
    def infer(images: torch.Tensor) -> None:
        backbone(images)

    rows = []
    for size in sizes:
        images = torch.rand(BATCH_SIZE, 1, size, size, device=accelerator.device)
        images = images.contiguous(memory_format=torch.channels_last)
        seconds = interleaved({"infer": infer, "train": train}, 3, images)
        rows.append([f"{size} x {size}", *(spread(values / BATCH_SIZE * 1000) for values in seconds.values())])
    return markdown_table(["image", "features, ms", "forward and backward, ms"], rows)


def table_of_processes(most: int, patients: int, depth_multiplier: float) -> str:
    """The recipe on drawn films; the same films a process and step."""
    rows = []
    for processes in (1, most):
        with tempfile.TemporaryDirectory() as folder:
            launch: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc_per_node", processes]
            options: list[Any] = ["--data.num_patients", patients, "--run.cpu_threads", 1, "--fine_tuning.epochs", 1]
            options += ["--model.depth_multiplier", depth_multiplier, "--model.image_size", 150]
            options += ["--fine_tuning.batch_size", BATCH_SIZE, "--evaluation.resamples", 100]
            options += ["--evaluation.report", "false", "--run.output_dir", folder + "/run"]
            recipe = [ROOT / "recipes/two_stage.py", ROOT / "recipes/configs/sample.yaml", *options]
            subprocess.run([*map(str, launch + recipe)], check=True, capture_output=True, cwd=ROOT)
            models = json.loads(Path(folder, "run/metrics.json").read_text())["models"]
        rows.append([str(processes), *(f"{models[phase]['seconds']:.1f}" for phase in ("frozen", "fine_tuned"))])
    return markdown_table(["processes of one thread", "phase one, s", "phase two, s"], rows)


if __name__ == "__main__":
    main()
