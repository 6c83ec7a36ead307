"""The loopback Hub against the real client, a fresh process each time."""

import json
import subprocess
import sys
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hub.loopback import LoopbackHub

REPO = "org/cxr-inception"


@pytest.fixture
def hub():
    tokens = {"hf_write": "org", "hf_read": "org", "hf_other": "timm"}
    with LoopbackHub(tokens, read_only={"hf_read"}) as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Runs lines of Python with huggingface_hub and an `api` at hand; returns what they leave in `result`.

    `status(call, ...)` is 200, the status of the refusal, or the name of an exception that has none; `commit(text)`
    commits it as config.json.
    """

    def run(lines, token="hf_write"):
        script = f"""
import json
from huggingface_hub import *
api = HfApi()

def status(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error.response.status_code if hasattr(error, "response") else type(error).__name__
    return 200

def commit(text, repo="{REPO}", **kwargs):
    operations = [CommitOperationAdd("config.json", text.encode())]
    return api.create_commit(repo, operations, commit_message=text, **kwargs)

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


# Faults


def test_a_fault_answers_as_often_as_it_was_asked_to_and_carries_nothing_out(hub, client):
    hub.add_repo(REPO, {"config.json": b"{}"})
    hub.fail("POST", ".*/commit/main", 409, times=2)
    hub.fail("POST", ".*/commit/main", 500)
    assert client("result = [status(commit, 'theirs') for _ in range(4)]") == [409, 409, 500, 200]
    assert [commit.message for commit in hub.repos[REPO].commits] == ["add_repo", "theirs"]


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500, 503])
def test_a_fault_has_any_status(hub, status):
    """Through urllib, which starts no process: the client's own view is in the tests around this one."""
    hub.fail("GET", "/api/models/.*", status, headers={"Retry-After": "7"})
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{hub.endpoint}/api/models/{REPO}")
    assert (refused.value.code, refused.value.headers["Retry-After"]) == (status, "7")


def test_the_code_of_a_fault_picks_the_clients_exception(hub, client):
    hub.add_repo(REPO, {"config.json": b"{}"})
    hub.fail("GET", f"/api/models/{REPO}", 403, code="GatedRepo")
    kinds, status = client(refusal(f'api.repo_info("{REPO}")'))
    assert (kinds[0], status) == ("GatedRepoError", 403)


def test_the_client_waits_as_long_as_retry_after_says(hub, client):
    hub.add_repo(REPO, {"config.json": b"{}"})
    hub.fail("POST", ".*/preupload/main", 429, headers={"Retry-After": "2"})
    seconds = client("""
import time
start = time.monotonic()
commit("patient")
result = time.monotonic() - start
""")
    assert seconds >= 2  # its own first wait is 1 s
    assert hub.repos[REPO].head.message == "patient"


def test_a_fault_is_for_one_method_and_a_whole_path_without_its_query(hub):
    repo = hub.add_repo(REPO, {"config.json": b"{}", "config.json.bak": b"old"})
    file = f"{hub.endpoint}/{REPO}/resolve/main/config.json"
    hub.fail("GET", f"/{REPO}/resolve/main/config.json", 500)
    assert urlopen(Request(file, method="HEAD")).status == 200
    assert urlopen(f"{file}.bak").read() == repo.files["config.json.bak"]
    with pytest.raises(HTTPError, match="500"):
        urlopen(f"{file}?download=true")
    assert urlopen(file).read() == repo.files["config.json"]


def test_a_fault_that_no_request_met_is_an_error():
    with (
        pytest.raises(AssertionError, match="No request was a GET /api/model, which was to meet CUT"),
        LoopbackHub() as hub,
    ):
        hub.cut("GET", "/api/model")


def test_a_download_that_was_cut_half_way_goes_on_from_there(hub, client):
    content = bytes(range(256)) * 4096
    hub.add_repo(REPO, {"weights.bin": content})
    path = f"/{REPO}/resolve/main/weights.bin"
    hub.cut("GET", path)
    with pytest.raises(IncompleteRead) as half:
        urlopen(hub.endpoint + path).read()
    assert half.value.partial == content[: len(content) // 2]
    hub.cut("GET", path, times=2)
    file = client(f'result = hf_hub_download("{REPO}", "weights.bin")')
    assert Path(file).read_bytes() == content
    assert hub.requests.count(f"GET {path}") == 1 + 3


def test_weights_that_were_cut_half_way_are_sent_again(hub, client, folder):
    hub.cut("PUT", "/lfs/.*")
    client(f"""
api.create_repo("{REPO}")
api.upload_folder(repo_id="{REPO}", folder_path={str(folder)!r})
result = None
""")
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 2
    assert [commit.files for commit in hub.repos[REPO].commits] == [contents(folder)]


def test_a_commit_that_was_cut_half_way_has_not_happened(hub, client):
    hub.add_repo(REPO, {"config.json": b"{}"})
    hub.cut("POST", ".*/commit/main")
    assert client("result = status(commit, 'new')") == "RemoteProtocolError"
    assert [commit.message for commit in hub.repos[REPO].commits] == ["add_repo"]


def test_a_commit_whose_answer_was_lost_has_happened(hub, client):
    hub.add_repo(REPO, {"config.json": b"{}"})
    hub.lose_answer("POST", ".*/commit/main")
    first, second = client("result = status(commit, 'new'), commit('new').oid")
    assert first == "RemoteProtocolError"
    assert second == hub.repos[REPO].head.sha  # the client found nothing left to commit
    assert [commit.message for commit in hub.repos[REPO].commits] == ["add_repo", "new"]


# Pull requests, parents and tags


def test_a_pull_request_leaves_main_alone_and_reads_as_a_revision(hub, client):
    repo = hub.add_repo(REPO, {"config.json": b"main"})
    first, second, files, snapshot = client(f"""
first, second = commit("first", create_pr=True), commit("second", create_pr=True)
commit("second, corrected", revision=second.pr_revision)
revisions = ["main", first.pr_revision, second.oid, second.pr_revision]
result = [
    [first.pr_url, first.pr_revision],
    [second.pr_url, second.pr_revision],
    [hf_hub_download("{REPO}", "config.json", revision=revision) for revision in revisions],
    snapshot_download("{REPO}", revision="refs/pr/1"),
]
""")
    assert first == [f"{hub.endpoint}/{REPO}/discussions/1", "refs/pr/1"]
    assert second == [f"{hub.endpoint}/{REPO}/discussions/2", "refs/pr/2"]
    assert [Path(file).read_text() for file in files] == ["main", "first", "second", "second, corrected"]
    assert contents(Path(snapshot)) == {"config.json": b"first"}
    assert len(repo.commits) == 1


def test_a_commit_on_a_parent_that_is_no_longer_the_head_is_refused(hub, client):
    repo = hub.add_repo(REPO, {"config.json": b"1"})
    old, head = repo.head.sha, repo.commit("theirs", {"config.json": b"2"})
    assert client(f"""
result = [status(commit, "mine", parent_commit=parent) for parent in ("{old}", "{head}")]
""") == [412, 200]
    assert [commit.message for commit in repo.commits] == ["add_repo", "theirs", "mine"]


def test_a_pull_request_starts_from_its_parent(hub, client):
    repo = hub.add_repo(REPO, {"old.json": b"{}"})
    old = repo.head.sha
    repo.commit("theirs", {"new.json": b"{}"})
    client(f'result = commit("mine", create_pr=True, parent_commit="{old}").oid')
    assert set(repo.at("refs/pr/1").files) == {"old.json", "config.json"}


def test_a_tag_keeps_pointing_to_its_commit(hub, client):
    hub.add_repo(REPO, {"config.json": b"1"})
    file, again = client(f"""
api.create_tag("{REPO}", tag="v1.0")
commit("2")
result = hf_hub_download("{REPO}", "config.json", revision="v1.0"), status(api.create_tag, "{REPO}", tag="v1.0")
""")
    assert Path(file).read_bytes() == b"1"
    assert again == 409


# Who may


def test_a_private_repository_exists_only_for_tokens_of_its_namespace(hub, client):
    private, found = client("""
api.create_repo("org/private", private=True)
api.create_repo("org/visibility", visibility="private")
api.create_repo("org/public")
commit("secret", "org/private")
def look(token):
    calls = (api.repo_info, api.auth_check, api.list_repo_files)
    found = [status(call, "org/private", token=token) for call in calls]
    return found + [status(get_hf_file_metadata, hf_hub_url("org/private", "config.json"), token=token)]
result = [
    [api.repo_info(f"org/{name}").private for name in ("private", "visibility", "public")],
    [look(token) for token in ("hf_write", "hf_read", "hf_other", False)],
]
""")
    assert private == [True, True, False]
    assert found == [[200] * 4, [200] * 4, [404] * 4, [404] * 4]


def test_a_token_that_only_reads_is_told_so_and_refused_when_it_writes(hub, client):
    repo = hub.add_repo(REPO, {"config.json": b"{}"})
    roles, statuses = client(f"""
result = [
    [api.whoami(token)["auth"]["accessToken"]["role"] for token in ("hf_write", "hf_read")],
    [
        status(hf_hub_download, "{REPO}", "config.json", token="hf_read"),
        status(api.create_repo, "org/new", token="hf_read"),
        status(commit, "new", token="hf_read"),
        status(commit, "new", token="hf_read", create_pr=True),
        status(api.create_tag, "{REPO}", tag="v1.0", token="hf_read"),
    ],
]
""")
    assert roles == ["write", "read"]
    assert statuses == [200, 403, 403, 403, 403]
    assert (list(hub.repos), len(repo.commits), list(repo.branches), repo.tags) == ([REPO], 1, ["main"], {})


def test_auth_check_says_who_may_read_and_who_may_write(hub, client):
    hub.add_repo(REPO, {"config.json": b"{}"})
    found = client(f"""
tokens = ("hf_write", "hf_read", "hf_other", "hf_wrong", False)
result = [[status(api.auth_check, "{REPO}", write=write, token=token) for token in tokens] for write in (False, True)]
result.append([status(api.auth_check, "org/gone", write=write) for write in (False, True)])
""")
    assert found == [[200, 200, 200, 401, 200], [200, 403, 403, 401, 401], [404, 404]]


def test_whoever_writes_somewhere_may_propose_elsewhere(hub, client):
    repo = hub.add_repo(REPO, {"config.json": b"{}"})
    assert client("""
weights = CommitOperationAdd("model.safetensors", bytes(64))
result = [
    status(commit, "new", token="hf_other"),
    status(api.create_commit, "org/cxr-inception", [weights], commit_message="w", token="hf_other", create_pr=True),
]
""") == [403, 200]
    assert repo.at("refs/pr/1").files["model.safetensors"] == bytes(64)
