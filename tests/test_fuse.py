"""`fuse()` gives a copy for inference that answers the same, faster, and can't be mistaken for the model."""

import copy

import pytest
import torch
from narrow import PROCESSOR, in_use, tiny_model
from PIL import Image
from torch import nn
from transformers import pipeline

from cxr_backbone import CXRInceptionBackbone, CXRInceptionConfig, CXRInceptionModel
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.weights import load_inception_v3


def images(batch=4, size=75):
    return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(0))


def relative_difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_every_class_answers_the_same_to_1e_4():
    config = CXRInceptionConfig(depth_multiplier=0.1, image_size=75, out_features=["stem", "stage2", "stage4"])
    classifier, base, backbone = map(in_use, (tiny_model(), CXRInceptionModel(config), CXRInceptionBackbone(config)))
    assert relative_difference(classifier.fuse()(images()).logits, classifier(images()).logits) < 1e-4
    assert relative_difference(base.fuse()(images()).pooler_output, base(images()).pooler_output) < 1e-4
    both = zip(backbone.fuse()(images()).feature_maps, backbone(images()).feature_maps, strict=True)
    assert all(relative_difference(*maps) < 1e-4 for maps in both)


@torch.no_grad()
def test_the_real_network_answers_the_same_to_1e_4_on_real_films(shared, real_films):
    weights = shared / "weights/inception_v3_nsfwjs_f16.safetensors"
    model, processor = load_inception_v3(weights, image_mean=0, image_std=1, avg_pool_count_include_pad=False)
    films = [Image.open(path) for path in sorted(real_films.rglob("test/*/*"))[::8]]
    pixel_values = processor(films, return_tensors="pt")["pixel_values"]
    assert relative_difference(model.fuse()(pixel_values).pooler_output, model(pixel_values).pooler_output) < 1e-4


def test_no_batch_norm_is_left_and_the_model_itself_stays_as_it_was():
    model = in_use(tiny_model()).train()
    before = copy.deepcopy(model.state_dict())
    fused = model.fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not fused.training and not any(parameter.requires_grad for parameter in fused.parameters())
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_and_synchronised_layers_are_folded_too():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(in_use(tiny_model()))
    model.freeze_backbone()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.fuse().modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_copy_is_folded_in_full_precision_and_keeps_a_full_head(dtype):
    model = in_use(tiny_model())
    fused, expected = model.fuse(dtype), model.fuse().state_dict()
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.float32 if name.startswith("classifier.") else dtype))
    logits = fused(images()).logits
    assert fused.dtype == dtype and logits.dtype == torch.float32 and not torch.equal(logits, logits.to(dtype).float())


def test_a_half_precision_model_stays_so_but_for_its_head():
    fused = in_use(tiny_model()).to(torch.bfloat16).fuse()
    assert fused.dtype == torch.bfloat16 and fused(images()).logits.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_the_average_at_the_border_is_that_of_the_model(count_include_pad):
    model = in_use(tiny_model(avg_pool_count_include_pad=count_include_pad))
    outputs = [given(images(), output_hidden_states=True).hidden_states for given in (model, model.fuse())]
    assert all(relative_difference(*maps) < 1e-4 for maps in zip(*outputs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("every_stage", [False, True])
def test_a_large_batch_goes_through_in_pieces_and_comes_back_whole(every_stage):
    fused = in_use(tiny_model()).fuse()
    whole = fused(images(9), output_hidden_states=every_stage)
    batches = []
    stem = fused.cxr_inception.encoder.stages["stem"]
    stem.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    fused.cxr_inception.encoder.bytes_at_once = 4 * 75 * 75 * 4  # four images in float32
    pieces = fused(images(9), output_hidden_states=every_stage)
    assert batches == [4, 4, 1]
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-4, atol=1e-5)
    if every_stage:
        assert [len(map_) for map_ in pieces.hidden_states] == [9] * 5


@torch.no_grad()
def test_an_image_larger_than_a_piece_goes_through_alone():
    fused = in_use(tiny_model()).fuse()
    fused.cxr_inception.encoder.bytes_at_once = 100
    assert fused(images(3)).logits.shape == (3, 2)


def test_it_can_be_neither_trained_nor_saved(tmp_path):
    fused = tiny_model().fuse()
    with pytest.raises(ValueError, match="train the original"):
        fused.train()
    with pytest.raises(ValueError, match="save the original"):
        fused.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists() and not fused.eval().training


def test_the_pipeline_takes_it():
    model, film = in_use(tiny_model()), Image.fromarray(draw_phantom(0, opacity=True))
    answers = [
        pipeline("image-classification", model=given, image_processor=PROCESSOR)(film)
        for given in (model, model.fuse())
    ]
    scores = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
