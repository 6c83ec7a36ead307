"""What docs/data.md shows is run, block after block, in one folder, as a reader would who follows along."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "docs/data.md").read_text(), flags=re.DOTALL)
# A narrow network from random weights stands in for the configs' own, which takes hours.
ACCELERATE = """#!/bin/sh
exec {python} -m accelerate.commands.accelerate_cli "$@" --model.init null --model.depth_multiplier 0.1 \\
    --model.image_size 75 --fine_tuning.epochs 1 --fine_tuning.batch_size 4 --run.mixed_precision no --run.cpu_threads 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like the repository's root, where what the blocks write does no harm."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "benchmarks", "model_card.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    programs = {"accelerate": ACCELERATE, "python": '#!/bin/sh\nexec {python} "$@"\n'}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text.format(python=sys.executable))
        (folder / "bin" / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture(scope="module")
def environment(folder):
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def real_data(folder, shared, chestxray14):
    """What the page calls $KERMANY and so on."""
    pneumoniamnist = np.load(shared / "data/pneumoniamnist/pneumoniamnist_rebuilt.npz")
    np.savez(folder / "pneumoniamnist.npz", **{name: values[:60] for name, values in pneumoniamnist.items()})
    return {
        "KERMANY": str(shared / "data/kermany224"),
        "ORIGINALS": str(shared / "data/kermany-originals"),
        "CHESTXRAY14": str(chestxray14),
        "PNEUMONIAMNIST": str(folder / "pneumoniamnist.npz"),
    }


@pytest.fixture(scope="module")
def names():
    """What the Python blocks have defined so far."""
    return {}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_runs(number, folder, environment, names, monkeypatch, request):
    language, text = BLOCKS[number]
    monkeypatch.chdir(folder)
    if language == "python":
        exec(text, names)
        return
    if re.search(r"\$[A-Z]", text):
        environment = environment | request.getfixturevalue("real_data")
    process = subprocess.run(["bash", "-euc", text], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    for run in re.findall(r"--run\.output_dir (runs/[\w-]+)", text):
        for path in folder.glob(run + "*"):
            assert (path / "audit.json").is_file()
            assert (path / "metrics.json").is_file() or "recipes/audit.py" in text


def test_the_blocks_are_those_of_the_page():
    assert {language for language, _ in BLOCKS} == {"python", "bash"} and len(BLOCKS) > 10
    assert sum("two_stage.py" in text for _, text in BLOCKS) > 6
