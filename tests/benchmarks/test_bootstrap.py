"""The bootstrap benchmark, on few films: what it prints, not how fast this machine is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(printed):
    table = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


@pytest.fixture(scope="module")
def printed():
    options = ["--films", "50", "1200", "--resamples", "30", "--peer_resamples", "4"]
    command = [sys.executable, "benchmarks/bootstrap.py", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_number_of_films_has_a_row_with_both_ways_and_their_ratio(printed):
    assert [row[0] for row in rows(printed)] == ["50", "1,200"]
    for row in rows(printed):
        ours, peer, ratio = (float(cell) for cell in row[2:5])
        assert ours >= 0 and peer >= 0 and ratio > 0


def test_both_ways_give_the_same_figures(printed):
    assert all(float(row[-1]) < 1e-12 for row in rows(printed))


def test_it_says_that_the_loop_was_scaled(printed):
    assert printed.startswith("Seconds for AUROC and AUPRC of 30 resamples (scikit-learn: of 4, scaled):")
    assert "scikit-learn 1" in printed and f"Python {sys.version.split()[0]}" in printed
