"""What tests of training share."""

import pytest

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {split: decode_once(rows, 75, cache) for split, rows in load_synthetic(40, image_size=75).items()}
