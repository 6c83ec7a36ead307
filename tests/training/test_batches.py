"""What training feeds the network is what the image processor would have made of the same film."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset

from cxr_backbone import CXRInceptionImageProcessor
from cxr_backbone.data.decoding import decode_once, stack_pixels
from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training.batches import run_through, to_images, to_pixel_values, training_loader

SIZE = {"height": 2, "width": 2}
RAW = CXRInceptionImageProcessor(size=SIZE, image_mean=[0.0], image_std=[1.0])


@pytest.fixture(scope="module")
def films():
    return load_synthetic(20, image_size=110)["train"]


@pytest.fixture(scope="module")
def rows(films, tmp_path_factory):
    return decode_once(films, 75, tmp_path_factory.mktemp("cache"))


def number_rows(labels):
    """Rows of 2 x 2 pixels, whose value is the number of the row."""
    image_ids = [f"film {n}" for n in range(len(labels))]
    return Dataset.from_dict(
        {"pixels": [bytes([n] * 4) for n in range(len(labels))], "label": labels, "image_id": image_ids}
    )


def as_stream(rows, num_shards=3, num_workers=0):
    return FilmStream(rows.to_iterable_dataset(num_shards=num_shards), len(rows), "numbered", num_workers)


@pytest.fixture(params=["rows", "stream"])
def numbered(request):
    """23 rows; pixels and label of a row are its number."""
    rows = number_rows(list(range(23)))
    return rows if request.param == "rows" else as_stream(rows)


def accelerator():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3))


def order(loader):
    return [label for batch in loader for label in batch["label"].tolist()]


@pytest.mark.parametrize("mean, std", [([0.5], [0.5]), ([0.0], [1.0]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
def test_pixel_values_are_the_image_processors_own(films, rows, mean, std):
    size = {"height": 75, "width": 75}
    image_processor = CXRInceptionImageProcessor(size=size, num_channels=len(mean), image_mean=mean, image_std=std)
    expected = image_processor(films["image"][:], return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(stack_pixels(list(rows))).unsqueeze(1)
    found = to_pixel_values(to_images(pixels), image_processor)
    assert found.shape == expected.shape == (len(films), len(mean), 75, 75)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_images_run_from_0_to_1_and_the_bytes_stay_as_they_are():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    images = to_images(pixels)
    torch.testing.assert_close(images.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert pixels.flatten().tolist() == [0, 51, 255]


def test_a_pass_sees_every_row_once_in_order_with_its_label(numbered):
    shapes = []

    def forward(pixel_values):
        shapes.append(tuple(pixel_values.shape))
        return 255 * pixel_values.mean(dim=(1, 2, 3))

    results, labels = run_through(forward, numbered, RAW, accelerator(), batch_size=8, desc="")
    assert shapes == [(8, 1, 2, 2), (8, 1, 2, 2), (7, 1, 2, 2)]
    assert results.dtype == torch.float32 and labels.dtype == torch.int64
    assert results.round().tolist() == labels.tolist() == list(range(23))


def test_images_can_be_changed_before_they_are_normalised(numbered):
    half = CXRInceptionImageProcessor(size={"height": 2, "width": 2}, image_mean=[0.5], image_std=[0.5])
    results, _ = run_through(
        lambda pixel_values: pixel_values.mean(dim=(1, 2, 3)),
        numbered,
        half,
        accelerator(),
        batch_size=8,
        desc="",
        change=lambda images: images * 0 + 0.75,
    )
    torch.testing.assert_close(results, torch.full((23,), 0.5))


def test_findings_come_as_floats_with_nan_for_unknown():
    rows = number_rows([{"Effusion": 1.0, "Mass": math.nan}, {"Effusion": 0.0, "Mass": 1.0}])
    for films in (rows, as_stream(rows, num_shards=1)):
        labels = run_through(lambda x: x.flatten(1), films, RAW, accelerator(), batch_size=2, desc="")[1]
        np.testing.assert_array_equal(labels.numpy(), np.array([[1, math.nan], [0, 1]], dtype=np.float32))


def test_fewer_films_than_processes_are_refused(numbered):
    crowd = SimpleNamespace(num_processes=24, process_index=0)
    with pytest.raises(ValueError, match="23 films are too few for 24 processes"):
        run_through(lambda x: x.flatten(1), numbered, RAW, crowd, batch_size=8, desc="")


def test_a_share_without_films_does_not_pass_for_an_epoch():
    empty = FilmStream(number_rows([1]).to_iterable_dataset().filter(lambda row: False), 8, "empty")
    with pytest.raises(RuntimeError, match="hold no film of train"):
        list(training_loader(empty, 4, accelerator(), seed=0))


def test_shards_that_do_not_divide_among_the_processes_are_warned_of(caplog):
    films = as_stream(number_rows(list(range(23))), num_shards=3)
    pair = SimpleNamespace(num_processes=2, process_index=0, gradient_state=None, device="cpu")
    loader = training_loader(films, 2, pair, seed=0)
    assert len(loader) == 23 // 4
    assert "3 shards for 2 processes" in caplog.text


def test_a_film_keeps_its_label_and_its_name(numbered):
    for batch in training_loader(numbered, 8, accelerator(), seed=3):
        assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (8, 1, 2, 2)
        assert torch.equal(batch["pixels"][:, 0, 1, 1].long(), batch["label"])
        assert batch["image_id"] == [f"film {label}" for label in batch["label"].tolist()]


def test_training_batches_are_full_and_no_row_comes_twice(numbered):
    loader = training_loader(numbered, 8, accelerator(), seed=3)
    seen = order(loader)
    assert len(loader) == 2 and len(seen) == len(set(seen)) == 16


def test_each_epoch_has_an_order_of_its_own_that_the_seed_repeats(numbered):
    def epochs():
        loader = training_loader(numbered, 8, accelerator(), seed=3)
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            yield order(loader)

    first, second = epochs()
    assert sorted(first) != first != second
    torch.manual_seed(99)  # the order doesn't hang on what was drawn before
    assert list(epochs()) == [first, second]


def test_workers_decode_a_stream_without_losing_a_film():
    films = as_stream(number_rows(list(range(23))), num_shards=2, num_workers=2)
    assert sorted(order(training_loader(films, 1, accelerator(), seed=0))) == list(range(23))
    labels = run_through(lambda x: x.flatten(1), films, RAW, accelerator(), batch_size=4, desc="")[1]
    assert sorted(labels.tolist()) == list(range(23))
