"""A saved model loads in half precision, and onto the devices that a `device_map` names. (No test here has a GPU.)"""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.synthetic import draw_phantom


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A narrow model of two classes and its image processor. (On maps of 1 x 1, which smaller films end in, torch 2.6
    to 2.10 get float16 wrong on a CPU.)"""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = CXRInceptionConfig(depth_multiplier=0.1, image_size=107, num_labels=2)
    CXRInceptionForImageClassification(config).save_pretrained(folder)
    CXRInceptionImageProcessor(size={"height": 107, "width": 107}).save_pretrained(folder)
    return folder


# dtype

# How far a score may move. docs/loading.md has the figures of a real model at full width.
SCORE_TOLERANCE = {torch.float16: 0.005, torch.bfloat16: 0.02}


@pytest.fixture(scope="module")
def pixel_values(folder):
    """Eight phantoms."""
    image_processor = CXRInceptionImageProcessor.from_pretrained(folder)
    films = [Image.fromarray(draw_phantom(seed, opacity=seed % 2 == 0, image_size=96)) for seed in range(8)]
    return image_processor(films, return_tensors="pt")["pixel_values"]


def open_classifier(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def scores(model, pixel_values):
    with torch.inference_mode():
        return model(pixel_values).logits.float().softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_half_the_bytes_and_moves_scores_by_little(dtype, folder, pixel_values, tmp_path):
    whole, half = open_classifier(folder, dtype=torch.float32), open_classifier(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert half.get_memory_footprint() < 0.51 * whole.get_memory_footprint()
    moved = (scores(half, pixel_values) - scores(whole, pixel_values)).abs().max()
    assert 0 < moved < SCORE_TOLERANCE[dtype]
    half.save_pretrained(tmp_path)
    assert open_classifier(tmp_path, dtype="auto").dtype == open_classifier(tmp_path).dtype == dtype


def test_auto_is_the_precision_that_was_saved(folder, pixel_values):
    model = open_classifier(folder, dtype="auto")
    assert model.dtype == torch.float32
    assert torch.equal(scores(model, pixel_values), scores(open_classifier(folder), pixel_values))


def test_integers_are_refused_as_a_dtype(folder):
    with pytest.raises(ValueError, match=r"torch\.int8.*not a floating-point dtype"):
        open_classifier(folder, dtype=torch.int8)


def test_linear_layers_hold_next_to_none_of_the_weights():
    """Which is why a quantizer, which converts linear layers, has nothing to gain here."""
    with torch.device("meta"):
        model = CXRInceptionForImageClassification(CXRInceptionConfig(num_labels=2))
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert 0 < linear < 0.001 * model.num_parameters()


# device_map

STAGE = "cxr_inception.encoder.stages."
DEVICE_MAPS = {
    "auto": "auto",
    "cpu": "cpu",
    "all on one": {"": "cpu"},
    "late stages on disk": {
        **dict.fromkeys((STAGE + "stem", STAGE + "stage1", STAGE + "stage2", "classifier"), "cpu"),
        **dict.fromkeys((STAGE + "stage3", STAGE + "stage4"), "disk"),
    },
    "head on disk": {"cxr_inception": "cpu", "classifier": "disk"},
}


@pytest.mark.parametrize("name", DEVICE_MAPS)
def test_logits_do_not_depend_on_where_the_weights_are(name, folder, pixel_values, tmp_path):
    model = open_classifier(folder, device_map=DEVICE_MAPS[name], offload_folder=tmp_path)
    on_disk = {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}
    assert bool(on_disk) == ("disk" in name)
    with torch.inference_mode():
        logits = model(pixel_values).logits
        expected = open_classifier(folder)(pixel_values).logits
    torch.testing.assert_close(logits, expected)


def test_what_does_not_fit_goes_to_disk_a_whole_stage_at_a_time(folder, pixel_values, tmp_path):
    memory = {"cpu": open_classifier(folder).get_memory_footprint() // 2, "disk": "1GB"}
    model = open_classifier(folder, device_map="auto", max_memory=memory, offload_folder=tmp_path)
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    for stage in model.cxr_inception.encoder.stages.values():
        assert len({parameter.device for parameter in stage.parameters()}) == 1
    assert torch.equal(scores(model, pixel_values), scores(open_classifier(folder), pixel_values))
