"""Opens a page in headless Chromium, as a reader would."""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
# The page under test forbids scripts. This one frames it, at the width asked for, and looks in from outside.
RULER = """<!DOCTYPE html><body style="margin: 0">
<iframe src="{page}" style="border: 0; width: {width}px; height: 900px"></iframe><pre></pre><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const pictures = [...page.images].map(image => [image.naturalWidth, image.naturalHeight, image.clientWidth]);
  const wide = [...page.querySelectorAll("body *")].filter(element => !element.closest(".wide")
    && element.getBoundingClientRect().right > {width} + 1).map(element => element.outerHTML.slice(0, 80));
  const measured = {{width: root.scrollWidth, height: root.scrollHeight, pictures, wide, text: page.body.innerText}};
  document.querySelector("pre").textContent = JSON.stringify(measured);
}};
</script>"""


def measure(page, width):
    """What a window `width` pixels wide makes of a page: `width` and `height` of all there is, `pictures` (width and
    height in the file, width shown), `wide` (what sticks out), the visible `text`."""
    with tempfile.TemporaryDirectory() as folder:
        ruler = Path(folder) / "ruler.html"
        ruler.write_text(RULER.format(page=page.resolve().as_uri(), width=width))
        dom = _run(["--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", ruler.as_uri()])
    return json.loads(html.unescape(re.search("<pre>(.*?)</pre>", dom, re.DOTALL)[1]))


def screenshot(page, width, height, path=None):
    """The page as pixels, uint8 (height, width, 3). Chromium's windows are no narrower than 500 pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder) / "page.png"
        _run([f"--window-size={width},{height}", f"--screenshot={path}", page.resolve().as_uri()])
        return np.asarray(Image.open(path).convert("RGB"))


def chromium():
    """The browser's path; the test is skipped where there is none."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.skip("needs a browser: no chromium on the PATH (set CHROMIUM)")
    return path


def _run(arguments):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
