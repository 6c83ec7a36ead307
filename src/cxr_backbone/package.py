"""What a finished run puts on the Hub, as one folder that needs nothing else."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cxr_backbone.card import is_control_run, write_card
from cxr_backbone.configuration_cxr_inception import SMALLEST_IMAGE, CXRInceptionConfig
from cxr_backbone.guard import FILE as GUARD
from cxr_backbone.hub import check_repo_id
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor

WEIGHTS = "model.safetensors"
CODE = sorted(file.name for file in Path(__file__).parent.glob("*_cxr_inception.py"))  # what the Hub runs alone
MODEL_FILES = ("config.json", "preprocessor_config.json", WEIGHTS, GUARD, *CODE)


def assemble(run: str | Path, *, repo_id: str, template: Path, licence: Path, float16: bool = False) -> Path:
    """Write the folder `hub/` of a finished run, afresh: all of it can be published, and nothing else of the run.

    It holds the fine-tuned model (`model.safetensors`, `config.json`, `preprocessor_config.json`, the input check
    `guard.safetensors` and the four code files), `README.md` (the card), `metrics.json`, `figures/*.png`, `LICENSE` and
    `input_contract.json`. Films, predictions and the ids of films and patients stay in the run.

    Args:
        run: the run directory of a training.
        repo_id: what the model will be called on the Hub; the card's title.
        template: the card as a Jinja template, `model_card.md`.
        licence: of code and weights.
        float16: store the weights in half as many bytes. They are still computed in float32, as config.json says.

    Returns:
        The folder.

    Raises:
        ValueError: the run is not finished; the message names the file that it lacks. Or `repo_id` is no org/name, or a
            weight too large for float16.
    """
    check_repo_id(repo_id)
    run = Path(run)
    fine_tuned, folder = run / "fine_tuned", run / "hub"
    for file in (run / "metrics.json", *(fine_tuned / name for name in MODEL_FILES)):
        if not file.is_file():
            raise ValueError(f"{file} is missing; expected the run directory of a training that has come to its end.")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for name in MODEL_FILES:
        shutil.copyfile(fine_tuned / name, folder / name)
    if float16:
        _store_in_float16(folder / WEIGHTS)
    shutil.copyfile(run / "metrics.json", folder / "metrics.json")
    shutil.copyfile(licence, folder / "LICENSE")
    for picture in sorted((run / "figures").glob("*.png")):
        (folder / "figures").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "figures" / picture.name)
    contract = describe_inputs(
        CXRInceptionConfig.from_pretrained(folder), CXRInceptionImageProcessor.from_pretrained(folder)
    )
    (folder / "input_contract.json").write_text(json.dumps(contract, indent=2) + "\n")
    write_card(run, folder, template, repo_id)
    return folder


def check_worth_publishing(data: Mapping[str, Any]) -> None:
    """Refuse a model that nobody must take for a real one (`card.is_control_run`).

    Args:
        data: the data section of the run's config.yaml.

    Raises:
        ValueError: it is one.
    """
    if is_control_run(data):
        raise ValueError("A model of data.permute_labels or of data.protocol selected_on_test is not to be published.")


def describe_inputs(config: CXRInceptionConfig, image_processor: CXRInceptionImageProcessor) -> dict[str, Any]:
    """What goes into a model and what comes out, for machines to read: channels, size, type, range, meaning.

    `image` is what the image processor takes. `network_data_format` is that of a MONAI bundle's metadata:
    `pixel_values`, what the image processor gives and the network takes, and `logits`, what the network gives.
    """
    means, deviations = image_processor.image_mean, image_processor.image_std
    black = [(0 - mean) / deviation for mean, deviation in zip(means, deviations, strict=True)]
    white = [(1 - mean) / deviation for mean, deviation in zip(means, deviations, strict=True)]
    multi_label = config.problem_type == "multi_label_classification"
    channels = [str(channel) for channel in range(config.num_channels)]
    radiograph = {"type": "image", "format": "magnitude", "modality": ["CR", "DX"]}
    return {
        "image": radiograph
        | {
            "num_channels": [1, 3, 4],
            "spatial_shape": ["any", "any"],
            "dtype": ["uint8", "uint16", "int16", "int32", "float32", "float64"],
            "value_range": "0 to 255, floats 0 to 1; anything else is windowed from its minimum to its maximum",
            "meaning": "frontal chest radiograph, air dark and bone bright (MONOCHROME2); colours become luma; "
            "opacity, the fourth channel, is composited over black; the aspect ratio is not kept",
        },
        "network_data_format": {
            "inputs": {
                "pixel_values": radiograph
                | {
                    "num_channels": config.num_channels,
                    "spatial_shape": [image_processor.size["height"], image_processor.size["width"]],
                    "smallest_spatial_shape": [SMALLEST_IMAGE, SMALLEST_IMAGE],
                    "dtype": "float32",
                    "value_range": [min(black), max(white)],
                    "is_patch_data": False,
                    "channel_def": dict.fromkeys(channels, "grey"),
                    "meaning": f"(batch, channels, height, width); black is {black}, white is {white}, one a channel",
                }
            },
            "outputs": {
                "logits": {
                    "type": "logits",
                    "format": "classes",
                    "num_channels": config.num_labels,
                    "spatial_shape": [],
                    "dtype": "float32",
                    "is_patch_data": False,
                    "channel_def": {str(index): label for index, label in (config.id2label or {}).items()},
                    "activation": "sigmoid" if multi_label else "softmax",
                    "temperature": config.temperature,
                    "meaning": "(batch, labels); "
                    + ("a film may have several labels or none" if multi_label else "a film has one label")
                    + "; already divided by the temperature, if there is one",
                }
            },
        },
    }


def _store_in_float16(file: Path) -> None:
    weights = load_file(file)
    for name, values in weights.items():
        if values.is_floating_point():
            weights[name] = values.half()
        if not weights[name].isfinite().all():
            raise ValueError(f"{name} holds values that float16 does not reach (65,504); store the weights in float32.")
    save_file(weights, file, metadata={"format": "pt"})
