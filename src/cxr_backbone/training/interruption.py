"""SIGTERM (pre-emption) and SIGINT (Ctrl-C): a training saves its state before it goes."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)


class Interruption:
    """Takes both signals from now on. The process ends at once with the status that shells give it (143, 130); but
    while it is `deferred`, a signal is only noted in `is_asked`, for the training to save its state and `exit`. (A
    second Ctrl-C doesn't wait for that.)"""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._signal: signal.Signals | None = None
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    @property
    def is_asked(self) -> bool:
        return self._signal is not None

    @contextmanager
    def deferred(self, wait: bool = True) -> Iterator[None]:
        before, self._deferred = self._deferred, wait
        try:
            yield
        finally:
            self._deferred = before

    def exit(self, saved: str = "") -> NoReturn:
        number = self._signal or signal.SIGTERM  # it may be another process of the training that was asked
        if os.environ.get("RANK", "0") == "0":
            logger.warning("Stopped by %s%s. The same command goes on with the run.", number.name, saved)
        raise SystemExit(128 + number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that inherited this: it ends as if nobody had taken the signal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_impatient = self.is_asked and number == signal.SIGINT  # (SIGTERM may come twice: by SLURM and by torchrun)
        self._signal = signal.Signals(number)
        if is_impatient or not self._deferred:
            self.exit()
