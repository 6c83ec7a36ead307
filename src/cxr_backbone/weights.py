"""Inception V3 weights of timm, torchvision and Keras as a CXRInception backbone, with the same outputs."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cxr_backbone.configuration_cxr_inception import CXRInceptionConfig
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.layers_cxr_inception import CXRInceptionConvLayer
from cxr_backbone.modeling_cxr_inception import CXRInceptionModel, CXRInceptionPreTrainedModel

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value or one a channel
AnyModel = TypeVar("AnyModel", bound=CXRInceptionPreTrainedModel)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Mean and standard deviation ([0, 1] scale) that each published set of weights was trained with; source: timm's
# pretrained_cfg. torchvision's `transform_input` turns ImageNet's mean and std into 0.5, so its weights take 0.5.
HUB_NORMALISATION: dict[str, Normalisation] = {
    "timm/inception_v3.tv_in1k": ((0.5,), (0.5,)),
    "timm/inception_v3.tf_in1k": ((0.5,), (0.5,)),
    "timm/inception_v3.tf_adv_in1k": ((0.5,), (0.5,)),
    "timm/inception_v3.gluon_in1k": (IMAGENET_MEAN, IMAGENET_STD),
}
KERAS_NORMALISATION: Normalisation = ((0.5,), (0.5,))  # keras.applications scales pixels to [-1, 1]

TORCH_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
KERAS_SUFFIXES = (".h5", ".keras")
MOST_TIMES_ITS_SIZE = 10  # weights hardly shrink: what unpacks to more than this is made to fill the memory


def load_inception_v3(
    source: str | Path,
    *,
    image_mean: float | list[float] | None = None,
    image_std: float | list[float] | None = None,
    **config_overrides,
) -> tuple[CXRInceptionModel, CXRInceptionImageProcessor]:
    """A backbone with published Inception V3 weights, and the image processor that goes with it.

    Args:
        source: a Hub id of timm (`timm/inception_v3.tv_in1k`, `….tf_in1k`, `….gluon_in1k`), a `.safetensors` or torch
            state dict file with timm's / torchvision's parameter names, a Keras `.h5` / `.keras` file (needs h5py), or
            a CXRInception checkpoint (folder or Hub id).
        image_mean, image_std: one value or one a channel, on the [0, 1] scale, that the weights expect. Known for the
            Hub ids above, for Keras and for a CXRInception checkpoint; needed for any other file.
        config_overrides: fields of `CXRInceptionConfig`. With `num_channels=1` (the default) the first convolution is
            summed over its input channels, which gives the network that sees the grey image in each of them; means and
            deviations that differ a channel are folded in exactly. Average pooling counts its padding, except for
            Keras; set `avg_pool_count_include_pad` for a file that was converted from Keras.

    Returns:
        The model in eval mode, float32, and its image processor.

    Raises:
        FileNotFoundError: if a file is meant and does not exist.
        ValueError: if the file can't be read, tensors are missing or misshapen, or mean and std are unknown. The
            message names the file and the tensor.
        OSError: (of huggingface_hub and transformers) if the Hub can't be reached or a repository lacks a file.
    """
    published = _read_checkpoint(source) if _is_checkpoint(source) else _read_published(source)
    known_mean, known_std = published.normalisation or (None, None)
    mean = _as_channels(image_mean if image_mean is not None else known_mean, "image_mean", source)
    std = _as_channels(image_std if image_std is not None else known_std, "image_std", source)

    config = CXRInceptionConfig(**(published.config | config_overrides))
    model = CXRInceptionModel(config)
    state_dict = published.tensors
    if published.names_are_theirs:
        state_dict = _rename(state_dict, model, source)
    _check(model, state_dict, source)
    channels = state_dict[FIRST_CONVOLUTION].shape[1]
    if not min(std) > 0:
        raise ValueError(f"image_std={std} is not allowed; expected positive values.")
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} has {len(values)} values; {source} takes {channels} channels.")
    mean, std = adapt_input_channels(state_dict, config.num_channels, mean, std)
    model.load_state_dict(state_dict, strict=False)  # not strict: num_batches_tracked is nobody's weight
    image_processor = CXRInceptionImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        num_channels=config.num_channels,
        image_mean=mean,
        image_std=std,
    )
    return model.eval(), image_processor


def open_checkpoint(source: str | Path, model_class: type[AnyModel]) -> tuple[AnyModel, CXRInceptionImageProcessor]:
    """A CXRInception checkpoint (folder or Hub id) and its image processor. Nothing in it is run: weights come from
    safetensors, classes from this package.

    Raises:
        ValueError: a folder without `model.safetensors`, or anything in it that can't be read.
        OSError, StrictDataclassError: (of transformers) the Hub can't be reached; a value that is not allowed.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "model.safetensors").is_file():  # an index could name files of any folder
        raise ValueError(f"{source} has no model.safetensors; expected all weights in this file.")
    try:
        # There is no attention in it; a config could still name code of the Hub for that.
        model = model_class.from_pretrained(source, use_safetensors=True, attn_implementation="eager")
        return model, CXRInceptionImageProcessor.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError):  # they name the source or the field
        raise
    except Exception as error:  # what is damaged or made to harm raises half a dozen kinds
        raise ValueError(f"{source} can't be read as a checkpoint: {_reason(error)}") from error


def adapt_input_channels(
    state_dict: dict[str, Tensor], num_channels: int, mean: list[float], std: list[float]
) -> tuple[list[float], list[float]]:
    """Make the first convolution of `state_dict` (our names, changed in place) take `num_channels` grey channels.

    The network that results gives the same outputs for a grey image as the original gives for that image in each of
    its channels, normalised by its own `mean` and `std` (one value a channel).

    Returns:
        mean and std (one value a new channel) to normalise the image with.
    """
    weight = state_dict[FIRST_CONVOLUTION].double()  # (out, in, 3, 3)
    channels = weight.shape[1]
    old_mean, old_std = (torch.tensor(values, dtype=torch.float64).expand(channels) for values in (mean, std))
    if channels == num_channels:
        return old_mean.tolist(), old_std.tolist()

    # The network sees (grey - mean_c) / std_c in channel c. Written with one normalised grey z = (grey - m) / s:
    #     sum_c W_c * (s z + m - mean_c) / std_c  =  (s sum_c W_c / std_c) * z  -  offset
    # The offset is the same at every position, since this convolution has no padding; BatchNorm's mean takes it up.
    new_mean, new_std = old_mean.mean(), old_std.mean()
    per_channel = weight / old_std.view(1, -1, 1, 1)
    offset = (per_channel * (old_mean - new_mean).view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    summed = per_channel.sum(dim=1, keepdim=True) * new_std  # (out, 1, 3, 3)
    # Several grey channels that are all the same image share the sum.
    state_dict[FIRST_CONVOLUTION] = (summed / num_channels).expand(-1, num_channels, -1, -1).contiguous().float()
    state_dict[FIRST_MEAN] = (state_dict[FIRST_MEAN].double() + offset).float()
    return [new_mean.item()] * num_channels, [new_std.item()] * num_channels


FIRST_CONVOLUTION = "encoder.stages.stem.layers.0.convolution.weight"
FIRST_MEAN = "encoder.stages.stem.layers.0.normalization.running_mean"


class _Published(NamedTuple):
    tensors: dict[str, Tensor]
    names_are_theirs: bool  # timm's and torchvision's parameter names, not ours
    normalisation: Normalisation | None  # None: not known
    config: dict[str, Any]


def _is_checkpoint(source: str | Path) -> bool:
    """Whether `source` is a CXRInception folder or Hub id. The Hub is not asked about what is known to be timm's."""
    if Path(source).is_dir():
        config = Path(source) / "config.json"
    elif (
        str(source) in HUB_NORMALISATION
        or Path(source).suffix in KERAS_SUFFIXES + TORCH_SUFFIXES
        or not is_hub_id(source)
    ):
        return False
    else:
        config = Path(hf_hub_download(str(source), "config.json"))
    if not config.is_file():
        return False
    try:
        settings = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} can't be read as JSON: {_reason(error)}") from error
    return isinstance(settings, dict) and settings.get("model_type") == CXRInceptionConfig.model_type


def _read_checkpoint(source: str | Path) -> _Published:
    model, image_processor = open_checkpoint(source, CXRInceptionModel)
    fields = (
        "depth_multiplier",
        "batch_norm_eps",
        "avg_pool_count_include_pad",
        "num_channels",
        "image_size",
    )
    return _Published(
        dict(model.state_dict()),
        False,
        (tuple(image_processor.image_mean), tuple(image_processor.image_std)),
        {field: getattr(model.config, field) for field in fields},
    )


def _read_published(source: str | Path) -> _Published:
    path = Path(source)
    if path.suffix in KERAS_SUFFIXES + TORCH_SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"There is no weights file {path}.")
        if path.suffix in KERAS_SUFFIXES:
            return _Published(_read_keras(path), True, KERAS_NORMALISATION, {"avg_pool_count_include_pad": False})
        return _Published(_read_torch(path), True, None, {})
    if path.is_dir() or not is_hub_id(source):
        raise ValueError(
            f"{source!s} is not a weights file ({', '.join(TORCH_SUFFIXES + KERAS_SUFFIXES)}), not a folder with a "
            f"CXRInception checkpoint, and not a Hub id such as {next(iter(HUB_NORMALISATION))}."
        )
    file = Path(hf_hub_download(str(source), "model.safetensors"))
    return _Published(_read_torch(file), True, HUB_NORMALISATION.get(str(source)), {})


def is_hub_id(source: str | Path) -> bool:
    """By its look alone: org/name."""
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return str(source).count("/") == 1


def _as_channels(values: float | list[float] | tuple[float, ...] | None, name: str, source: str | Path) -> list[float]:
    if values is None:
        raise ValueError(
            f"{source} does not say which {name} its weights expect; pass {name} ([0, 1] scale, for example 0.5). A "
            "wrong value would go unnoticed and cost accuracy."
        )
    return [float(value) for value in (values if isinstance(values, list | tuple) else [values])]


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_unpacked(path, sum(entry.file_size for entry in archive.infolist()))
        # weights_only: tensors and nothing else; a pickle that would run code is refused.
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        zipfile.BadZipFile,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{path} can't be read as weights: {_reason(error)}") from error
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise ValueError(f"{path} is no state dict; expected a dictionary of tensors by name.")
    return state_dict


def _check_unpacked(path: Path, num_bytes: int) -> None:
    if num_bytes > MOST_TIMES_ITS_SIZE * path.stat().st_size:
        raise ValueError(f"it would unpack to {num_bytes:,} bytes, more than {MOST_TIMES_ITS_SIZE} times its size")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_keras(path: Path) -> dict[str, Tensor]:
    """The 94 convolutions with their BatchNorm, from Keras's files, under torchvision's names."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"Reading {path} needs h5py: pip install 'cxr-backbone[keras]'.") from error
    layers: dict[str, dict[str, np.ndarray]] = {}
    try:
        content: Any = path
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                _check_unpacked(path, archive.getinfo("model.weights.h5").file_size)
                content = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(content) as file:
            arrays: list[Any] = []
            file.visititems(lambda name, item: arrays.append(item) if isinstance(item, h5py.Dataset) else None)
            # HDF5 can lay an array into any file of this machine, and needs no room for one that is all zeros.
            if outside := [array.name for array in arrays if array.external or array.is_virtual]:
                raise ValueError(f"its array {outside[0]} lies in another file")
            _check_unpacked(path, sum(array.nbytes for array in arrays))
            for array in arrays:
                _collect_keras(layers, array)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} can't be read as Keras weights: {_reason(error)}") from error

    # Convolution and BatchNorm belong together by their order of creation, which only the layers' numbers tell.
    convolutions = sorted((name for name, tensors in layers.items() if tensors["first"].ndim == 4), key=_layer_number)
    norms = sorted((name for name, tensors in layers.items() if "moving_variance" in tensors), key=_layer_number)
    if min(len(convolutions), len(norms)) < len(CONV_NAMES):
        raise ValueError(
            f"{path} holds {len(convolutions)} named convolutions and {len(norms)} BatchNorm layers; an Inception V3 "
            f"has {len(CONV_NAMES)} of each. (Keras 3.0 to 3.5 names no layers: save the file again with 3.6 or later.)"
        )
    tensors = {}
    for theirs, convolution, norm in zip(CONV_NAMES, convolutions, norms, strict=False):
        kernel = layers[convolution]["first"].transpose(
            3, 2, 0, 1
        )  # (height, width, in, out) to (out, in, height, width)
        tensors[f"{theirs}.conv.weight"] = kernel
        tensors[f"{theirs}.bn.bias"] = layers[norm]["beta"]
        tensors[f"{theirs}.bn.weight"] = layers[norm].get("gamma", np.ones_like(layers[norm]["beta"]))
        tensors[f"{theirs}.bn.running_mean"] = layers[norm]["moving_mean"]
        tensors[f"{theirs}.bn.running_var"] = layers[norm]["moving_variance"]
    return {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}


def _collect_keras(layers: dict[str, dict[str, np.ndarray]], dataset: Any) -> None:
    """Add one HDF5 data set to its layer: {"first": …} for a kernel, {"first", "gamma", "beta", …} for BatchNorm."""
    group = dataset.parent
    tensor = dataset.name.rsplit("/", 1)[1].removesuffix(":0")
    if (
        tensor.isdigit()
    ):  # Keras 3: …/conv2d_5/vars/0. The group is numbered by graph order; the true name is an attribute.
        layer = group.attrs.get("name")
        count = len(group)
        names = {
            1: ["first"],
            3: ["beta", "moving_mean", "moving_variance"],
            4: ["gamma", "beta", "moving_mean", "moving_variance"],
        }
        if layer is None or int(tensor) >= len(names.get(count, [])):
            return
        tensor = names[count][int(tensor)]
    else:  # Keras 2 and legacy files: …/conv2d_5/kernel:0
        layer = group.name.rsplit("/", 1)[1]
    tensors = layers.setdefault(str(layer), {})
    tensors[tensor] = dataset[()]
    tensors.setdefault("first", tensors[tensor])


def _layer_number(name: str) -> int:
    """conv2d_12 is 12; conv2d, the first, is 0."""
    digits = re.search(r"_(\d+)$", name)
    return int(digits[1]) if digits else 0


def _rename(published: dict[str, Tensor], model: CXRInceptionModel, source: str | Path) -> dict[str, Tensor]:
    """The published tensors under our names. Tensors of the classifier and the auxiliary head are left behind."""
    layers = [name for name, module in model.named_modules() if isinstance(module, CXRInceptionConvLayer)]
    names = {}
    for theirs, ours in zip(CONV_NAMES, layers, strict=True):
        names[f"{theirs}.conv.weight"] = f"{ours}.convolution.weight"
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            names[f"{theirs}.bn.{tensor}"] = f"{ours}.normalization.{tensor}"
    if missing := [name for name in names if name not in published]:
        raise ValueError(
            f"{source} lacks {len(missing)} of the {len(names)} tensors of an Inception V3 in timm's / torchvision's "
            f"names, the first of them {missing[0]!r}."
        )
    return {ours: published[theirs].float() for theirs, ours in names.items()}


def _check(model: CXRInceptionModel, state_dict: dict[str, Tensor], source: str | Path) -> None:
    for name, own in model.state_dict().items():
        if name not in state_dict:
            continue  # num_batches_tracked is nobody's weight
        tensor, expected = state_dict[name], tuple(own.shape)
        if name == FIRST_CONVOLUTION and tensor.ndim == 4:  # takes any number of channels, see adapt_input_channels
            expected = (expected[0], tensor.shape[1], *expected[2:])
        if tensor.shape != expected:
            raise ValueError(
                f"{source}: the tensor for {name} has shape {tuple(tensor.shape)}; expected "
                f"{expected} (depth_multiplier={model.config.depth_multiplier})."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: the tensor for {name} holds NaN or infinity.")


def _block_names(block: str, layers: str) -> list[str]:
    return [f"{block}.branch{layer}" for layer in layers.split()]


_A = "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
_B = "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3"
_C = "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool"
_D = "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
_E = "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool"

# The 94 convolutions under timm's and torchvision's names, in the order of our table, which is also Keras's.
CONV_NAMES = [
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *(name for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d") for name in _block_names(block, _A)),
    *_block_names("Mixed_6a", _B),
    *(name for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e") for name in _block_names(block, _C)),
    *_block_names("Mixed_7a", _D),
    *(name for block in ("Mixed_7b", "Mixed_7c") for name in _block_names(block, _E)),
]
