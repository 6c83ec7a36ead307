"""The table of precisions is measured on the validation films of a run."""

import re
import subprocess
import sys

import pytest
from running import ROOT, sample_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sample_run(tmp_path_factory.mktemp("trained"), **{"evaluation.report": ["false"]})


def test_each_precision_stands_beside_float32(run):
    command = [sys.executable, "benchmarks/half_precision.py", str(run.path)]
    process = subprocess.run(command, cwd=ROOT, env=run.environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    table = re.findall(r"^\| (\w+) +\| ([\d.]+) +\| ([\d.]+) +\| (\d+) +\| ([\d.]+)", process.stdout, re.MULTILINE)
    rows = {name: [float(cell) for cell in cells] for name, *cells in table}
    films = run.read("metrics.json")["models"]["fine_tuned"]["splits"]["validation"]
    assert f"{films['films']} validation films" in process.stdout
    assert rows["float32"][1:3] == [0, 0]
    assert rows["float32"][3] == pytest.approx(films["figures"]["auroc"]["value"], abs=1e-4)
    for half in ("float16", "bfloat16"):
        assert rows[half][0] < 0.6 * rows["float32"][0]
        assert 0 < rows[half][1] < 0.1
