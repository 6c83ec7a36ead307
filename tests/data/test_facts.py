"""Facts about films whose figures are known, and about real ones."""

import io

import datasets
import imagehash
import numpy as np
import pytest
from PIL import Image

from cxr_backbone.data.facts import FILM_FEATURES, THUMBNAIL_SIZE, film_facts
from cxr_backbone.data.radiographs import read_radiograph


@pytest.fixture(scope="module")
def originals(shared):
    """Full-size films of the Kermany set, uint8 (height, width)."""
    paths = sorted((shared / "data/kermany-originals").rglob("*.jpeg"))
    return [read_radiograph(path) for path in paths[::3]]


def facts_of(grey):
    return film_facts(grey, native_size=grey.shape, file_bytes=7)


def unlike(one, other):
    """Bits in which the perceptual hashes of two films differ."""
    return imagehash.hex_to_hash(one["perceptual_hash"]) - imagehash.hex_to_hash(other["perceptual_hash"])


def test_the_facts_are_those_that_the_arrow_file_has_columns_for():
    facts = film_facts(np.zeros((30, 20), np.uint8), native_size=(60, 40), file_bytes=7)
    assert list(facts) == list(FILM_FEATURES)
    assert (facts["height"], facts["width"], facts["file_bytes"]) == (60, 40, 7)
    assert len(facts["thumbnail"]) == THUMBNAIL_SIZE**2
    stored = datasets.Dataset.from_list([facts], datasets.Features(FILM_FEATURES))
    assert stored[0] == facts


def test_grey_levels_are_counted():
    grey = np.full((100, 100), 80, np.uint8)
    grey[:, :20], grey[:, 20:25], grey[:, 25:27] = 0, 255, 200
    facts = facts_of(grey)
    assert facts["mean"] == pytest.approx(grey.mean())
    assert (facts["black"], facts["white"]) == (0.2, 0.05)
    assert (facts["low"], facts["high"]) == (0, 255)
    assert facts_of(np.full((5, 5), 80, np.uint8))["low"] == facts_of(np.full((5, 5), 80, np.uint8))["high"] == 80


def test_grey_levels_of_some_rows_stand_for_the_film(originals):
    for grey in originals:
        facts = facts_of(grey)
        assert facts["mean"] == pytest.approx(grey.mean(), abs=0.3)
        assert [facts["low"], facts["high"]] == pytest.approx(np.percentile(grey, [1, 99]), abs=2)
        assert facts["black"] == pytest.approx((grey == 0).mean(), abs=0.002)
        assert facts["white"] == pytest.approx((grey == 255).mean(), abs=0.002)


def test_the_pixel_hash_finds_a_copy_in_another_file(originals):
    file = io.BytesIO()
    Image.fromarray(originals[0]).save(file, "PNG")
    copy = read_radiograph(file.getvalue())
    assert facts_of(copy)["pixel_hash"] == facts_of(originals[0])["pixel_hash"]
    assert facts_of(np.asfortranarray(copy))["pixel_hash"] == facts_of(originals[0])["pixel_hash"]


def test_the_pixel_hash_differs_with_a_single_pixel_and_with_the_shape(originals):
    other = originals[0].copy()
    other[0, 0] ^= 1
    assert facts_of(other)["pixel_hash"] != facts_of(originals[0])["pixel_hash"]
    blank = [facts_of(np.zeros(shape, np.uint8))["pixel_hash"] for shape in ((4, 4), (2, 8), (8, 2))]
    assert len(set(blank)) == 3


def test_the_perceptual_hash_tells_a_smaller_copy_from_another_film(originals):
    facts = [facts_of(grey) for grey in originals]
    for grey, large in zip(originals, facts, strict=True):
        copy = Image.fromarray(grey).resize((224, 224), resample=Image.Resampling.LANCZOS)
        assert unlike(facts_of(np.asarray(copy)), large) <= 4
    assert min(unlike(one, other) for i, one in enumerate(facts) for other in facts[:i]) > 4


def test_the_thumbnail_is_the_film_squeezed_to_a_square(originals):
    for grey in originals:
        thumbnail = np.frombuffer(facts_of(grey)["thumbnail"], np.uint8).reshape(THUMBNAIL_SIZE, THUMBNAIL_SIZE)
        plain = Image.fromarray(grey).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), resample=Image.Resampling.BILINEAR)
        assert np.abs(thumbnail - np.asarray(plain, int)).mean() < 2
