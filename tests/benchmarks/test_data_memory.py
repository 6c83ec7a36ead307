"""The memory benchmark, on few films: reading them takes no more memory when there are more of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIXELS = 256 * 256


@pytest.fixture(scope="module")
def added():
    """Work -> bytes of peak memory per added film."""
    command = [sys.executable, "benchmarks/data_memory.py", "--films", "250", "--image_size", "256"]
    # Threads that each keep freed memory for themselves would make the figures waver by a few MB.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    table = [line.strip("|").split("|") for line in process.stdout.splitlines() if line.startswith("|")]
    assert "2,500 films (164 MB of pixels)" in table[0][2]
    return {work.strip(): int(cells[2].replace(",", "")) for work, *cells in table[2:]}


@pytest.mark.parametrize("work", ["decode once", "an epoch of decoded films"])
def test_memory_does_not_grow_with_the_data_set(added, work):
    assert added[work] < PIXELS / 10


def test_memory_does_not_grow_with_the_shards_of_a_stream(added):
    # A tenth is too strict for so few films: what the readers' allocators keep wavers by 20 MB, 14 % of the pixels.
    # Shards that are read ahead as a whole take more than all of the pixels.
    assert added["an epoch of a stream"] < PIXELS / 4


def test_films_held_in_memory_are_seen_to_grow(added):
    assert added["peer: all films in one tensor"] >= 0.9 * PIXELS
