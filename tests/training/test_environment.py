"""What a run ran with, and what has changed since."""

import subprocess
import sys

import pytest
from narrow import accelerator

from cxr_backbone.training.environment import describe_environment, differences


def test_differences_are_named_by_section_and_field():
    before = {"run": {"seed": 0, "cpu_threads": None}, "frozen": {"l2_strengths": [0.1]}, "device": "A"}
    now = {"run": {"seed": 1, "cpu_threads": None}, "frozen": {"l2_strengths": [0.1, 1.0]}, "more": 2, "device": "A"}
    assert differences(before, now) == [
        "run.seed was 0 and is 1",
        "frozen.l2_strengths was [0.1] and is [0.1, 1.0]",
        "more was None and is 2",
    ]
    assert differences(before, before) == []


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A recipe in a folder of its own."""
    (tmp_path / "recipes").mkdir()
    script = tmp_path / "recipes/two_stage.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "config.yaml"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return script


def git(folder, *words):
    name = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *name, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(script):
    return describe_environment(accelerator(), None)["git_commit"]


def test_outside_of_a_repository_there_is_no_commit(script):
    assert commit(script) is None


def test_the_commit_is_that_of_the_recipes_repository_and_says_if_files_differ(script):
    folder = script.parents[1]
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "tag", "v1")
    assert commit(script) == git(folder, "rev-parse", "HEAD")
    script.write_text("changed = True")
    assert commit(script) == git(folder, "rev-parse", "HEAD") + "-dirty"
