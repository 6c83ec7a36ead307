"""The two-stage recipe, started as a user starts it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Recipe:
    """The recipe with a cache and a run directory of its own, in a process, or in several that `torchrun` starts."""

    def __init__(self, folder, config, processes=1, **overrides):
        self.path = folder / "run"
        self.environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}
        overrides |= {"run.output_dir": [self.path], "run.mixed_precision": ["no"], "run.cpu_threads": [1]}
        self.argv = [config, *(word for name, values in overrides.items() for word in (f"--{name}", *values))]
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_cpu_threads_per_process", "1"]
        if processes > 1:  # which accelerate's launcher does not start on CPUs
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        self.command = [*launch, "recipes/two_stage.py", *self.argv]

    def start(self, output):
        """A launcher that runs until it has ended or is stopped; what it prints goes to the file `output`."""
        command = [sys.executable, *map(str, self.command)]
        with output.open("w") as file:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT)

    def python(self, *argv):
        command = [sys.executable, *map(str, argv)]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=600)

    def read(self, name):
        return json.loads((self.path / name).read_text())

    @property
    def log(self):
        return [json.loads(line) for line in (self.path / "log.jsonl").read_text().splitlines()]


class Run(Recipe):
    """A run from start to end."""

    def __init__(self, folder, config, processes=1, **overrides):
        super().__init__(folder, config, processes, **overrides)
        self.process = self.python(*self.command)
        assert self.process.returncode == 0, self.process.stderr


def sample_run(folder, **overrides):
    """The built-in sample, in half a minute."""
    tiny = {"data.num_patients": [40], "model.image_size": [75], "model.depth_multiplier": [0.1]}
    tiny |= {"fine_tuning.epochs": [1], "fine_tuning.batch_size": [8]}
    return Run(folder, "recipes/configs/sample.yaml", **(tiny | overrides))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
