"""Shards are opened without being read, on disk and on the Hub."""

import subprocess
import sys

import datasets
import pytest
from data.drawn_shards import NAMES, write_parquet, write_tars
from datasets.distributed import split_dataset_by_node
from hub.loopback import LoopbackHub

from cxr_backbone.data.shards import open_stream
from cxr_backbone.data.table import load_table


@pytest.fixture(params=["parquet", "tar"])
def shards(request, tmp_path):
    return (write_parquet if request.param == "parquet" else write_tars)(tmp_path / "shards")


def test_opening_reads_no_film(shards):
    stream = open_stream(str(shards), label_columns=["label"], label_names=NAMES)
    assert isinstance(stream.splits["train"], datasets.IterableDataset)
    first = next(iter(stream.splits["train"]))
    assert first["image"]["bytes"].startswith(b"\x89PNG") and first["patient_id"].startswith("p")


def test_a_film_without_a_label_is_left_out(tmp_path):
    shards = write_parquet(tmp_path / "shards", changed={"label": -1}, label=datasets.Value("int64"))
    stream = open_stream(str(shards), label_columns=["label"], label_names=NAMES)
    assert len(list(stream.splits["train"])) == 23


def test_what_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no shards; expected \*\.parquet or \*\.tar"):
        open_stream(str(tmp_path / "empty"), label_columns=["label"])
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*gone"):
        open_stream(str(tmp_path / "gone"), label_columns=["label"])
    shards = write_parquet(tmp_path / "shards", label=datasets.Value("int64"))
    for options, message in [
        ({"label_columns": ["finding"]}, r"has no column 'finding'; it has image, label, patient_id"),
        ({"label_columns": ["label"], "patient_column": "subject"}, "has no column 'subject'"),
        ({"label_columns": ["label"], "image_column": "film"}, "has no column of films"),
        ({"label_columns": ["label"]}, "doesn't tell the classes of 'label'; name them in label_names"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_stream(str(shards), **options)
    write_parquet(tmp_path / "sides", split="holdout")
    with pytest.raises(ValueError, match="has the split 'holdout'"):
        open_stream(str(tmp_path / "sides"), label_columns=["label"])


def ids_in_any_order(stream, processes=2):
    rows = stream.splits["train"]
    shuffled = [row["image_id"] for row in rows.shuffle(seed=3, buffer_size=5)]
    shares = [row["image_id"] for rank in range(processes) for row in split_dataset_by_node(rows, rank, processes)]
    patients = {row["image_id"]: row["patient_id"] for row in rows.shuffle(seed=4, buffer_size=2)}
    return sorted(shuffled), sorted(shares), patients


def test_a_film_has_one_name_in_every_order_and_share(shards):
    stream = open_stream(str(shards), label_columns=["label"], label_names=NAMES)
    shuffled, shares, patients = ids_in_any_order(stream)
    assert shuffled == shares == sorted(patients)
    assert {image_id: patient for image_id, patient in patients.items()} == {
        row["image_id"]: row["patient_id"] for row in stream.splits["train"]
    }


def test_dicom_films_of_a_tar_are_called_by_their_key(tmp_path):
    stream = open_stream(str(write_tars(tmp_path / "shards", suffix="dcm")), label_columns=["label"], label_names=NAMES)
    shuffled, shares, _ = ids_in_any_order(stream)
    assert shuffled == shares == sorted(str(film) for film in range(24))


def test_films_without_a_name_are_refused(tmp_path):
    shards = write_parquet(tmp_path / "shards", changed={"image": {"bytes": b"film", "path": None}})
    with pytest.raises(ValueError, match="has a film without a name; expected a column image_id"):
        list(open_stream(str(shards), label_columns=["label"]).splits["train"])


def test_label_names_order_the_classes_by_their_names(tmp_path):
    shards = write_parquet(tmp_path / "shards")  # its own order is NORMAL, PNEUMONIA
    given = open_stream(str(shards), label_columns=["label"]).splits["train"]
    turned = open_stream(str(shards), label_columns=["label"], label_names=NAMES[::-1]).splits["train"]
    table = load_table(shards, label_columns=["label"], label_names=NAMES[::-1], num_folds=4)
    expected = {row["image_id"]: 1 - row["label"] for row in given}
    assert {row["image_id"]: row["label"] for row in turned} == expected
    of_table = {
        image_id.removeprefix("train/"): label
        for split in table.values()
        for image_id, label in zip(split["image_id"], split["label"], strict=True)
    }
    assert of_table == expected


@pytest.mark.parametrize("load", [load_table, lambda source, **options: open_stream(str(source), **options)])
def test_shards_whose_classes_are_others_are_refused(tmp_path, load):
    shards = write_parquet(tmp_path / "shards")
    write_parquet(shards, split="test", label=datasets.ClassLabel(names=["COVID", *NAMES]))
    with pytest.raises(ValueError, match=r"has the classes \[.*\] in label, and .* has \["):
        load(shards, label_columns=["label"])


def test_shards_without_patients_open_and_say_so(tmp_path):
    stream = open_stream(str(write_parquet(tmp_path / "shards")), label_columns=["label"], patient_column="")
    assert {row["patient_id"] for row in stream.splits["train"]} == {None}


FROM_THE_HUB = """
from cxr_backbone.data.shards import open_stream
from cxr_backbone.data.table import load_table
from cxr_backbone.data.table import load_table

stream = open_stream("org/films", label_columns=["label"])
print(len(list(stream.splits["train"])), stream.fingerprint.split()[0])
splits = load_table("org/films", label_columns=["label"], num_folds=4)
print(sum(map(len, splits.values())), splits["train"].features["label"].names)
"""


def test_a_set_on_the_hub_is_streamed_at_one_commit_and_loaded_as_a_table(tmp_path):
    shards = {f"data/{path.name}": path.read_bytes() for path in write_parquet(tmp_path / "shards").iterdir()}
    with LoopbackHub() as hub:
        repo = hub.add_repo("datasets/org/films", shards)
        process = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [f"24 org/films@{repo.head.sha}", f"24 {NAMES}"]


def test_a_hub_id_that_does_not_exist_is_named(tmp_path):
    program = "from cxr_backbone.data.shards import open_stream; open_stream('org/gone', label_columns=['label'])"
    with LoopbackHub() as hub:
        process = subprocess.run(
            [sys.executable, "-c", program],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
        )
    assert "FileNotFoundError: org/gone is neither a folder nor a Hub data set that can be streamed" in process.stderr
