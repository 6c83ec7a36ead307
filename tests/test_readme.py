"""The README's Python runs, in the order it stands there, on a folder like the one that `make train` leaves."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path):
    folder = tmp_path / "runs/sample/fine_tuned"
    labels = {"id2label": {0: "NORMAL", 1: "PNEUMONIA"}, "temperature": 1.0}
    points = {"PNEUMONIA": {"sensitivity>=0.95": {"threshold": 0.3}}}
    config = CXRInceptionConfig(depth_multiplier=0.1, image_size=75, operating_points=points, **labels)
    CXRInceptionForImageClassification(config).save_pretrained(folder)
    CXRInceptionImageProcessor(size={"height": 75, "width": 75}).save_pretrained(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)).save(tmp_path / "chest.png")

    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 2
    program = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert program.returncode == 0, program.stderr[-2000:]
    assert "PNEUMONIA" in program.stdout


def test_every_file_the_readme_speaks_of_exists():
    for path in re.findall(r"\b(?:recipes|benchmarks|docs|src)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path


def test_the_readme_says_that_this_is_no_medical_device():
    assert "not a medical device" in README
    assert "not a medical device" in (ROOT / "model_card.md").read_text()
