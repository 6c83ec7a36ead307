"""Processes that are stopped: a Python that has imported all that the recipe needs, and forks a process for each start
of it. Where a start takes a second, it can be killed fifty times."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from running import ROOT

FORK = """
import importlib.util, json, os, runpy, sys, traceback
sys.path.insert(0, "recipes")
import two_stage  # and with it everything that takes long
for line in sys.stdin:
    start = json.loads(line)
    if (child := os.fork()) == 0:
        output = os.open(start["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = start["argv"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else 1
            print("" if isinstance(ending.code, int) else ending.code, file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    """Starts the recipe again and again, with a cache of its own."""

    def __init__(self, folder: Path):
        self.output = folder / "output.txt"
        environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._forks = subprocess.Popen([sys.executable, "-c", FORK], cwd=ROOT, env=environment, **pipes)
        self._child = None

    def start(self, *argv) -> None:
        words = ["recipes/two_stage.py", *map(str, argv)]
        self._forks.stdin.write(json.dumps({"argv": words, "output": str(self.output)}) + "\n")
        self._forks.stdin.flush()
        self._child = int(self._forks.stdout.readline())

    def is_running(self) -> bool:
        """A child that has ended is a zombie until its parent has asked for its status."""
        try:
            state = Path(f"/proc/{self._child}/stat").read_text().rsplit(") ", 1)[1][0]
        except FileNotFoundError:
            return False
        return state != "Z"

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._child, number)

    def wait(self) -> int:
        """The exit status; below 0 for the signal that ended it."""
        return int(self._forks.stdout.readline())

    def run(self, *argv) -> int:
        self.start(*argv)
        return self.wait()

    def wait_until(self, condition) -> bool:
        """Look many times a millisecond; False if the process ended before."""
        while not condition():
            if not self.is_running():
                return False
            time.sleep(0.0002)
        return True

    def wait_for(self, seconds: float) -> None:
        """So long, or until the process ends."""
        end = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() > end)

    def close(self) -> None:
        self._forks.communicate()
