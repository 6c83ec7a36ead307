"""The same film is found again, whatever was done to it; different films are left alone."""

import datasets
import numpy as np
import pytest
from data.drawn_sets import decoded, jpeg, phantoms
from PIL import Image

from cxr_backbone.data.duplicates import (
    MAX_LISTED_PAIRS,
    MIN_CORRELATION,
    find_duplicates,
    group_duplicates,
    standardise,
)
from cxr_backbone.data.film_table import read_films
from cxr_backbone.data.radiographs import read_radiograph


def resized(pixels, share):
    height, width = pixels.shape
    return np.asarray(Image.fromarray(pixels).resize((round(width * share), round(height * share))))


def cropped(pixels, share):
    rows, columns = round(len(pixels) * share), round(len(pixels[0]) * share)
    return np.ascontiguousarray(pixels[rows:-rows, columns:-columns])


def rotated(pixels, degrees):
    return np.asarray(Image.fromarray(pixels).rotate(degrees, resample=Image.Resampling.BILINEAR))


def with_gamma(pixels, gamma):
    return np.round(255 * (pixels / 255) ** gamma).astype(np.uint8)


def brighter(pixels, levels):
    return np.clip(pixels.astype(int) + levels, 0, 255).astype(np.uint8)


def groups_of(*splits):
    films = read_films(datasets.DatasetDict(zip(("train", "validation", "test"), splits, strict=False)))
    return group_duplicates(films.pixel_hash, films.perceptual_hash, films.thumbnails)


def duplicates_in(*splits):
    return find_duplicates(read_films(datasets.DatasetDict(zip(("train", "test"), splits, strict=False))))


@pytest.fixture(scope="module")
def originals(shared):
    """Fifteen full-size films, all different."""
    return [read_radiograph(path) for path in sorted((shared / "data/kermany-originals").rglob("*.jpeg"))[::2]]


@pytest.fixture(scope="module")
def decoded_originals(originals):
    return decoded(originals)


def share_found(decoded_originals, copies):
    """Share of the films that are grouped with their copy; that no film is grouped with another's is asserted."""
    groups = groups_of(decoded_originals, decoded(copies))
    originals, of_copies = np.split(groups, 2)
    assert (originals == np.arange(len(originals))).all()
    found = originals == of_copies
    assert (of_copies[~found] >= len(originals)).all()
    return found.mean()


@pytest.mark.parametrize(
    "change",
    [
        lambda film: film.copy(),
        lambda film: jpeg(film, quality=10),
        lambda film: resized(film, 0.25),
        lambda film: film.astype(np.uint16) * 257,
        lambda film: np.round(0.6 * film).astype(np.uint8),
        lambda film: with_gamma(film, 0.8),
        lambda film: with_gamma(film, 1.3),
    ],
    ids=["exact", "re-compressed", "small", "16 bits", "darker", "gamma 0.8", "gamma 1.3"],
)
def test_a_film_stored_another_way_is_found(originals, decoded_originals, change):
    assert share_found(decoded_originals, [change(film) for film in originals]) >= 0.9


@pytest.mark.parametrize(
    "change",
    [lambda film: cropped(film, 0.01), lambda film: rotated(film, 1), lambda film: brighter(film, 30)],
    ids=["cropped by 1 % a side", "rotated by 1 degree", "30 levels brighter"],
)
def test_most_films_that_are_moved_or_brightened_a_little_are_found(originals, decoded_originals, change):
    assert share_found(decoded_originals, [change(film) for film in originals]) >= 0.6


@pytest.mark.parametrize(
    "change",
    [
        lambda film: cropped(film, 0.03),
        lambda film: rotated(film, 3),
        lambda film: np.ascontiguousarray(film[:, ::-1]),
        lambda film: 255 - film,
    ],
    ids=["cropped by 3 % a side", "rotated by 3 degrees", "mirrored", "negative"],
)
def test_the_limits_are_those_that_the_docstring_states(originals, decoded_originals, change):
    assert share_found(decoded_originals, [change(film) for film in originals]) == 0


def test_a_copy_with_the_same_pixels_is_exact_and_any_other_is_near():
    films = phantoms(0, 6)
    found = duplicates_in(decoded(films), decoded([films[1], jpeg(films[2], 50)]))
    assert (found["groups"], found["films"], found["largest_group"], found["groups_across_splits"]) == (2, 4, 2, 2)
    assert found["exact"] == found["near"] == {"pairs": 1, "across_splits": 1}
    exact, near = found["listed"]
    assert exact["exact"] and exact["correlation"] == 1
    assert not near["exact"] and MIN_CORRELATION <= near["correlation"] < 1
    assert [film["image_id"] for film in near["films"]] == ["film2", "film1"]
    assert [(film["split"], film["row"]) for film in near["films"]] == [("train", 2), ("test", 1)]


def test_films_like_one_film_are_one_group():
    film, other = phantoms(0, 2)
    slow_change = [np.round((1 - mix) * film + mix * other).astype(np.uint8) for mix in (0, 0.1, 0.2, 0.3, 0.4)]
    first, last = standardise(np.stack([slow_change[0].ravel(), slow_change[-1].ravel()]))
    assert first @ last < MIN_CORRELATION
    assert groups_of(decoded([*slow_change, other])).tolist() == [0, 0, 0, 0, 0, 5]


def test_copies_of_copies_join_the_group_of_the_first():
    film = phantoms(0, 1)[0]
    small = resized(film, 0.5)
    assert groups_of(decoded([*phantoms(5, 2), small, film, small, film])).tolist() == [0, 1, 2, 2, 2, 2]


def test_films_of_one_grey_level_are_only_like_exact_copies():
    blank = [np.full((64, 64), level, dtype=np.uint8) for level in (0, 10, 10, 200)]
    assert groups_of(decoded(blank)).tolist() == [0, 1, 1, 3]


def test_films_across_splits_come_first_then_contradictory_labels():
    a, b, c, d = phantoms(0, 4)
    found = duplicates_in(decoded([a, a, b, b, c], labels=[0, 0, 0, 1, 0]), decoded([c, d], labels=[0, 0]))
    assert [(pair["across_splits"], pair["contradictory"]) for pair in found["listed"]] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert found["contradictory_groups"] == 1
    assert [film["label"] for film in found["listed"][1]["films"]] == ["NORMAL", "PNEUMONIA"]


def test_a_finding_contradicts_only_where_both_films_know_it():
    a, b = phantoms(0, 2)
    nan = float("nan")
    labels = [{"Mass": 1.0, "Nodule": value} for value in (0.0, 1.0, 0.0, nan)]
    found = duplicates_in(decoded([a, a, b, b], labels=labels, names=("Mass", "Nodule"), multi_label=True))
    assert [pair["contradictory"] for pair in found["listed"]] == [True, False]
    assert [film["label"] for film in found["listed"][0]["films"]] == ["Mass", "Mass | Nodule"]


def test_a_huge_group_is_counted_but_not_listed_pair_by_pair():
    film = phantoms(0, 1)[0]
    train, test = decoded([film] * 300, labels=[0] * 300), decoded([film] * 200, labels=[0] * 200)
    found = duplicates_in(train, test)
    assert found["largest_group"] == 500
    assert found["exact"] == {"pairs": 500 * 499 // 2, "across_splits": 300 * 200}
    assert len(found["listed"]) == 8 * 7 // 2  # four films of each split
    assert sum(pair["across_splits"] for pair in found["listed"]) == 16


def test_a_list_of_pairs_ends_somewhere():
    films = list(np.random.default_rng(0).integers(0, 256, size=(200, 32, 32), dtype=np.uint8))
    found = duplicates_in(decoded(films * 4, labels=[0] * 800))
    assert (found["groups"], found["exact"]["pairs"]) == (200, 1200)
    assert len(found["listed"]) == MAX_LISTED_PAIRS


def test_many_like_films_are_compared_with_one_of_them_only():
    rng = np.random.default_rng(0)
    film = np.stack([phantoms(0, 1)[0].ravel()])
    like = np.clip(film.astype(int) + rng.integers(-2, 3, size=(2000, film.shape[1])), 0, 255).astype(np.uint8)
    reads = []

    class Counted:
        def __getitem__(self, rows):
            reads.append(len(rows))
            return like[rows]

    groups = group_duplicates([str(row) for row in range(2000)], ["0123456789abcdef"] * 2000, Counted())
    assert (groups == 0).all()
    assert sum(reads) == 2000
