"""The run directory: everything that a run did, in one place."""

import csv
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from cxr_backbone.data.audit_page import write_audit_page
from cxr_backbone.data.splits import write_split
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.training.arguments import Arguments
from cxr_backbone.training.films import Films

logger = logging.getLogger(__name__)

PACKAGES = (
    "cxr-backbone",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "scikit-learn",
    "kornia",
    "numpy",
    "pillow",
    "imagehash",
    "pydicom",
    "pylibjpeg-libjpeg",
)


class RunDirectory:
    """A new directory with

    config.yaml (resolved), external.yaml (names the films of another source, if there are any), environment.json,
    split.csv (which film is on which side; `data.split_file` of another run takes it), audit.json and audit.html (what
    the data told on themselves), unreadable.csv (films that were skipped, if any), log.jsonl (a line a step and a line
    an evaluation), frozen/ and fine_tuned/ (the two models; the pipeline opens either), metrics.json, predictions/
    (Parquet, a file for each model and split), report.html, films.png, figures/, and hub/ (what can be published).
    Until the test split is opened, checkpoints/ has the weights of each evaluation.

    Raises:
        ValueError: if the directory already holds files; a run never overwrites another.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"run.output_dir={str(path)!r} already holds files; choose a new directory for this run.")

    @property
    def frozen(self) -> Path:
        return self.path / "frozen"

    @property
    def fine_tuned(self) -> Path:
        return self.path / "fine_tuned"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def start(self, arguments: Arguments, films: Films, report: dict[str, Any], accelerator: Accelerator) -> None:
        """Write what is known before training; `report` is the audit of the films."""
        if not accelerator.is_main_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(asdict(arguments), sort_keys=False))
        if arguments.evaluation.external:
            shutil.copyfile(arguments.evaluation.external, self.path / "external.yaml")
        write_split(films.splits, self.path / "split.csv")
        self.write_audit(films, report)
        self.write_json(self.path / "environment.json", _environment(accelerator, arguments.model.init))

    def write_audit(self, films: Films, report: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json(self.path / "audit.json", report)
        write_audit_page(report, films.splits, self.path / "audit.html")
        if films.unreadable:
            with (self.path / "unreadable.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("path", "reason"), *films.unreadable.items()])

    def write_results(self, metrics: dict[str, Any], predictions: Mapping[str, Mapping[str, Predictions]]) -> None:
        """metrics.json, and predictions/<model> <split>.parquet."""
        (self.path / "predictions").mkdir(parents=True, exist_ok=True)
        for model, splits in predictions.items():
            for split, said in splits.items():
                said.write(self.path / "predictions" / f"{model} {split}.parquet")
        text = json.dumps(metrics, indent=2, allow_nan=False)  # what is not defined is null, with a reason
        (self.path / "metrics.json").write_text(text + "\n")

    def keep_checkpoint(self, model: nn.Module, steps: int) -> None:
        """Keep the weights after so many steps, for the losses of each checkpoint in the end."""
        self.checkpoints.mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, self.checkpoints / f"{steps:09d}.safetensors")

    def log(self, **values: Any) -> None:
        """Add a line to log.jsonl; what holds a validation loss is shown as well."""
        if "validation_loss" in values:
            shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
            logger.info("  ".join(f"{name}={value}" for name, value in shown.items()))
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        return read_log(self.path)

    @staticmethod
    def write_json(path: Path, content: Any) -> None:
        path.write_text(json.dumps(content, indent=2) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, oldest first; none if there is no such file."""
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a run that was stopped may have begun another


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra
        return None


def _environment(accelerator: Accelerator, init: str | None) -> dict[str, Any]:
    files = [Path(init), Path(init) / "model.safetensors"] if init else []  # a file or a checkpoint's folder
    weights = next((file for file in files if file.is_file()), None)  # None: random, or from the Hub
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "initial_weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights else None,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; Python knows the name elsewhere
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
