"""A run directory holds what a run did, and never takes the place of another."""

import csv
import hashlib
import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from evaluation.drawn_predictions import drawn_run, two_classes

from cxr_backbone.data.audit import audit
from cxr_backbone.data.splits import repeat_split
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.environment import PACKAGES
from cxr_backbone.training.films import Films
from cxr_backbone.training.state import RunDirectory


@pytest.fixture
def started(tmp_path, arguments, films):
    run = RunDirectory(tmp_path / "runs/first")
    run.start(arguments, films, audit(films.splits, films.unreadable), Accelerator(cpu=True))
    return run


def read(path):
    return json.loads(path.read_text())


def test_what_is_known_before_training_is_written_before_training(started):
    assert {path.name for path in started.path.iterdir()} == {
        *("config.yaml", "environment.json", "split.csv", "audit.json", "audit.html", "unreadable.csv")
    }


def test_the_config_on_file_repeats_the_run(started, arguments):
    assert parse_arguments([str(started.path / "config.yaml")]) == arguments


def test_the_split_on_file_is_the_split_of_the_run(started, films):
    repeated = repeat_split(films.splits, started.path / "split.csv")
    assert all(repeated[name]["image_id"][:] == rows["image_id"][:] for name, rows in films.splits.items())


def test_the_audit_on_file_is_that_of_the_films(started, films):
    report = read(started.path / "audit.json")
    assert {name: split["films"] for name, split in report["splits"].items()} == {
        name: len(rows) for name, rows in films.splits.items()
    }
    assert "phantom0_0.png" in (started.path / "audit.html").read_text()


def test_films_that_were_skipped_are_listed_with_the_reason(started):
    with (started.path / "unreadable.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"path": "broken.png", "reason": "Can't read broken.png, it is no image."}
        ]


def test_where_none_was_skipped_there_is_no_list(tmp_path, films):
    run = RunDirectory(tmp_path / "run")
    run.write_audit(Films(films.splits, films.train, films.train_sample, films.sealed_test), audit(films.splits))
    assert {path.name for path in run.path.iterdir()} == {"audit.json", "audit.html"}


def test_the_environment_on_file_says_with_what_it_ran(started):
    environment = read(started.path / "environment.json")
    assert set(environment["packages"]) == set(PACKAGES)
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["processes"] == 1 and environment["mixed_precision"] == "no"
    assert environment["threads"] == torch.get_num_threads()
    assert environment["device"]
    assert environment["initial_weights_sha256"] is None  # it started from random ones


def test_a_file_of_initial_weights_is_known_by_its_hash(arguments, films, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"some weights")
    arguments.model.init = str(tmp_path / "weights.pth")
    run = RunDirectory(tmp_path / "run")
    run.start(arguments, films, audit(films.splits), Accelerator(cpu=True))
    environment = read(run.path / "environment.json")
    assert environment["initial_weights_sha256"] == hashlib.sha256(b"some weights").hexdigest()


def test_results_are_a_file_of_metrics_and_one_of_predictions_for_each_model_and_split(tmp_path):
    metrics, predictions = drawn_run(two_classes)
    run = RunDirectory(tmp_path / "new")
    run.write_results(metrics, predictions)
    assert read(run.path / "metrics.json") == metrics
    names = {f"{model} {split}.parquet" for model, splits in predictions.items() for split in splits}
    assert {path.name for path in (run.path / "predictions").iterdir()} == names
    rows = pq.read_table(run.path / "predictions/fine_tuned test.parquet").to_pylist()
    assert [row["image_id"] for row in rows] == predictions["fine_tuned"]["test"].image_ids


@pytest.mark.parametrize("name", ["config.yaml", ".hidden", "other.txt"])
def test_a_directory_with_files_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"run\.output_dir='{tmp_path}' already holds files"):
        RunDirectory(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"run\.output_dir"):
        RunDirectory(tmp_path / "run")


def test_an_empty_directory_is_taken_and_a_new_one_is_not_made_before_the_start(tmp_path):
    RunDirectory(tmp_path)
    RunDirectory(tmp_path / "deep/run")
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_writes(tmp_path, arguments, films):
    run = RunDirectory(tmp_path / "run")
    run.start(arguments, films, audit(films.splits), SimpleNamespace(is_main_process=False))
    assert not run.path.exists()
