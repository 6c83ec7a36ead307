"""What the pages of docs/ show is run, block after block, in one folder each, as a reader would who follows along."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
BLOCKS = {page: re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL) for page, text in PAGES.items()}
NUMBERED = [(page, number) for page, blocks in BLOCKS.items() for number in range(len(blocks))]
# A narrow network from random weights stands in for the configs' own, which takes hours.
ACCELERATE = """#!/bin/sh
exec {python} -m accelerate.commands.accelerate_cli "$@" --model.init null --model.depth_multiplier 0.1 \\
    --model.image_size 75 --fine_tuning.epochs 1 --fine_tuning.batch_size 4 --run.mixed_precision no --run.cpu_threads 1
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """For each page a folder like the repository's root, where what its blocks write does no harm, and what its Python
    blocks have defined so far."""
    return {page: (repository(tmp_path_factory.mktemp(page)), {}) for page in PAGES}


def repository(folder):
    for name in ("recipes", "benchmarks", "model_card.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    programs = {"accelerate": ACCELERATE, "python": '#!/bin/sh\nexec {python} "$@"\n'}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text.format(python=sys.executable))
        (folder / "bin" / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture
def real_data(shared, chestxray14, tmp_path):
    """What the pages call $KERMANY and so on."""
    pneumoniamnist = np.load(shared / "data/pneumoniamnist/pneumoniamnist_rebuilt.npz")
    np.savez(tmp_path / "pneumoniamnist.npz", **{name: values[:60] for name, values in pneumoniamnist.items()})
    return {
        "KERMANY": str(shared / "data/kermany224"),
        "ORIGINALS": str(shared / "data/kermany-originals"),
        "CHESTXRAY14": str(chestxray14),
        "PNEUMONIAMNIST": str(tmp_path / "pneumoniamnist.npz"),
    }


@pytest.mark.parametrize(("page", "number"), NUMBERED)
def test_every_block_runs(page, number, followed, monkeypatch, request):
    folder, names = followed[page]
    language, text = BLOCKS[page][number]
    monkeypatch.chdir(folder)
    if language == "python":
        exec(text, names)
        return
    search = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1"}
    if re.search(r"\$[A-Z]", text):
        environment |= request.getfixturevalue("real_data")
    process = subprocess.run(["bash", "-euc", text], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    for run in re.findall(r"--(?:run\.)?output_dir (runs/[\w-]+)", text):
        for path in folder.glob(run + "*"):
            assert (path / "audit.json").is_file()
            assert (path / "metrics.json").is_file() or "recipes/audit.py" in text


def test_the_blocks_are_those_of_the_pages():
    assert {language for language, _ in BLOCKS["data"]} == {"python", "bash"} and len(BLOCKS["data"]) > 10
    assert sum("two_stage.py" in text for _, text in BLOCKS["data"]) > 6
    assert sum("evaluate.py" in text for _, text in BLOCKS["evaluation"]) == 2


def test_a_decision_was_made(followed):
    assert set(followed["evaluation"][1]["decision"]) == {"PNEUMONIA"}
