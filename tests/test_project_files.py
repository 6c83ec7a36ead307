"""The files around the code: one version everywhere, workflows and forms as GitHub wants them, hooks against films."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version
from PIL import Image

import cxr_backbone
from cxr_backbone.data.synthetic import draw_phantom

ROOT = Path(__file__).parents[1]
CHECK_SCHEMA = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]


def test_the_citation_names_the_version_of_the_package():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == cxr_backbone.__version__


def test_the_changelog_leads_to_the_version_of_the_package():
    unreleased, *released = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert unreleased == "Unreleased"
    assert not released or Version(released[0]) <= Version(cxr_backbone.__version__)


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflows_are_such_as_github_reads_and_end_by_themselves(schema):
    check = subprocess.run([*CHECK_SCHEMA, schema, *WORKFLOWS], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def test_only_the_job_that_publishes_may_ask_for_an_identity():
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    permissions = {name: job.get("permissions", release["permissions"]) for name, job in release["jobs"].items()}
    publish = permissions.pop("publish")
    assert publish == {"id-token": "write"}
    assert all(given == {"contents": "read"} for given in permissions.values())
    assert release["jobs"]["publish"]["needs"] == "check" and release["jobs"]["check"]["needs"] == "build"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_every_issue_form_has_what_github_asks_for_and_begins_with_the_rule_on_patient_data(form):
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    for field in content["body"]:
        assert field["type"] in {"checkboxes", "dropdown", "input", "markdown", "textarea"}
        assert field["id"] and field["attributes"]["label"]
    rule = content["body"][0]["attributes"]["options"][0]
    assert rule["required"] is True
    assert all(word in rule["label"] for word in ("no patient data", "films", "names", "dates", "DICOM headers"))


@pytest.fixture
def repository(tmp_path):
    """A function that runs the hooks of this repository, in one of its own, over the files that stand in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / ".pre-commit-config.yaml").symlink_to(ROOT / ".pre-commit-config.yaml")

    def run_hooks():
        for command in (["git", "init", "--quiet"], ["git", "add", "--all"]):
            subprocess.run(command, cwd=folder, env=environment(tmp_path), check=True)
        return pre_commit(folder, environment(tmp_path))

    return folder, run_hooks


def test_the_hooks_let_text_the_pictures_of_the_docs_and_the_checkpoint_pass(repository):
    folder, run_hooks = repository
    (folder / "docs/figures").mkdir(parents=True)
    (folder / "checkpoints/cxr-inception").mkdir(parents=True)
    (folder / "README.md").write_text("# Films\n")
    (folder / "checkpoints/cxr-inception/model.safetensors").write_bytes(bytes(range(256)) * 5000)
    write_film(folder / "docs/figures/roc.png")
    hooks = run_hooks()
    assert hooks.returncode == 0, hooks.stdout


@pytest.mark.parametrize(
    "name",
    [
        *("film.jpg", "film.png", "docs/film.png", "films/IM000001", "film.dcm", "film.tiff"),
        "checkpoints/cxr-inception/film.png",
    ],
)
def test_the_hooks_refuse_a_film_under_any_name(name, repository):
    folder, run_hooks = repository
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_film(folder / name)
    hooks = run_hooks()
    assert hooks.returncode == 1
    assert name in hooks.stdout and "Films and weights stay out." in hooks.stdout


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.h5", "films.npz"])
def test_the_hooks_refuse_weights_and_arrays(name, repository):
    folder, run_hooks = repository
    (folder / name).write_bytes(bytes(range(256)))
    hooks = run_hooks()
    assert hooks.returncode == 1 and name in hooks.stdout


def test_the_hooks_refuse_a_file_over_a_megabyte(repository):
    folder, run_hooks = repository
    (folder / "labels.csv").write_text("0\n" * 600_000)
    (folder / "short.csv").write_text("0\n" * 400_000)
    hooks = run_hooks()
    assert hooks.returncode == 1 and "over 1 MB -- labels.csv" in hooks.stdout and "short.csv" not in hooks.stdout


@pytest.mark.parametrize("hook", ["no-films", "no-large-files"])
def test_this_repository_keeps_its_own_rules(hook, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    hooks = pre_commit(ROOT, environment(tmp_path), hook)
    assert hooks.returncode == 0, hooks.stdout


def environment(folder: Path) -> dict[str, str]:
    """With a cache of pre-commit's own; without what git sets for a hook, if it is a hook that runs these tests."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return outside | {"PRE_COMMIT_HOME": str(folder / "pre-commit")}


def pre_commit(folder: Path, environment: dict[str, str], *hooks: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pre_commit", "run", "--all-files", *hooks]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def write_film(path: Path) -> None:
    """A phantom in the format of the name; as DICOM's first bytes where the name is DICOM's, or none."""
    film = Image.fromarray(draw_phantom(0, opacity=False, image_size=75))
    if path.suffix in ("", ".dcm"):
        path.write_bytes(bytes(128) + b"DICM" + film.tobytes())
    else:
        film.save(path)
