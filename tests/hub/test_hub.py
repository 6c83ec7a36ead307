"""A folder goes up as one commit, and comes back by id through every Auto class, with the package and without it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub.loopback import LoopbackHub
from PIL import Image

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.synthetic import draw_phantom

REPO = "org/cxr-inception"

WITH_THE_PACKAGE = """
import cxr_backbone
options = {"trust_remote_code": False}
"""
WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cxr_backbone":
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
options = {"trust_remote_code": True}
"""
LOAD = """
import json, torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
)
film = Image.open(FILM)
config = AutoConfig.from_pretrained(REPO, **options)
image_processor = AutoImageProcessor.from_pretrained(REPO, **options)
pixel_values = image_processor(film, return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    logits = AutoModelForImageClassification.from_pretrained(REPO, **options)(pixel_values).logits
    features = AutoModel.from_pretrained(REPO, **options)(pixel_values).pooler_output
    backbone = AutoBackbone.from_pretrained(REPO, out_features=["stage1", "stage4"], **options)
    maps = backbone(pixel_values).feature_maps
result = {
    "classes": [type(it).__name__ for it in (config, image_processor, backbone)],
    "module": type(backbone).__module__.partition(".")[0],
    "pixel_values": pixel_values.tolist(),
    "logits": logits.tolist(),
    "pooled": features.tolist(),
    "stage1": maps[0].mean((2, 3)).tolist(),
    "stage4": maps[1].mean((2, 3)).tolist(),
    "pipeline": pipeline("image-classification", model=REPO, **options)(FILM),
}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(tokens={"hf_write": "org"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, home):
    """Runs lines of Python in a fresh process, away from the repository; returns what they leave in `result`."""

    def run(lines, token=None, cache="cache"):
        process = subprocess.run(
            [sys.executable, "-c", f"{lines}\nimport json\nprint(json.dumps(result))"],
            env=hub.environment(home / cache, token),
            cwd=home,
            stdin=subprocess.DEVNULL,  # a question would be an error, not a wait
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def film(home):
    Image.fromarray(draw_phantom(0, opacity=True, image_size=96)).save(home / "film.png")
    return home / "film.png"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = CXRInceptionConfig(depth_multiplier=0.1, image_size=75, id2label={0: "NORMAL", 1: "PNEUMONIA"})
    return CXRInceptionForImageClassification(config).eval()


@pytest.fixture(scope="module")
def image_processor():
    return CXRInceptionImageProcessor(size={"height": 75, "width": 75}, image_mean=[0.4], image_std=[0.3])


@pytest.fixture(scope="module")
def folder(home, model, image_processor):
    """What a run leaves to be shared, with a folder inside."""
    folder = home / "final"
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (folder / "figures").mkdir()
    (folder / "figures/curve.png").write_bytes(b"\x89PNG\0" + bytes(range(256)))
    return folder


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def pushed(hub, client, folder):
    """After a push, another card and a second push: what the folder held each time, the repository, the addresses."""
    first = contents(folder)
    urls = client(
        f"""
from pathlib import Path
from cxr_backbone.hub import push_folder
folder = Path({str(folder)!r})
result = [push_folder(folder, "{REPO}")]
(folder / "README.md").write_text("# Another card")
result.append(push_folder(folder, "{REPO}"))
""",
        token="hf_write",
    )
    return [first, contents(folder)], hub.repos[REPO], urls


# check_push_access

REFUSED = {
    "no name": (None, "hf_write", "run.push_to_hub needs run.hub_model_id, for example org/cxr-inception."),
    "malformed name": ("org/cxr inception", "hf_write", "org/cxr inception"),
    "two slashes": ("org/cxr/inception", "hf_write", "org/cxr/inception"),
    "no token": (REPO, None, "needs a token of the Hub: run `hf auth login` or set HF_TOKEN."),
    "bad token": (REPO, "hf_wrong", "The Hub refuses this token (401); run `hf auth login` again."),
    "foreign namespace": ("timm/x", "hf_write", "This token can't write to timm/x; it can write under org."),
}


@pytest.fixture(scope="module")
def answers(client):
    """What `check_push_access` says in each case of REFUSED, and in two that it lets through."""
    cases = {case: arguments[:2] for case, arguments in REFUSED.items()}
    cases |= {"own namespace": (REPO, "hf_write"), "name alone": ("cxr-inception", "hf_write")}
    return client(f"""
import os
from cxr_backbone.hub import check_push_access
result = {{}}
for case, (repo_id, token) in {cases}.items():
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        result[case] = check_push_access(repo_id)
    except ValueError as error:
        result[case] = str(error)
""")


@pytest.mark.parametrize("case", REFUSED)
def test_a_push_that_would_be_refused_is_refused_before_training(answers, case):
    assert REFUSED[case][2] in answers[case]


@pytest.mark.parametrize("case", ["own namespace", "name alone"])
def test_a_push_that_would_be_let_in_passes(answers, case):
    assert answers[case] is None


# push_folder


def test_each_push_is_one_commit_with_every_file(pushed, hub):
    held, repo, urls = pushed
    assert [commit.files for commit in repo.commits] == held
    assert urls == [f"{hub.endpoint}/{REPO}/commit/{commit.sha}" for commit in repo.commits]


def test_the_code_that_opens_the_model_goes_up_with_it(pushed):
    trio = {f"{kind}_cxr_inception.py" for kind in ("configuration", "modeling", "image_processing")}
    assert trio | {"figures/curve.png", "README.md", "model.safetensors"} < set(pushed[1].files)


@pytest.fixture(scope="module", params=[WITH_THE_PACKAGE, WITHOUT_THE_PACKAGE], ids=["package", "remote code"])
def loaded(request, client, pushed, film):
    """What a process gets by id from the Hub: with `import cxr_backbone`, and where that can't be imported."""
    lines = f"{request.param}\nREPO, FILM = {REPO!r}, {str(film)!r}\n{LOAD}"
    if request.param is WITH_THE_PACKAGE:
        return "cxr_backbone", client(lines, cache="cache-with")
    check = 'assert "cxr_backbone" not in sys.modules\n'
    return "transformers_modules", client(f"{lines}\n{check}", cache="cache-without")


def test_every_auto_class_opens_the_id_with_the_classes_of_the_package_or_of_the_repository(loaded):
    module, found = loaded
    assert found["classes"] == ["CXRInceptionConfig", "CXRInceptionImageProcessor", "CXRInceptionBackbone"]
    assert found["module"] == module


def test_what_was_pushed_gives_the_same_values_by_id(loaded, model, image_processor, film):
    pixel_values = image_processor(Image.open(film), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model.cxr_inception(pixel_values, output_hidden_states=True)
        expected = {
            "pixel_values": pixel_values,
            "logits": model(pixel_values).logits,
            "pooled": outputs.pooler_output,
            "stage1": outputs.hidden_states[1].mean((2, 3)),
            "stage4": outputs.pooler_output,
        }
    for name, values in expected.items():
        assert values.std() > 0
        np.testing.assert_allclose(loaded[1][name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_pipeline_gives_the_probabilities_of_the_model_by_id(loaded, model, image_processor, film):
    with torch.inference_mode():
        logits = model(**image_processor(Image.open(film), return_tensors="pt")).logits
    scores = {row["label"]: row["score"] for row in loaded[1]["pipeline"]}
    assert list(scores) == sorted(scores, key=scores.get, reverse=True)
    expected = dict(zip(["NORMAL", "PNEUMONIA"], logits.softmax(-1)[0].tolist(), strict=True))
    assert scores == pytest.approx(expected, abs=1e-6)
