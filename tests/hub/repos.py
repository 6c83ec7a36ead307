"""What the loopback Hub keeps: repositories with their commits, and the reasons not to answer."""

import hashlib
from dataclasses import dataclass, field
from itertools import chain


@dataclass(frozen=True)
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]  # the whole tree after this commit, path -> content


NO_COMMIT = Commit("0" * 40, "", {})


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})  # and "refs/pr/1", ...
    tags: dict[str, Commit] = field(default_factory=dict)

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    @property
    def head(self) -> Commit:
        return self.at("main")

    @property
    def files(self) -> dict[str, bytes]:
        return self.head.files

    def commit(self, message: str, files: dict[str, bytes], branch: str = "main") -> str:
        commits = self.branches[branch]
        parent = commits[-1] if commits else NO_COMMIT
        tree = "\n".join(f"{path} {git_or_lfs_id(content)}" for path, content in sorted(files.items()))
        sha = hashlib.sha1(f"{parent.sha}\n{message}\n{tree}".encode()).hexdigest()
        commits.append(Commit(sha, message, files))
        return sha

    def open_pull_request(self, base: Commit) -> str:
        """The name of a new branch that continues `base`."""
        name = f"refs/pr/{len(self.branches)}"  # main is not one
        self.branches[name] = [base]
        return name

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a full sha."""
        if revision in self.branches:
            return [NO_COMMIT, *self.branches[revision]][-1]
        if revision in self.tags:
            return self.tags[revision]
        for commit in [NO_COMMIT, *chain(*self.branches.values())]:
            if commit.sha == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Refusal(Exception):
    """An answer other than 200; the client picks its exception by `code`."""

    def __init__(
        self, status: int, message: str, code: str = "", *, headers: dict[str, str] | None = None, **body: str
    ):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **(headers or {})}


def is_lfs(size: int, sample: bytes) -> bool:
    # Big or binary. A safetensors file, however small, has zeros in its first eight bytes.
    return size > 10 * 2**20 or b"\0" in sample


def git_or_lfs_id(content: bytes) -> str:
    """The id that the client computes too: the sha256 of an LFS file, git's blob id of any other."""
    if is_lfs(len(content), content[:512]):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
