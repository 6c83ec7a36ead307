"""Films that several tests read."""

import pytest
from PIL import Image

from cxr_backbone.data.synthetic import draw_phantom


@pytest.fixture
def originals(shared):
    """Full-size JPEGs of the Kermany set."""
    return sorted((shared / "data/kermany-originals").rglob("*.jpeg"))


@pytest.fixture
def film(tmp_path):
    """A drawn film as a PNG file."""
    path = tmp_path / "film.png"
    Image.fromarray(draw_phantom(0, opacity=True, image_size=64)).save(path)
    return path
