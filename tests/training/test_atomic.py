"""A file or a folder appears whole or not at all."""

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from cxr_backbone.training import atomic
from cxr_backbone.training.atomic import remove, replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_after_the_block_and_what_was_there_before_it_until_then(tmp_path):
    path = tmp_path / "new folder/file"
    for text in ("first", "second"):
        with replacing(path) as place:
            place.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text and names(path.parent) == ["file"]


def test_a_folder_takes_the_place_of_another_with_all_that_was_in_it(tmp_path):
    for name in ("a", "b"):
        with replacing(tmp_path / "folder") as place:
            place.mkdir()
            (place / name).write_text(name)
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as place:
        place.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_what_a_killed_process_left_does_no_harm(tmp_path):
    child = f"""
import os, runpy, signal, sys
from pathlib import Path
replacing = runpy.run_path({atomic.__file__!r})["replacing"]
with replacing(Path(sys.argv[1])) as place:
    place.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "file"
    path.write_text("old")
    process = subprocess.run([sys.executable, "-c", child, str(path)])
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old" and names(tmp_path) == ["file", "file.unfinished"]
    with replacing(path) as place:
        place.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_a_folder_whose_process_was_killed_between_the_two_renames_is_made_anew(tmp_path):
    for name in ("folder.old", "folder.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "leftover").touch()
    with replacing(tmp_path / "folder") as place:
        place.mkdir()
        (place / "new").touch()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["new"]


def write_bytes(file):
    file.write_bytes(b"0" * 100_000)


def write_safetensors(file):
    save_file({"weight": torch.zeros(100_000)}, file)


def write_with_torch(file):
    with file.open("wb") as opened:
        torch.save({"weight": torch.zeros(100_000)}, opened)


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of its own, which has room for nothing that these tests write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("write", [write_bytes, write_safetensors, write_with_torch])
def test_whoever_meets_a_full_disk_the_error_names_the_file_and_the_reason(full_disk, write):
    path = full_disk / "file"
    path.write_text("old")
    with (
        pytest.raises(OSError, match=f"{path} can't be written: .*[Nn]o space left on device"),
        replacing(path) as place,
    ):
        write(place)
    assert path.read_text() == "old" and names(full_disk) == ["file"]


def test_removing_a_link_leaves_what_it_points_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == []
