"""Reference features of Inception V3 from torchvision, timm and Keras, and the inputs that reproduce them.

The peers are not dependencies of this project. In an environment that has one of them:

    python tests/references/inception_v3.py torchvision|timm|keras out.npz [--save PATH ...]

Weights and images are drawn with numpy from fixed seeds, so a test redraws them by ``draw_weights`` and
``draw_image`` and only the features, (2048,) float32 per size, are stored. ``--save`` (Keras, repeatable)
also writes the model, in the format that the ending names: ``.keras``, ``.weights.h5`` or legacy ``.h5``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import numpy as np

# (height, width): the native size, the smallest that fits, and one that is not square.
SIZES = ((299, 299), (75, 75), (181, 243))

Weights = dict[str, np.ndarray]
Forward = Callable[[np.ndarray], np.ndarray]


def draw_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: bool = True) -> Weights:
    """Draw a float32 tensor per name, of the kind that the torchvision parameter name says.

    ``scale=False`` draws every ``bn.weight`` as ones, as in Keras, whose Inception V3 has no BatchNorm scale.
    """
    return {name: _draw(name, shape, seed, scale).astype(np.float32) for name, shape in shapes.items()}


def draw_image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Draw a float32 image in [-1, 1], (1, channels, height, width): flat patches under fine noise."""
    rng = np.random.default_rng((seed, height, width, channels))
    # Patches, because noise alone averages out and then every image pools to nearly the same features.
    grid = rng.uniform(-0.8, 0.8, (channels, 6, 6))
    patches = grid[:, np.arange(height)[:, None] * 6 // height, np.arange(width) * 6 // width]
    return (patches + rng.uniform(-0.2, 0.2, patches.shape))[None].astype(np.float32)


def feature_key(height: int, width: int) -> str:
    """Name the features of one size in a reference file."""
    return f"features_{height}x{width}"


def backbone_shapes(channels: int = 3) -> dict[str, tuple[int, ...]]:
    """Map torchvision's names of the backbone's tensors to their shapes, conv weights (out, in, kh, kw)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in conv_shapes(channels).items():
        shapes[f"{name}.conv.weight"] = shape
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{tensor}"] = shape[:1]
    return shapes


def conv_shapes(channels: int = 3) -> dict[str, tuple[int, int, int, int]]:
    """Map the 94 conv blocks to their weight shapes, in torchvision's order, which is Keras' creation order.

    Source: torchvision.models.inception, keras.applications.inception_v3.
    """
    shapes: dict[str, tuple[int, int, int, int]] = {}
    for block, in_channels, convs in _blocks(channels):
        before = in_channels
        for name, source, out_channels, (height, width) in convs:
            # A conv reads the block's input ("in"), the conv listed just before it (""), or a named one.
            inputs = {"in": in_channels, "": before}
            read = inputs[source] if source in inputs else shapes[f"{block}.{source}"][0]
            shapes[f"{block}.{name}" if name else block] = (out_channels, read, height, width)
            before = out_channels
    return shapes


def main() -> None:
    """Write one peer's features, and its version, to an .npz file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("peer", choices=("torchvision", "timm", "keras"))
    parser.add_argument("out", help=".npz file to write")
    parser.add_argument("--save", action="append", default=[], metavar="PATH", help="save the Keras model")
    args = parser.parse_args()
    if args.save and args.peer != "keras":
        parser.error("--save needs the peer keras")

    if args.peer == "keras":
        forward, version = _keras(draw_weights(backbone_shapes(), scale=False), args.save)
    else:
        peer = _torchvision if args.peer == "torchvision" else _timm
        forward, version = peer(draw_weights(backbone_shapes()))
    features = {feature_key(*size): forward(draw_image(*size))[0] for size in SIZES}
    np.savez_compressed(args.out, version=np.array(version), **features)
    for key, values in features.items():
        zeros = (values == 0).mean()
        print(f"{version} {key}: mean {values.mean():.3f}, std {values.std():.3f}, zeros {zeros:.3f}")


def _draw(name: str, shape: tuple[int, ...], seed: int, scale: bool) -> np.ndarray:
    # A generator per name keeps a tensor's values independent of which others are drawn, and in what order.
    rng = np.random.default_rng((seed, crc32(name.encode())))
    match name.rpartition(".")[2]:
        case "weight" if len(shape) == 4:
            # He-normal, for the fan in.
            return rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        case "weight":
            return rng.uniform(0.5, 1.5, shape) if scale else np.ones(shape)
        case "running_var":
            return rng.uniform(0.5, 1.5, shape)
        case "bias":
            # Above zero on average, or half of the features at 75 px, a map of one position, are zero.
            return rng.standard_normal(shape) * 0.1 + 0.1
        case "running_mean":
            return rng.standard_normal(shape) * 0.1
    raise ValueError(f"no draw for a tensor named {name!r}")


def _torchvision(weights: Weights) -> tuple[Forward, str]:
    torchvision = importlib.import_module("torchvision")
    model = torchvision.models.inception_v3(weights=None, transform_input=False, init_weights=False).eval()
    _load(model, weights)
    maps: list[Any] = []
    model.Mixed_7c.register_forward_hook(lambda module, inputs, output: maps.append(output))

    def forward(image: np.ndarray) -> np.ndarray:
        torch = importlib.import_module("torch")
        with torch.inference_mode():
            model(torch.from_numpy(image))
            return maps.pop().mean((2, 3)).numpy()

    return forward, f"torchvision {torchvision.__version__}"


def _timm(weights: Weights) -> tuple[Forward, str]:
    timm = importlib.import_module("timm")
    model = timm.create_model("inception_v3", pretrained=False).eval()
    _load(model, weights)

    def forward(image: np.ndarray) -> np.ndarray:
        torch = importlib.import_module("torch")
        with torch.inference_mode():
            return model.forward_features(torch.from_numpy(image)).mean((2, 3)).numpy()

    return forward, f"timm {timm.__version__}"


def _load(model: Any, weights: Weights) -> None:
    """Load drawn weights into a torch peer, and check that only its heads and counters stay undrawn."""
    torch = importlib.import_module("torch")
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    undrawn = [name for name in missing if not re.match(r"fc\.|AuxLogits\.|.*\.num_batches_tracked$", name)]
    if undrawn or unexpected:
        raise ValueError(f"peer and drawn weights differ: undrawn {undrawn}, unexpected {unexpected}")


def _keras(weights: Weights, save_paths: list[str]) -> tuple[Forward, str]:
    # Keras' torch backend pools as TensorFlow does: "same" average pooling leaves the padding uncounted.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = importlib.import_module("keras")
    model = keras.applications.InceptionV3(include_top=False, weights=None, pooling="avg", input_shape=(None, None, 3))
    # model.layers is sorted by depth in the graph; only the number in a layer's name tells creation order.
    convs = sorted((x for x in model.layers if isinstance(x, keras.layers.Conv2D)), key=_number)
    norms = sorted((x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)), key=_number)
    for name, conv, norm in zip(conv_shapes(), convs, norms, strict=True):
        conv.set_weights([weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0)])
        norm.set_weights([weights[f"{name}.bn.{x}"] for x in ("bias", "running_mean", "running_var")])
    for path in save_paths:
        (model.save_weights if path.endswith(".weights.h5") else model.save)(path)

    def forward(image: np.ndarray) -> np.ndarray:
        return model.predict(image.transpose(0, 2, 3, 1), verbose=0)

    return forward, f"keras {keras.__version__} ({keras.backend.backend()})"


def _number(layer: Any) -> int:
    """Read a layer's number from its name: conv2d_12 is 12, conv2d (the first) is 0."""
    digits = re.search(r"_(\d+)$", layer.name)
    return int(digits[1]) if digits else 0


# A conv: its name in the block, what it reads (see conv_shapes), output channels, kernel (height, width).
_Conv = tuple[str, str, int, tuple[int, int]]


def _blocks(channels: int) -> Iterator[tuple[str, int, list[_Conv]]]:
    """Yield every block's name, input channels and convs."""
    yield "Conv2d_1a_3x3", channels, [("", "in", 32, (3, 3))]
    yield "Conv2d_2a_3x3", 32, [("", "in", 32, (3, 3))]
    yield "Conv2d_2b_3x3", 32, [("", "in", 64, (3, 3))]
    yield "Conv2d_3b_1x1", 64, [("", "in", 80, (1, 1))]
    yield "Conv2d_4a_3x3", 80, [("", "in", 192, (3, 3))]
    yield "Mixed_5b", 192, _block_a(32)
    yield "Mixed_5c", 256, _block_a(64)
    yield "Mixed_5d", 288, _block_a(64)
    yield "Mixed_6a", 288, _block_b()
    yield "Mixed_6b", 768, _block_c(128)
    yield "Mixed_6c", 768, _block_c(160)
    yield "Mixed_6d", 768, _block_c(160)
    yield "Mixed_6e", 768, _block_c(192)
    yield "Mixed_7a", 768, _block_d()
    yield "Mixed_7b", 1280, _block_e()
    yield "Mixed_7c", 2048, _block_e()


def _block_a(pool: int) -> list[_Conv]:
    return [
        ("branch1x1", "in", 64, (1, 1)),
        ("branch5x5_1", "in", 48, (1, 1)),
        ("branch5x5_2", "", 64, (5, 5)),
        ("branch3x3dbl_1", "in", 64, (1, 1)),
        ("branch3x3dbl_2", "", 96, (3, 3)),
        ("branch3x3dbl_3", "", 96, (3, 3)),
        ("branch_pool", "in", pool, (1, 1)),
    ]


def _block_b() -> list[_Conv]:
    return [
        ("branch3x3", "in", 384, (3, 3)),
        ("branch3x3dbl_1", "in", 64, (1, 1)),
        ("branch3x3dbl_2", "", 96, (3, 3)),
        ("branch3x3dbl_3", "", 96, (3, 3)),
    ]


def _block_c(inner: int) -> list[_Conv]:
    return [
        ("branch1x1", "in", 192, (1, 1)),
        ("branch7x7_1", "in", inner, (1, 1)),
        ("branch7x7_2", "", inner, (1, 7)),
        ("branch7x7_3", "", 192, (7, 1)),
        ("branch7x7dbl_1", "in", inner, (1, 1)),
        ("branch7x7dbl_2", "", inner, (7, 1)),
        ("branch7x7dbl_3", "", inner, (1, 7)),
        ("branch7x7dbl_4", "", inner, (7, 1)),
        ("branch7x7dbl_5", "", 192, (1, 7)),
        ("branch_pool", "in", 192, (1, 1)),
    ]


def _block_d() -> list[_Conv]:
    return [
        ("branch3x3_1", "in", 192, (1, 1)),
        ("branch3x3_2", "", 320, (3, 3)),
        ("branch7x7x3_1", "in", 192, (1, 1)),
        ("branch7x7x3_2", "", 192, (1, 7)),
        ("branch7x7x3_3", "", 192, (7, 1)),
        ("branch7x7x3_4", "", 192, (3, 3)),
    ]


def _block_e() -> list[_Conv]:
    return [
        ("branch1x1", "in", 320, (1, 1)),
        ("branch3x3_1", "in", 384, (1, 1)),
        ("branch3x3_2a", "branch3x3_1", 384, (1, 3)),
        ("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
        ("branch3x3dbl_1", "in", 448, (1, 1)),
        ("branch3x3dbl_2", "", 384, (3, 3)),
        ("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
        ("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
        ("branch_pool", "in", 192, (1, 1)),
    ]


if __name__ == "__main__":
    main()
