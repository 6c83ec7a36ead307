"""Shards are opened without being read, on disk and on the Hub."""

import subprocess
import sys

import datasets
import pytest
from data.drawn_shards import NAMES, write_parquet, write_tars
from hub.loopback import LoopbackHub

from cxr_backbone.data.shards import open_stream


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


FROM_THE_HUB = """
from cxr_backbone.data.shards import open_stream
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
