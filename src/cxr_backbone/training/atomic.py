"""Files and folders that appear whole or not at all, whatever ends the process meanwhile."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or to fill a folder; at the end of the block it becomes `path`.

    Until then what was at `path` stays as it was. If the block fails, what it wrote is removed; if the process is
    killed, it lies there as `<name>.unfinished` until the next time. (A folder takes two renames to replace: killed
    between them, the old one is `<name>.old`.)

    Raises:
        OSError: it can't be written, for want of room say; it names `path`.
    """
    unfinished, old = (path.with_name(path.name + suffix) for suffix in (".unfinished", ".old"))
    remove(unfinished)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            to_disk(unfinished)
            if path.is_dir():
                remove(old)
                path.rename(old)
            unfinished.replace(path)
            remove(old)
            _flush(path.parent)
    except BaseException:
        remove(unfinished)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever a library says when it can't write, as an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch has it as the context
        if isinstance(error, RuntimeError) and not isinstance(reason, OSError):
            raise
        words = reason.strerror if isinstance(reason, OSError) and reason.strerror else " ".join(str(error).split())
        raise OSError(f"{path} can't be written: {words}.") from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk: a rename may get there before what it renames."""
    for file in [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]:
        _flush(file)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows can't, and needn't
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
