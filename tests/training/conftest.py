"""What tests of training share."""

import pytest
from datasets import DatasetDict

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.films import Films


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {split: decode_once(rows, 75, cache) for split, rows in load_synthetic(40, image_size=75).items()}


@pytest.fixture
def arguments(tmp_path):
    """Of a run."""
    (tmp_path / "config.yaml").write_text(
        "run: {output_dir: here, seed: 4}\ndata: {format: synthetic}\nmodel: {image_mean: [0.4], dropout: 1e-1}"
    )
    return parse_arguments([str(tmp_path / "config.yaml"), "--frozen.l2_strengths", "1e-3", "0.1"])


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """What a run is made of: twenty phantoms, decoded; a file that could not be read."""
    cache = tmp_path_factory.mktemp("cache")
    splits = DatasetDict(
        {name: decode_once(rows, 32, cache) for name, rows in load_synthetic(20, image_size=32).items()}
    )
    return Films(
        splits,
        splits["train"],
        splits["train"],
        splits["test"],
        {"broken.png": "Can't read broken.png, it is no image."},
    )
