"""The page in a process of its own, as `python space/app.py` starts it, and a browser that looks at it."""

import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from browser import chromium
from playwright.sync_api import sync_playwright
from running import ROOT, free_port


class Server:
    """`url`; `log`, a file of what it prints; `films`, the folder in which it may lay uploads down."""

    def __init__(self, folder, *options, app=ROOT / "space/app.py", cwd=ROOT):
        port = free_port()
        self.url, self.log, self.films = f"http://127.0.0.1:{port}", folder / "log.txt", folder / "tmp"
        self.films.mkdir()
        environment = os.environ | {"TMPDIR": str(self.films)}
        command = [sys.executable, str(app), "--port", str(port), *map(str, options)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.wait_until_it_answers()

    def wait_until_it_answers(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(self.url, timeout=30):
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text())

    def stop(self):
        self.process.terminate()
        return self.process.wait(60)

    @property
    def films_on_disk(self):
        """(Gradio makes an empty file for each upload, too.)"""
        return [path for path in self.films.rglob("*") if path.is_file() and path.stat().st_size]


@contextmanager
def open_browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()
