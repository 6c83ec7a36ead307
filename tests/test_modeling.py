"""The network: shapes, losses, freezing, precision, gradient checkpointing, saving."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

from cxr_backbone import (
    CXRInceptionBackbone,
    CXRInceptionConfig,
    CXRInceptionForImageClassification,
    CXRInceptionModel,
)

STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def tiny_config(**overrides) -> CXRInceptionConfig:
    return CXRInceptionConfig(**({"depth_multiplier": 0.1, "image_size": 75} | overrides))


def tiny_classifier(**overrides) -> CXRInceptionForImageClassification:
    torch.manual_seed(0)
    return CXRInceptionForImageClassification(tiny_config(**overrides))


def images(batch: int = 4, channels: int = 1, height: int = 75, width: int = 75) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def buffers_and_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def train_a_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(images(), labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Shapes


def test_the_full_network_has_the_sizes_of_the_paper():
    model = CXRInceptionModel(CXRInceptionConfig()).eval()
    # 21,785,568 with three input channels; two of the first convolution's three slices (2 x 32 x 3 x 3) are gone
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_785_568 - 576
    with torch.no_grad():
        outputs = model(images(1, 1, 299, 299), output_hidden_states=True)
    assert [tuple(map_.shape) for map_ in outputs.hidden_states] == [
        *((1, 64, 147, 147), (1, 192, 71, 71), (1, 288, 35, 35), (1, 768, 17, 17), (1, 2048, 8, 8))
    ]
    assert outputs.pooler_output.shape == (1, 2048)
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean((2, 3)))


@pytest.mark.parametrize(("height", "width"), [(75, 75), (76, 133), (299, 75)])
def test_any_size_from_75_pixels_works(height, width):
    assert tiny_classifier().eval()(images(2, 1, height, width)).logits.shape == (2, 2)


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="74 x 90 pixels; at least 75 x 75"):
        tiny_classifier()(images(2, 1, 74, 90))


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="has 3 channels, but this model takes 1"):
        tiny_classifier()(images(2, 3))


@pytest.mark.parametrize("num_labels", [1, 2, 14])
def test_the_head_takes_any_number_of_labels(num_labels):
    model = tiny_classifier(num_labels=num_labels, problem_type="multi_label_classification")
    assert model(images()).logits.shape == (4, num_labels)


def test_the_head_can_have_hidden_layers():
    model = tiny_classifier(head_hidden_sizes=[32, 8])
    assert [layer.out_features for layer in model.classifier.modules() if isinstance(layer, nn.Linear)] == [32, 8, 2]
    assert model(images()).logits.shape == (4, 2)


def test_a_tuple_comes_back_when_asked_for():
    logits, *_ = tiny_classifier()(images(), return_dict=False)
    assert logits.shape == (4, 2)
    logits, *_ = tiny_classifier(return_dict=False)(images())
    assert logits.shape == (4, 2)


def test_the_backbone_returns_the_stages_that_the_config_names():
    config = tiny_config(out_features=["stem", "stage2", "stage4"])
    backbone = CXRInceptionBackbone(config)
    maps = backbone(images(2, 1, 96, 96)).feature_maps
    assert [map_.shape[1] for map_ in maps] == backbone.channels == [config.hidden_sizes[i] for i in (0, 2, 4)]


def test_counting_the_padding_of_average_pooling_is_a_choice():
    counted, uncounted = (
        CXRInceptionModel(tiny_config(avg_pool_count_include_pad=count)).eval() for count in (True, False)
    )
    uncounted.load_state_dict(counted.state_dict())
    assert not torch.allclose(counted(images()).pooler_output, uncounted(images()).pooler_output)


# Loss


def test_single_label_loss_is_cross_entropy_with_weights_and_smoothing():
    model = tiny_classifier(num_labels=3, class_weights=[1.0, 2.0, 3.0], label_smoothing=0.1).eval()
    labels = torch.tensor([0, 1, 2, 1])
    outputs = model(images(), labels=labels)
    expected = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)


def test_unknown_findings_are_left_out_of_the_multi_label_loss():
    model = tiny_classifier(num_labels=3, problem_type="multi_label_classification").eval()
    labels = torch.tensor([[1, 0, float("nan")], [float("nan"), 1, 0], [0, 0, 0], [float("nan")] * 3])
    outputs = model(images(), labels=labels)
    known = ~labels.isnan()
    expected = nn.BCEWithLogitsLoss()(outputs.logits[known], labels[known])
    torch.testing.assert_close(outputs.loss, expected)


def test_a_batch_without_any_known_finding_gives_no_gradient_and_no_nan():
    model = tiny_classifier(num_labels=3, problem_type="multi_label_classification")
    loss = model(images(), labels=torch.full((4, 3), float("nan"))).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.classifier.parameters())


def test_multi_label_weights_count_the_positive_examples():
    weights = [1.0, 5.0]
    model = tiny_classifier(problem_type="multi_label_classification", class_weights=weights).eval()
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    outputs = model(images(), labels=labels)
    expected = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)


def test_labels_that_do_not_fit_the_problem_are_refused():
    with pytest.raises(ValueError, match="integer labels"):
        tiny_classifier(problem_type="single_label_classification")(images(), labels=torch.rand(4))
    with pytest.raises(ValueError, match=r"labels of shape \(4, 2\)"):
        tiny_classifier(problem_type="multi_label_classification")(images(), labels=torch.rand(4))


def test_the_auxiliary_head_adds_its_weighted_loss_in_training_only():
    model = tiny_classifier(use_auxiliary_head=True, auxiliary_loss_weight=0.4, dropout=0.0)
    labels = torch.tensor([0, 1, 0, 1])
    outputs = model(images(), labels=labels)
    auxiliary_logits = model.auxiliary_classifier(
        model.cxr_inception(images(), output_hidden_states=True).hidden_states[3]
    )
    expected = nn.functional.cross_entropy(outputs.logits, labels) + 0.4 * nn.functional.cross_entropy(
        auxiliary_logits, labels
    )
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    outputs = model.eval()(images(), labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))


# Freezing


def test_a_frozen_backbone_does_not_change_by_one_bit_in_training():
    model = tiny_classifier()
    model.freeze_backbone()
    before = buffers_and_parameters(model.cxr_inception)
    for _ in range(3):
        model.train()  # the call that undoes plain freezing
        train_a_step(model)
    for name, tensor in model.cxr_inception.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(not parameter.requires_grad for parameter in model.cxr_inception.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    assert model.classifier.training


def test_without_freezing_the_statistics_do_move():
    model = tiny_classifier()
    before = buffers_and_parameters(model)
    train_a_step(model)
    name = "cxr_inception.encoder.stages.stem.layers.0.normalization.running_mean"
    assert not torch.equal(model.state_dict()[name], before[name])


def test_freezing_can_stop_at_a_stage():
    model = tiny_classifier()
    model.freeze_backbone(to_stage="stage2")
    model.train()
    before = buffers_and_parameters(model)
    train_a_step(model)
    after = model.state_dict()
    for name in after:
        if not name.endswith(("num_batches_tracked", "running_mean")):
            continue
        frozen = any(f".{stage}." in name for stage in STAGES[:3])
        assert torch.equal(after[name], before[name]) == frozen, name


def test_unfreezing_restores_training():
    model = tiny_classifier().train()
    model.freeze_backbone()
    model.unfreeze_backbone()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    before = buffers_and_parameters(model)
    train_a_step(model)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("stem" in name for name in moved)


def test_unfreezing_can_begin_at_a_stage_and_respects_eval_mode():
    model = tiny_classifier().eval()
    model.freeze_backbone()
    model.unfreeze_backbone(from_stage="stage4")
    stages = model.cxr_inception.encoder.stages
    assert [all(p.requires_grad for p in stages[name].parameters()) for name in STAGES] == [False] * 4 + [True]
    assert not any(module.training for module in model.modules())
    model.train()
    assert [stages[name].training for name in STAGES] == [False] * 4 + [True]


@pytest.mark.parametrize("model_class", [CXRInceptionModel, CXRInceptionBackbone])
def test_every_class_of_the_family_can_be_frozen(model_class):
    model = model_class(tiny_config())
    model.freeze_backbone()
    model.train()
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_batch_norm_can_be_frozen_alone_and_everything_else_learns():
    model = tiny_classifier()
    model.freeze_batch_norm()
    before = buffers_and_parameters(model)
    for _ in range(2):
        model.train()
        train_a_step(model)
    assert model.training and model.cxr_inception.encoder.stages["stem"].training
    for name, tensor in model.state_dict().items():
        is_statistic = "running_" in name or "num_batches" in name
        assert torch.equal(tensor, before[name]) == is_statistic, name


def test_batch_norm_over_all_processes_is_frozen_too():
    model = tiny_classifier()
    model.freeze_batch_norm()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    layers = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert layers and not any(layer.training for layer in layers)


def test_frozen_batch_norm_outlasts_the_freezing_of_stages():
    model = tiny_classifier()
    model.freeze_batch_norm()
    model.freeze_backbone()
    model.unfreeze_backbone()
    model.train()
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no stage 'layer4'; the stages are stem, stage1"):
        tiny_classifier().freeze_backbone(to_stage="layer4")
    with pytest.raises(ValueError, match="no stage 'layer4'"):
        tiny_classifier().unfreeze_backbone(from_stage="layer4")


# Precision and gradient checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_full(dtype):
    model = tiny_classifier().eval()
    pixel_values = images(height=107, width=107)  # on maps of 1 x 1, torch 2.6 to 2.10 get float16 wrong on a CPU
    expected = model(pixel_values).logits
    outputs = copy.deepcopy(model).to(dtype)(pixel_values, labels=torch.tensor([0, 1, 0, 1]))
    assert outputs.logits.dtype == dtype
    assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.logits.float(), expected, rtol=0.05, atol=0.05)


def test_autocast_trains():
    model = tiny_classifier()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(), labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    plain = tiny_classifier(dropout=0.0)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model.train()
        model(images(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)
    statistics = dict(plain.named_buffers())
    for name, buffer in checkpointed.named_buffers():
        assert torch.equal(buffer, statistics[name]), name


def test_reentrant_checkpointing_is_refused_since_it_would_move_statistics_twice():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tiny_classifier().activation_checkpointing_enable({"use_reentrant": True})


# Saving


def test_a_saved_model_is_exact_in_every_tensor_and_brings_its_code(tmp_path):
    model = tiny_classifier(use_auxiliary_head=True, id2label={0: "NORMAL", 1: "PNEUMONIA"})
    train_a_step(model)  # so that buffers are not at their initial values
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "configuration_cxr_inception.py"),
        *("layers_cxr_inception.py", "modeling_cxr_inception.py", "image_processing_cxr_inception.py"),
    }
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, CXRInceptionForImageClassification)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class RandomNumbers(TorchDispatchMode):
    """Counts the tensors in memory that are filled with random numbers meanwhile."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += torch.Tag.nondeterministic_seeded in function.tags and args[0].device.type != "meta"
        return function(*args, **(kwargs or {}))


def test_opening_draws_no_weight_that_the_file_has(tmp_path):
    with RandomNumbers() as building:
        tiny_classifier().save_pretrained(tmp_path)
    with RandomNumbers() as opening:
        CXRInceptionForImageClassification.from_pretrained(tmp_path)
    assert building.count > 94 and opening.count == 0


def test_a_base_model_opens_a_checkpoint_with_a_head_and_the_other_way_round(tmp_path):
    classifier = tiny_classifier()
    classifier.save_pretrained(tmp_path / "head")
    base, report = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, classifier.cxr_inception.state_dict()[name])

    base.save_pretrained(tmp_path / "base")
    headed, report = AutoModelForImageClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.output_layer.weight", "classifier.output_layer.bias"}
    for name, tensor in headed.cxr_inception.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


def test_the_backbone_class_opens_a_checkpoint_with_a_head(tmp_path):
    classifier = tiny_classifier().eval()
    classifier.save_pretrained(tmp_path)
    backbone = CXRInceptionBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage4"]).eval()
    expected = classifier.cxr_inception(images(), output_hidden_states=True).hidden_states
    maps = backbone(images()).feature_maps
    torch.testing.assert_close(maps, (expected[1], expected[4]))
    assert isinstance(AutoBackbone.from_config(backbone.config), CXRInceptionBackbone)


def test_loading_to_bfloat16_casts_the_weights(tmp_path):
    tiny_classifier().save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded(images()).logits.isfinite().all()


def test_another_head_has_no_temperature_and_no_operating_points(tmp_path):
    points = {"sick": {"youden": {"threshold": 0.4}}}
    settings = {"temperature": 1.7, "operating_points": points}
    tiny_classifier(id2label={0: "healthy", 1: "sick"}, **settings).save_pretrained(tmp_path)
    same = CXRInceptionForImageClassification.from_pretrained(tmp_path)
    assert (same.config.temperature, same.config.operating_points) == (1.7, points)
    other = CXRInceptionForImageClassification.from_pretrained(tmp_path, id2label={0: "normal", 1: "effusion"})
    assert (other.config.temperature, other.config.operating_points) == (None, None)
