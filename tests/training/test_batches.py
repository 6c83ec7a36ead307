"""What training feeds the network is what the image processor would have made of the same film."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset

from cxr_backbone import CXRInceptionImageProcessor
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training.batches import make_loader, to_images, to_pixel_values


@pytest.fixture(scope="module")
def films():
    return load_synthetic(20, image_size=110)["train"]


@pytest.fixture(scope="module")
def rows(films, tmp_path_factory):
    return decode_once(films, 75, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def numbered():
    """23 rows of 2 x 2 pixels; pixels and label of a row are its number."""
    return Dataset.from_dict(
        {"pixels": [bytes([n] * 4) for n in range(23)], "label": list(range(23)), "other": [""] * 23}
    )


def accelerator():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3))


def order(loader):
    return [label for batch in loader for label in batch["label"].tolist()]


@pytest.mark.parametrize("mean, std", [([0.5], [0.5]), ([0.0], [1.0]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
def test_pixel_values_are_the_image_processors_own(films, rows, mean, std):
    size = {"height": 75, "width": 75}
    image_processor = CXRInceptionImageProcessor(size=size, num_channels=len(mean), image_mean=mean, image_std=std)
    expected = image_processor(films["image"][:], return_tensors="pt")["pixel_values"]
    (batch,) = make_loader(rows, len(rows), accelerator())
    found = to_pixel_values(to_images(batch["pixels"]), image_processor)
    assert found.shape == expected.shape == (len(films), len(mean), 75, 75)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_images_run_from_0_to_1_and_the_bytes_stay_as_they_are():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    images = to_images(pixels)
    torch.testing.assert_close(images.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert pixels.flatten().tolist() == [0, 51, 255]


def test_evaluation_sees_every_row_once_in_order(numbered):
    loader = make_loader(numbered, 8, accelerator())
    batches = list(loader)
    assert [batch["pixels"].shape for batch in batches] == [(8, 1, 2, 2), (8, 1, 2, 2), (7, 1, 2, 2)]
    assert {(batch["pixels"].dtype, batch["label"].dtype) for batch in batches} == {(torch.uint8, torch.int64)}
    assert order(batches) == list(range(23))


def test_a_film_keeps_its_label(numbered):
    for batch in make_loader(numbered, 8, accelerator(), training=True):
        assert torch.equal(batch["pixels"][:, 0, 1, 1].long(), batch["label"])


def test_training_batches_are_full_and_no_row_comes_twice(numbered):
    seen = order(make_loader(numbered, 8, accelerator(), training=True))
    assert len(seen) == len(set(seen)) == 16


def test_each_epoch_has_an_order_of_its_own_that_the_seed_repeats(numbered):
    def epochs():
        loader = make_loader(numbered, 8, accelerator(), training=True)
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            yield order(loader)

    first, second = epochs()
    assert sorted(first) != first != second
    torch.manual_seed(99)  # the order doesn't hang on what was drawn before
    assert list(epochs()) == [first, second]
