"""Phase one's single pass: each film's features once, in order, kept under a name that says what they come from."""

import itertools
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cxr_backbone import CXRInceptionConfig, CXRInceptionImageProcessor, CXRInceptionModel
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training.features import View, extract_features


@pytest.fixture(scope="module")
def films():
    return load_synthetic(20, image_size=75)["train"]


@pytest.fixture(scope="module")
def rows(films, tmp_path_factory):
    return decode_once(films, 75, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    model = CXRInceptionModel(CXRInceptionConfig(image_size=75, depth_multiplier=0.1))
    for module in model.modules():  # as after some training: eval mode differs from train mode
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def image_processor():
    return CXRInceptionImageProcessor(size={"height": 75, "width": 75})


@pytest.fixture
def extract(backbone, rows, image_processor, tmp_path):
    def extract(batch_size=4, **changed):
        given = {"backbone": backbone, "films": rows, "image_processor": image_processor} | changed
        return extract_features(**given, accelerator=Accelerator(cpu=True), batch_size=batch_size, cache_dir=tmp_path)

    return extract


def test_features_are_those_of_the_model_image_by_image_and_in_order(extract, backbone, films, image_processor):
    features, labels = extract(batch_size=4)
    assert labels.tolist() == films["label"][:]
    backbone.eval()
    with torch.no_grad():
        one_by_one = [backbone(**image_processor(film, return_tensors="pt")).pooler_output for film in films["image"]]
    assert features.dtype == torch.float32 and len(features) % 4 != 0
    torch.testing.assert_close(features, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_a_backbone_in_train_mode_is_put_in_eval_mode_and_keeps_its_statistics(extract, backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    in_train_mode, _ = extract(backbone=backbone.train())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    torch.testing.assert_close(in_train_mode, extract(batch_size=len(in_train_mode), backbone=backbone.eval())[0])


def test_features_carry_no_graph(extract):
    assert not extract()[0].requires_grad


def test_a_second_call_reads_the_files(extract, backbone, tmp_path, monkeypatch):
    first = extract()
    files = sorted(tmp_path.iterdir())
    assert [file.name.partition("-")[0] for file in files] == ["features", "labels"]
    monkeypatch.setattr(backbone, "forward", None)  # a second pass would fail
    assert same(extract(), first)
    assert sorted(tmp_path.iterdir()) == files


def test_features_are_mapped_and_what_is_made_of_them_in_memory_does_not_reach_the_file(extract, tmp_path):
    features, _ = extract()
    assert any(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    features.zero_()
    assert extract()[0].abs().sum() > 0


def other_weights(backbone, rows, image_processor):
    with torch.no_grad():
        next(backbone.parameters())[0, 0, 0, 0] += 1e-3
    return {"backbone": backbone}


def other_statistics(backbone, rows, image_processor):
    next(backbone.buffers())[0] += 1e-3
    return {"backbone": backbone}


def other_pooling(backbone, rows, image_processor):
    torch.manual_seed(0)
    other = CXRInceptionModel(CXRInceptionConfig(image_size=75, depth_multiplier=0.1, avg_pool_count_include_pad=False))
    other.load_state_dict(backbone.state_dict())
    return {"backbone": other}


def other_normalisation(backbone, rows, image_processor):
    return {"image_processor": CXRInceptionImageProcessor(size=image_processor.size, image_mean=[0.4])}


def other_rows(backbone, rows, image_processor):
    return {"films": rows.select(range(len(rows) - 1))}


def other_order(backbone, rows, image_processor):
    return {"films": rows.select(range(len(rows) - 1, -1, -1))}


@pytest.mark.parametrize(
    "change", [other_weights, other_statistics, other_pooling, other_normalisation, other_rows, other_order]
)
def test_whatever_changes_the_features_gives_a_file_of_its_own(
    extract, backbone, rows, image_processor, tmp_path, change
):
    first, _ = extract()
    changed, _ = extract(**change(backbone, rows, image_processor))
    assert len(list(tmp_path.glob("features-*.npy"))) == 2
    assert changed.shape != first.shape or not torch.equal(changed, first)


def test_a_pass_that_is_stopped_goes_on_after_its_last_whole_batch(extract, rows, tmp_path):
    expected = extract()
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(KeyboardInterrupt), forward_passes(limit=2):
        extract()
    (part,) = tmp_path.iterdir()
    with part.open("ab") as file:
        file.write(b"a part of the third batch")
    with forward_passes() as passes:
        again = extract()
    assert same(again, expected)
    assert len(passes) == math.ceil(len(rows) / 4) - 2 and not part.exists()


def test_what_a_pass_that_was_killed_left_is_not_read(extract, tmp_path):
    expected = extract()
    for file in tmp_path.iterdir():
        half = file.read_bytes()[:1000]
        file.unlink()
        file.with_name(file.name + ".unfinished").write_bytes(half)
    assert same(extract(), expected)
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_augmented_view_is_the_same_each_time_and_like_no_other(extract, tmp_path):
    plain, labels = extract()
    first, second, weaker, reseeded = (
        extract(view=view)[0] for view in (View(0, 1.0, 7), View(1, 1.0, 7), View(0, 0.5, 7), View(0, 1.0, 8))
    )
    for one, other in itertools.combinations((plain, first, second, weaker, reseeded), 2):
        assert not torch.isclose(one, other).all(dim=1).any()  # no film looks the same
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(KeyboardInterrupt), forward_passes(limit=2):
        extract(view=View(0, 1.0, 7))
    again, its_labels = extract(view=View(0, 1.0, 7))
    assert torch.equal(again, first) and torch.equal(its_labels, labels)


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@contextmanager
def forward_passes(limit=math.inf):
    """The batches that a backbone is asked about meanwhile; one more than `limit`, and it is as if Ctrl-C came."""
    passes = []

    def count(module, inputs):
        if isinstance(module, CXRInceptionModel):
            if len(passes) == limit:
                raise KeyboardInterrupt
            passes.append(inputs)

    with torch.nn.modules.module.register_module_forward_pre_hook(count):
        yield passes
