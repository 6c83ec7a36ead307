"""The run directory: everything that a run did, in one place."""

import importlib.metadata
import json
import logging
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from datasets import DatasetDict

from cxr_backbone.training.arguments import Arguments

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
)


class RunDirectory:
    """A new directory with

    config.yaml (resolved), environment.json, split.json (patient ids a split), log.jsonl (a line a step and a line an
    evaluation), frozen/ and fine_tuned/ (the two models; the pipeline opens either), metrics.json.

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
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    def start(self, arguments: Arguments, data: DatasetDict, accelerator: Accelerator) -> None:
        """Write what is known before training."""
        if not accelerator.is_main_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(yaml.safe_dump(asdict(arguments), sort_keys=False))
        patients = {split: sorted(set(rows["patient_id"])) for split, rows in data.items()}
        self.write_json(self.path / "split.json", patients)
        self.write_json(self.path / "environment.json", _environment(accelerator))

    def log(self, **values: Any) -> None:
        """Add a line to log.jsonl; what holds a validation loss is shown as well."""
        if "validation_loss" in values:
            shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
            logger.info("  ".join(f"{name}={value}" for name, value in shown.items()))
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    @staticmethod
    def write_json(path: Path, content: Any) -> None:
        path.write_text(json.dumps(content, indent=2) + "\n")


def _environment(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
