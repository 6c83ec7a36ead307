"""Every format has one loader, and an option that it doesn't know is a mistake that is told."""

import inspect

import pytest

from cxr_backbone.data.labels import make_features
from cxr_backbone.data.sources import FOR_EVERY_LOADER, LOADERS, load_films
from cxr_backbone.training.arguments import DataArguments


def test_a_format_is_loaded_with_its_own_options():
    films = load_films("synthetic", seed=1, image_size=40, num_patients=20)
    assert list(films) == ["train", "validation", "test"]
    assert films["train"][0]["image"].size == (40, 40)
    assert make_features(["NORMAL", "PNEUMONIA"]).items() <= films["train"].features.items()


def test_the_seed_reaches_the_loader(shared):
    def validation(seed):
        return load_films("kermany", seed=seed, image_size=75, source=str(shared / "data/kermany224"))["validation"]

    assert validation(0)["image_id"][:] != validation(1)["image_id"][:]


@pytest.mark.parametrize("format", LOADERS)
def test_every_option_of_a_loader_can_be_given_in_a_config(format):
    options = set(inspect.signature(LOADERS[format]).parameters) - set(FOR_EVERY_LOADER)
    assert options <= set(DataArguments.__dataclass_fields__)
    assert DataArguments(format=format, source=None if format == "synthetic" else "films").format == format


def test_an_option_of_another_format_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.label_columns means nothing to data\.format=kermany; it takes source,"
    ):
        load_films("kermany", seed=0, image_size=75, source="films", label_columns=["label"])
    with pytest.raises(ValueError, match=r"data\.fold means nothing to data\.format=synthetic"):
        load_films("synthetic", seed=0, image_size=75, fold=1)


def test_an_option_that_is_needed_is_asked_for():
    with pytest.raises(ValueError, match=r"data\.format=table needs data\.label_columns"):
        load_films("table", seed=0, image_size=75, source="films.csv")
