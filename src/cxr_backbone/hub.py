"""A folder as one commit on the Hub."""

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from cxr_backbone.card import PICTURES

logger = logging.getLogger(__name__)

TRIES = 5
WAIT = 2.0  # seconds before the second try, twice as long before each one after it
LONGEST_WAIT = 300.0
# 409 and 412: somebody else committed in between. The next try looks at what is there now.
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
# What a broken connection is: for huggingface_hub and the client under it an HTTPError, for an upload a RuntimeError
# around one or, through Xet, one of Python's own.
BROKEN = (HTTPError, LocalEntryNotFoundError, RuntimeError, ConnectionError, TimeoutError)
# Files of ours, which go when the folder lacks them. Others are not ours to delete.
OURS = re.compile(
    rf"figures/({'|'.join(PICTURES)})(-[\w-]+)?\.png"
    r"|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json"
)

Result = TypeVar("Result")


def check_push_access(repo_id: str, *, private: bool = False, create_pr: bool = False) -> None:
    """Find out, before anything is trained or uploaded, whether `publish` will be let in. Nothing is written.

    Of a fine-grained token the Hub tells only for a repository that is there whether it may write to it.

    Args:
        private: whether the repository has to be private, if it is there.
        create_pr: whether a pull request is all that is wanted; that takes no right to write, but a repository.

    Raises:
        ValueError: the name is malformed, there is no token, the Hub refuses it, it may not write there, or the
            repository is public and should be `private`.
        ConnectionError: the Hub can't be reached.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise ValueError(f"Publishing {repo_id} needs a token of the Hub: run `hf auth login` or set HF_TOKEN.")
    api = HfApi()
    account = _ask(api.whoami, repo_id)
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"This token may only read; publishing {repo_id} needs one that may write.")
    try:
        _ask(lambda: api.auth_check(repo_id, write=not create_pr), repo_id)
        if private:
            _check_private(_ask(lambda: api.model_info(repo_id), repo_id))
    except RepositoryNotFoundError as error:
        if create_pr:
            raise ValueError(_no_repository(repo_id)) from error
        groups = [org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"]
        namespaces = [account["name"], *groups]
        if repo_id.split("/")[0] not in namespaces:
            raise ValueError(
                f"This token can't write to {repo_id}; it can write under {', '.join(namespaces)}."
            ) from error


def check_repo_id(repo_id: str) -> None:
    """Refuse, with a ValueError, what is no org/name; without the first part a card would name what nobody can load."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no account; expected org/name, for example org/cxr-inception.")


def publish(
    folder: str | Path, repo_id: str, *, private: bool = False, create_pr: bool = False, overwrite: bool = False
) -> str:
    """Upload a folder of `package.assemble` as one commit, creating the repository if needed.

    Readers meet the old model or the new one, never half of one. What a lost connection left undone, the next try or
    the next call does: files that have arrived are not sent again, and what is published already makes no commit.
    Pictures and parts of weights of an earlier publication that the folder lacks are deleted in the same commit.

    Args:
        private: make the repository private, if it is made now.
        create_pr: open a pull request; the published model stays as it is.
        overwrite: replace a published model that is better, or that can't be compared.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        ValueError: the folder has no model; the published model is better; the repository is public and `private` was
            asked for; there is nothing to propose; or the Hub refuses token, name or content.
        ConnectionError: the Hub could not be reached, or broke off, in all of several tries.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "config.json", "metrics.json", "README.md"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; expected a folder of package.assemble.")
    try:
        # A pull request whose answer got lost may be open all the same; a second try would open a second one.
        tries = 1 if create_pr else TRIES
        return _ask(lambda: _publish(folder, repo_id, private, create_pr, overwrite), repo_id, tries=tries)
    except OfflineModeIsEnabled:
        raise
    except ConnectionError as error:
        what_next = (
            f"Look at {HfApi().endpoint}/{repo_id}/discussions whether the pull request is open before you try again."
            if create_pr
            else "Run the same command again: what has arrived there is not sent again."
        )
        raise ConnectionError(f"{error} {what_next}") from error


def _publish(folder: Path, repo_id: str, private: bool, create_pr: bool, overwrite: bool) -> str:
    api = HfApi()
    if not create_pr:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    try:
        published = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        raise ValueError(_no_repository(repo_id)) from error
    if private:
        _check_private(published)
    if not create_pr and not overwrite:
        _check_not_better(published, (folder / "metrics.json").read_text())

    # Made anew for each try: an operation that was committed without an answer would be committed once more.
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    stale = [name for name in _names(published) if OURS.fullmatch(name) and name not in files]
    deletions = [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(
        repo_id,
        [*additions, *deletions],
        commit_message="Publish a model of cxr-backbone",
        create_pr=create_pr,
        parent_commit=published.sha,  # what was compared is what is replaced
    )
    if create_pr and commit.pr_url is None:
        raise ValueError(f"{repo_id} holds all of this already; there is nothing to propose.")
    return commit.pr_url or str(commit.commit_url)


def _check_private(published: ModelInfo) -> None:
    if not published.private:
        raise ValueError(f"{published.id} is there already and public; only a new repository can be made private.")


def _no_repository(repo_id: str) -> str:
    return f"There is no {repo_id} to open a pull request in, or it is not open to this token."


def _names(published: ModelInfo) -> list[str]:
    return [file.rfilename for file in published.siblings or []]


def _check_not_better(published: ModelInfo, metrics: str) -> None:
    """Refuse to replace a model with a higher AUROC on validation or on test, or one that can't be compared."""
    if set(_names(published)) <= {".gitattributes", "README.md", "LICENSE"}:  # no model yet
        return
    theirs = "{}"
    if "metrics.json" in _names(published):
        theirs = Path(hf_hub_download(published.id, "metrics.json", revision=published.sha)).read_text()
    if theirs == metrics:
        return
    overwrite = "pass --overwrite to replace it all the same (its commit stays readable)"
    try:
        their_test, their_aurocs = _test_and_aurocs(json.loads(theirs))
        test, aurocs = _test_and_aurocs(json.loads(metrics))
        comparable = their_test == test
    except (KeyError, TypeError, ValueError):
        comparable = False  # no metrics.json of this package, or an AUROC that is not defined
    if not comparable:
        raise ValueError(f"{published.id} holds a model that can't be compared with this one; {overwrite}.")
    for split, auroc in their_aurocs.items():
        if auroc > aurocs[split]:
            raise ValueError(
                f"{published.id} holds a better model: AUROC on {split} {auroc:.4f}, this run {aurocs[split]:.4f}. "
                "(Whoever chooses between runs by their test figures makes these worthless.) If this run is to be "
                f"published for another reason, {overwrite}."
            )


def _test_and_aurocs(metrics: dict[str, Any]) -> tuple[tuple, dict[str, float]]:
    """On what the model that is published was tested (labels, films, patients), and its AUROC by split; of several
    labels their mean.

    Raises:
        KeyError, TypeError: it has none.
    """
    splits = metrics["models"]["fine_tuned"]["splits"]
    figures = {split: splits[split]["figures"] for split in ("validation", "test")}
    name = "auroc_macro" if "auroc_macro" in figures["test"] else "auroc"
    test = (sorted(splits["test"]["targets"]), splits["test"]["films"], splits["test"]["patients"])
    return test, {split: float(its[name]["value"]) for split, its in figures.items()}


def _ask(question: Callable[[], Result], repo_id: str, tries: int = TRIES) -> Result:
    """The answer of the Hub, asked again while it is busy or out of reach."""
    for attempt in range(1, tries + 1):
        try:
            return question()
        except (RepositoryNotFoundError, OfflineModeIsEnabled):
            raise
        except BROKEN as caught:
            error: BaseException = caught
            if isinstance(caught, RuntimeError) and isinstance(caught.__cause__, HTTPError):
                error = caught.__cause__
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in PASSING:
                raise ValueError(_refusal(response.status_code, error, repo_id)) from error
            if attempt == tries:
                raise ConnectionError(f"The Hub can't be reached or broke off ({_reason(error)}).") from error
            seconds = _seconds_to_wait(response, attempt)
            logger.warning("The Hub is busy or out of reach (%s); again in %.0f s.", _reason(error), seconds)
            time.sleep(seconds)
    raise AssertionError("not reached")


def _refusal(status: int, error: BaseException, repo_id: str) -> str:
    if status == 401:
        return f"The Hub refuses this token for {repo_id} (401); run `hf auth login` again."
    if status == 403:
        return f"This token can't write to {repo_id} (403): {_reason(error)}"
    return f"The Hub refuses {repo_id} ({status}): {_reason(error)}"


def _seconds_to_wait(response: Any, attempt: int) -> float:
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked) if asked.isdigit() else WAIT * 2 ** (attempt - 1), LONGEST_WAIT)


def _reason(error: BaseException) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return said.splitlines()[0]
