"""The loopback Hub against the real client, a fresh process each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub.loopback import LoopbackHub

REPO = "org/cxr-inception"


@pytest.fixture
def hub():
    with LoopbackHub(tokens={"hf_write": "org"}) as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs lines of Python with huggingface_hub and an `api` at hand; returns what they leave in `result`."""

    def run(lines, token="hf_write"):
        script = f"""
import json
from huggingface_hub import *
api = HfApi()
{lines}
print(json.dumps(result))
"""
        process = subprocess.run(
            [sys.executable, "-c", script],
            env=hub.environment(tmp_path / "home", token),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


@pytest.fixture
def folder(tmp_path):
    """A model's folder: config, card, and 11 MiB of safetensors."""
    size = 11 * 2**20
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "cxr_inception"}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(call: str) -> str:
    """Lines for the client: make `call`, and leave the names of its exception's classes and the status."""
    return f"""
try:
    {call}
except Exception as error:
    result = [[kind.__name__ for kind in type(error).__mro__], error.response.status_code]
"""


def test_a_folder_goes_up_in_one_commit_and_comes_back_the_same(hub, client, folder):
    file, snapshot = client(f"""
api.create_repo("{REPO}")
api.upload_folder(repo_id="{REPO}", folder_path={str(folder)!r}, commit_message="first")
result = [hf_hub_download("{REPO}", "model.safetensors"), snapshot_download("{REPO}")]
""")
    assert [commit.message for commit in hub.repos[REPO].commits] == ["first"]
    assert hub.repos[REPO].files == contents(folder)
    assert Path(file).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert contents(Path(snapshot)) == contents(folder)


def test_only_the_weights_go_through_lfs_and_nothing_through_xet(hub, client, folder):
    client(f"""
api.create_repo("{REPO}")
api.upload_folder(repo_id="{REPO}", folder_path={str(folder)!r})
result = None
""")
    assert list(hub.lfs_objects.values()) == [(folder / "model.safetensors").read_bytes()]
    assert not [request for request in hub.requests if "xet" in request]


def test_a_folder_that_has_not_changed_makes_no_second_commit(hub, client, folder):
    client(f"""
api.create_repo("{REPO}")
for _ in range(2):
    api.upload_folder(repo_id="{REPO}", folder_path={str(folder)!r})
result = None
""")
    assert len(hub.repos[REPO].commits) == 1


def test_an_earlier_commit_stays_readable(hub, client):
    first = hub.add_repo(REPO, {"config.json": b"1", "old.json": b"{}"}).head.sha
    paths = client(f"""
api.create_repo("{REPO}", exist_ok=True)
operations = [CommitOperationAdd("config.json", b"2"), CommitOperationDelete("old.json")]
api.create_commit("{REPO}", operations, commit_message="second")
result = [hf_hub_download("{REPO}", "config.json", revision=revision) for revision in ("main", "{first}")]
""")
    assert [Path(path).read_bytes() for path in paths] == [b"2", b"1"]
    assert hub.repos[REPO].files == {"config.json": b"2"}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (f'hf_hub_download("{REPO}", "missing.json")', "EntryNotFoundError"),
        (f'hf_hub_download("{REPO}", "config.json", revision="v9")', "RevisionNotFoundError"),
        ('hf_hub_download("org/missing", "config.json")', "RepositoryNotFoundError"),
        ('snapshot_download("org/missing")', "RepositoryNotFoundError"),
    ],
)
def test_what_is_missing_raises_the_clients_own_error(hub, client, call, expected):
    hub.add_repo(REPO, {"config.json": b"{}"})
    kinds, status = client(refusal(call), token=None)
    assert expected in kinds
    assert status == 404


@pytest.mark.parametrize(
    ("call", "token", "expected"),
    [
        ("api.whoami()", "hf_wrong", 401),
        (f'hf_hub_download("{REPO}", "config.json")', "hf_wrong", 401),
        ('api.create_repo("org/new")', "hf_wrong", 401),
        ('api.create_repo("org/new")', None, 401),
        ('api.create_repo("timm/new")', "hf_write", 403),
    ],
)
def test_a_token_that_does_not_fit_is_refused(hub, client, call, token, expected):
    hub.add_repo(REPO, {"config.json": b"{}"})
    kinds, status = client(refusal(call), token)
    assert kinds[0] == "HfHubHTTPError"
    assert status == expected
    assert list(hub.repos) == [REPO]


def test_whoami_names_the_namespace_of_the_token(client):
    assert client('result = api.whoami()["name"]') == "org"
