"""The last checkpoints of a training, whole or known to be damaged."""

import subprocess

import pytest
import torch

from cxr_backbone.training.checkpoints import KEPT, Checkpoints


def state(steps):
    tensors = {"weight": torch.full((1000,), float(steps)), "step": torch.tensor(steps)}
    return {"model": tensors, "progress": {"steps": steps, "lowest": float("inf"), "losses": [0.1]}, "scaler": None}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run/resume")


def test_without_a_checkpoint_there_is_no_state(checkpoints):
    assert checkpoints.newest() is None


def test_the_newest_state_comes_back_as_it_was(checkpoints):
    for steps in (900, 1000):
        checkpoints.save(state(steps), steps)
    found, expected = checkpoints.newest(), state(1000)
    assert found["progress"] == expected["progress"] and found["scaler"] is None
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in found["model"].items())


def test_only_the_last_ones_are_kept(checkpoints):
    for steps in range(5):
        checkpoints.save(state(steps), steps)
    assert [int(file.name[:9]) for file in sorted(checkpoints.folder.iterdir())] == list(range(5 - KEPT, 5))


def cut(content):
    return content[:-100]


def emptied(content):
    return b""


def with_one_bit_turned(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, emptied, with_one_bit_turned])
def test_of_a_damaged_one_it_is_told_and_the_one_before_it_taken(checkpoints, damage, caplog):
    for steps in (1, 2):
        checkpoints.save(state(steps), steps)
    newest = sorted(checkpoints.folder.iterdir())[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoints.newest()["progress"]["steps"] == 1
    assert f"{newest} is damaged" in caplog.text
    checkpoints.save(state(2), 2)
    assert checkpoints.newest()["progress"]["steps"] == 2


def test_if_all_are_damaged_there_is_none(checkpoints):
    for steps in (1, 2):
        checkpoints.save(state(steps), steps)
    for file in checkpoints.folder.iterdir():
        file.write_bytes(b"no checkpoint")
    assert checkpoints.newest() is None


def test_a_half_written_one_is_none(checkpoints):
    checkpoints.save(state(1), 1)
    (checkpoints.folder / "unfinished").write_bytes(b"half")
    assert checkpoints.newest()["progress"]["steps"] == 1
    checkpoints.save(state(2), 2)
    assert checkpoints.newest()["progress"]["steps"] == 2


class Attack:
    def __reduce__(self):
        return (print, ("code has run",))


def test_code_in_a_checkpoint_is_not_run(checkpoints, capsys):
    checkpoints.save(state(1) | {"model": Attack()}, 1)
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        checkpoints.newest()
    assert "code has run" not in capsys.readouterr().out


def test_a_full_disk_leaves_the_earlier_ones(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        checkpoints = Checkpoints(folder / "resume")
        checkpoints.save(state(1), 1)
        checkpoints.save(state(2), 2)
        before = sorted(checkpoints.folder.iterdir())
        with pytest.raises(OSError, match="resume/000000003 can't be written: No space left on device"):
            checkpoints.save(state(3) | {"more": torch.zeros(10_000)}, 3)
        assert sorted(checkpoints.folder.iterdir()) == before
        assert checkpoints.newest()["progress"]["steps"] == 2
    finally:
        subprocess.run(["umount", str(folder)], check=True)
