"""Two nodes: a launcher on each, with the configs of recipes/configs/accelerate/, and a run directory that both see."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType
from running import ROOT, free_port

CONFIGS = ROOT / "recipes/configs/accelerate"
PATIENCE = 120  # seconds, after which a test fails that would wait for ever


class Nodes:
    """Two network namespaces with a cable between them; where the machine permits none, two launchers on one address.

    `apart` says which; `refusal` is what the machine said.
    """

    def __init__(self):
        self.names = [f"cxr-backbone-{os.getpid()}-{rank}" for rank in range(2)]
        self.refusal = self._lay_cable()
        self.apart = not self.refusal
        self.address = "192.0.2.1" if self.apart else "127.0.0.1"
        self.port = None if self.apart else free_port()

    def _lay_cable(self):
        first, second = self.names
        commands = [f"netns add {first}", f"netns add {second}"]
        commands += [f"link add cable netns {first} type veth peer name cable netns {second}"]
        for number, name in enumerate(self.names, start=1):
            commands += [f"-n {name} addr add 192.0.2.{number}/24 dev cable", f"-n {name} link set cable up"]
            commands += [f"-n {name} link set lo up"]
        if shutil.which("ip") is None:
            return "there is no program `ip`"
        for command in commands:
            process = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if process.returncode:
                self.remove()
                return process.stderr.strip()
        return ""

    def on(self, rank, *command):
        """The command, to be run on a node."""
        return ["ip", "netns", "exec", self.names[rank], *command] if self.apart else list(command)

    def launch(self, rank, folder, *argv):
        """Start the recipe on a node; what it prints is in the folder's file `node <rank>`."""
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", CONFIGS / "two_nodes.yaml", "--num_processes", "2"]  # one on each node
        command += ["--machine_rank", rank, "--main_process_ip", self.address]
        command += ["--main_process_port", self.port] if self.port else []
        environment = os.environ | {"HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": "cable"} if self.apart else {}
        with (folder / f"node {rank}").open("w") as output:
            return subprocess.Popen(
                self.on(rank, *map(str, command), "recipes/two_stage.py", *argv),
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture(scope="module")
def nodes():
    nodes = Nodes()
    yield nodes
    if nodes.apart:
        nodes.remove()


@pytest.fixture(scope="module")
def run(nodes, tmp_path_factory):
    """A run in whose fine-tuning node 1 is switched off, and which the same commands then take up.

    `before` and `after` have the status and the output of each node.
    """
    folder = tmp_path_factory.mktemp("two nodes")
    argv = ["recipes/configs/sample.yaml", "--run.output_dir", str(folder / "run"), "--run.mixed_precision", "no"]
    argv += ["--run.cpu_threads", "1", "--data.num_patients", "40", "--model.image_size", "75"]
    argv += ["--model.depth_multiplier", "0.1", "--fine_tuning.batch_size", "8", "--fine_tuning.epochs", "8"]
    argv += ["--evaluation.report", "false", "--evaluation.resamples", "100"]
    run = {"path": folder / "run"}
    for attempt in ("before", "after"):
        launchers = [nodes.launch(rank, folder, *argv) for rank in range(2)]
        try:
            if attempt == "before":
                _wait_for(lambda: any("step" in line for line in _log(folder / "run")), launchers)
                _kill_with_children(launchers[1])
            statuses = [launcher.wait(timeout=PATIENCE) for launcher in launchers]
        finally:
            for launcher in launchers:
                _kill_with_children(launcher)
        run[attempt] = [(status, (folder / f"node {rank}").read_text()) for rank, status in enumerate(statuses)]
    return run


def test_each_node_has_a_network_of_its_own(nodes):
    if not nodes.apart:
        pytest.skip(f"the nodes are two launchers on one address: {nodes.refusal}")
    ask = ["readlink", "/proc/self/ns/net"]
    networks = [subprocess.check_output(command) for command in (ask, nodes.on(0, *ask), nodes.on(1, *ask))]
    assert len(set(networks)) == 3


def test_a_node_that_dies_ends_the_other_which_says_why(run):
    (status, output), (killed, _) = run["before"]
    assert killed == -signal.SIGKILL
    assert status not in (0, -signal.SIGKILL)  # by itself
    assert re.search("Connection (closed|reset) by peer|Broken pipe", output)
    assert "recipes/two_stage.py FAILED" in output


def test_the_same_commands_go_on_and_make_one_run(run):
    assert [status for status, _ in run["after"]] == [0, 0], run["after"]
    assert "Going on after" in run["after"][0][1]
    assert json.loads((run["path"] / "environment.json").read_text())["processes"] == 2
    assert (run["path"] / "metrics.json").is_file()
    assert (run["path"] / "fine_tuned/model.safetensors").is_file()


def test_only_the_main_process_writes_and_speaks(run):
    steps = [line["step"] for line in _log(run["path"]) if "step" in line]
    assert steps == list(range(len(steps)))  # each once
    (_, first), (_, second) = run["after"]
    assert "auroc" in first and "auroc" not in second


@pytest.mark.parametrize(("name", "kind", "machines", "processes"), [
    ("one_gpu", DistributedType.NO, 1, 1),
    ("eight_gpus", DistributedType.MULTI_GPU, 1, 8),
    ("two_nodes", DistributedType.MULTI_GPU, 2, 16),
])  # fmt: skip
def test_accelerate_reads_each_config(name, kind, machines, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.mixed_precision is None  # run.mixed_precision decides


def test_every_config_is_tested_and_explained():
    names = {path.name for path in CONFIGS.iterdir()}
    assert names == {"one_gpu.yaml", "eight_gpus.yaml", "two_nodes.yaml", "slurm.sh"}
    page = (ROOT / "docs/scaling.md").read_text()
    assert all(f"recipes/configs/accelerate/{name}" in page for name in names)


# What SLURM's commands do, as far as the script goes: `srun` starts a task on each of two nodes, `scancel` signals the
# tasks and nothing that they started.
SLURM = {
    "srun": """while [ "${1#--}" != "$1" ]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >> tasks; done
        status=0; for task in $(cat tasks); do wait $task || status=$?; done; exit $status""",
    "scontrol": """case "$1 $2" in
        "show hostnames") printf 'node-a\\nnode-b\\n';;
        *) echo "$@" > requeued;;
        esac""",
    "scancel": """echo "$@" > cancelled; kill -TERM $(cat tasks)""",
    "accelerate": """[ "$1" = launch ] && [ -f "$3" ] || exit 2
        trap 'echo saved > saved-$SLURM_NODEID; exit 1' TERM
        echo "$@" > unfinished-$SLURM_NODEID; mv unfinished-$SLURM_NODEID started-$SLURM_NODEID
        [ ! -f endless ] || while :; do sleep 0.05; done""",
}


class Cluster:
    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "recipes").symlink_to(ROOT / "recipes")
        for name, text in SLURM.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / "bin" / name).chmod(stat.S_IRWXU)

    def submit(self, *argv):
        given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2"}
        given |= {"SLURM_GPUS_PER_NODE": "h100:8", "SLURM_CPUS_PER_TASK": "32"}
        environment = os.environ | given | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", CONFIGS / "slurm.sh", *argv], cwd=self.folder, env=environment)

    def started(self):
        files = [self.folder / f"started-{node}" for node in range(2)]
        return [file.read_text().split() for file in files if file.is_file()]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_the_job_starts_a_launcher_on_each_node(cluster):
    assert cluster.submit("config.yaml", "--data.source", "a folder").wait(PATIENCE) == 0
    commands = [" ".join(command) for command in cluster.started()]
    for rank, command in enumerate(commands):
        assert command.startswith("launch --config_file recipes/configs/accelerate/two_nodes.yaml")
        assert f"--num_machines 2 --num_processes 16 --machine_rank {rank} --main_process_ip node-a" in command
        assert command.endswith("recipes/two_stage.py config.yaml --data.source a folder")
    assert len(commands) == 2 and not (cluster.folder / "requeued").exists()


def test_a_job_that_is_stopped_passes_it_on_and_is_queued_again(cluster):
    (cluster.folder / "endless").touch()
    job = cluster.submit("config.yaml")
    _wait_for(lambda: len(cluster.started()) == 2, [job])
    job.terminate()
    assert job.wait(PATIENCE) == 1
    assert (cluster.folder / "saved-0").is_file() and (cluster.folder / "saved-1").is_file()
    assert (cluster.folder / "cancelled").read_text() == "--signal=TERM 7\n"
    assert (cluster.folder / "requeued").read_text() == "requeue 7\n"


def _log(run):
    """The lines of a run's log that are whole."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _wait_for(condition, processes):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def _kill_with_children(process):
    """As a power cut would; of one that has ended there is nothing to kill."""
    if process.poll() is not None:
        return
    family = [process.pid]
    for parent in family:
        for task in Path(f"/proc/{parent}/task").iterdir():
            family += map(int, (task / "children").read_text().split())
    for member in family:
        os.kill(member, signal.SIGKILL)
    process.wait()
