"""What goes wrong between a client and the loopback Hub, as often as a test asks for it."""

import re
import threading
from dataclasses import dataclass, field
from enum import Enum


class Effect(Enum):
    REFUSE = "an answer other than 200, and nothing is carried out"
    CUT = "the connection ends within the body: the answer's for a GET, the request's for anything else"
    LOSE_ANSWER = "the request is carried out and the connection ends before the answer"


@dataclass
class Fault:
    """Meets the next `times` requests whose method and whole path, without the query, match."""

    effect: Effect
    method: str
    path: str  # a regular expression, for paths as `LoopbackHub.requests` shows them: revisions are percent-encoded
    times: int = 1
    status: int = 0
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    met: int = 0


class Faults:
    """The faults that are waiting, first come, first served; each request meets one at most."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()  # requests arrive in threads, and `times=1` must mean one of them

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def meet(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.met < fault.times and fault.method == method and re.fullmatch(fault.path, path):
                    fault.met += 1
                    return fault
        return None

    def check_met(self) -> None:
        """A fault that no request met leaves a test that shows nothing.

        Raises:
            AssertionError: with the first such fault.
        """
        for fault in self._faults:
            assert fault.met, f"No request was a {fault.method} {fault.path}, which was to meet {fault.effect.name}."
