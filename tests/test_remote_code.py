"""What `save_pretrained` writes is enough for a machine that has only transformers, torch and pillow."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor

# None in sys.modules makes `import cxr_backbone` fail, as on a machine without it.
CHILD = """
import json, sys
sys.modules["cxr_backbone"] = None
import numpy as np, torch
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
)
folder, film, saved_again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
backbone = AutoBackbone.from_config(config, trust_remote_code=True)
model.save_pretrained(saved_again)
processor.save_pretrained(saved_again)
from PIL import Image
pixel_values = processor(Image.open(film), return_tensors="pt").pixel_values
things = (config, model, base, processor, backbone)
with torch.no_grad():
    print(json.dumps({
        "modules": sorted({type(thing).__module__.split(".")[0] for thing in things}),
        "classes": [type(thing).__name__ for thing in things],
        "logits": model(pixel_values).logits.tolist(),
        "pooled": base(pixel_values).pooler_output.tolist(),
        "pipeline": pipeline("image-classification", model=folder, trust_remote_code=True)(film),
    }))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model, the model itself, and the path of a film."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = CXRInceptionConfig(depth_multiplier=0.1, image_size=75, id2label={0: "NORMAL", 1: "PNEUMONIA"})
    model = CXRInceptionForImageClassification(config).eval()
    model.save_pretrained(folder / "model")
    CXRInceptionImageProcessor(size={"height": 75, "width": 75}).save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "film.png")
    return folder / "model", model, folder / "film.png"


def run_child(folder, film, saved_again) -> dict:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(film), str(saved_again)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_every_auto_class_and_the_pipeline_open_the_folder_without_the_package(checkpoint, tmp_path):
    folder, model, film = checkpoint
    answers = run_child(folder, film, tmp_path / "again")
    assert answers["modules"] == ["transformers_modules"]
    assert answers["classes"] == [
        *("CXRInceptionConfig", "CXRInceptionForImageClassification", "CXRInceptionModel"),
        *("CXRInceptionImageProcessor", "CXRInceptionBackbone"),
    ]
    processor = CXRInceptionImageProcessor.from_pretrained(folder)
    pixel_values = processor(Image.open(film), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values).logits
        pooled = model.cxr_inception(pixel_values).pooler_output
    torch.testing.assert_close(torch.tensor(answers["logits"]), logits)
    torch.testing.assert_close(torch.tensor(answers["pooled"]), pooled)
    scores = {answer["label"]: answer["score"] for answer in answers["pipeline"]}
    expected = logits.softmax(dim=1)[0].tolist()
    assert scores == pytest.approx({"NORMAL": expected[0], "PNEUMONIA": expected[1]}, abs=1e-5)


def test_what_remote_code_saves_again_is_as_complete(checkpoint, tmp_path):
    folder, _, film = checkpoint
    first = run_child(folder, film, tmp_path / "again")
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in folder.iterdir()}
    second = run_child(tmp_path / "again", film, tmp_path / "third")
    assert second["logits"] == first["logits"]
