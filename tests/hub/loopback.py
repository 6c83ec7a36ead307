"""A Hugging Face Hub on 127.0.0.1, for tests: the real client talks to it over real HTTP.

As on the Hub: tokens, small text files in the commit itself, big or binary files through Git LFS, one commit
a request, unchanged files recognised, ETags, and the error codes that the client turns into exceptions.
Simpler than the Hub: all repositories are public, have one branch (main) and no Xet; data sets are read only, under ids
such as "datasets/org/films"; and `create_repo` makes no first commit, so that a repository's commits are those that its
users made.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]  # the whole tree after this commit, path -> content


@dataclass
class Repo:
    commits: list[Commit] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[-1] if self.commits else Commit("0" * 40, "", {})

    @property
    def files(self) -> dict[str, bytes]:
        return self.head.files

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        tree = "\n".join(f"{path} {_oid(content)}" for path, content in sorted(files.items()))
        sha = hashlib.sha1(f"{self.head.sha}\n{message}\n{tree}".encode()).hexdigest()
        self.commits.append(Commit(sha, message, files))
        return sha

    def at(self, revision: str) -> Commit:
        for commit in [self.head, *self.commits]:
            if revision in ("main", commit.sha):
                return commit
        raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class LoopbackHub:
    """`with LoopbackHub(tokens={"hf_write": "org"}) as hub:` serves at `hub.endpoint` until the block ends.

    A token writes to the namespace it is mapped to. What arrived can be read from `repos` (by repo id) and
    from `requests` ("METHOD /path", in order).
    """

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = tokens or {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.lfs_objects: dict[str, bytes] = {}  # sha256 -> content, uploaded but perhaps not committed
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(self, repo_id: str, files: dict[str, bytes]) -> Repo:
        """A repository that is already there, with one commit."""
        self.repos[repo_id] = Repo()
        self.repos[repo_id].commit("add_repo", dict(files))
        return self.repos[repo_id]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a client process with its caches in `home`.

        It has to be a fresh process, because HF_ENDPOINT is read on import. Without HF_HUB_DISABLE_XET the
        client would send to Xet what belongs in LFS.
        """
        client = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        client |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        client |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return client | ({"HF_TOKEN": token} if token else {})


class _Refusal(Exception):
    """An answer other than 200; the client picks its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **body: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # The body is read whatever the answer, or its rest would be taken for the connection's next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {self.path}")
        self.reply_status, self.reply_headers = 200, {}
        try:
            reply = self.route()
            status = self.reply_status
        except _Refusal as refusal:
            status, reply = refusal.status, refusal.body
            self.reply_headers |= refusal.headers
        except KeyError as missing:
            status, reply = 400, {"error": f"{missing} is missing"}
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **self.reply_headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass  # hub.requests keeps them instead

    def route(self) -> bytes | dict | list:
        for methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if match and self.command in methods:
                parts = match.groupdict(default="main")  # only the revision may be left out
                return answer(self, **{name: unquote(value) for name, value in parts.items()})
        raise _Refusal(404, f"The loopback Hub has no {self.command} {self.path}")

    def json(self) -> dict:
        return json.loads(self.body)

    def namespace(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def check_writer(self, repo_id: str) -> None:
        if self.namespace() != repo_id.split("/")[0]:
            raise _Refusal(403, f"This token does not write to {repo_id}")

    def repo(self, repo_id: str) -> Repo:
        if "Authorization" in self.headers:
            self.namespace()  # reading needs no token, but a bad one is refused all the same
        if repo_id not in self.hub.repos:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[repo_id]


def _whoami(request: _Handler) -> dict:
    return {"type": "user", "name": request.namespace(), "orgs": []}


def _validate_yaml(request: _Handler) -> dict:
    return {"errors": [], "warnings": []}


def _create_repo(request: _Handler) -> dict:
    wanted = request.json()
    repo_id = f"{wanted['organization'] or request.namespace()}/{wanted['name']}"
    url = f"{request.hub.endpoint}/{repo_id}"
    request.check_writer(repo_id)
    if repo_id in request.hub.repos:
        raise _Refusal(409, "You already created this model repo", url=url)  # `exist_ok` reads the url
    request.hub.repos[repo_id] = Repo()
    return {"name": repo_id, "url": url}


def _preupload(request: _Handler, repo: str, revision: str) -> dict:
    """Whether each file goes into the commit or through LFS, and the id of what is under its path now."""
    request.check_writer(repo)
    present = request.repo(repo).at(revision).files
    plans = []
    for file in request.json()["files"]:
        mode = "lfs" if _is_lfs(file["size"], base64.b64decode(file["sample"])) else "regular"
        oid = _oid(present[file["path"]]) if file["path"] in present else None
        plans.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": plans}


def _lfs_batch(request: _Handler, repo: str) -> dict:
    request.check_writer(repo)
    objects = request.json()["objects"]
    for file in objects:
        if file["oid"] not in request.hub.lfs_objects:  # no actions means nothing to upload
            href = f"{request.hub.endpoint}/lfs/{file['oid']}"
            file["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
    return {"transfer": "basic", "objects": objects}


def _lfs_put(request: _Handler, oid: str) -> bytes:
    # No token: on the Hub this is a signed address of the storage, and the client sends none.
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _Refusal(400, "The content does not have this sha256")
    request.hub.lfs_objects[oid] = request.body
    return b""


def _lfs_verify(request: _Handler, oid: str) -> dict:
    request.namespace()
    if len(request.hub.lfs_objects[oid]) != request.json()["size"]:
        raise _Refusal(400, "The content does not have this size")
    return {}


def _commit(request: _Handler, repo: str, revision: str) -> dict:
    request.check_writer(repo)
    target = request.repo(repo)
    files, message = dict(target.at(revision).files), ""
    for line in request.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        match operation["key"]:
            case "header":
                message = value["summary"]
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = request.hub.lfs_objects[value["oid"]]
            case "deletedFile":
                del files[value["path"]]
            case other:
                raise _Refusal(400, f"The loopback Hub has no {other}")
    sha = target.commit(message, files)
    return {"success": True, "commitOid": sha, "commitUrl": f"{request.hub.endpoint}/{repo}/commit/{sha}"}


def _repo_info(request: _Handler, repo: str, revision: str) -> dict:
    commit = request.repo(repo).at(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    return {"id": repo, "sha": commit.sha, "private": False, "tags": [], "siblings": siblings}


def _tree(request: _Handler, repo: str, revision: str, path: str = "") -> list:
    """The files and folders in a folder; with `recursive`, all below it."""
    files = request.repo(repo).at(revision).files
    inside = [name for name in _with_folders(files) if name.startswith(f"{path}/" if path else "")]
    if path and not inside:
        raise _Refusal(404, "Entry not found", "EntryNotFound")
    if "recursive=true" not in urlsplit(request.path).query.lower():
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
    return {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])}


def _resolve(request: _Handler, repo: str, revision: str, path: str) -> bytes:
    commit = request.repo(repo).at(revision)
    request.reply_headers["X-Repo-Commit"] = commit.sha
    if path not in commit.files:
        raise _Refusal(404, "Entry not found", "EntryNotFound")
    content = commit.files[path]
    request.reply_headers |= {"ETag": f'"{_oid(content)}"', "X-Linked-Size": str(len(content))}
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
    (["GET"], f"/api/(?:models/)?{_REPO}(?:/revision/{_REVISION})?", _repo_info),
    (["GET"], f"/api/(?:models/)?{_REPO}/tree/{_REVISION}", _tree),
    (["GET"], f"/api/(?:models/)?{_REPO}/tree/{_REVISION}/(?P<path>.+)", _tree),
    (["POST"], f"/api/{_REPO}/paths-info/{_REVISION}", _paths_info),
    (["GET", "HEAD"], f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
]


def _is_lfs(size: int, sample: bytes) -> bool:
    # Big or binary. A safetensors file, however small, has zeros in its first eight bytes.
    return size > 10 * 2**20 or b"\0" in sample


def _oid(content: bytes) -> str:
    """The id that the client computes too: the sha256 of an LFS file, git's blob id of any other."""
    if _is_lfs(len(content), content[:512]):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
