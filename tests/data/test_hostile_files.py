"""Damaged and malicious files: an array of bounded size or a ValueError comes back, whatever is in them.

The same mutations run for as long as one likes, in a process of limited memory:

    python tests/data/test_hostile_files.py 600 > fuzz.log    # seconds a kind of file
"""

import resource
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the child process

from data.film_files import as_dicom, as_file, as_png, as_tiff, lossless_jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.encaps import encapsulate

from cxr_backbone.data import radiographs
from cxr_backbone.data.radiographs import MAX_FILE_BYTES, MAX_PIXELS, read_radiograph

ROWS, COLUMNS = np.mgrid[0:40, 0:48]
DEEP = ((np.sin(ROWS / 7) + np.cos(COLUMNS / 9) + 2) * 900 + (ROWS * 37 + COLUMNS * 91) % 17).astype(np.uint16)
GREY = (DEEP >> 4).astype(np.uint8)
ENDS_IN_DIRECTORY = ("tiff deflate", "tiff lzw", "tiff jpeg", "tiff group 4")  # without which nothing is found
TAGS = {"WindowCenter": 2000, "WindowWidth": 3000, "RescaleSlope": 1, "RescaleIntercept": 0}


def whole_files():
    """One valid file of each kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about what is written
        return {
            "jpeg": as_file(GREY, "JPEG"),
            "jpeg progressive": as_file(np.stack([GREY] * 3, axis=-1), "JPEG", progressive=True),
            "png 16": as_file(DEEP, "PNG"),
            "png opacity": as_file(np.stack([GREY] * 4, axis=-1), "PNG"),
            "tiff": as_tiff(DEEP),
            "tiff float": as_tiff(DEEP.astype(np.float32), big_endian=True),
            "tiff deflate": as_file(DEEP, "TIFF", compression="tiff_deflate"),
            "tiff lzw": as_file(GREY, "TIFF", compression="tiff_lzw"),
            "tiff jpeg": as_file(GREY, "TIFF", compression="jpeg"),
            "tiff group 4": as_file(GREY > 99, "TIFF", compression="group4"),
            "bmp": as_file(GREY, "BMP"),
            "dicom": as_dicom(DEEP, bits=12, **TAGS),
            "dicom rle": as_dicom(DEEP, bits=12, syntax=uid.RLELossless, **TAGS),
            "dicom jpeg": as_dicom(GREY, syntax=uid.JPEGBaseline8Bit, frame=as_file(GREY, "JPEG")),
            "dicom lossless jpeg": as_dicom(
                DEEP, bits=12, syntax=uid.JPEGLosslessSV1, frame=lossless_jpeg(DEEP, 12), **TAGS
            ),
            "dicom jpeg-ls": as_dicom(DEEP, bits=12, syntax=uid.JPEGLSLossless, **TAGS),
            "dicom jpeg 2000": as_dicom(DEEP, bits=12, syntax=uid.JPEG2000Lossless, **TAGS),
        }


def mutated(whole, rng):
    """A file cut off, with some bytes gone, put in or changed: anywhere, in its header, or where its pixels begin."""
    file = bytearray(whole)
    kind = rng.random()
    if kind < 0.2:
        return bytes(file[: rng.integers(len(file))])
    if kind < 0.4:
        at = int(rng.integers(len(file)))
        file[at : at + int(rng.integers(64))] = rng.bytes(int(rng.integers(16)))
        return bytes(file)
    pixels = max(whole.find(b"\xe0\x7f\x10\x00"), 0)
    start, stop = [(0, len(file)), (0, 400), (len(file) - 400, len(file)), (pixels, pixels + 300)][rng.integers(4)]
    start, stop = max(start, 0), min(stop, len(file))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        file[rng.integers(start, stop)] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    return bytes(file)


def is_film_or_refusal(file, options):
    """Read it, and say which of the two it was."""
    try:
        pixels = read_radiograph(file, **options)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith("Can't read the given bytes as ")
        return "refused"
    assert pixels.ndim == 2 and 0 < pixels.size <= MAX_PIXELS
    assert pixels.min() >= 0 and pixels.max() <= (255 if pixels.dtype == np.uint8 else 1)
    return "read"


def fuzz(num_bytes, seed, films=None, seconds=None):
    """Read mutations of each kind of file, all of which a crash of a C library would end."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    for kind, whole in whole_files().items():
        rng, start, counts, slowest = np.random.default_rng(seed), time.monotonic(), {}, 0.0
        while sum(counts.values()) < films if seconds is None else time.monotonic() - start < seconds:
            options = {} if rng.random() < 0.5 else {"dtype": np.float32, "window": (1, 99)}
            before = time.monotonic()
            outcome = is_film_or_refusal(mutated(whole, rng), options)
            slowest = max(slowest, time.monotonic() - before)
            counts[outcome] = counts.get(outcome, 0) + 1
        print(kind, counts, f"slowest {slowest:.2f} s", flush=True)


def test_mutations_of_every_kind_of_file_are_read_or_refused_in_bounded_memory():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_hostile_files as it; "
    code += f"it.fuzz({6 * 2**30}, seed=0, films=150)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == len(whole_files())
    assert all("refused" in line and "read" in line for line in lines)


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=400), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM"])
)
def test_noise_behind_a_magic_number_is_refused(noise, magic):
    assert is_film_or_refusal(magic + noise, {}) == "refused"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=400))
def test_noise_behind_a_dicom_prefix_is_refused(noise):
    assert is_film_or_refusal(bytes(128) + b"DICM" + noise, {}) == "refused"


@pytest.mark.parametrize("kind", [kind for kind in whole_files() if kind not in ENDS_IN_DIRECTORY])
def test_a_file_cut_off_in_its_pixels_is_refused(kind):
    whole = whole_files()[kind]
    for share in (0.55, 0.7, 0.9, 0.97):
        assert is_film_or_refusal(whole[: int(len(whole) * share)], {}) == "refused"


# Bombs


ZEROS = np.zeros((1, 20_000_000), np.uint8)  # some kilobytes in the file


@pytest.mark.parametrize("side", [7072, 12_000, 60_000])  # below and above the two limits that Pillow has
def test_more_pixels_than_the_limit_are_refused_from_the_header(side):
    assert side**2 > MAX_PIXELS
    tiff = as_tiff(np.zeros((4, 4), np.uint16))
    for tag in (b"\0\1\4\0", b"\1\1\4\0"):  # width and height
        tiff = tiff.replace(tag + struct.pack("<II", 1, 4), tag + struct.pack("<II", 1, side))
    for file in (as_png(8, 0, ZEROS, size=(side, side)), tiff):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=r"its .*pixels are more than 50,000,000"):
                read_radiograph(file)


def test_a_png_that_inflates_to_more_than_it_says_is_read_to_what_it_says():
    assert read_radiograph(as_png(8, 0, ZEROS, size=(4, 4))).shape == (4, 4)


def test_a_tiff_with_a_giant_tile_is_refused():
    file = as_tiff(np.zeros((16, 16), np.uint8), tile=40_000)
    with pytest.raises(ValueError, match="one of its tiles has more than 50,000,000 pixels"):
        read_radiograph(file)


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # a hole on disk
    with pytest.raises(ValueError, match=r"long\.png as an image: its 268,435,457 bytes are more than 268,435,456"):
        read_radiograph(tmp_path / "long.png")


def test_bytes_beyond_the_limit_are_refused_too(monkeypatch):
    monkeypatch.setattr(radiographs, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match="its 11 bytes are more than 10"):
        read_radiograph(bytes(11))


def test_run_lengths_stop_where_the_film_is_full():
    bomb = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x07" * 500_000  # 64 MB
    film = as_dicom(np.zeros((4, 4), np.uint8), syntax=uid.RLELossless, frame=bomb)
    assert (read_radiograph(film) == 7).all()


def jpeg_2000():
    file = whole_files()["dicom jpeg 2000"]
    return file, file.index(b"\xff\x4f\xff\x51"), file.index(b"\xff\x52\x00")


def test_a_jpeg_2000_frame_in_pieces_smaller_than_any_films_is_refused():
    file, start, coding = jpeg_2000()
    edits = {
        "tiles": (start + 24, struct.pack(">II", 1, 1)),
        "code blocks": (coding + 10, b"\0\0"),
        "layers": (coding + 6, b"\xff\xff"),
        "another size": (start + 8, struct.pack(">II", 60_000, 60_000)),
        "offset": (start + 16, struct.pack(">II", 8, 8)),
        "channels": (start + 40, b"\x00\x04"),
        "precision": (start + 42, b"\x25"),
        "steps": (start + 43, b"\x02\x02"),
    }
    assert is_film_or_refusal(file, {}) == "read"
    for at, new in edits.values():
        with pytest.raises(ValueError, match=r"its JPEG 2000|its compressed pixels are"):
            read_radiograph(file[:at] + new + file[at + len(new) :])
    frame = file[start:-8]
    segment = bytearray(frame[coding - start :][:14])
    segment[2:5] = struct.pack(">HB", 12 + segment[9] + 1, 1)
    small = frame[: coding - start] + segment + b"\x11" * (segment[9] + 1) + frame[coding - start + 14 :]
    with pytest.raises(ValueError, match="smaller pieces"):
        read_radiograph(as_dicom(DEEP, bits=12, syntax=uid.JPEG2000Lossless, frame=small))
    assert encapsulate([frame]) in file


def test_coding_that_a_tile_brings_itself_is_looked_at_too():
    file, start, coding = jpeg_2000()
    frame = bytearray(file[start:-8])
    part, data = frame.index(b"\xff\x90"), frame.index(b"\xff\x93")
    style = bytearray(frame[coding - start :][:14])
    style[10:12] = b"\0\0"
    length = int.from_bytes(frame[part + 6 : part + 10], "big") + len(style)
    frame[part + 6 : part + 10] = length.to_bytes(4, "big")
    frame[data:data] = style
    with pytest.raises(ValueError, match="smaller pieces"):
        read_radiograph(as_dicom(DEEP, bits=12, syntax=uid.JPEG2000Lossless, frame=bytes(frame)))


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        (b"\xff\xde\x00\x0b\x0c\xff\xff\xff\xff\x01\x01\x11\x00", "no JPEG header of the kind"),
        (b"\xff\xc3\x00\x0b\x0c\xff\xff\xff\xff\x01\x01\x11\x00", "its compressed pixels are 65535 x 65535"),
        (b"\xff\xc9\x00\x0b\x0c\x00\x28\x00\x30\x01\x01\x11\x00", "no JPEG header of the kind"),
    ],
    ids=["pyramid", "another size", "arithmetic"],
)
def test_a_jpeg_frame_that_would_make_its_decoder_ask_for_more_is_refused(segment, reason):
    frame = lossless_jpeg(DEEP, 12)
    film = as_dicom(DEEP, bits=12, syntax=uid.JPEGLosslessSV1, frame=frame[:2] + segment + frame[2:])
    with pytest.raises(ValueError, match=reason):
        read_radiograph(film)


# Memory


MEASURE = """
import os, resource, sys
import cxr_backbone.data.dicom
from cxr_backbone.data.radiographs import read_radiograph

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for path in sys.argv[1:]:
    if os.fork() == 0:
        before = peak()
        read_radiograph(path, dtype="float32")
        print(peak() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_a_large_film_is_read_in_a_few_bytes_a_pixel(tmp_path):
    """12 megapixels. At the limit of 50 as many bytes a pixel, and the libraries beside them, stay below a gigabyte."""
    deep = (np.arange(12_000_000, dtype=np.uint32).reshape(3000, 4000) % 65536).astype(np.uint16)
    grey = (deep >> 8).astype(np.uint8)
    files = {
        "png": lambda: as_file(deep, "PNG", compress_level=0),
        "opacity": lambda: as_file(np.stack([grey] * 4, axis=-1), "PNG", compress_level=0),
        "tiff": lambda: as_tiff(deep.astype(np.float32)),
        "dicom": lambda: as_dicom(deep, **TAGS),
    }
    for name, write in files.items():
        (tmp_path / name).write_bytes(write())
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in files)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    bytes_a_pixel = dict(zip(files, (int(line) / deep.size for line in child.stdout.split()), strict=True))
    assert max(bytes_a_pixel.values()) < 12, bytes_a_pixel


if __name__ == "__main__":
    fuzz(6 * 2**30, seed=int(time.time()), seconds=float(sys.argv[1]))
