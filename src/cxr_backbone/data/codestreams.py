"""Compressed frames of DICOM, checked before a C library decodes them.

A decoder allocates by what the codestream says of itself, not by the DICOM header around it: a few bytes can ask for
many gigabytes. What a frame says is read here, in the few places where it decides about memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from cxr_backbone.data.radiographs import Refusal

# JPEG 2000 (ISO/IEC 15444-1): real films have one tile or some hundreds, code-blocks of 32 or 64 and precincts of 128
# or more; a decoder keeps a record of a few kilobytes for each tile and of some hundred bytes for each of the others.
MAX_TILES = 1024
MIN_CODE_BLOCK_EXPONENT = 4  # 16 samples
MIN_PRECINCT_EXPONENT = 6  # 64 samples
MAX_LAYERS = 100

# What may stand before the frame header of a JPEG (ISO/IEC 10918-1): tables, restart interval, comment, application
# data. Not 0xDE, which starts a pyramid of frames; nor APP11, in which JPEG XT hides further pictures.
JPEG_TABLES = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xEB}


def check_jpeg(frame: bytes, rows: int, columns: int, bits: int, kinds: set[int]) -> None:
    """Refuse a JPEG or JPEG-LS frame whose own header isn't of this size, of one component, of at most so many bits.

    Args:
        frame: the codestream.
        rows, columns, bits: of the DICOM header (bits allocated).
        kinds: the start-of-frame markers that the transfer syntax allows, such as 0xC3 for lossless JPEG.
    """
    if frame[:2] != b"\xff\xd8":
        raise Refusal("its compressed pixels are no JPEG")
    # Without this end marker libjpeg makes up the missing rows. What follows it is padding.
    if not frame[-64:].rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise Refusal("its compressed pixels break off before their end")
    position = 2
    while len(frame) >= position + 10 and frame[position] == 0xFF:
        marker, length = frame[position + 1], int.from_bytes(frame[position + 2 : position + 4], "big")
        if marker in kinds:
            precision, height, width, components = struct.unpack_from(">BHHB", frame, position + 4)
            return _check_same(rows, columns, bits, height, width, components, precision)
        if marker not in JPEG_TABLES:
            break
        position += 2 + length
    raise Refusal("its compressed pixels have no JPEG header of the kind that it names")


def check_jpeg_2000(frame: bytes, rows: int, columns: int, bits: int) -> None:
    """Refuse a JPEG 2000 frame of another size, or cut into more pieces than any film."""
    if frame[:4] != b"\xff\x4f\xff\x51" or len(frame) < 45:
        raise Refusal("its compressed pixels are no JPEG 2000 codestream")
    # From ISO/IEC 15444-1 A.5.1: image area, tile area, number of components, precision of the first.
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = struct.unpack_from(
        ">8IH", frame, 8
    )
    precision, *steps = frame[42:45]
    _check_same(rows, columns, bits, bottom - top, right - left, components, (precision & 0x7F) + 1)
    if steps != [1, 1] or 0 in (tile_width, tile_height):
        raise Refusal("its JPEG 2000 header makes no film")
    if math.ceil((right - tile_left) / tile_width) * math.ceil((bottom - tile_top) / tile_height) > MAX_TILES:
        raise Refusal(f"its JPEG 2000 pixels are cut into more than {MAX_TILES} tiles")
    for marker, segment in _jpeg_2000_segments(frame):
        if marker == 0x52:  # coding style: flags, progression, layers, component transform, then as for 0x53
            has_precincts, layers, coding = segment[0] & 1, int.from_bytes(segment[2:4], "big"), segment[5:]
        elif marker == 0x53:  # coding style of a component
            has_precincts, layers, coding = segment[1] & 1, 1, segment[2:]
        else:
            continue
        precincts = coding[5:] if has_precincts else b"\xff"
        if (
            layers > MAX_LAYERS
            or min(coding[1], coding[2]) + 2 < MIN_CODE_BLOCK_EXPONENT
            or min(min(size & 15, size >> 4) for size in precincts) < MIN_PRECINCT_EXPONENT
        ):
            raise Refusal("its JPEG 2000 pixels are cut into smaller pieces than those of any film")


def decode_rle(frame: bytes, rows: int, columns: int, num_bytes: int) -> np.ndarray:
    """Decode DICOM's run lengths: one byte plane after the other, the most significant first.

    Pillow's decoder stops where the film is full. Those that pydicom can call decode to the end, which may be a hundred
    times as long, or end the whole program on damaged data.

    Returns:
        uint8 or uint16 array (rows, columns).
    """
    num_planes, *starts = struct.unpack_from("<16I", frame)
    if num_planes != num_bytes:
        raise Refusal(f"its run-length pixels have {num_planes} byte planes, and its header tells of {num_bytes}")
    ends = [*starts[1:num_planes], len(frame)]
    film = np.zeros((rows, columns), np.uint8 if num_bytes == 1 else np.uint16)
    for start, end in zip(starts, ends, strict=False):
        plane = Image.frombytes("L", (rows * columns, 1), frame[start:end], "packbits", "L")
        film <<= 8 * (num_bytes - 1)
        film |= np.asarray(plane).reshape(rows, columns)
    return film


def _check_same(rows: int, columns: int, bits: int, height: int, width: int, components: int, precision: int) -> None:
    if (height, width, components) != (rows, columns, 1) or precision > bits:
        raise Refusal(
            f"its compressed pixels are {width} x {height} with {components} channels of {precision} bits, "
            f"and its header tells of {columns} x {rows} with 1 of {bits}"
        )


def _jpeg_2000_segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """The marker segments of the main header and of each tile part."""
    position, end_of_part = 2, len(frame)
    while position + 4 <= len(frame) and frame[position] == 0xFF:
        marker, length = frame[position + 1], int.from_bytes(frame[position + 2 : position + 4], "big")
        if marker == 0xD9:  # end of the codestream
            return
        if marker == 0x93:  # the data of this tile part; the next one's header comes after it
            position = end_of_part
            continue
        if marker == 0x90:  # a tile part: its length counts from here, and 0 means to the end
            part = int.from_bytes(frame[position + 6 : position + 10], "big")
            end_of_part = position + part if part else len(frame)
            if end_of_part <= position + 12:
                break
        yield marker, frame[position + 4 : position + 2 + length]
        position += 2 + length
