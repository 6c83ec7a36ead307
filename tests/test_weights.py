"""Published Inception V3 weights give the published network's features, or an error that says why not.

Full-width networks are drawn once; what does not depend on the width is tested with a narrow network.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hub.loopback import LoopbackHub
from PIL import Image
from references.inception_v3 import SIZES, backbone_shapes, conv_shapes, draw_image, draw_weights, feature_key
from safetensors.torch import load_file, save_file

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionModel
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.layers_cxr_inception import CXRInceptionConvLayer
from cxr_backbone.weights import CONV_NAMES, load_inception_v3

REFERENCES = Path(__file__).parent / "references"
NARROW = {"depth_multiplier": 0.1, "image_size": 96}
HALF = {"image_mean": 0.5, "image_std": 0.5}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def reference(peer: str, size: tuple[int, int]) -> np.ndarray:
    return np.load(REFERENCES / f"inception_v3_{peer}.npz")[feature_key(*size)]


@torch.inference_mode()
def features_of(model, pixel_values) -> np.ndarray:
    return model(torch.as_tensor(pixel_values)).pooler_output[0].numpy()


def grey_features(model, image_processor, image) -> np.ndarray:
    return features_of(model, image_processor(image, return_tensors="pt")["pixel_values"])


def difference(features: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the norm of what is expected."""
    return float(np.linalg.norm(features - expected) / np.linalg.norm(expected))


def with_what_is_left_behind(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As published: with the heads, and the counters that torch keeps beside BatchNorm's statistics."""
    heads = {"fc.weight": torch.ones(5, 7), "fc.bias": torch.ones(5), "AuxLogits.conv0.conv.weight": torch.ones(3, 3)}
    counters = {f"{name}.bn.num_batches_tracked": torch.tensor(7) for name in conv_shapes()}
    return tensors | heads | counters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def drawn():
    """The tensors that the references were made with, under torchvision's names."""
    return {name: torch.from_numpy(array) for name, array in draw_weights(backbone_shapes()).items()}


@pytest.fixture(scope="module")
def drawn_file(folder, drawn):
    save_file(with_what_is_left_behind(drawn), folder / "drawn.safetensors")
    return folder / "drawn.safetensors"


@pytest.fixture(scope="module")
def drawn_model(drawn_file):
    return load_inception_v3(drawn_file, num_channels=3, **HALF)[0]


@pytest.fixture(scope="module")
def narrow():
    """Drawn tensors of a narrow network with three channels, under torchvision's names."""
    model = CXRInceptionModel(CXRInceptionConfig(num_channels=3, **NARROW))
    layers = [module for module in model.modules() if isinstance(module, CXRInceptionConvLayer)]
    shapes = {}
    for name, layer in zip(conv_shapes(), layers, strict=True):
        shapes[f"{name}.conv.weight"] = tuple(layer.convolution.weight.shape)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{tensor}"] = shapes[f"{name}.conv.weight"][:1]
    return {name: torch.from_numpy(array) for name, array in draw_weights(shapes).items()}


@pytest.fixture(scope="module")
def narrow_file(folder, narrow):
    save_file(with_what_is_left_behind(narrow), folder / "narrow.safetensors")
    return folder / "narrow.safetensors"


@pytest.fixture(scope="module")
def checkpoint(folder, narrow_file):
    """A folder with a classifier for grey images, and the backbone and image processor that are in it."""
    unusual = {"avg_pool_count_include_pad": False, "batch_norm_eps": 0.01, "dropout": 0.5}
    backbone, image_processor = load_inception_v3(narrow_file, **unusual, **IMAGENET, **NARROW)
    model = CXRInceptionForImageClassification(backbone.config)
    model.cxr_inception.load_state_dict(backbone.state_dict())
    model.save_pretrained(folder / "checkpoint")
    image_processor.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", backbone, image_processor


@pytest.fixture(scope="module")
def film():
    return Image.fromarray(draw_phantom(0, opacity=True, image_size=120))


# Parity with the peers


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("peer", ["torchvision", "timm"])
def test_pooled_features_are_those_of_the_peer(drawn_model, peer, size):
    assert difference(features_of(drawn_model, draw_image(*size)), reference(peer, size)) < 1e-4


def test_a_torch_state_dict_loads_like_safetensors(folder, drawn, drawn_model):
    torch.save(with_what_is_left_behind(drawn), folder / "drawn.pth")
    model, _ = load_inception_v3(folder / "drawn.pth", num_channels=3, **HALF)
    for name, tensor in drawn_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_order_of_the_convolutions_is_that_of_the_peers():
    assert list(conv_shapes()) == CONV_NAMES


def test_weights_converted_from_keras_need_only_the_pooling_set(folder, drawn):
    ones = {name: torch.ones_like(it) for name, it in drawn.items() if name.endswith("bn.weight")}
    save_file(drawn | ones, folder / "converted.safetensors")
    size = SIZES[-1]
    for counts_padding, is_keras in ((False, True), (True, False)):
        model, _ = load_inception_v3(
            folder / "converted.safetensors", num_channels=3, avg_pool_count_include_pad=counts_padding, **HALF
        )
        distance = difference(features_of(model, draw_image(*size)), reference("keras", size))
        assert distance < 1e-4 if is_keras else distance > 1e-2


@pytest.fixture(scope="module")
def keras_files(folder):
    """Real Keras: its features of today, and its model in all three formats."""
    if importlib.util.find_spec("keras") is None:  # importing it here would settle its backend for the whole run
        pytest.skip("needs keras")
    files = [folder / name for name in ("model.keras", "model.weights.h5", "legacy.h5")]
    saves = [argument for file in files for argument in ("--save", file)]
    process = subprocess.run(
        [sys.executable, REFERENCES / "inception_v3.py", "keras", folder / "keras.npz", *saves],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return {file.name: file for file in [*files, folder / "keras.npz"]}


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5", "legacy.h5"])
def test_pooled_features_are_those_of_keras_whatever_the_format(keras_files, name):
    model, image_processor = load_inception_v3(keras_files[name], num_channels=3)
    live = np.load(keras_files["keras.npz"])
    for size in SIZES:
        features = features_of(model, draw_image(*size))
        assert difference(features, live[feature_key(*size)]) < 1e-4
        assert difference(features, reference("keras", size)) < 1e-4
    assert list(image_processor.image_mean) == list(image_processor.image_std) == [0.5] * 3
    assert not model.config.avg_pool_count_include_pad


def test_keras_weights_with_padding_counted_are_another_network(keras_files):
    model, _ = load_inception_v3(keras_files["legacy.h5"], num_channels=3, avg_pool_count_include_pad=True)
    assert difference(features_of(model, draw_image(*SIZES[1])), reference("keras", SIZES[1])) > 1e-2


# Channels


@pytest.mark.parametrize("normalisation", [HALF, IMAGENET], ids=["one for all", "one a channel"])
def test_one_channel_gives_the_features_of_three_for_a_grey_film(narrow_file, film, normalisation):
    three, prepare_three = load_inception_v3(narrow_file, num_channels=3, **normalisation, **NARROW)
    one, prepare_one = load_inception_v3(narrow_file, **normalisation, **NARROW)
    assert prepare_three(film)["pixel_values"][0].shape == (3, 96, 96)
    assert prepare_one(film)["pixel_values"][0].shape == (1, 96, 96)
    expected = grey_features(three, prepare_three, film)
    assert difference(grey_features(one, prepare_one, film), expected) < 1e-5


def test_real_weights_see_in_a_real_film_the_same_with_one_channel_and_three(shared):
    film = Image.open(next((shared / "data/kermany-originals").rglob("*.jpeg")))
    file = shared / "weights/inception_v3_nsfwjs_f16.safetensors"
    known = {"image_mean": 0.0, "image_std": 1.0, "avg_pool_count_include_pad": False}
    three, prepare_three = load_inception_v3(file, num_channels=3, **known)
    one, prepare_one = load_inception_v3(file, **known)
    assert one.dtype == torch.float32 and not one.training
    expected = grey_features(three, prepare_three, film)
    assert expected.std() > 0.01
    assert difference(grey_features(one, prepare_one, film), expected) < 1e-5


def test_three_channel_weights_become_the_exact_sum(narrow, narrow_file):
    model, _ = load_inception_v3(narrow_file, **HALF, **NARROW)
    first = next(model.parameters())
    torch.testing.assert_close(first, narrow["Conv2d_1a_3x3.conv.weight"].sum(1, keepdim=True), rtol=0, atol=1e-6)


def test_three_channels_give_the_features_of_one(folder, narrow, film):
    grey = narrow | {"Conv2d_1a_3x3.conv.weight": narrow["Conv2d_1a_3x3.conv.weight"][:, :1].contiguous()}
    save_file(grey, folder / "grey.safetensors")
    known = {"image_mean": 0.4, "image_std": 0.3, **NARROW}
    one, prepare_one = load_inception_v3(folder / "grey.safetensors", **known)
    three, prepare_three = load_inception_v3(folder / "grey.safetensors", num_channels=3, **known)
    assert prepare_three.image_mean == pytest.approx([0.4] * 3)
    expected = grey_features(one, prepare_one, film)
    assert difference(grey_features(three, prepare_three, film), expected) < 1e-5


# Our own checkpoints


@pytest.mark.parametrize("channels", [1, 3])
def test_a_checkpoint_loads_with_its_features_and_its_normalisation(checkpoint, film, channels):
    path, backbone, image_processor = checkpoint
    model, prepare = load_inception_v3(path, num_channels=channels)
    assert prepare.image_mean == pytest.approx([0.449] * channels)
    assert prepare.image_std == pytest.approx([0.226] * channels)
    assert prepare.size == {"height": 96, "width": 96}
    expected = grey_features(backbone, image_processor, film)
    assert difference(grey_features(model, prepare, film), expected) < 1e-5


def test_a_checkpoint_keeps_its_grey_channel_and_gets_a_new_head(checkpoint):
    model, _ = load_inception_v3(str(checkpoint[0]), dropout=0.1, id2label={0: "NORMAL", 1: "PNEUMONIA"})
    assert model.config.num_channels == 1 and model.config.depth_multiplier == 0.1
    assert model.config.dropout == 0.1
    assert model.config.label2id == {"NORMAL": 0, "PNEUMONIA": 1}
    assert not model.training


# The Hub


@pytest.fixture(scope="module")
def from_hub(folder, narrow_file, checkpoint, film):
    """What a fresh process gets by Hub id: means, deviations and features of the film, or the error."""
    film.save(folder / "film.png")
    weights = {"model.safetensors": narrow_file.read_bytes(), "config.json": b'{"architecture": "inception_v3"}'}
    ids = ["timm/inception_v3.tv_in1k", "timm/inception_v3.gluon_in1k", "org/cxr-inception", "org/other", "org/gone"]
    with LoopbackHub() as hub:
        for repo_id in (*ids[:2], "org/other"):
            hub.add_repo(repo_id, weights)
        hub.add_repo("org/cxr-inception", {file.name: file.read_bytes() for file in checkpoint[0].iterdir()})
        script = f"""
import pickle, torch
from PIL import Image
from cxr_backbone.weights import load_inception_v3
found = {{}}
for source in {ids}:
    known = {{}} if source == "org/cxr-inception" else {NARROW}
    try:
        model, processor = load_inception_v3(source, **known)
        pixel_values = processor(Image.open({str(folder / "film.png")!r}), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = model(pixel_values).pooler_output[0].numpy()
        found[source] = processor.image_mean, processor.image_std, features
    except Exception as error:
        found[source] = type(error).__name__, str(error)
pickle.dump(found, open({str(folder / "from_hub.pickle")!r}, "wb"))
"""
        environment = hub.environment(folder / "home")
        process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return pickle.loads((folder / "from_hub.pickle").read_bytes()), hub.requests


@pytest.mark.parametrize(
    ("repo_id", "normalisation", "mean", "std"),
    [
        ("timm/inception_v3.tv_in1k", HALF, 0.5, 0.5),
        ("timm/inception_v3.gluon_in1k", IMAGENET, 0.449, 0.226),
    ],
)
def test_a_hub_id_of_timm_knows_its_normalisation(from_hub, narrow_file, film, repo_id, normalisation, mean, std):
    found_mean, found_std, features = from_hub[0][repo_id]
    assert (found_mean, found_std) == (pytest.approx([mean]), pytest.approx([std]))
    three, prepare = load_inception_v3(narrow_file, num_channels=3, **normalisation, **NARROW)
    assert difference(features, grey_features(three, prepare, film)) < 1e-5


def test_the_hub_is_asked_for_nothing_but_the_weights_of_a_known_id(from_hub):
    requests = [request for request in from_hub[1] if "inception_v3.tv_in1k" in request]
    assert requests and all(request.endswith("model.safetensors") for request in requests)


def test_a_hub_id_of_our_own_checkpoint_loads(from_hub, checkpoint, film):
    mean, _, features = from_hub[0]["org/cxr-inception"]
    assert mean == pytest.approx([0.449])
    assert difference(features, grey_features(*checkpoint[1:], film)) < 1e-5


def test_a_hub_id_with_unknown_normalisation_or_without_repository_is_named(from_hub):
    kind, message = from_hub[0]["org/other"]
    assert kind == "ValueError" and message.startswith("org/other does not say which image_mean")
    kind, message = from_hub[0]["org/gone"]
    assert kind == "RepositoryNotFoundError" and "org/gone" in message


# What goes wrong, and what names it


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pth", "gone.h5", "gone.keras"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"There is no weights file .*{name}\."):
        load_inception_v3(tmp_path / name)


@pytest.mark.parametrize("source", ["inception_v3", "a/b/c", "org/", "weights.zip", "/"])
def test_what_is_no_file_no_folder_and_no_hub_id_is_named(source):
    with pytest.raises(ValueError, match=rf"^{source} is not a weights file .* and not a Hub id such as timm/"):
        load_inception_v3(source, **HALF)


def test_a_folder_of_another_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match=r"is not a weights file .*, not a folder with a CXRInception checkpoint"):
        load_inception_v3(tmp_path)


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth", "broken.bin", "broken.h5", "broken.keras"])
@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "text", "truncated"])
def test_a_damaged_file_is_named(folder, narrow_file, tmp_path, name, content):
    if content is None:
        content = narrow_file.read_bytes()[:100_000]
        if name.endswith((".pth", ".bin")):
            torch.save(load_file(narrow_file), tmp_path / "whole.pth")
            content = (tmp_path / "whole.pth").read_bytes()[:100_000]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} can't be read as (Keras )?weights: ."):
        load_inception_v3(tmp_path / name, **HALF)


@pytest.mark.parametrize("save", [torch.save, lambda it, path: path.write_bytes(pickle.dumps(it, protocol=2))])
def test_a_pickle_with_code_in_it_is_refused_and_the_code_is_not_run(tmp_path, save):
    harmful = {"Conv2d_1a_3x3.conv.weight": Payload(tmp_path / "marker")}
    save(harmful, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful\.pth can't be read as weights: "):
        load_inception_v3(tmp_path / "harmful.pth", **HALF)
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(harmful))
    assert (tmp_path / "marker").exists()  # whoever unpickles it runs it


def test_a_torch_file_without_a_state_dict_is_named(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt is no state dict; expected a dictionary of tensors"):
        load_inception_v3(tmp_path / "list.pt", **HALF)


def test_a_keras_file_of_another_network_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["conv2d/conv2d/kernel:0"] = np.ones((3, 3, 3, 8), dtype=np.float32)
    with pytest.raises(ValueError, match=r"other\.h5 holds 1 named convolutions and 0 BatchNorm layers; .* has 94"):
        load_inception_v3(tmp_path / "other.h5")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"other\.keras can't be read as Keras weights: .*model\.weights\.h5"):
        load_inception_v3(tmp_path / "other.keras")


def test_a_missing_tensor_is_named(narrow, tmp_path):
    gone = {"Mixed_6a.branch3x3.bn.bias", "Mixed_7c.branch_pool.conv.weight"}
    save_file({name: tensor for name, tensor in narrow.items() if name not in gone}, tmp_path / "part.safetensors")
    message = r"part\.safetensors lacks 2 of the 470 tensors .* the first of them 'Mixed_6a\.branch3x3\.bn\.bias'\."
    with pytest.raises(ValueError, match=message):
        load_inception_v3(tmp_path / "part.safetensors", **HALF, **NARROW)


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("Mixed_7c.branch1x1.bn.bias", lambda it: it[1:], r"stage4.*bias has shape \(31,\); expected \(32,\)"),
        ("Conv2d_1a_3x3.conv.weight", lambda it: it[:, :, 1:], r"stem.*weight has shape \(16, \d, 2, 3\)"),
        ("Conv2d_1a_3x3.conv.weight", lambda it: it[:5], r"stem.*weight has shape \(5, "),
        ("Conv2d_1a_3x3.conv.weight", lambda it: it[0, 0, 0], r"stem.*weight has shape \(3,\)"),
        ("Conv2d_1a_3x3.bn.running_mean", lambda it: it[1:], r"stem.*running_mean has shape \(15,\)"),
        ("Mixed_5b.branch1x1.conv.weight", lambda it: it * np.nan, r"stage2.*weight holds NaN or infinity"),
        ("Conv2d_1a_3x3.conv.weight", lambda it: it / 0, r"stem.*weight holds NaN or infinity"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(narrow, tmp_path, name, replace, message):
    save_file(narrow | {name: replace(narrow[name]).contiguous()}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=rf"odd\.safetensors: the tensor for encoder\.stages\.{message}"):
        load_inception_v3(tmp_path / "odd.safetensors", **HALF, **NARROW)


def test_another_width_is_named(narrow_file):
    message = r"narrow\.safetensors: the tensor for .* has shape .*; expected .* \(depth_multiplier=0\.2\)"
    with pytest.raises(ValueError, match=message):
        load_inception_v3(narrow_file, **HALF, depth_multiplier=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"narrow\.safetensors does not say which image_mean its weights expect; pass image_mean"),
        ({"image_mean": 0.5}, r"narrow\.safetensors does not say which image_std"),
        ({"image_mean": [0.4, 0.5], "image_std": 0.5}, r"image_mean has 2 values; .*narrow\.safetensors takes 3"),
        ({"image_mean": 0.5, "image_std": [0.5] * 4}, r"image_std has 4 values; .*narrow\.safetensors takes 3"),
        ({"image_mean": 0.5, "image_std": 0.0}, "image_std"),
        ({**HALF, "droput": 0.1}, "has no key 'droput'; did you mean 'dropout'"),
    ],
)
def test_an_argument_that_is_missing_or_wrong_is_named(narrow_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_inception_v3(narrow_file, **arguments, **NARROW)
