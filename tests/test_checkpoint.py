"""The checkpoint that comes with the repository: whole, small, of the present code, and of use at once."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForImageClassification, pipeline

from cxr_backbone.guard import guarded_pipeline
from cxr_backbone.package import CODE, MODEL_FILES

CHECKPOINT = ROOT / "checkpoints/cxr-inception"


@pytest.fixture(scope="module")
def metrics():
    return json.loads((CHECKPOINT / "metrics.json").read_text())


def test_it_is_all_that_is_published_of_a_model():
    names = {path.relative_to(CHECKPOINT).as_posix() for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert names >= {*MODEL_FILES, "README.md", "LICENSE", "metrics.json", "input_contract.json", "figures/roc.png"}
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 50e6


@pytest.mark.parametrize("name", CODE)
def test_its_code_is_that_of_the_package(name):
    assert (CHECKPOINT / name).read_text() == (ROOT / "src/cxr_backbone" / name).read_text()


def test_its_weights_are_stored_in_float16_and_computed_in_float32():
    stored = load_file(CHECKPOINT / "model.safetensors")
    assert {values.dtype for values in stored.values() if values.is_floating_point()} == {torch.float16}
    assert AutoModelForImageClassification.from_pretrained(CHECKPOINT).dtype == torch.float32


def test_its_card_says_what_its_metrics_say(metrics):
    card = (CHECKPOINT / "README.md").read_text()
    figures = metrics["models"]["fine_tuned"]["splits"]["test"]["targets"]["PNEUMONIA"]["figures"]
    assert f"{figures['auroc']['value']:.3f}" in card and "not a medical device" in card
    assert "nsfwjs" in card and "timm/inception_v3.tv_in1k" in card  # where it comes from, and how to train it again


def test_it_tells_real_films_of_any_size_apart(shared):
    folder = shared / "data/kermany-originals"
    films = sorted(path for path in folder.rglob("*") if path.suffix in (".jpeg", ".jpg", ".png"))
    classify = pipeline("image-classification", model=str(CHECKPOINT), trust_remote_code=False)
    scores = [{said["label"]: said["score"] for said in classify(str(film), top_k=None)} for film in films]
    is_sick = ["person" in film.name for film in films]
    assert len(films) == 30 and 0 < sum(is_sick) < 30
    assert roc_auc_score(is_sick, [score["PNEUMONIA"] for score in scores]) > 0.95


def test_its_guard_knows_films_from_noise_and_from_negatives(real_films):
    guarded = guarded_pipeline(CHECKPOINT)
    films = [Image.open(path) for path in sorted((real_films / "train").rglob("*.jpg"))[::6]]
    negatives = [Image.fromarray(255 - np.asarray(film)) for film in films]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8))
    outside = [guarded(film)[0]["out_of_distribution"] for film in (*films, *negatives, noise)]
    assert sum(outside[: len(films)]) <= 1 and all(outside[len(films) :])
