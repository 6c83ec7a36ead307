"""Benchmarks as a user starts them, and the tables that they print."""

import subprocess
import sys

from running import ROOT


def run(script, *options):
    """The tables that a benchmark prints, each as rows of cells without the header, and all that it prints."""
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, options)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    tables = [[]]
    for line in process.stdout.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [table[2:] for table in tables if table], process.stdout


def names(table):
    return [row[0] for row in table]


def number(cell):
    """The first one in a cell."""
    return float(cell.split()[0].replace(",", ""))
