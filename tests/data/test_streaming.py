"""Shards are read as a stream: every film once an epoch, none of them kept, the same pixels as anywhere else."""

from functools import partial

import datasets
import numpy as np
import pytest
from data.drawn_shards import CLASSES, NAMES, films, write_parquet, write_tars
from datasets.distributed import split_dataset_by_node

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.labels import label_names, labels_of
from cxr_backbone.data.shards import open_stream
from cxr_backbone.data.splits import complete_splits
from cxr_backbone.data.streaming import decode_stream

divide = partial(complete_splits, num_folds=4)


@pytest.fixture(params=["parquet", "tar"])
def shards(request, tmp_path):
    return (write_parquet if request.param == "parquet" else write_tars)(tmp_path / "shards")


@pytest.fixture
def decoded(shards, tmp_path):
    stream = open_stream(str(shards), label_columns=["label"], label_names=NAMES)
    return decode_stream(stream, 32, divide, cache_dir=tmp_path / "cache")


def test_the_splits_are_by_patient_and_hold_every_film(decoded):
    splits, train = decoded
    patients = [set(splits[name]["patient_id"]) for name in ("train", "validation", "test")]
    assert not patients[0] & patients[1] and not (patients[0] | patients[1]) & patients[2]
    image_ids = [image_id for split in splits.values() for image_id in split["image_id"]]
    assert sorted(image_ids) == sorted(f"{film}.png" for film in range(24))
    assert label_names(splits["train"].features) == NAMES
    assert len(train) == len(splits["train"]) == 12


def test_train_streams_and_what_is_held_out_is_kept_decoded(decoded):
    splits, train = decoded
    assert "pixels" not in splits["train"].column_names
    assert sorted(row["image_id"] for row in train.rows) == sorted(splits["train"]["image_id"])
    assert "pixels" in splits["validation"].column_names and "pixels" in splits["test"].column_names


def test_pixels_facts_and_labels_are_those_of_decode_once(decoded, tmp_path):
    splits, train = decoded
    rows = {"image": [image for image, _, _ in films(24)], "ill": [ill for _, ill, _ in films(24)]}
    features = datasets.Features({"image": datasets.Image(), "ill": datasets.Value("int64")})
    expected = list(decode_once(datasets.Dataset.from_dict(rows, features=features), 32, tmp_path / "other"))
    for row in [*train.rows, *splits["validation"], *splits["test"]]:
        film = expected[int(row["image_id"].removesuffix(".png"))]
        assert (row["pixels"], row["label"]) == (film["pixels"], film["ill"])
    for row in splits["train"]:
        assert row["film"] == expected[int(row["image_id"].removesuffix(".png"))]["film"]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_films_out_and_none_comes_twice(decoded, processes):
    _, train = decoded
    shares = [
        [row["image_id"] for row in split_dataset_by_node(train.rows, rank, processes)] for rank in range(processes)
    ]
    seen = sorted(image_id for share in shares for image_id in share)
    assert seen == sorted(row["image_id"] for row in train.rows)
    assert all(shares)


def test_a_second_look_reads_the_cache_and_changed_shards_are_looked_at_anew(tmp_path):
    shards, cache = write_parquet(tmp_path / "shards"), tmp_path / "cache"

    def look():
        stream = open_stream(str(shards), label_columns=["label"])
        _, train = decode_stream(stream, 32, divide, cache_dir=cache)
        return train.fingerprint, len(list(cache.rglob("*.arrow")))

    first = look()
    assert look() == first
    write_parquet(shards, number=28)
    fingerprint, num_files = look()
    assert fingerprint != first[0] and num_files == 2 * first[1]


def test_splits_that_the_shards_bring_stay_as_they_are(tmp_path):
    write_parquet(tmp_path / "shards", split="train")
    for split, number in (("valid", 8), ("test", 10)):
        features = {"image": datasets.Image(), "label": CLASSES}
        rows = [
            {"image": {**image, "path": f"{split}-{image['path']}"}, "label": ill, "patient_id": patient}
            for image, ill, patient in films(number)
        ]
        features = datasets.Features({**features, "patient_id": datasets.Value("string")})
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"shards/{split}-0.parquet")
    stream = open_stream(str(tmp_path / "shards"), label_columns=["label"])
    splits, train = decode_stream(stream, 32, divide, cache_dir=tmp_path / "cache")
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "validation": 8, "test": 10}
    assert len(list(train.rows)) == 24


def test_findings_come_with_their_policies(tmp_path):
    def beside(ill):
        return {"Edema": 1 if ill else -1, "Mass": None if ill else 0}

    shards = write_tars(tmp_path / "shards", beside=beside)
    stream = open_stream(str(shards), label_columns=["Edema", "Mass"], uncertain="ones", missing="ignore")
    splits, _ = decode_stream(stream, 32, divide, cache_dir=tmp_path / "cache")
    labels = labels_of(splits["validation"])
    assert label_names(splits["train"].features) == ["Edema", "Mass"]
    assert (labels[:, 0] == 1).all()
    assert set(labels[~np.isnan(labels[:, 1]), 1]) == {0.0} and np.isnan(labels[:, 1]).any()


def test_a_film_that_cannot_be_read_is_named_and_by_choice_left_out(tmp_path):
    shards = write_parquet(tmp_path / "shards", changed={"image": {"bytes": b"no image", "path": "broken.png"}})
    stream = open_stream(str(shards), label_columns=["label"])
    with pytest.raises(ValueError, match=r"(?s)1 of 24 films can't be read.*broken\.png"):
        decode_stream(stream, 32, divide, cache_dir=tmp_path / "cache")
    skipped = {}
    splits, train = decode_stream(stream, 32, divide, cache_dir=tmp_path / "cache", on_unreadable=skipped.__setitem__)
    assert list(skipped) == ["broken.png"] and "Can't read broken.png" in skipped["broken.png"]
    assert sum(map(len, splits.values())) == 23
    assert "broken.png" not in [row["image_id"] for row in train.rows]


@pytest.mark.parametrize(
    ("changed", "label", "message"),
    [
        ({"label": 7}, datasets.Value("int64"), r"5\.png has '7' in column label"),
        ({"image": None}, CLASSES, "holds no bytes of a film; expected the whole file in the shard"),
        ({"patient_id": None}, CLASSES, "has no patient_id"),
        ({"image": next(films(1))[0]}, CLASSES, r"0\.png comes twice"),
    ],
)
def test_a_faulty_row_is_refused_by_name(tmp_path, changed, label, message):
    shards = write_parquet(tmp_path / "shards", changed=changed, label=label)
    with pytest.raises(ValueError, match=message):
        stream = open_stream(str(shards), label_columns=["label"], label_names=NAMES)
        decode_stream(stream, 32, divide, cache_dir=tmp_path / "cache", on_unreadable=lambda path, reason: None)
