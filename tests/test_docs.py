"""What the README and the pages of docs/ show is run, block after block, in one folder each, as a reader would who
follows along. The Hub they speak to is a loopback one."""

import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
from hub.loopback import LoopbackHub
from interpreter import Interpreter
from PIL import Image
from running import ROOT

from cxr_backbone.data.synthetic import draw_phantom

PAGES = {path.stem: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {page: re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL) for page, text in PAGES.items()}
NUMBERED = [(page, number) for page, blocks in BLOCKS.items() for number in range(len(blocks))]

# A narrow network from random weights stands in for the configs' own, which takes hours; what a reader has installed is
# not installed again; and `make train` and `make test` are what CI runs anyway.
NARROW = "--model.init null --model.depth_multiplier 0.1 --model.image_size 75 --model.init_provenance null"
QUICK = "--fine_tuning.epochs 1 --fine_tuning.batch_size 4 --run.mixed_precision no --run.cpu_threads 1"
QUICK += " --evaluation.resamples 100"
PROGRAMS = {
    "accelerate": f'exec {{python}} -m accelerate.commands.accelerate_cli "$@" {NARROW} {QUICK}',
    "python": f"""case "$1" in
benchmarks/protocols.py) exec {{python}} "$@" --only official {NARROW} {QUICK} --evaluation.report false;;
*) exec {{python}} "$@";;
esac""",
    "pip": 'exec {python} -m pip "$@" --dry-run --no-build-isolation',
    "make": ":",
}


class Reader:
    """Follows a page: has a folder like the repository's root, where what the page writes does no harm, and a Python
    that remembers."""

    def __init__(self, folder, hub):
        self.folder = folder
        for path in ROOT.iterdir():
            is_folder = path.name in ("recipes", "benchmarks", "checkpoints", "src")
            if is_folder or path.name == "LICENSE" or path.suffix in (".md", ".toml", ".txt"):
                (folder / path.name).symlink_to(path)
        (folder / "bin").mkdir()
        for name, text in PROGRAMS.items():
            (folder / "bin" / name).write_text(f"#!/bin/sh\n{text.format(python=sys.executable)}\n")
            (folder / "bin" / name).chmod(stat.S_IRWXU)
        self.environment = hub.environment(folder / "hf-home", "hf_write")
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.interpreter = None

    def bash(self, text, **variables):
        environment = self.environment | variables
        process = subprocess.run(
            ["bash", "-euc", text], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr[-3000:]

    def python(self, text):
        self.interpreter = self.interpreter or Interpreter(self.folder, self.environment)
        self.interpreter.run(text)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    with LoopbackHub(tokens={"hf_write": "org"}) as hub:
        readers = {page: Reader(tmp_path_factory.mktemp(page), hub) for page in PAGES}
        yield readers
        for reader in readers.values():
            if reader.interpreter:
                reader.interpreter.close()


@pytest.fixture(scope="module")
def after_make_train(readers):
    """The README's reader has called `make train`, and has a film."""
    reader = readers["README"]
    reader.bash("accelerate launch recipes/two_stage.py recipes/configs/reuse_sample.yaml --data.num_patients 40")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    Image.fromarray(pixels).save(reader.folder / "chest.png")


@pytest.fixture(scope="module")
def chest_xray(readers):
    """`path/to/chest_xray` of the README: phantoms under the names of Kaggle's copy."""
    root = readers["README"].folder / "path/to/chest_xray"
    for number in range(60):
        split, is_sick = "train" if number < 48 else "test", number % 2
        folder = root / split / ("PNEUMONIA" if is_sick else "NORMAL")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"person{number}_virus_{number}.jpeg" if is_sick else f"IM-{number:04}-0001.jpeg"
        Image.fromarray(draw_phantom(number, opacity=bool(is_sick), image_size=100)).save(folder / name)


@pytest.fixture
def real_data(shared, chestxray14, real_films, tmp_path):
    """What the pages call $KERMANY and so on."""
    pneumoniamnist = np.load(shared / "data/pneumoniamnist/pneumoniamnist_rebuilt.npz")
    np.savez(tmp_path / "pneumoniamnist.npz", **{name: values[:60] for name, values in pneumoniamnist.items()})
    return {
        "KERMANY": str(real_films),  # a few of them: the whole set takes minutes even for a narrow network
        "ORIGINALS": str(shared / "data/kermany-originals"),
        "CHESTXRAY14": str(chestxray14),
        "PNEUMONIAMNIST": str(tmp_path / "pneumoniamnist.npz"),
        "RSNA_NORMALS": str(shared / "data/rsna-normals/labels.csv"),
        "NIH_SUBSET": str(shared / "data/nih-subset/labels.csv"),
        "WEIGHTS": str(shared / "weights/inception_v3_nsfwjs_f16.safetensors"),
    }


@pytest.mark.parametrize(("page", "number"), NUMBERED)
def test_every_block_runs(page, number, readers, request):
    reader, (language, text) = readers[page], BLOCKS[page][number]
    if page == "README":
        request.getfixturevalue("after_make_train")
    if language == "python":
        reader.python(text)
        return
    variables = {}
    if re.search(r"\$[A-Z]", text):
        variables = request.getfixturevalue("real_data")
    if "path/to/chest_xray" in text:
        request.getfixturevalue("chest_xray")
    if "pip install -c constraints.txt" in text and sys.version_info < (3, 11):
        pytest.skip("constraints.txt pins releases that need Python 3.11")
    reader.bash(text, **variables)
    for run in re.findall(r"--(?:run\.)?output_dir (runs/[\w-]+)", text):
        for path in reader.folder.glob(run + "*"):
            assert (path / "audit.json").is_file()
            assert (path / "metrics.json").is_file() or "recipes/audit.py" in text


def test_the_blocks_are_those_of_the_pages():
    assert {language for language, _ in BLOCKS["data"]} == {"python", "bash"} and len(BLOCKS["data"]) > 10
    assert sum("two_stage.py" in text for _, text in BLOCKS["data"]) > 6
    assert sum("evaluate.py" in text for _, text in BLOCKS["evaluation"]) == 2
    assert [language for language, _ in BLOCKS["README"]][:3] == ["python", "bash", "python"]  # the three entry points


def test_a_decision_was_made(readers):
    readers["evaluation"].python("assert set(decision) == {'PNEUMONIA'}")


def test_what_the_pages_make_is_what_ci_makes():
    made = set(re.findall(r"^make \w+", "\n".join(text for blocks in BLOCKS.values() for _, text in blocks), re.M))
    assert made == {"make train", "make test"}
    assert made <= set((ROOT / ".ci/run").read_text().splitlines())


def test_every_file_the_pages_speak_of_exists():
    for page, text in PAGES.items():
        for path in re.findall(r"\b(?:recipes|benchmarks|docs|space|src)/[\w./-]+\w", text):
            assert (ROOT / path).exists(), f"{page}: {path}"
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT if page == "README" else ROOT / "docs") / link).exists(), f"{page}: {link}"


def test_the_readme_and_the_card_say_that_this_is_no_medical_device():
    assert "not a medical device" in PAGES["README"]
    assert "not a medical device" in (ROOT / "model_card.md").read_text()
