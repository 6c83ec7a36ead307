"""Augmentation changes films as told by a seed and a strength, and nothing else."""

import numpy as np
import pytest
import torch

from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.training.augmentation import Augmentation


@pytest.fixture(scope="module")
def films():
    phantoms = [draw_phantom(n, opacity=n % 2 == 1, image_size=96) for n in range(16)]
    return torch.from_numpy(np.stack(phantoms)).unsqueeze(1).float() / 255


def test_the_seed_decides_everything(films):
    augmentation = Augmentation(1.0)
    torch.manual_seed(1)
    first = augmentation(films, seed=5)
    torch.manual_seed(2)
    assert torch.equal(augmentation(films, seed=5), first)
    assert torch.equal(Augmentation(1.0)(films, seed=5), first)
    assert not torch.equal(augmentation(films, seed=6), first)


def test_each_film_of_a_batch_is_changed_in_its_own_way(films):
    same = films[:1].expand(16, -1, -1, -1)
    changed = Augmentation(1.0)(same, seed=0)
    assert len({film.numpy().tobytes() for film in changed}) == 16


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_films_stay_grey_images_from_0_to_1(films, strength):
    changed = Augmentation(strength)(films, seed=0)
    assert changed.shape == films.shape and changed.dtype == torch.float32
    assert changed.min() >= 0 and changed.max() <= 1
    assert changed.std(dim=(1, 2, 3)).min() > 0.03  # something is still to be seen on each


@pytest.mark.parametrize("stretch", [False, True])
def test_strength_0_changes_nothing(films, stretch):
    assert torch.equal(Augmentation(0.0, stretch=stretch)(films, seed=0), films)


@pytest.mark.parametrize("stretch", [False, True])
def test_proportions_stay_unless_they_are_stretched(stretch):
    """A square in the middle, told from what else is done to it by its width and height."""
    square = torch.zeros(64, 1, 96, 96)
    square[..., 33:63, 33:63] = 1.0
    changed = Augmentation(0.5, stretch=stretch)(square, seed=0)[:, 0] > 0.4
    heights, widths = changed.sum(dim=1).amax(dim=1), changed.sum(dim=2).amax(dim=1)  # of columns, of rows
    ratios = widths / heights
    assert (ratios.std() > 0.1) == stretch


def test_more_strength_changes_more(films):
    def change(strength):
        return (Augmentation(strength)(films, seed=0) - films).abs().mean().item()

    assert 0 < change(0.2) < change(0.6) < change(1.0)


def test_the_films_that_were_given_stay_as_they_are(films):
    before = films.clone()
    Augmentation(1.0)(films, seed=0)
    assert torch.equal(films, before)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_drawn_next_follows_from_the_seed_too(films, strength):
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        Augmentation(strength)(films, seed=9)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_no_film_is_mirrored(films):
    """The heart stays on its side: every changed film is more like its original than like its mirror image."""
    asymmetric = torch.zeros(32, 1, 96, 96)
    asymmetric[..., 30:70, 8:40] = 1.0
    changed = Augmentation(1.0)(asymmetric, seed=0)
    left, right = changed[..., :48].mean(dim=(1, 2, 3)), changed[..., 48:].mean(dim=(1, 2, 3))
    assert (left > right).all()
