"""A Hugging Face Hub on 127.0.0.1, for tests: the real client talks to it over real HTTP.

As on the Hub: tokens that write or only read, private repositories, small text files in the commit itself, big or
binary files through Git LFS, one commit a request, unchanged files recognised, pull requests, tags, ETags, and the
error codes that the client turns into exceptions.
Simpler than the Hub: a repository has one branch (main) beside its pull requests, and no Xet; data sets are read only,
under ids such as "datasets/org/films"; `create_repo` makes no first commit, so that a repository's commits are those
that its users made; and who may not see a repository gets 404 with a token and without one, where the Hub answers the
latter with 401. The client raises RepositoryNotFoundError for both.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from hub.faults import Effect, Fault, Faults
from hub.repos import Refusal, Repo, git_or_lfs_id, is_lfs


class LoopbackHub:
    """`with LoopbackHub(tokens={"hf_write": "org"}) as hub:` serves at `hub.endpoint` until the block ends.

    A token writes to the namespace it is mapped to, or only reads there if it is in `read_only`. What arrived can be
    read from `repos` (by repo id; a pull request's from `at("refs/pr/1")`) and from `requests` ("METHOD /path", in
    order).

    `fail`, `cut` and `lose_answer` make the next `times` requests go wrong: those with this method whose whole path,
    without the query, matches the regular expression `path`. The block ends in an AssertionError if a fault met none.
    """

    def __init__(self, tokens: dict[str, str] | None = None, read_only: Collection[str] = ()):
        self.tokens = tokens or {}
        self.read_only = read_only
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.lfs_objects: dict[str, bytes] = {}  # sha256 -> content, uploaded but perhaps not committed
        self.faults = Faults()
        self.writing = threading.Lock()  # between the check of a commit's parent and the commit
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if kind is None:
            self.faults.check_met()

    def add_repo(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repository that is already there, with one commit."""
        self.repos[repo_id] = Repo(private)
        self.repos[repo_id].commit("add_repo", dict(files))
        return self.repos[repo_id]

    def fail(
        self,
        method: str,
        path: str,
        status: int,
        *,
        times: int = 1,
        headers: dict[str, str] | None = None,
        code: str = "",
    ) -> None:
        """Answer with `status`, for example 429 with `headers={"Retry-After": "1"}`, and carry nothing out.

        `code` is the X-Error-Code from which the client picks its exception, for example "GatedRepo".
        """
        self.faults.add(Fault(Effect.REFUSE, method, path, times, status, code, headers or {}))

    def cut(self, method: str, path: str, *, times: int = 1) -> None:
        """End the connection half-way: after half of what a GET asked for, or half of what else was sent."""
        self.faults.add(Fault(Effect.CUT, method, path, times))

    def lose_answer(self, method: str, path: str, *, times: int = 1) -> None:
        """Carry the request out, and end the connection without an answer."""
        self.faults.add(Fault(Effect.LOSE_ANSWER, method, path, times))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a client process with its caches in `home`.

        It has to be a fresh process, because HF_ENDPOINT is read on import. Without HF_HUB_DISABLE_XET the
        client would send to Xet what belongs in LFS.
        """
        client = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        client |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        client |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return client | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        fault = self.hub.faults.meet(self.command, self.url.path)
        effect = fault.effect if fault else None
        if effect in (Effect.CUT, Effect.LOSE_ANSWER):
            self.close_connection = True
        size = int(self.headers.get("Content-Length", 0))
        if effect is Effect.CUT and self.command != "GET":
            self.rfile.read(size // 2)
            return
        # The body is read whatever the answer, or its rest would be taken for the connection's next request.
        self.body = self.rfile.read(size)
        self.reply_status, self.reply_headers = 200, {}
        try:
            if effect is Effect.REFUSE:
                raise Refusal(fault.status, "The test asked for this", fault.code, headers=fault.headers)
            reply = self.route()
            status = self.reply_status
        except Refusal as refusal:
            status, reply = refusal.status, refusal.body
            self.reply_headers |= refusal.headers
        except KeyError as missing:
            status, reply = 400, {"error": f"{missing} is missing"}
        if effect is Effect.LOSE_ANSWER:
            return
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **self.reply_headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if effect is Effect.CUT:
            content = content[: len(content) // 2]
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass  # hub.requests keeps them instead

    @property
    def url(self) -> SplitResult:
        return urlsplit(self.path)

    @property
    def creates_pr(self) -> bool:
        return parse_qs(self.url.query).get("create_pr") == ["1"]

    def route(self) -> bytes | dict | list:
        for methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and self.command in methods:
                parts = match.groupdict(default="main")  # only the revision may be left out
                return answer(self, **{name: unquote(value) for name, value in parts.items()})
        raise Refusal(404, f"The loopback Hub has no {self.command} {self.path}")

    def json(self) -> dict:
        return json.loads(self.body)

    def token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def role(self) -> str:
        return "read" if self.token() in self.hub.read_only else "write"

    def owns(self, repo_id: str) -> bool:
        return self.hub.tokens[self.token()] == repo_id.split("/")[-2]

    def check_writer(self, repo_id: str, *, propose: bool = False) -> None:
        # A pull request may come from anybody who writes somewhere.
        if self.role() == "read" or not (propose or self.owns(repo_id)):
            raise Refusal(403, f"This token does not write to {repo_id}")

    def repo(self, repo_id: str) -> Repo:
        # Reading needs no token, but a bad one is refused all the same.
        owns = "Authorization" in self.headers and self.owns(repo_id)
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not owns):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo


def _whoami(request: _Handler) -> dict:
    token = {"displayName": "test", "role": request.role()}
    name = request.hub.tokens[request.token()]
    return {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}


def _auth_check(request: _Handler, repo: str) -> dict:
    request.repo(repo)
    return {}


def _auth_check_write(request: _Handler, repo: str) -> dict:
    request.repo(repo)
    request.check_writer(repo)
    return {}


def _validate_yaml(request: _Handler) -> dict:
    return {"errors": [], "warnings": []}


def _create_repo(request: _Handler) -> dict:
    wanted = request.json()
    repo_id = f"{wanted['organization'] or request.hub.tokens[request.token()]}/{wanted['name']}"
    url = f"{request.hub.endpoint}/{repo_id}"
    request.check_writer(repo_id)
    if repo_id in request.hub.repos:
        raise Refusal(409, "You already created this model repo", url=url)  # `exist_ok` reads the url
    request.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
    return {"name": repo_id, "url": url}


def _preupload(request: _Handler, repo: str, revision: str) -> dict:
    """Whether each file goes into the commit or through LFS, and the id of what is under its path now."""
    present = request.repo(repo).at(revision).files
    request.check_writer(repo, propose=request.creates_pr)
    plans = []
    for file in request.json()["files"]:
        mode = "lfs" if is_lfs(file["size"], base64.b64decode(file["sample"])) else "regular"
        oid = git_or_lfs_id(present[file["path"]]) if file["path"] in present else None
        plans.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": plans}


def _lfs_batch(request: _Handler, repo: str) -> dict:
    request.repo(repo)
    request.check_writer(repo, propose=True)  # the client doesn't say here whether it prepares a pull request
    objects = request.json()["objects"]
    for file in objects:
        if file["oid"] not in request.hub.lfs_objects:  # no actions means nothing to upload
            href = f"{request.hub.endpoint}/lfs/{file['oid']}"
            file["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
    return {"transfer": "basic", "objects": objects}


def _lfs_put(request: _Handler, oid: str) -> bytes:
    # No token: on the Hub this is a signed address of the storage, and the client sends none.
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "The content does not have this sha256")
    request.hub.lfs_objects[oid] = request.body
    return b""


def _lfs_verify(request: _Handler, oid: str) -> dict:
    request.token()
    if len(request.hub.lfs_objects[oid]) != request.json()["size"]:
        raise Refusal(400, "The content does not have this size")
    return {}


def _commit(request: _Handler, repo: str, revision: str) -> dict:
    target = request.repo(repo)
    request.check_writer(repo, propose=request.creates_pr)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    with request.hub.writing:
        parent = header["value"].get("parentCommit", "")
        if request.creates_pr:
            base = target.at(parent or revision)
        elif revision not in target.branches:
            raise Refusal(400, f"{revision} is not a branch")
        else:
            base = target.at(revision)
            # Status and words as the Hub's, for which the tests of huggingface_hub look.
            if parent not in ("", base.sha):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            _apply(operation["key"], operation["value"], files, request.hub.lfs_objects)
        branch = target.open_pull_request(base) if request.creates_pr else revision
        sha = target.commit(header["value"]["summary"], files, branch)
    reply = {"success": True, "commitOid": sha, "commitUrl": f"{request.hub.endpoint}/{repo}/commit/{sha}"}
    if request.creates_pr:
        reply["pullRequestUrl"] = f"{request.hub.endpoint}/{repo}/discussions/{branch.removeprefix('refs/pr/')}"
    return reply


def _apply(key: str, value: dict, files: dict[str, bytes], lfs_objects: dict[str, bytes]) -> None:
    match key:
        case "file":
            files[value["path"]] = base64.b64decode(value["content"])
        case "lfsFile":
            files[value["path"]] = lfs_objects[value["oid"]]
        case "deletedFile":
            del files[value["path"]]
        case other:
            raise Refusal(400, f"The loopback Hub has no {other}")


def _tag(request: _Handler, repo: str, revision: str) -> dict:
    target, name = request.repo(repo), request.json()["tag"]
    request.check_writer(repo)
    if name in target.tags:
        raise Refusal(409, f"Tag {name} already exists")
    target.tags[name] = target.at(revision)
    return {}


def _repo_info(request: _Handler, repo: str, revision: str) -> dict:
    found = request.repo(repo)
    commit = found.at(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    return {"id": repo, "sha": commit.sha, "private": found.private, "tags": [], "siblings": siblings}


def _tree(request: _Handler, repo: str, revision: str, path: str = "") -> list:
    """The files and folders in a folder; with `recursive`, all below it."""
    files = request.repo(repo).at(revision).files
    inside = [name for name in _with_folders(files) if name.startswith(f"{path}/" if path else "")]
    if path and not inside:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    if "recursive=true" not in request.url.query.lower():
        inside = [name for name in inside if "/" not in name.removeprefix(f"{path}/")]
    return [_entry(name, files) for name in inside]


def _paths_info(request: _Handler, repo: str, revision: str) -> list:
    files = request.repo(repo).at(revision).files
    return [_entry(name, files) for name in request.json()["paths"] if name in _with_folders(files)]


def _with_folders(files: dict[str, bytes]) -> list[str]:
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents} - {"."}
    return sorted({*files, *folders})


def _entry(name: str, files: dict[str, bytes]) -> dict:
    if name not in files:
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": len(files[name]), "oid": git_or_lfs_id(files[name])}


def _resolve(request: _Handler, repo: str, revision: str, path: str) -> bytes:
    commit = request.repo(repo).at(revision)
    request.reply_headers["X-Repo-Commit"] = commit.sha
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    content = commit.files[path]
    request.reply_headers |= {"ETag": f'"{git_or_lfs_id(content)}"', "X-Linked-Size": str(len(content))}
    if part := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        request.reply_headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        request.reply_status = 206
        content = content[first : last + 1]
    return content


_REPO, _REVISION, _OID = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)", r"(?P<revision>[^/]+)", r"(?P<oid>[0-9a-f]{64})"
_ROUTES = [
    (["GET"], "/api/whoami-v2", _whoami),
    (["POST"], "/api/validate-yaml", _validate_yaml),
    (["POST"], "/api/repos/create", _create_repo),
    (["POST"], f"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
    (["POST"], rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    (["PUT"], f"/lfs/{_OID}", _lfs_put),
    (["POST"], f"/lfs/{_OID}/verify", _lfs_verify),
    (["POST"], f"/api/models/{_REPO}/commit/{_REVISION}", _commit),
    (["POST"], f"/api/models/{_REPO}/tag/{_REVISION}", _tag),
    (["GET"], f"/api/(?:models/)?{_REPO}/auth-check", _auth_check),
    (["GET"], f"/api/(?:models/)?{_REPO}/auth-check/write", _auth_check_write),
    (["GET"], f"/api/(?:models/)?{_REPO}(?:/revision/{_REVISION})?", _repo_info),
    (["GET"], f"/api/(?:models/)?{_REPO}/tree/{_REVISION}", _tree),
    (["GET"], f"/api/(?:models/)?{_REPO}/tree/{_REVISION}/(?P<path>.+)", _tree),
    (["POST"], f"/api/{_REPO}/paths-info/{_REVISION}", _paths_info),
    (["GET", "HEAD"], f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
]
