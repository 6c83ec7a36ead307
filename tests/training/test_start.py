"""A run starts from published weights, from a checkpoint of its own kind, or from nothing."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from narrow import write_published_weights
from safetensors.torch import load_file

from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import ModelArguments
from cxr_backbone.training.start import start_model
from cxr_backbone.weights import load_inception_v3

NAMES = ["NORMAL", "PNEUMONIA"]
NARROW = {"image_size": 75, "depth_multiplier": 0.1}


@pytest.fixture
def checkpoint(tmp_path):
    """A narrow model with another head, saved as a run saves it."""
    torch.manual_seed(1)
    model, image_processor = start_model(ModelArguments(**NARROW), ["a", "b", "c"])
    image_processor.image_mean = [0.3]
    model.save_pretrained(tmp_path / "checkpoint")
    image_processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def published(tmp_path):
    return write_published_weights(tmp_path / "inception.safetensors")


def test_the_model_is_the_one_that_was_asked_for():
    arguments = ModelArguments(
        **NARROW,
        num_channels=3,
        dropout=0.4,
        head_hidden_sizes=[7],
        label_smoothing=0.1,
        avg_pool_count_include_pad=False,
    )
    model, image_processor = start_model(arguments, NAMES)
    config = model.config
    assert (config.image_size, config.num_channels, config.depth_multiplier) == (75, 3, 0.1)
    assert (config.dropout, config.head_hidden_sizes, config.label_smoothing) == (0.4, [7], 0.1)
    assert config.avg_pool_count_include_pad is False
    assert config.id2label == {0: "NORMAL", 1: "PNEUMONIA"} and config.label2id == {"NORMAL": 0, "PNEUMONIA": 1}
    assert config.problem_type == "single_label_classification"
    assert dict(image_processor.size) == {"height": 75, "width": 75} and image_processor.num_channels == 3
    assert list(image_processor.image_mean) == list(image_processor.image_std) == [0.5] * 3


def test_a_checkpoint_has_its_own_width(checkpoint):
    model, _ = start_model(ModelArguments(init=str(checkpoint), image_size=75), NAMES)
    assert model.config.depth_multiplier == 0.1
    assert (
        ModelArguments().depth_multiplier is None
        and start_model(ModelArguments(), NAMES)[0].config.depth_multiplier == 1
    )


def test_a_start_from_nothing_hangs_on_torchs_seed():
    def start(seed):
        torch.manual_seed(seed)
        return torch.cat([tensor.flatten() for tensor in start_model(ModelArguments(**NARROW), NAMES)[0].parameters()])

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_a_checkpoint_gives_its_backbone_and_normalisation_but_not_its_head(checkpoint):
    model, image_processor = start_model(ModelArguments(**NARROW, init=str(checkpoint)), NAMES)
    saved = load_file(checkpoint / "model.safetensors")
    for name, tensor in model.cxr_inception.state_dict().items():
        assert torch.equal(tensor, saved[f"cxr_inception.{name}"])
    assert model.classifier.output_layer.out_features == 2
    assert list(image_processor.image_mean) == [0.3]


def test_published_weights_give_the_backbone_of_the_converter(published):
    arguments = ModelArguments(**NARROW, init=str(published), image_mean=[0.2], image_std=[0.7])
    model, image_processor = start_model(arguments, NAMES)
    expected, _ = load_inception_v3(published, image_mean=0.2, image_std=0.7, **NARROW)
    pixel_values = torch.rand(2, 1, 75, 75)
    with torch.no_grad():
        assert torch.equal(model.eval().cxr_inception(pixel_values)[1], expected(pixel_values)[1])
    assert [*image_processor.image_mean, *image_processor.image_std] == pytest.approx([0.2, 0.7])


def test_the_real_weights_are_opened_with_their_pooling(shared):
    weights = shared / "weights/inception_v3_nsfwjs_f16.safetensors"
    arguments = ModelArguments(
        init=str(weights), image_size=75, image_mean=[0.0], image_std=[1.0], avg_pool_count_include_pad=False
    )
    model, _ = start_model(arguments, NAMES)
    assert model.config.avg_pool_count_include_pad is False
    assert model.classifier.output_layer.in_features == 2048
    first = load_file(weights)["Conv2d_1a_3x3.conv.weight"].float()
    kernel = model.cxr_inception.encoder.stages["stem"].layers[0].convolution.weight
    torch.testing.assert_close(kernel, first.sum(dim=1, keepdim=True))


def test_a_started_model_is_saved_and_loaded_whole(published, tmp_path):
    arguments = ModelArguments(**NARROW, init=str(published), image_mean=[0.5], image_std=[0.5])
    model, _ = start_model(arguments, NAMES)
    model.save_pretrained(tmp_path / "saved")
    loaded = CXRInceptionForImageClassification.from_pretrained(tmp_path / "saved").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"init": "/nowhere/weights.safetensors"}, "no weights file /nowhere"),
        ({"image_size": 50}, "image_size=50"),
        ({"num_channels": 2}, "num_channels=2"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"head_hidden_sizes": [0]}, "head_hidden_sizes"),
    ],
)
def test_what_makes_no_model_is_refused_by_name(changed, message):
    with pytest.raises((ValueError, FileNotFoundError, StrictDataclassError), match=message):
        start_model(ModelArguments(**(NARROW | changed)), NAMES)


def test_weights_that_do_not_say_their_normalisation_are_refused(published):
    with pytest.raises(ValueError, match="does not say which image_mean"):
        start_model(ModelArguments(**NARROW, init=str(published)), NAMES)
