"""What was published loads back with the same values: by id, by revision, from a folder and from the cache, with the
package and without it; and runs no code that nobody asked for."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hub.loopback import LoopbackHub
from PIL import Image

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.guard import FILE, Guard

REPO, PRIVATE, TURNED = "org/cxr-inception", "org/cxr-private", "org/cxr-turned"
GUARDED = "org/cxr-guarded"
CLASSES = [
    *("CXRInceptionConfig", "CXRInceptionImageProcessor", "CXRInceptionModel"),
    *("CXRInceptionForImageClassification", "CXRInceptionBackbone", "CXRInceptionForImageClassification"),
]


class Machine(NamedTuple):
    """A kind of machine to load on: how a process starts there, and where its classes come from."""

    start: str
    module: str
    trust_remote_code: bool


PACKAGE = Machine("import cxr_backbone", "cxr_backbone", False)
# None in sys.modules makes `import cxr_backbone` fail, as on a machine without it.
REMOTE_CODE = Machine("import sys\nsys.modules['cxr_backbone'] = None", "transformers_modules", True)
MACHINES = pytest.mark.parametrize("machine", [PACKAGE, REMOTE_CODE], ids=["package", "remote code"], scope="module")

OPENERS = """
import os, sys
from pathlib import Path
import torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

class Backbone:
    # For folders and the offline cache, where AutoBackbone would ask the Hub first.
    @staticmethod
    def from_pretrained(source, trust_remote_code, **where):
        if trust_remote_code:
            name = "modeling_cxr_inception.CXRInceptionBackbone"
            return get_class_from_dynamic_module(name, source, **where).from_pretrained(source, **where)
        from cxr_backbone import CXRInceptionBackbone
        return CXRInceptionBackbone.from_pretrained(source, **where)

def open_pipeline(source, **options):
    return pipeline("image-classification", model=source, **options)
"""
LOAD = """
def load(source, where):
    options = {"trust_remote_code": TRUST_REMOTE_CODE, **where}
    config = AutoConfig.from_pretrained(source, **options)
    image_processor = AutoImageProcessor.from_pretrained(source, **options)
    base = AutoModel.from_pretrained(source, **options)
    classifier = AutoModelForImageClassification.from_pretrained(source, **options)
    backbone = BACKBONE.from_pretrained(source, **options)
    classify = open_pipeline(source, **options)
    pixel_values = image_processor(Image.open(FILM), return_tensors="pt")["pixel_values"]
    things = [config, image_processor, base, classifier, backbone, classify.model]
    with torch.inference_mode():
        return {
            "classes": [type(thing).__name__ for thing in things],
            "modules": sorted({type(thing).__module__.partition(".")[0] for thing in things}),
            "values": {
                "pixel_values": pixel_values.flatten().tolist(),
                "logits": classifier(pixel_values).logits[0].tolist(),
                "pooled": base(pixel_values).pooler_output[0].tolist(),
                "feature map": backbone(pixel_values).feature_maps[0].mean((2, 3))[0].tolist(),
                "pipeline": [row["score"] for row in sorted(classify(FILM, top_k=None), key=lambda row: row["label"])],
            },
        }

result = {name: load(*source) for name, source in SOURCES.items()}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("loading")


@pytest.fixture(scope="module")
def film(home):
    Image.fromarray(draw_phantom(0, opacity=True, image_size=96)).save(home / "film.png")
    return home / "film.png"


def save_model(folder, seed, mean):
    """A narrow model of two classes and its image processor, in `folder` and in this process."""
    torch.manual_seed(seed)
    labels = {0: "NORMAL", 1: "PNEUMONIA"}
    config = CXRInceptionConfig(depth_multiplier=0.1, image_size=75, id2label=labels, out_features=["stage1"])
    model = CXRInceptionForImageClassification(config).eval()
    image_processor = CXRInceptionImageProcessor(size={"height": 75, "width": 75}, image_mean=[mean], image_std=[0.3])
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return model, image_processor


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def expected_values(model, image_processor, film):
    pixel_values = image_processor(Image.open(film), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixel_values, output_hidden_states=True)
    return {
        "pixel_values": pixel_values.flatten().tolist(),
        "logits": outputs.logits[0].tolist(),
        "pooled": outputs.hidden_states[-1].mean((2, 3))[0].tolist(),
        "feature map": outputs.hidden_states[1].mean((2, 3))[0].tolist(),
        "pipeline": outputs.logits.softmax(-1)[0].tolist(),
    }


@pytest.fixture(scope="module")
def folders(home, film):
    """Two versions of a model: the folder of each, and the values it gives for the film."""
    folders, values = [], []
    for version in (1, 2):
        folders.append(home / f"version{version}")
        values.append(expected_values(*save_model(folders[-1], seed=version, mean=0.2 + 0.1 * version), film))
    assert all(values[0][name] != values[1][name] for name in values[0])
    return folders, values


def run(lines, environment, cwd):
    """Runs lines of Python in a fresh process, away from the repository; returns what they leave in `result`."""
    process = subprocess.run(
        [sys.executable, "-c", f"{lines}\nimport json\nprint()\nprint(json.dumps(result))"],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,  # a question would be an error, not a wait
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def load(machine, sources, film, environment, backbone="Backbone"):
    """What each of `sources` {name: (id or folder, where)} gives on a machine of this kind."""
    names = f"TRUST_REMOTE_CODE, BACKBONE = {machine.trust_remote_code}, {backbone}\n"
    names += f"FILM, SOURCES = {str(film)!r}, {sources!r}\n"
    found = run(machine.start + OPENERS + names + LOAD, environment, film.parent)
    for name, it in found.items():
        assert (name, it["classes"], it["modules"]) == (name, CLASSES, [machine.module])
    return {name: it["values"] for name, it in found.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        # Another process may run other kernels: where weights lie in memory decides, and the processor's maker.
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


# By id, by revision, from the cache, from a folder


class Published(NamedTuple):
    """What was loaded by id, and what is needed to do it again now that the Hub can't be reached."""

    machine: Machine
    sources: dict
    found: dict
    environment: dict
    expected: dict


@pytest.fixture(scope="module", params=[PACKAGE, REMOTE_CODE], ids=["package", "remote code"])
def published(request, home, film, folders):
    """Everything once by id from a Hub that is then shut down."""
    machine = request.param
    versions, (first, second) = folders
    with LoopbackHub(tokens={"hf_read": "org"}, read_only={"hf_read"}) as hub:
        repo = hub.add_repo(REPO, contents(versions[0]))
        repo.tags["v1.0"] = repo.head
        sha = repo.head.sha
        repo.commit("second version", contents(versions[1]))
        hub.add_repo(PRIVATE, contents(versions[0]), private=True)
        sources = {"main": (REPO, {}), "tag": (REPO, {"revision": "v1.0"}), "sha": (REPO, {"revision": sha})}
        sources["private"] = (PRIVATE, {})
        expected = {"main": second, "tag": first, "sha": first, "private": first}
        environment = hub.environment(home / f"cache-{machine.module}", token="hf_read")
        found = load(machine, sources, film, environment, backbone="AutoBackbone")
    return Published(machine, sources, found, environment, expected)


@pytest.mark.parametrize("source", ["main", "tag", "sha", "private"])
def test_every_auto_class_gives_by_id_the_values_that_were_published(published, source):
    assert_same(published.found[source], published.expected[source])


def test_all_of_it_opens_from_the_cache_when_there_is_no_network(published, film):
    offline = published.environment | {"HF_HUB_OFFLINE": "1"}
    for source, values in load(published.machine, published.sources, film, offline).items():
        assert_same(values, published.expected[source])


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@MACHINES
def test_a_folder_opens_without_a_single_request(machine, hub, home, film, folders):
    (folder, _), (values, _) = folders
    before = list(hub.requests)
    environment = hub.environment(home / f"empty-cache-{machine.module}")
    found = load(machine, {"folder": (str(folder), {})}, film, environment)
    assert_same(found["folder"], values)
    assert hub.requests == before


def test_the_guard_comes_with_the_model_at_its_revision_or_is_missed_by_name(hub, home, film, folders):
    """The first version has one that stops everything, the second has none."""
    (first, second), _ = folders
    strict = Guard(torch.zeros(9), torch.eye(9)[:1], torch.ones(2), torch.tensor(-1.0))
    strict.save(home)
    repo = hub.add_repo(GUARDED, contents(first) | {FILE: (home / FILE).read_bytes()})
    sha = repo.head.sha
    repo.commit("without", contents(second))
    lines = f"""
from cxr_backbone.guard import guarded_pipeline
pinned = guarded_pipeline({GUARDED!r}, revision={sha!r})
try:
    guarded_pipeline({GUARDED!r})
except ValueError as error:
    result = [pinned.guard.threshold.item(), str(error)]
"""
    threshold, error = run(PACKAGE.start + OPENERS + lines, hub.environment(home / "cache-guard"), home)
    assert threshold == -1 and error.startswith(f"{GUARDED} has no {FILE}")


# Remote code

# Each opener starts as in a process of its own: code that was imported before is forgotten.
OPEN_ONE_BY_ONE = """
AUTO_CLASSES = (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoBackbone)
OPENERS = {auto.__name__: auto.from_pretrained for auto in AUTO_CLASSES}
OPENERS |= {"pipeline": open_pipeline, "get_class_from_dynamic_module": Backbone.from_pretrained}

def outcome(opener, trust_remote_code, **where):
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    MARKER.unlink(missing_ok=True)
    try:
        OPENERS[opener](REPO, trust_remote_code=trust_remote_code, **where)
        refused = False
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        refused = True
    return {"refused": refused, "ran the hostile code": MARKER.exists()}
"""


@pytest.fixture(scope="module")
def turned(hub, home, folders):
    """A repository whose second commit leaves a marker wherever its code is run; the sha of the first commit."""
    version = contents(folders[0][0])
    repo = hub.add_repo(TURNED, version)
    leave_marker = f"\n\n__import__('pathlib').Path({str(home / 'marker')!r}).touch()\n".encode()
    first = repo.head.sha
    repo.commit("turned", {name: text + leave_marker * name.endswith(".py") for name, text in version.items()})
    return first


def open_one_by_one(machine, hub, home, lines):
    names = f"REPO, MARKER = {TURNED!r}, Path({str(home / 'marker')!r})\n"
    environment = hub.environment(home / f"cache-{machine.module}-{len(hub.requests)}")  # an empty one
    return run(machine.start + OPENERS + names + OPEN_ONE_BY_ONE + lines, environment, home)


def test_at_a_pinned_revision_only_its_own_files_are_fetched_and_run(hub, home, turned):
    before = len(hub.requests)
    lines = f"result = {{opener: outcome(opener, True, revision={turned!r}) for opener in OPENERS}}"
    found = open_one_by_one(REMOTE_CODE, hub, home, lines)
    assert len(found) == 7
    for opener, outcome in found.items():
        assert (opener, outcome) == (opener, {"refused": False, "ran the hostile code": False})
    fetched = [request for request in hub.requests[before:] if "/resolve/" in request]
    assert any("modeling_cxr_inception.py" in request for request in fetched)
    assert any("model.safetensors" in request for request in fetched)
    assert {request.split("/resolve/")[1].split("/")[0] for request in fetched} == {turned}


@pytest.fixture(scope="module")
def unpinned(hub, home, turned):
    """What becomes of the hostile code where nothing is pinned: {trust_remote_code: {opener: outcome}}."""
    lines = """
asked = [opener for opener in OPENERS if opener != "get_class_from_dynamic_module"]  # which runs code by definition
result = {str(trust): {opener: outcome(opener, trust) for opener in asked} for trust in (None, False)}
result["fetched"] = [path.name for path in Path(os.environ["HF_HOME"]).rglob("*_cxr_inception.py")]
result["True"] = {opener: outcome(opener, True) for opener in OPENERS}
"""
    return open_one_by_one(REMOTE_CODE, hub, home, lines)


@pytest.mark.parametrize("trust", ["None", "False"])
def test_code_that_is_not_trusted_is_neither_fetched_nor_run(unpinned, trust):
    assert len(unpinned[trust]) == 6
    for opener, outcome in unpinned[trust].items():
        assert (opener, outcome) == (opener, {"refused": True, "ran the hostile code": False})
    assert unpinned["fetched"] == []


def test_code_that_is_trusted_and_not_pinned_runs_whatever_the_repository_turned_into(unpinned):
    assert len(unpinned["True"]) == 7
    for opener, outcome in unpinned["True"].items():
        assert (opener, outcome) == (opener, {"refused": False, "ran the hostile code": True})


def test_with_the_package_the_code_of_a_repository_is_not_run(hub, home, turned):
    # But for pipeline(..., trust_remote_code=True), which looks for a video processor in the image processor's file.
    lines = """
result = {opener: outcome(opener, False) for opener in OPENERS}
result |= {f"{name} trusted": outcome(name, True) for name in OPENERS if name.startswith("Auto")}
"""
    found = open_one_by_one(PACKAGE, hub, home, lines)
    assert len(found) == 12
    for opener, outcome in found.items():
        assert (opener, outcome) == (opener, {"refused": False, "ran the hostile code": False})
