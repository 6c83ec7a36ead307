"""What the benchmarks of speed share: ways that take turns, medians with their spread, and the machine by name."""

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def interleaved(ways: Mapping[str, Callable[..., Any]], repetitions: int, *given: Any) -> dict[str, np.ndarray]:
    """Seconds that each way took over what is `given`, (repetitions,).

    They take turns, so that other work on the machine slows all of them alike. A first turn of each warms up and is not
    counted."""
    for way in ways.values():
        way(*given)
    seconds = {name: np.zeros(repetitions) for name in ways}
    for repetition in range(repetitions):
        for name, way in ways.items():
            start = time.perf_counter()
            way(*given)
            wait_for_device()
            seconds[name][repetition] = time.perf_counter() - start
    return seconds


def wait_for_device() -> None:
    """Till a GPU has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def ratio(seconds: Mapping[str, np.ndarray], name: str, peer: str) -> str:
    """How many times as fast as its peer a way is, within each repetition."""
    return spread(seconds[peer] / seconds[name]) if peer in seconds else "peer not installed"


def spread(values: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def machine(*packages: str) -> str:
    """Processor, Python and those of `packages` that are there."""
    versions = [f"{name} {version(name)}" for name in packages if _is_installed(name)]
    return f"{_cpu_model()}; Python {platform.python_version()}, {', '.join(versions)}."


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
