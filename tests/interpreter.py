"""A Python of its own, which runs lines as they come and remembers what they defined."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# Runs what it reads, a JSON string a line; answers with what the lines left in `result`, or with a traceback.
LOOP = """
import json, sys, traceback
names = {}
for line in sys.stdin:
    names["result"] = None
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except BaseException:
        answer = {"traceback": traceback.format_exc()}
    print("\\nANSWER" + json.dumps(answer), flush=True)
"""


class Interpreter:
    """Lives until it is closed; what it prints is in `printed`."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.printed = ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process lives
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", LOOP], cwd=folder, env=environment, **pipes)

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def run(self, lines: str):
        """What `lines` leave in `result`; an AssertionError with their traceback if they fail."""
        self._process.stdin.write(json.dumps(lines) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER"):
                answer = json.loads(line.removeprefix("ANSWER"))
                assert "traceback" not in answer, answer["traceback"]
                return answer["result"]
            self.printed += line
        self._errors.seek(0)
        raise AssertionError(f"The interpreter ended: {self._errors.read()[-3000:]}")

    def read_errors(self) -> str:
        """All it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read()
