"""The wheel as a stranger gets it: what is in it, and what works where nothing else of this repository is."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from narrow import PROCESSOR, tiny_model
from PIL import Image
from transformers import pipeline

import cxr_backbone

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
INFO = f"cxr_backbone-{cxr_backbone.__version__}.dist-info"
NEED_AN_EXTRA = {
    "cxr_backbone.data.dicom": "pydicom",
    "cxr_backbone.evaluation.plots": "matplotlib",
    "cxr_backbone.evaluation.report_page": "matplotlib",
    "cxr_backbone.evaluation.saliency": "captum",
}
OPEN_ALONE = """
import importlib.util, json, sys
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

folder, film = sys.argv[1:]
assert importlib.util.find_spec("cxr_backbone") is None
opened = [
    auto.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForImageClassification, AutoImageProcessor)
]
answer = pipeline("image-classification", model=folder, trust_remote_code=True)(film)
print(json.dumps({"classes": [type(thing).__name__ for thing in opened], "answer": answer}))
"""
IMPORT_EVERYTHING = """
import importlib, json, pkgutil
import cxr_backbone

missing = {}
for module in pkgutil.walk_packages(cxr_backbone.__path__, "cxr_backbone."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = error.name
print(json.dumps(missing))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model, and a film."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder / "model")
    PROCESSOR.save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "film.png")
    return folder / "model", folder / "film.png"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The Python of an environment that has transformers, torch and pillow, what these need, and nothing else."""
    if sys.version_info < (3, 11):
        pytest.skip("constraints.txt pins releases that need Python 3.11")
    folder = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv/bin/python"
    download = [python, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps", "--dest", folder]
    reached = subprocess.run([*download, pin("pillow")], capture_output=True, text=True)
    if reached.returncode:
        pytest.skip(f"pip can't install anything here: {reached.stderr.strip().splitlines()[-1]}")
    install(python, pin("torch"))  # first and alone, as in the Makefile
    install(python, "transformers", "pillow")
    return python


@pytest.fixture(scope="module")
def opened_alone(clean, checkpoint):
    """What the clean environment makes of the checkpoint, before anything of this package is there."""
    return json.loads(run([clean, "-c", OPEN_ALONE, *checkpoint], clean.parent))


@pytest.fixture(scope="module")
def installed(clean, opened_alone, built):
    """The Python of the same environment, with the wheel and what the wheel itself asks for."""
    install(clean, next(built.glob("*.whl")))
    return clean


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    about = {f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    sources = {path for path in (ROOT / "src/cxr_backbone").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert names == about | {path.relative_to(ROOT / "src").as_posix() for path in sources}
    assert {Path(name).suffix for name in names - about} == {".py", ".html", ".typed"}


def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.split("/")[1] for name in sdist.getnames()}
    documents = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert names == {"src", "pyproject.toml", "PKG-INFO", ".gitignore", *documents}


def test_transformers_torch_and_pillow_are_enough_to_open_a_checkpoint(opened_alone, checkpoint):
    folder, film = checkpoint
    classes = ["CXRInceptionModel", "CXRInceptionForImageClassification", "CXRInceptionImageProcessor"]
    assert opened_alone["classes"] == classes
    here = pipeline("image-classification", model=str(folder), trust_remote_code=False)(str(film))
    assert [entry["label"] for entry in opened_alone["answer"]] == [entry["label"] for entry in here]
    scores = [[entry["score"] for entry in answer] for answer in (opened_alone["answer"], here)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_the_three_entry_points_run_from_the_wheel(installed, tmp_path):
    answers = json.loads(run([installed, ROOT / "tests/entry_points.py", tmp_path], tmp_path).splitlines()[-1])
    site_packages = installed.parents[1] / "lib"
    assert Path(answers["reuse"]["package"]).is_relative_to(site_packages)
    assert answers["reuse"]["module"] == "cxr_backbone.modeling_cxr_inception"
    assert answers["infer"]["module"].startswith("transformers_modules.")  # it did not import the package
    assert {entry["label"] for entry in answers["infer"]["answer"]} == {"NORMAL", "PNEUMONIA"}


def test_only_what_an_extra_is_for_asks_for_an_extra(installed, tmp_path):
    assert json.loads(run([installed, "-c", IMPORT_EVERYTHING], tmp_path)) == NEED_AN_EXTRA


def test_what_the_wheel_asks_for_fits_together(installed, tmp_path):
    assert "No broken requirements" in run([installed, "-m", "pip", "check"], tmp_path)


def pin(package: str) -> str:
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{package}=="))


def install(python: Path, *packages: str | Path) -> None:
    run([python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, *packages], python.parent)


def run(command: list, folder: Path) -> str:
    """What the command prints, run in `folder`, where it finds no source of this repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout
