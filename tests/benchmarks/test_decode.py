"""The decoding benchmark, on a few drawn JPEGs: what it prints, not how fast this machine is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(folder, *options):
    command = [sys.executable, "benchmarks/decode.py", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    noise = np.random.default_rng(0).integers(0, 256, (3, 300, 400), dtype=np.uint8)
    for film, name in zip(noise, ("grey.jpeg", "nested/grey.JPG"), strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(film).save(folder / name)
    Image.fromarray(noise.transpose(1, 2, 0).copy()).save(folder / "colour.jpg", quality=60)
    process = run(folder, "--image_size", "75", "--repetitions", "3")
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def rows(printed):
    """Way -> [ms a film, times as fast as plain, mean difference, largest]."""
    table = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {way.strip(): [cell.strip() for cell in cells] for way, *cells in table[2:]}


def test_every_way_has_a_row(rows):
    assert list(rows) == [
        "plain",
        *("ours, exact", "ours, exact, with facts", "ours, reduced", "ours, reduced, with facts"),
        *("datasets.Image", "ViT image processor"),
    ]


def test_the_plain_way_is_what_the_others_are_compared_with(rows):
    assert rows["plain"][1:] == ["1.00 (1.00 to 1.00)", "0.000", "0"]
    milliseconds = {way: float(cells[0].split()[0]) for way, cells in rows.items()}
    assert all(value > 0 for value in milliseconds.values())


def test_the_facts_change_no_pixel(rows):
    for way in ("ours, exact", "ours, reduced"):
        assert rows[way][2:] == rows[f"{way}, with facts"][2:]


def test_only_a_reduced_film_is_more_than_a_rounding_away(rows):
    for way, cells in rows.items():
        assert (int(cells[3]) > 2) == ("reduced" in way), way


def test_the_films_and_the_software_are_counted(printed):
    assert printed.startswith("3 films to 75 x 75; median (interquartile range) of 3 repetitions:")
    assert 'convert("L") in 2 of 3 films' in printed or 'convert("L") in 3 of 3 films' in printed
    assert f"Python {sys.version.split()[0]}, pillow {Image.__version__}, transformers " in printed


def test_a_folder_without_films_is_refused(tmp_path):
    process = run(tmp_path)
    assert process.returncode == 2 and f"no JPEG file in {tmp_path}" in process.stderr
