"""Phantoms look the same from run to run, differ where they should, and don't give their label away."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxr_backbone.data.kermany import FEATURES
from cxr_backbone.data.synthetic import draw_phantom, load_synthetic


@pytest.fixture(scope="module")
def splits():
    return load_synthetic(40, image_size=64)


def test_a_phantom_is_a_grey_square():
    film = draw_phantom(0, opacity=True)
    assert film.shape == (299, 299) and film.dtype == np.uint8
    assert film.min() < 30 and film.max() > 180


def test_the_same_seed_draws_the_same_film():
    assert (draw_phantom(5, opacity=True) == draw_phantom(5, opacity=True)).all()
    assert (draw_phantom(5, opacity=True) != draw_phantom(6, opacity=True)).any()


def test_an_opacity_brightens_part_of_one_lung_and_nothing_else():
    for seed in range(20):
        healthy, ill = (draw_phantom(seed, opacity=opacity).astype(int) for opacity in (False, True))
        brighter = ill - healthy > 15
        assert (ill >= healthy).all()
        assert 0.005 < brighter.mean() < 0.15
        assert brighter[:, :150].mean() < 1e-3 or brighter[:, 150:].mean() < 1e-3


def test_two_films_of_one_patient_differ_but_show_the_opacity_in_the_same_lung():
    for seed in range(5):
        healthy, ill = (
            [draw_phantom(seed, opacity=opacity, film=film).astype(int) for film in (0, 1)] for opacity in (False, True)
        )
        assert (healthy[0] != healthy[1]).any()
        added = [after - before for before, after in zip(healthy, ill, strict=True)]
        in_left_half = [film[:, :150].sum() > film[:, 150:].sum() for film in added]
        assert in_left_half[0] == in_left_half[1]


def test_mean_brightness_does_not_give_the_label_away():
    brightness = [draw_phantom(seed, opacity=seed % 2 == 1, image_size=64).mean() for seed in range(200)]
    auroc = roc_auc_score([seed % 2 for seed in range(200)], brightness)
    assert 0.25 < auroc < 0.75


def test_the_data_set_has_the_columns_of_the_kermany_set(splits):
    for split in splits.values():
        assert split.features == FEATURES
        assert set(split["subtype"]) == {"normal", "drawn"}
    assert splits["train"][0]["image"].size == (64, 64)


def test_patients_are_split_70_15_15_and_stand_on_one_side(splits):
    patients = {name: set(split["patient_id"]) for name, split in splits.items()}
    assert {name: len(ids) for name, ids in patients.items()} == {"train": 28, "validation": 6, "test": 6}
    assert len(set.union(*patients.values())) == 40


def test_a_patient_has_one_film_or_two_with_one_label(splits):
    train = splits["train"].to_pandas().groupby("patient_id")["label"]
    assert set(train.size()) == {1, 2}
    assert (train.nunique() == 1).all()


def test_the_seed_decides_the_data_set(splits):
    def first_film(seed):
        return np.asarray(load_synthetic(20, image_size=64, seed=seed)["train"][0]["image"])

    assert (first_film(3) == first_film(3)).all()
    assert (first_film(3) != first_film(4)).any()


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_patients must be at least 20, not 19"):
        load_synthetic(19)
    with pytest.raises(ValueError, match="seed must not be negative"):
        load_synthetic(seed=-1)
    with pytest.raises(ValueError, match="image_size must be at least 32 pixels, not 8"):
        draw_phantom(0, opacity=True, image_size=8)
    with pytest.raises(ValueError, match="must not be negative"):
        draw_phantom(-1, opacity=True)
