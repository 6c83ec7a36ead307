"""What CXRInceptionConfig allows, derives and refuses."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from cxr_backbone import CXRInceptionConfig


def test_the_defaults_are_those_of_inception_v3_on_grey_images():
    config = CXRInceptionConfig()
    assert (config.image_size, config.num_channels, config.batch_norm_eps) == (299, 1, 1e-3)
    assert config.hidden_sizes == [64, 192, 288, 768, 2048]
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert not config.use_auxiliary_head
    assert config.auxiliary_loss_weight == 0.4


def test_depth_multiplier_scales_the_widths_but_never_below_sixteen():
    assert CXRInceptionConfig(depth_multiplier=0.5).hidden_sizes[-1] == 1024
    assert CXRInceptionConfig(depth_multiplier=0.01).hidden_sizes[0] == 16


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("image_size", 74, "at least 75"),
        ("num_channels", 2, "1 .grey. or 3"),
        ("depth_multiplier", 0.0, "above 0"),
        ("batch_norm_eps", 0.0, "between 0 and 1"),
        ("dropout", 1.0, r"in \[0, 1\)"),
        ("head_hidden_sizes", [0], "positive widths"),
        ("auxiliary_loss_weight", -0.1, "0 or more"),
        ("class_weights", [1.0], "one positive number for each of the 2 labels"),
        ("class_weights", [1.0, -1.0], "one positive number for each of the 2 labels"),
        ("label_smoothing", 1.0, r"in \[0, 1\)"),
        ("temperature", 0.0, "a number above 0"),
        ("operating_points", {"LABEL_1": {"youden": {"threshold": 1.5}}}, r"a threshold in \[0, 1\]"),
        ("problem_type", "regression", "single_label_classification or multi_label_classification"),
        ("out_features", ["stage9"], "subset of stage_names"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(key, value, allowed):
    with pytest.raises((StrictDataclassError, ValueError), match=allowed):
        CXRInceptionConfig(**{key: value})


def test_a_value_of_the_wrong_type_is_refused_by_name():
    with pytest.raises(StrictDataclassError, match="image_size"):
        CXRInceptionConfig(image_size="large")


def test_types_are_checked_at_assignment_and_ranges_by_validate():
    config = CXRInceptionConfig()
    with pytest.raises(StrictDataclassError, match="dropout"):
        config.dropout = "high"
    config.dropout = 2.0
    with pytest.raises(StrictDataclassError, match=r"dropout=2\.0 is not allowed"):
        config.validate()


def test_a_misspelt_key_is_refused_with_a_guess():
    with pytest.raises(ValueError, match=r"no key 'depth_multiplyer'; did you mean 'depth_multiplier'"):
        CXRInceptionConfig(depth_multiplyer=0.5)


def test_a_key_like_no_other_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no key 'zzz'; known keys are .*image_size"):
        CXRInceptionConfig(zzz=1)


def test_label2id_follows_from_id2label():
    config = CXRInceptionConfig(id2label={0: "NORMAL", 1: "PNEUMONIA"})
    assert config.label2id == {"NORMAL": 0, "PNEUMONIA": 1}
    assert config.num_labels == 2


def test_out_features_and_out_indices_follow_each_other():
    assert CXRInceptionConfig(out_features=["stage1", "stage3"]).out_indices == [1, 3]
    assert CXRInceptionConfig(out_indices=[0, 4]).out_features == ["stem", "stage4"]


def test_a_saved_config_loads_as_it_was_and_names_every_auto_class(tmp_path):
    config = CXRInceptionConfig(
        depth_multiplier=0.5,
        head_hidden_sizes=[32],
        id2label={0: "a", 1: "b", 2: "c"},
        class_weights=[1.0, 2.0, 3.0],
        problem_type="multi_label_classification",
        out_features=["stem", "stage4"],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CXRInceptionConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        *("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone", "AutoImageProcessor")
    }


POINTS = {"sick": {"youden": {"threshold": 0.4, "sensitivity": 0.9, "specificity": 0.8, "films": 50}}}
NAMES = {0: "healthy", 1: "sick"}


def answer(score):
    """What the pipeline gives for one image."""
    scores = {"sick": score, "healthy": 1 - score}
    return [{"label": label, "score": value} for label, value in sorted(scores.items(), key=lambda item: -item[1])]


def test_a_score_is_decided_by_the_threshold_of_a_named_point():
    config = CXRInceptionConfig(id2label=NAMES, operating_points=POINTS)
    assert [config.decide(answer(score), "youden") for score in (0.39, 0.4, 0.9)] == [
        {"sick": False},
        {"sick": True},
        {"sick": True},
    ]


def test_temperature_and_operating_points_survive_saving(tmp_path):
    CXRInceptionConfig(id2label=NAMES, temperature=1.7, operating_points=POINTS).save_pretrained(tmp_path)
    config = CXRInceptionConfig.from_pretrained(tmp_path)
    assert (config.temperature, config.operating_points) == (1.7, POINTS)


def test_a_decision_that_can_not_be_made_is_refused_with_what_there_is():
    config = CXRInceptionConfig(id2label=NAMES, operating_points=POINTS)
    with pytest.raises(ValueError, match="no operating point 'best'; it has youden"):
        config.decide(answer(0.5), "best")
    with pytest.raises(ValueError, match="none at all"):
        CXRInceptionConfig().decide(answer(0.5), "youden")
    with pytest.raises(ValueError, match="no score of sick; call the pipeline with top_k=None"):
        config.decide(answer(0.2)[:1], "youden")
    with pytest.raises(ValueError, match="several images"):
        config.decide([answer(0.2), answer(0.3)], "youden")
