"""The run directory: everything that a run did, in one place."""

import csv
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import nn

from cxr_backbone.data.audit_page import write_audit_page
from cxr_backbone.data.splits import write_split
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import Arguments
from cxr_backbone.training.atomic import naming, remove, replacing, to_disk
from cxr_backbone.training.checkpoints import Checkpoints
from cxr_backbone.training.environment import describe_environment, differences
from cxr_backbone.training.films import Films

logger = logging.getLogger(__name__)

LOCK_SECONDS = 10  # that a run directory may stay locked by the workers of a process that was killed


class RunDirectory:
    """A new directory with

    config.yaml (resolved), external.yaml and joint.yaml (name films of other sources, if there are any),
    environment.json, split.csv (which film is on which side; `data.split_file` of another run takes it), joint.csv (the
    films of joint training), audit.json and audit.html (what
    the data told on themselves), unreadable.csv (films that were skipped, if any), metrics.json, predictions/
    (Parquet, a file for each model and split), report.html, films.png and figures/.

    Raises:
        ValueError: if the directory already holds files; a run never overwrites another.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"run.output_dir={str(path)!r} already holds files; choose a new directory for this run.")

    def start(self, arguments: Arguments, films: Films, report: dict[str, Any], accelerator: Accelerator) -> None:
        """Write what is known before training; `report` is the audit of the films."""
        if not accelerator.is_main_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for name, about in (("external", arguments.evaluation.external), ("joint", arguments.joint.films)):
            if about:
                shutil.copyfile(about, self.path / f"{name}.yaml")
        for name, listed in _listings(films).items():
            write_split(listed, self.path / name)
        self.write_audit(films, report)
        self.write_json("environment.json", describe_environment(accelerator, arguments.model.init))
        with replacing(self.path / "config.yaml") as file:  # the last: where it is, the others are
            file.write_text(yaml.safe_dump(asdict(arguments), sort_keys=False))

    def write_audit(self, films: Films, report: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("audit.json", report)
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
        self.write_json("metrics.json", metrics)

    def write_json(self, name: str, content: Any) -> None:
        with replacing(self.path / name) as file:
            text = json.dumps(content, indent=2, allow_nan=False)  # what is not defined is null, with a reason
            file.write_text(text + "\n")


class TrainingRun(RunDirectory):
    """The run directory of a training. It is one run: a process that was stopped is followed by one that goes on.

    It also has run.lock, log.jsonl (a line a step and a line an evaluation), frozen/ and fine_tuned/ (the two models;
    the pipeline opens either), nonfinite/ (which films were in a batch whose loss was no number, if one was), features/
    (of the frozen backbone) and hub/ (what can be published). Until the run is complete, checkpoints/ has the weights
    of each evaluation (evaluated/) and the last states of the training (resume/, see `Checkpoints`).

    Raises:
        ValueError: the directory holds something else, a run with other settings, or one that a process is at work on.
    """

    def __init__(self, arguments: Arguments):
        self.path, self.arguments = Path(arguments.run.output_dir), arguments
        self.checkpoints = Checkpoints(self.path / "checkpoints" / "resume")
        self.evaluated = self.path / "checkpoints" / "evaluated"
        self.seconds: dict[str, float] = {}  # that each phase took, stops left out
        self._timed: tuple[str, float] | None = None
        self._lock = FileLock(self.path / "run.lock", timeout=LOCK_SECONDS)
        if (self.path / "run.lock").is_file():
            self._check_settings()
        else:
            super().__init__(arguments.run.output_dir)

    @property
    def frozen(self) -> Path:
        return self.path / "frozen"

    @property
    def fine_tuned(self) -> Path:
        return self.path / "fine_tuned"

    @property
    def is_complete(self) -> bool:
        return (self.path / "metrics.json").is_file() and not self.evaluated.parent.exists()

    def claim(self) -> None:
        """Let no other process write here while this one lives.

        Raises:
            ValueError: another one does already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another process is at work on {self.path}; wait until it ends, or choose another run.output_dir."
            ) from None

    def start(self, arguments: Arguments, films: Films, report: dict[str, Any], accelerator: Accelerator) -> None:
        """Claim the directory and write what is known before training; or, of a run that goes on, see that films and
        machine are still the same.

        Raises:
            ValueError: as `claim`; other films, initial weights or another number of processes.
        """
        self.accelerator = accelerator
        if not accelerator.is_main_process:
            return
        self.claim()
        if (self.path / "config.yaml").is_file():
            self._check_settings()
            self._check_films(films)
            self._check_environment(describe_environment(accelerator, arguments.model.init))
        else:
            super().start(arguments, films, report, accelerator)

    def newest_state(self) -> dict[str, Any] | None:
        """The state to go on from, the same on all processes; None at the start. The log goes back to that moment."""
        state = None
        if self.accelerator.is_main_process:
            log = self.path / "log.jsonl"
            if state := self.checkpoints.newest():
                os.truncate(log, state["log_bytes"])
                logger.info("Going on after %d steps of fine-tuning.", state["progress"]["steps"])
            else:
                log.unlink(missing_ok=True)
        (state,) = broadcast_object_list([state])
        self.seconds = dict(state["seconds"]) if state else {}
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep what the training can go on from; `state["progress"]["steps"]` says how far it is."""
        self._tick()
        if self.accelerator.is_main_process:
            log = self.path / "log.jsonl"
            log.touch()
            to_disk(log)  # it must not be shorter than the state says
            state |= {"log_bytes": log.stat().st_size, "seconds": dict(self.seconds)}
            self.checkpoints.save(state, state["progress"]["steps"])

    def save_evaluated(self, model: nn.Module, steps: int) -> None:
        """Keep the weights of an evaluation, for the choice among them and their losses in the end."""
        if self.accelerator.is_main_process:
            tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            with replacing(self.evaluated / f"{steps:09d}.safetensors") as file:
                save_file(tensors, file)

    def save_model(
        self, folder: Path, model: CXRInceptionForImageClassification, image_processor: CXRInceptionImageProcessor
    ) -> None:
        if self.accelerator.is_main_process:
            save_model(folder, model, image_processor)

    def note_nonfinite(self, step: int, content: dict[str, Any]) -> Path:
        """Keep what is known of a batch whose loss or gradient is no number; returns where."""
        path = self.path / "nonfinite" / f"{step:09d}.json"
        if self.accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            self.write_json(f"nonfinite/{path.name}", content)
        return path

    def warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)

    def log(self, **values: Any) -> None:
        """Add a line to log.jsonl, with null for NaN and infinities, and its numbers to the tracker; what holds a
        validation loss is shown as well."""
        numbers = {f"{values['phase']}/{name}": value for name, value in values.items() if isinstance(value, float)}
        values = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        self.accelerator.log(numbers, step=values.get("step", values.get("after_steps")))
        if not self.accelerator.is_main_process:
            return
        if "validation_loss" in values:
            shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
            logger.info("  ".join(f"{name}={value}" for name, value in shown.items()))
        with naming(self.path / "log.jsonl"), (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block to those of a phase."""
        self._timed = (phase, time.perf_counter())
        yield
        self._tick()
        self._timed = None

    def complete(self) -> None:
        """Remove the checkpoints: there is nothing left to go on with."""
        finished = self.path / "checkpoints.old"
        self.evaluated.parent.rename(finished)  # at once; half of them would be half a run
        remove(finished)

    def _tick(self) -> None:
        if self._timed:
            phase, since = self._timed
            self._timed = (phase, time.perf_counter())
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._timed[1] - since

    def _check_settings(self) -> None:
        config = self.path / "config.yaml"
        if not config.is_file():  # it was stopped before it began
            return
        before, now = yaml.safe_load(config.read_text()), asdict(self.arguments)
        del before["run"]["output_dir"], now["run"]["output_dir"]  # a folder may be moved
        if changed := differences(before, now):
            raise ValueError(
                f"{self.path} is a run with other settings: {'; '.join(changed)}. Expected the settings it was "
                "started with, or a new run.output_dir."
            )

    def _check_films(self, films: Films) -> None:
        for name, listed in _listings(films).items():
            with tempfile.TemporaryDirectory() as folder:
                write_split(listed, Path(folder) / name)
                now = (Path(folder) / name).read_text().splitlines()
            before = (self.path / name).read_text().splitlines()
            if before != now:
                changed = len(set(before) ^ set(now)) or "the order of the"
                source = {"split.csv": "data.source", "joint.csv": "joint.films"}[name]
                raise ValueError(
                    f"{source} has other films than when {self.path} was started: {changed} lines of its {name} "
                    "differ. Expected the same films, or a new run.output_dir."
                )

    def _check_environment(self, now: dict[str, Any]) -> None:
        before = json.loads((self.path / "environment.json").read_text())
        resumed = before.pop("resumed", [])
        for name in ("initial_weights_sha256", "processes"):
            if changed := differences(before[name], now[name], name):
                raise ValueError(f"{self.path} can't go on: {changed[0]}. Expected the same, or a new run.output_dir.")
        now["command"] = before["command"]
        if changed := differences(before, now):
            logger.warning("Going on where some things changed, so not to the bit: %s.", "; ".join(changed))
            self.write_json("environment.json", before | {"resumed": [*resumed, changed]})


def _listings(films: Films) -> dict[str, DatasetDict]:
    """What the files of a run that list its films hold."""
    listings = {"split.csv": films.splits}
    if films.joint and films.joint.others is not None:
        listings["joint.csv"] = DatasetDict(joint=films.joint.others)
    return listings


def save_model(
    folder: Path, model: CXRInceptionForImageClassification, image_processor: CXRInceptionImageProcessor
) -> None:
    """A folder that the pipeline opens, in the place of what was there."""
    with replacing(folder) as place:
        model.save_pretrained(place)
        image_processor.save_pretrained(place)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, oldest first; none if there is no such file."""
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a run that was stopped may have begun another
