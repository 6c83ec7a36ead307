"""What a run ran with: enough to repeat it, and to tell whether a later process may go on with it."""

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

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


def describe_environment(accelerator: Accelerator, init: str | None) -> dict[str, Any]:
    """Command, versions, machine, and where the code and the initial weights come from.

    `git_commit` is that of the folder in which the recipe lies, with `-dirty` behind it if files differ from it; None
    if it lies in no repository. `initial_weights_sha256` is None for random weights and for those of the Hub.
    """
    script = Path(sys.argv[0])
    files = [Path(init), Path(init) / "model.safetensors"] if init else []  # a file or a checkpoint's folder
    weights = next((file for file in files if file.is_file()), None)
    return {
        "command": [script.name, *sys.argv[1:]],
        "git_commit": _git_commit(script.resolve().parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "initial_weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights else None,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What two nested dictionaries differ in: `section.field was 1 and is 2`, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        pairs = [(f"{name}.{key}".lstrip("."), before.get(key), now.get(key)) for key in keys]
        return [line for key, one, other in pairs for line in differences(one, other, key)]
    return [] if before == now else [f"{name} was {before!r} and is {now!r}"]


def _git_commit(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; Python knows the name elsewhere
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
