"""Files count if they can be seen and stay in their folder; their names tell patient and split."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_backbone.data.files import (
    listed_file,
    load_from_hub,
    load_shards,
    patients_by_pattern,
    split_of,
    visible,
    visible_files,
)


def row_of_a_table(row):
    return f"table.csv, line {row + 2}"


@pytest.fixture
def folder(tmp_path):
    for name in ("films/b/2.png", "films/a.png", "films/.DS_Store", "films/__MACOSX/a.png", "films/Thumbs.db"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "secret.png").touch()
    return tmp_path / "films"


def test_hidden_files_and_what_systems_leave_behind_are_not_seen(folder):
    assert [path.name for path in visible(folder)] == ["a.png", "b"]
    assert [path.name for path in visible_files(folder, folder)] == ["a.png", "2.png"]


def test_a_link_to_a_file_of_the_folder_is_a_file(folder):
    (folder / "again.png").symlink_to(folder / "a.png")
    assert folder / "again.png" in visible_files(folder, folder)


@pytest.mark.parametrize("target", ["../secret.png", "..", "."])
def test_a_link_out_of_the_folder_or_to_a_folder_is_refused(folder, target):
    (folder / "c.png").symlink_to(target)
    with pytest.raises(ValueError, match=r"c\.png is a link (to a folder|out of)"):
        list(visible_files(folder, folder))


@pytest.mark.parametrize("name", ["b/2.png", "./b/../b/2.png"])
def test_a_listed_file_is_found(folder, name):
    assert listed_file(folder, name, "line 2") == str((folder / "b/2.png").resolve())
    assert listed_file(folder, str(folder / name), "line 2") == str((folder / "b/2.png").resolve())


def test_a_folder_that_is_itself_reached_by_a_link_is_no_way_out(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert listed_file(tmp_path / "link", "a.png", "line 2") == str((folder / "a.png").resolve())


def test_a_path_that_leaves_the_folder_is_refused(folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "films-of-others").mkdir()
    (tmp_path / "films-of-others/1.png").touch()
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "../films-of-others/1.png"):
        with pytest.raises(ValueError, match=r"line 2 lists .*, which is outside .*films; expected a file inside"):
            listed_file(folder, name, "line 2")


@pytest.mark.parametrize("name", ["gone.png", "", "b", "a.png/1.png", "https://example.org/a.png"])
def test_a_listed_file_that_is_missing_is_refused(folder, name):
    with pytest.raises(FileNotFoundError, match=r"line 2 lists '.*', which is no file in .*films"):
        listed_file(folder, name, "line 2")


@settings(deadline=None)
@given(st.text(min_size=0, max_size=400))
def test_no_name_that_a_table_can_hold_breaks_out(tmp_path_factory, name):
    empty = tmp_path_factory.getbasetemp()
    with pytest.raises((FileNotFoundError, ValueError), match=r"line 2 (lists|has an image path)"):
        listed_file(empty / "nothing-here", name, "line 2")


def test_a_pattern_tells_the_patient_by_its_first_group_or_by_all_of_it():
    names = ["train/patient00001/study1/view1.jpg", "train/patient00002/study1/view1.jpg"]
    assert patients_by_pattern(names, r"patient\d+", row_of_a_table) == ["patient00001", "patient00002"]
    assert patients_by_pattern(names, r"patient0*(\d+)", row_of_a_table) == ["1", "2"]


@pytest.mark.parametrize("pattern", [r"person\d+", r"\d*", r"patient()", r"(person)?patient"])
def test_a_pattern_that_finds_no_patient_is_refused_by_line(pattern):
    with pytest.raises(ValueError, match=r"table\.csv, line 2: patient_pattern=.* finds no patient in 'patient1\.png'"):
        patients_by_pattern(["patient1.png"], pattern, row_of_a_table)


def test_what_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"patient_pattern='\(' is no regular expression: "):
        patients_by_pattern(["patient1.png"], "(", row_of_a_table)


def test_splits_have_many_names():
    assert [split_of(name, "x") for name in ("Train", "VAL", "valid", "validation", "dev", "test")] == [
        "train",
        *["validation"] * 4,
        "test",
    ]
    with pytest.raises(ValueError, match=r"table\.csv has the split 'holdout'; expected one of train, validation, val"):
        split_of("holdout", "table.csv")


def test_shards_are_put_together_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    for name, rows in {"train-00000-of-00002": 2, "train-00001-of-00002": 3, "test-00000-of-00001": 1}.items():
        datasets.Dataset.from_dict({"n": list(range(rows))}).to_parquet(tmp_path / f"data/{name}.parquet")
    assert load_shards(tmp_path).num_rows == {"train": 5, "test": 1} == load_shards(tmp_path / "data").num_rows
    assert load_shards(tmp_path.parent) is None


def test_what_is_neither_here_nor_on_the_hub_is_named(monkeypatch, tmp_path):
    def refuse(hub_id):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for source in (tmp_path / "gone", "gone", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            load_from_hub(source)
    with pytest.raises(FileNotFoundError, match=r"no-one/nothing is neither here nor a Hub data set .*: offline"):
        load_from_hub("no-one/nothing")
