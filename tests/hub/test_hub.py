"""A folder goes up as one commit, whatever happens on the way, and never in the place of a better model."""

import json

import pytest
from hub.loopback import LoopbackHub
from interpreter import Interpreter

from cxr_backbone.hub import TRIES

REPO = "org/cxr-inception"
COMMIT = "/api/models/org/{}/commit/main"
WEIGHTS = b"\0\1weights" * 100


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub(tokens={"hf_write": "org", "hf_read": "org", "hf_other": "other"}, read_only={"hf_read"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, home):
    """Runs lines of Python in a process of its own, with HF_ENDPOINT set from the start, away from the repository."""
    client = Interpreter(home, hub.environment(home / "cache"))
    yield client
    client.close()


# check_push_access

REFUSED = {
    "no account": (["cxr-inception"], "hf_write", "'cxr-inception' names no account; expected org/name"),
    "malformed name": (["org/cxr inception"], "hf_write", "org/cxr inception"),
    "two slashes": (["org/cxr/inception"], "hf_write", "org/cxr/inception"),
    "no token": ([REPO], None, "needs a token of the Hub: run `hf auth login` or set HF_TOKEN."),
    "bad token": ([REPO], "hf_wrong", f"The Hub refuses this token for {REPO} (401); run `hf auth login` again."),
    "read-only token": ([REPO], "hf_read", f"This token may only read; publishing {REPO} needs one that may write."),
    "public": (["org/there", False, True], "hf_write", "org/there is there already and public"),
    "foreign namespace": (["timm/x"], "hf_write", "This token can't write to timm/x; it can write under org."),
    "somebody else's": (["org/there"], "hf_other", "This token can't write to org/there (403)"),
    "nothing to propose to": (["org/nothing", True], "hf_write", "There is no org/nothing to open a pull request in"),
}
LET_IN = {
    "new": ([REPO], "hf_write"),
    "one's own": (["org/there"], "hf_write"),
    "a pull request for somebody else's": (["org/there", True], "hf_other"),
}


@pytest.fixture(scope="module")
def answers(hub, client):
    """What `check_push_access` says in each case of REFUSED and LET_IN, and what it asked."""
    hub.add_repo("org/there", {"config.json": b"{}"})
    cases = {case: arguments[:2] for case, arguments in (REFUSED | LET_IN).items()}
    before = len(hub.requests)
    answers = client.run(f"""
import os
from cxr_backbone.hub import check_push_access
result = {{}}
for case, ((repo_id, *options), token) in {cases}.items():
    create_pr, private = [*options, False, False][:2]
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        result[case] = check_push_access(repo_id, create_pr=create_pr, private=private)
    except ValueError as error:
        result[case] = str(error)
""")
    return answers, hub.requests[before:]


@pytest.mark.parametrize("case", REFUSED)
def test_a_push_that_would_be_refused_is_refused_before_training(answers, case):
    assert REFUSED[case][2] in answers[0][case]


@pytest.mark.parametrize("case", LET_IN)
def test_a_push_that_would_be_let_in_passes(answers, case):
    assert answers[0][case] is None


def test_finding_that_out_writes_nothing(answers):
    assert {request.partition(" ")[0] for request in answers[1]} == {"GET"}


# publish


def metrics(validation=0.99, test=0.95, label="PNEUMONIA", films=624):
    """As much of metrics.json as is compared."""
    splits = {
        split: {"figures": {"auroc": {"value": value}}, "targets": {label: {}}, "films": films, "patients": 427}
        for split, value in (("validation", validation), ("test", test))
    }
    return {"models": {"frozen": {}, "fine_tuned": {"splits": splits}}}


CONTENT = {
    "config.json": b'{"model_type": "cxr_inception"}',
    "metrics.json": json.dumps(metrics()).encode(),
    "README.md": b"---\nlibrary_name: transformers\n---\n# A model\n",
    "model.safetensors": WEIGHTS,
    "figures/roc.png": b"\x89PNG\0",
}


@pytest.fixture(scope="module")
def publish(home, client):
    """Publishes CONTENT, with changes, to each repository named; what `publish` answered, or the name and the text of
    its error."""

    def run(*names, token="hf_write", changes=None, **options):
        folder = home / f"folder-{len(list(home.iterdir()))}"
        for name, content in (CONTENT | (changes or {})).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return client.run(f"""
import os
from cxr_backbone import hub
os.environ["HF_TOKEN"] = {token!r}
hub.WAIT = 0.01
result = []
for name in {names}:
    try:
        result.append(hub.publish({str(folder)!r}, f"org/{{name}}", **{options}))
    except (ValueError, OSError) as error:
        result.append([type(error).__name__, str(error)])
""")

    return run


def test_a_new_repository_gets_one_commit_with_every_file_and_a_second_time_none(hub, publish):
    urls = publish("new", "new")
    (commit,) = hub.repos["org/new"].commits
    assert commit.files == CONTENT
    assert urls == [f"{hub.endpoint}/org/new/commit/{commit.sha}"] * 2
    assert not hub.repos["org/new"].private


def test_what_is_left_of_an_earlier_model_goes_in_the_same_commit_and_what_others_put_there_stays(hub, publish):
    theirs = {
        "onnx/model.onnx": b"onnx",
        ".gitattributes": b"*",
        "NOTES.md": b"read me",
        "figures/theirs.png": b"\x89\0",
    }
    theirs["model.fp16.safetensors"] = b"\0half"
    stale = {"figures/roc-2-mass.png": b"\x89PNG\0", "model-00001-of-00002.safetensors": b"\0"}
    hub.add_repo("org/stale", CONTENT | theirs | stale)
    publish("stale", changes={"README.md": b"# Another card"})
    commits = hub.repos["org/stale"].commits
    assert len(commits) == 2
    assert commits[-1].files == CONTENT | theirs | {"README.md": b"# Another card"}


def test_a_private_repository_is_made_so(hub, publish):
    publish("hidden", private=True)
    assert hub.repos["org/hidden"].private and len(hub.repos["org/hidden"].commits) == 1


def test_a_public_repository_is_not_taken_for_a_private_one(hub, publish):
    hub.add_repo("org/public", {})
    ((kind, message),) = publish("public", private=True)
    assert kind == "ValueError" and "org/public is there already and public" in message
    assert hub.repos["org/public"].files == {}


def test_a_pull_request_leaves_the_published_model_as_it_is(hub, publish):
    better = {"metrics.json": json.dumps(metrics(test=0.999)).encode()}
    hub.add_repo("org/proposed", CONTENT | better)
    (url,) = publish("proposed", create_pr=True, token="hf_other")
    assert url == f"{hub.endpoint}/org/proposed/discussions/1"
    assert hub.repos["org/proposed"].files == CONTENT | better
    assert hub.repos["org/proposed"].at("refs/pr/1").files == CONTENT


# What goes wrong on the way: how the Hub fails, and how often before it answers

TROUBLES = {
    "busy": lambda hub, name: hub.fail("POST", COMMIT.format(name), 429, headers={"Retry-After": "1"}),
    "broken": lambda hub, name: hub.fail("POST", COMMIT.format(name), 500, times=2),
    "moved": lambda hub, name: hub.fail("POST", COMMIT.format(name), 412),
    "conflicting": lambda hub, name: hub.fail("POST", COMMIT.format(name), 409),
    "cut": lambda hub, name: hub.cut("POST", COMMIT.format(name)),
    "lost": lambda hub, name: hub.lose_answer("POST", COMMIT.format(name)),
    "lost-creation": lambda hub, name: hub.lose_answer("POST", "/api/repos/create"),
    "unknown": lambda hub, name: hub.fail("GET", f"/api/models/org/{name}", 503),
}


@pytest.fixture(scope="module")
def troubled(hub, publish):
    return dict(zip(TROUBLES, (trouble_with(hub, name, publish) for name in TROUBLES), strict=True))


def trouble_with(hub, name, publish):
    TROUBLES[name](hub, name)
    (answer,) = publish(name)
    return answer


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_that_passes_ends_in_one_commit(hub, troubled, name):
    (commit,) = hub.repos[f"org/{name}"].commits
    assert commit.files == CONTENT
    assert troubled[name] == f"{hub.endpoint}/org/{name}/commit/{commit.sha}"


def test_when_no_try_succeeds_nothing_is_published_and_the_next_call_goes_on_from_there(hub, publish):
    weights = b"\0\2weights" * 100
    hub.fail("POST", COMMIT.format("down"), 503, times=TRIES)
    ((kind, message),) = publish("down", changes={"model.safetensors": weights})
    assert kind == "ConnectionError" and "Run the same command again" in message
    assert hub.repos["org/down"].commits == []
    before = len(hub.requests)
    publish("down", changes={"model.safetensors": weights})
    assert hub.repos["org/down"].files == CONTENT | {"model.safetensors": weights}
    assert not [request for request in hub.requests[before:] if request.startswith("PUT")]


def test_weights_that_break_off_half_way_are_sent_again(hub, publish):
    weights = b"\0\3weights" * 100
    hub.cut("PUT", "/lfs/.*")
    publish("half", changes={"model.safetensors": weights})
    (commit,) = hub.repos["org/half"].commits
    assert commit.files["model.safetensors"] == weights


@pytest.mark.parametrize(("status", "message"), [(401, "The Hub refuses this token"), (403, "can't write to org/no-")])
def test_a_refusal_is_told_at_once_and_publishes_nothing(hub, publish, status, message):
    hub.fail("POST", COMMIT.format(f"no-{status}"), status)
    ((kind, told),) = publish(f"no-{status}")
    assert kind == "ValueError" and message in told and str(status) in told
    assert hub.repos[f"org/no-{status}"].commits == []


def test_a_model_whose_auroc_is_undefined_is_published_once_whatever_happens_to_the_answer(hub, publish):
    undefined = {"metrics.json": json.dumps(metrics(test=None)).encode()}
    hub.lose_answer("POST", COMMIT.format("undefined-twice"))
    urls = publish("undefined-twice", "undefined-twice", changes=undefined)
    (commit,) = hub.repos["org/undefined-twice"].commits
    assert urls == [f"{hub.endpoint}/org/undefined-twice/commit/{commit.sha}"] * 2


def test_a_lost_pull_request_is_not_opened_again(hub, publish):
    hub.add_repo("org/lost-proposal", {"README.md": b"# Ours"})
    hub.lose_answer("POST", COMMIT.format("lost-proposal"))
    ((kind, message),) = publish("lost-proposal", create_pr=True)
    assert kind == "ConnectionError" and f"{hub.endpoint}/org/lost-proposal/discussions" in message
    assert set(hub.repos["org/lost-proposal"].branches) == {"main", "refs/pr/1"}


def test_what_is_there_already_is_no_pull_request(hub, publish):
    hub.add_repo("org/same", CONTENT)
    ((kind, message),) = publish("same", create_pr=True)
    assert kind == "ValueError" and "nothing to propose" in message


def test_a_folder_without_its_weights_is_not_published(hub, home, client):
    (home / "bare").mkdir()
    (home / "bare/config.json").write_text("{}")
    before = len(hub.requests)
    told = client.run("""
from cxr_backbone.hub import publish
try:
    publish("bare", "org/bare")
except ValueError as error:
    result = str(error)
""")
    assert "model.safetensors is missing" in told
    assert len(hub.requests) == before


# What is published already

PUBLISHED = {
    "better-on-validation": (metrics(validation=0.991), "holds a better model: AUROC on validation 0.9910"),
    "better-on-test": (metrics(test=0.951), "holds a better model: AUROC on test 0.9510, this run 0.9500"),
    "other-labels": (metrics(label="EFFUSION"), "holds a model that can't be compared"),
    "other-test-films": (metrics(test=0.9, films=2134), "holds a model that can't be compared"),
    "undefined": (metrics(test=None), "holds a model that can't be compared"),
    "other-metrics": ({"accuracy": 0.9}, "holds a model that can't be compared"),
    "no-config": ({"pytorch_model.bin": 1}, "holds a model that can't be compared"),
    "no-metrics": (None, "holds a model that can't be compared"),
}


@pytest.fixture(scope="module")
def guarded(hub, publish):
    """What is told of each repository of PUBLISHED, and the commits that each then has."""
    for name, (published, _) in PUBLISHED.items():
        files = {"config.json": b"{}", "model.safetensors": b"\0"}
        if published is not None:
            files["metrics.json"] = json.dumps(published).encode()
        hub.add_repo(f"org/{name}", files)
    told = dict(zip(PUBLISHED, publish(*PUBLISHED), strict=True))
    return told, {name: len(hub.repos[f"org/{name}"].commits) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_better_or_another_model_is_not_replaced(guarded, name):
    told, commits = guarded
    kind, message = told[name]
    assert kind == "ValueError" and PUBLISHED[name][1] in message and "pass --overwrite" in message
    assert commits[name] == 1


def test_it_is_replaced_when_that_is_asked_for(guarded, hub, publish):
    publish(*PUBLISHED, overwrite=True)
    for name in PUBLISHED:
        assert hub.repos[f"org/{name}"].files == CONTENT


def test_a_worse_model_is_replaced_and_its_commit_stays(hub, publish):
    worse = {"metrics.json": json.dumps(metrics(validation=0.98, test=0.94)).encode()}
    first = hub.add_repo("org/worse", CONTENT | worse).head
    publish("worse")
    assert hub.repos["org/worse"].files == CONTENT
    assert hub.repos["org/worse"].at(first.sha).files == CONTENT | worse


def test_where_an_upload_through_xet_breaks_it_is_tried_again_and_told(hub, home):
    """The loopback Hub has no Xet, so that a client that uses it gets no further."""
    pytest.importorskip("hf_xet")
    (home / "xet").mkdir()
    for name in ("model.safetensors", "config.json", "metrics.json", "README.md"):
        (home / "xet" / name).write_bytes(CONTENT[name])
    environment = hub.environment(home / "xet-cache", "hf_write")
    del environment["HF_HUB_DISABLE_XET"]
    client = Interpreter(home, environment)
    told = client.run("""
from cxr_backbone import hub
hub.WAIT = 0.01
try:
    hub.publish("xet", "org/xet")
except ConnectionError as error:
    result = str(error)
""")
    client.close()
    assert "Run the same command again" in told
    assert sum("xet-write-token" in request for request in hub.requests) == TRIES
    assert hub.repos["org/xet"].commits == []


def test_no_token_is_ever_printed(guarded, answers, troubled, client):
    assert "hf_" not in client.printed + client.read_errors()
