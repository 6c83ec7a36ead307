"""What a training goes on from after it was stopped: its whole state, every few minutes."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch

from cxr_backbone.training.atomic import naming, remove, to_disk

logger = logging.getLogger(__name__)

KEPT = 2  # checkpoints; the older one is for when the newer one is damaged


class Checkpoints:
    """The newest `KEPT` states of a training, in a folder of its run directory.

    A file is named after the steps that were taken and the SHA-256 of its content, so that one rename makes it appear,
    whole, and a damaged one is known.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, state: dict[str, Any], steps: int) -> None:
        """Write the state after so many steps, then remove what is older than the newest `KEPT`.

        Raises:
            OSError: there is no room for it, say. What was there before is whole.
        """
        unfinished = self.folder / "unfinished"
        try:
            with naming(self.folder / f"{steps:09d}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                with unfinished.open("wb") as file:  # by its name, torch would not say why it can't
                    torch.save(state, file)
                to_disk(unfinished)
                unfinished.replace(self.folder / f"{steps:09d}-{_digest(unfinished)}.pt")
        except BaseException:
            remove(unfinished)
            raise
        for older in self._files()[:-KEPT]:
            older.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest state that is whole, its tensors on the CPU; None if there is none. Damaged ones are removed."""
        for file in reversed(self._files()):
            if file.stem.endswith(_digest(file)):
                return torch.load(file, map_location="cpu", weights_only=True)
            logger.warning("The checkpoint %s is damaged; going on from the one before.", file)
            file.unlink()
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
