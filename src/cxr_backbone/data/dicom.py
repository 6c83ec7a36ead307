"""One DICOM film to grey pixels, through every step that the standard puts between the two.

Stored values -> modality rescale or table -> VOI window or table -> MONOCHROME1 turned over (PS3.3 C.11.1 and C.11.2).
Stored values have at most 16 bits, so all steps are made on a table of the values that there can be.
"""

from __future__ import annotations

import io

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import apply_modality_lut, apply_windowing, get_decoder, pixel_array
from pydicom.tag import BaseTag, Tag

from cxr_backbone.data.codestreams import check_jpeg, check_jpeg_2000, decode_rle
from cxr_backbone.data.radiographs import Refusal, as_dtype, check_size
from cxr_backbone.image_processing_cxr_inception import blocks_of_rows, grey_range

NATIVE = {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
JPEG_2000 = {uid.JPEG2000Lossless, uid.JPEG2000}

# The frame headers (start-of-frame markers) that go with each kind of JPEG: baseline, extended, lossless, JPEG-LS.
JPEG = {
    uid.JPEGBaseline8Bit: {0xC0},
    uid.JPEGExtended12Bit: {0xC0, 0xC1},
    uid.JPEGLossless: {0xC3},
    uid.JPEGLosslessSV1: {0xC3},
    uid.JPEGLSLossless: {0xF7},
    uid.JPEGLSNearLossless: {0xF7},
}

# The decoders that stood up to damaged files. pydicom left to itself falls back on others, which didn't.
PLUGINS = {
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pylibjpeg",
    uid.JPEGLossless: "pylibjpeg",
    uid.JPEGLosslessSV1: "pylibjpeg",
    uid.JPEGLSLossless: "pylibjpeg",
    uid.JPEGLSNearLossless: "pylibjpeg",
    uid.JPEG2000Lossless: "pillow",
    uid.JPEG2000: "pillow",
}

PIXEL_DATA = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double, integers

# Nothing else of a header is read.
KEYWORDS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
)


def read_dicom(data: bytes, *, dtype: np.dtype, window: tuple[float, float] | None) -> np.ndarray:
    """Read the one grey frame of a DICOM file, uncompressed or as RLE, JPEG, JPEG-LS or JPEG 2000.

    Padding (PixelPaddingValue, and the range up to PixelPaddingRangeLimit) counts for no window and becomes black. Of
    several VOI windows or tables the first is taken, and a table before a window.

    Args:
        data: a whole file.
        dtype, window: as in `read_radiograph`, which calls this function.

    Returns:
        (rows, columns) of `dtype`.

    Raises:
        Refusal: the film is none that can be read, and why.
        ImportError: the decoder of its compression is not installed.
        Exception: whatever pydicom raises on a damaged header or frame; its text may quote the header.
    """
    file = io.BytesIO(data)
    header, syntax = _read_header(file)
    stored = _decode(file, header, syntax)
    signed, unsigned = stored.dtype, np.dtype(f"u{stored.dtype.itemsize}")
    stored = stored.view(unsigned)
    counts = np.zeros(2 ** (8 * unsigned.itemsize), dtype=np.int64)
    for rows in blocks_of_rows(stored.shape):
        counts += np.bincount(stored[rows].ravel(), minlength=len(counts))
    table = _levels(np.arange(len(counts)).astype(unsigned).view(signed), counts, header, syntax, dtype, window)
    film = np.empty(stored.shape, dtype)
    for rows in blocks_of_rows(stored.shape):
        film[rows] = table[stored[rows]]
    return film


def _read_header(file: io.BytesIO) -> tuple[Dataset, uid.UID]:
    """The header, checked, and the transfer syntax. `file` is left at the pixel data."""
    read_preamble(file, force=False)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    syntax = meta.get("TransferSyntaxUID")
    # Deflated is left out on purpose: it would have to be inflated before anything can be checked.
    if syntax not in {*NATIVE, *JPEG, *JPEG_2000, uid.RLELossless}:
        raise Refusal("its transfer syntax is none of uncompressed, RLE, JPEG, JPEG-LS and JPEG 2000")
    pixels = []  # tag and length of the pixel data

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in PIXEL_DATA:
            pixels.append((tag, length))
        return bool(pixels)

    tags: list[BaseTag | int] = [Tag(keyword) for keyword in KEYWORDS]
    header = read_dataset(file, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=at_pixels, specific_tags=tags)
    header.file_meta = FileMetaDataset(meta)
    for element in list(header):
        if element.is_empty:  # a blank is what anonymisers leave of a window
            del header[element.tag]
    if not pixels or pixels[0][0] != PIXEL_DATA[-1]:
        raise Refusal("it has no pixel data, or none of integers")
    _check_header(header)
    size = header.Rows * header.Columns * header.BitsAllocated // 8
    in_file = len(file.getbuffer()) - file.tell()
    if syntax in NATIVE and not (size <= pixels[0][1] < 2 * max(size, 2) and size <= in_file):
        raise Refusal("its pixel data is not as long as its rows, columns and bits ask for")
    return header, syntax


def _check_header(header: Dataset) -> None:
    check_size(int(header.Columns), int(header.Rows))
    if int(header.get("NumberOfFrames", 1)) != 1:
        raise Refusal("it holds several frames")
    if int(header.SamplesPerPixel) != 1 or header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise Refusal("it is in colour")
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    if allocated not in (8, 16) or not 8 <= stored <= allocated:
        raise Refusal(f"it stores {stored} bits a pixel in {allocated}")
    if int(header.get("HighBit", stored - 1)) != stored - 1:
        raise Refusal("its values don't stand in the low bits")


def _decode(file: io.BytesIO, header: Dataset, syntax: uid.UID) -> np.ndarray:
    """The stored values, signed or not, (rows, columns), in the byte order of this machine."""
    rows, columns, allocated = header.Rows, header.Columns, header.BitsAllocated
    if syntax in NATIVE:
        values = pixel_array(file, index=0, raw=True)
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    # An offset table is not needed for one frame, and need not be right.
    file.seek(file.tell() + 12)
    frame = get_frame(file, 0, number_of_frames=1)
    if syntax == uid.RLELossless:
        values = decode_rle(frame, rows, columns, allocated // 8)
        values = values.view("ui"[header.PixelRepresentation] + str(allocated // 8))
        values <<= allocated - header.BitsStored  # the unused bits can hold anything
        values >>= allocated - header.BitsStored
        return values
    if syntax in JPEG:
        check_jpeg(frame, rows, columns, allocated, JPEG[syntax])
    else:
        check_jpeg_2000(frame, rows, columns, allocated)
    if PLUGINS[syntax] not in get_decoder(syntax).available_plugins:
        raise ImportError(name=f"a decoder of {syntax.name} ({PLUGINS[syntax]})")
    return pixel_array(file, index=0, raw=True, decoding_plugin=PLUGINS[syntax], extended_offsets=None)


def _levels(
    stored: np.ndarray,
    counts: np.ndarray,
    header: Dataset,
    syntax: uid.UID,
    dtype: np.dtype,
    window: tuple[float, float] | None,
) -> np.ndarray:
    """The pixel that each of the `stored` values becomes; `counts` says how often the film has it."""
    padding = _is_padding(stored, header)
    counts = np.where(padding, 0, counts)
    if not counts.any():
        return np.zeros(len(stored), dtype)
    turned_over = header.PhotometricInterpretation == "MONOCHROME1"
    values = apply_modality_lut(stored.astype(np.int32), header)
    if window is not None:
        window = (100 - window[1], 100 - window[0]) if turned_over else window
        low, high = _percentiles(values, counts, window)
    elif "VOILUTSequence" in header:
        values, (low, high) = _apply_voi_lut(values, header, syntax)
    elif "WindowCenter" in header and "WindowWidth" in header:
        # The window's own black and white: what is far outside it becomes these.
        low, high = _apply_window(np.array([-1e30, 1e30]), header)
        values = _apply_window(values, header)
        if low > high:  # the rescale slope is negative; the window still rises
            low, high, values = -low, -high, -values
    else:
        low, high = grey_range(values[counts > 0])
    if not np.isfinite([low, high, *values[counts > 0]]).all():
        raise Refusal("its rescale or its window makes NaN or infinity")
    table = as_dtype(values, low, high, dtype)
    if turned_over:
        table = (255 if dtype == np.uint8 else 1) - table
    table[padding] = 0
    return table


def _is_padding(stored: np.ndarray, header: Dataset) -> np.ndarray:
    if "PixelPaddingValue" not in header:
        return np.zeros(len(stored), dtype=bool)
    ends = [int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue))]
    # Writers disagree on the sign of these tags; their bits are those of a stored value.
    mask = 2 ** (8 * stored.dtype.itemsize) - 1
    low, high = np.sort(np.array([end & mask for end in ends], dtype=f"u{stored.dtype.itemsize}").view(stored.dtype))
    return (stored >= low) & (stored <= high)


def _percentiles(values: np.ndarray, counts: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """`np.percentile` of a film, from how often it has each value."""
    order = np.argsort(values)
    up_to = np.cumsum(counts[order])
    ranks = np.asarray(window) / 100 * (up_to[-1] - 1)
    below, above = (values[order][np.searchsorted(up_to, whole(ranks), side="right")] for whole in (np.floor, np.ceil))
    return below + (above - below) * (ranks % 1)


def _apply_window(values: np.ndarray, header: Dataset) -> np.ndarray:
    try:
        return apply_windowing(values, header)
    except Exception:
        raise Refusal("its VOI window can't be applied (give a percentile `window` to do without)") from None


def _apply_voi_lut(values: np.ndarray, header: Dataset, syntax: uid.UID) -> tuple[np.ndarray, tuple[float, float]]:
    """What the first VOI table makes of values, and its black and white (PS3.3 C.11.2.1.1).

    pydicom's own function wraps around at 256 entries where a table gives 8 bits.
    """
    item = header.VOILUTSequence[0]
    num_entries, first, bits = item.LUTDescriptor
    entries = item.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, "<u2" if syntax.is_little_endian else ">u2")
    entries = np.asarray(entries, dtype=np.int64)[: num_entries or 2**16]
    index = np.clip(np.rint(values) - first, 0, len(entries) - 1).astype(np.int64)
    return entries[index], (0, 2**bits - 1)
