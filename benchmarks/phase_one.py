"""How long does phase one take when the backbone runs once, and when it runs every epoch? And what does bf16 change?

python benchmarks/phase_one.py recipes/configs/pneumonia.yaml [--epochs 10] [--films 1000] [--section.field value ...]

The slow way runs the frozen backbone over train and validation in every epoch and trains the head by AdamW, at the same
precision and batch size; the quick way is the recipe's. Both on --films of train. Then the head is fitted to features
of all films, extracted in float32 and in the precision of the hardware, and the AUROC on validation is compared.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from timing import machine
from torch.utils.data import DataLoader

from cxr_backbone import CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.labels import label_names
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.batches import _collate, run_through, to_images, to_pixel_values
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.films import decode_films, open_films
from cxr_backbone.training.hardware import choose_precision
from cxr_backbone.training.loop import predict
from cxr_backbone.training.phases import fit_head
from cxr_backbone.training.start import start_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the recipe; one label a film")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--films", type=int, default=1000)
    given, others = parser.parse_known_args()
    arguments = parse_arguments([given.config, "--evaluation.report", "false", *others])
    settings = {"image_size": arguments.model.image_size, "seed": 0}
    films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    assert isinstance(films.train, Dataset), "expected data.streaming=false"
    validation, few = films.splits["validation"], films.train.shuffle(seed=0)
    few = few.select(range(min(given.films, len(few))))
    start, image_processor = start_model(arguments.model, label_names(few.features), multi_label=False)
    start.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    batch_size, precision = arguments.frozen.batch_size, choose_precision("auto")

    def quick_way(model: CXRInceptionForImageClassification, train: Dataset, precision: str) -> None:
        accelerator = accelerator_of(precision)
        with tempfile.TemporaryDirectory() as folder:
            place = {"batch_size": batch_size, "cache_dir": Path(folder)}
            of_train, of_validation = (
                extract_features(model.cxr_inception, rows, image_processor, accelerator, **place)  # type: ignore[arg-type]
                for rows in (train, validation)
            )
            fit_head(model, [of_train], of_validation, arguments.frozen, lambda **line: None)

    seconds, models = {}, {name: copy.deepcopy(start) for name in ("quick", "slow", "no", precision)}
    begin = time.perf_counter()
    quick_way(models["quick"], few, precision)
    seconds["quick"] = time.perf_counter() - begin
    begin = time.perf_counter()
    slow_way(models["slow"], few, validation, image_processor, accelerator_of(precision), given.epochs, batch_size)
    seconds["slow"] = time.perf_counter() - begin
    header = ["way", f"seconds, {len(few):,} + {len(validation):,} films", "times as fast", "AUROC, validation"]
    rows = [
        [text, f"{took:.1f}", f"{seconds['slow'] / took:.1f}", auroc(models[name], validation, image_processor)]
        for (name, took), text in zip(
            seconds.items(),
            ("backbone once", f"backbone in each of {given.epochs} epochs"),
            strict=True,
        )
    ]
    print(f"\n{precision}, batches of {batch_size}, {torch.get_num_threads()} threads:\n")
    print(markdown_table(header, rows))

    rows = []
    for name in dict.fromkeys(("no", precision)):
        quick_way(models[name], films.train, name)
        rows.append([name, auroc(models[name], validation, image_processor)])
    print(f"\nHead fitted to features of all {len(films.train):,} films:\n")
    print(markdown_table(["precision of the features", "AUROC, validation"], rows))
    print(f"\n{machine('torch', 'accelerate')}")


def slow_way(
    model: CXRInceptionForImageClassification,
    films: Dataset,
    validation: Dataset,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    epochs: int,
    batch_size: int,
) -> None:
    model.freeze_backbone()
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
    rows = films.select_columns(["pixels", "label"])
    loader: DataLoader = DataLoader(rows, batch_size=batch_size, shuffle=True, collate_fn=_collate)
    for _ in range(epochs):
        model.train()
        for batch in loader:
            with accelerator.autocast():
                loss = model(to_pixel_values(to_images(batch["pixels"]), image_processor), labels=batch["label"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        run_through(
            lambda pixel_values: model(pixel_values).logits,
            validation,
            image_processor,
            accelerator,
            batch_size=batch_size,
            desc="validation",
        )


def auroc(
    model: CXRInceptionForImageClassification, films: Dataset, image_processor: CXRInceptionImageProcessor
) -> str:
    """Asked in float32, whatever it was trained in."""
    logits, labels = predict(model, films, image_processor, accelerator_of("no"), batch_size=32)
    return f"{roc_auc_score(labels, logits[:, 1] - logits[:, 0]):.5f}"


def accelerator_of(precision: str) -> Accelerator:
    """On the CPU; Accelerate holds one precision a process, so the one before is forgotten."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision)


if __name__ == "__main__":
    main()
