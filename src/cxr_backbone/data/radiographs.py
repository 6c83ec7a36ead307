"""One film in, grey pixels out: whatever the film is stored in, and within bounds whatever the file says."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import SAMPLEFORMAT, TILELENGTH, TILEWIDTH, TiffImageFile

from cxr_backbone.image_processing_cxr_inception import blocks_of_rows, grey_range, grey_values, to_levels

# The largest detectors and film scanners stay below both. A film of this size is read within a gigabyte of memory.
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 256 * 2**20

# Of Pillow's formats: no other is common for films, and some of them start other programs or run scripts.
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP")

DICOM_PREFIX_AT = 128


class Refusal(Exception):
    """Why a film can't be read, without its name: one clause that quotes nothing of a DICOM header."""


def read_radiograph(
    source: str | Path | bytes,
    *,
    dtype: npt.DTypeLike = np.uint8,
    window: tuple[float, float] | None = None,
    reduce_to: int | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Read one radiograph as grey pixels, upright and at full size; bones are white.

    Args:
        source: path of a file, or its bytes: JPEG, PNG, TIFF or BMP of 8 bits (colour becomes luma), PNG or TIFF of 16
            bits, TIFF of 32 bits (integer or float), or DICOM (see `cxr_backbone.data.dicom`). What is transparent
            becomes black; TIFF and DICOM in which 0 is white are turned over.
        dtype: uint8, 0 black to 255 white; or float32, 0 to 1, at the full depth of the file.
        window: what becomes black and white. None: the film's own window, which is DICOM's VOI window or table where it
            has one, 8-bit values as they are, and the minimum and maximum of anything deeper (`to_grey_uint8`). Two
            percentiles, as in (0.5, 99.5): these of the film's own values, in place of its own window.
        reduce_to: a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, the smallest whose sides are both at least
            this many pixels: faster, and close to what a resize gives. Nothing else is reduced.
        name: what an error calls the film; the path, or "the given bytes", by default.

    Returns:
        (height, width) of `dtype`, the caller's own.

    Raises:
        FileNotFoundError: there is no file at the path.
        ImportError: the film is DICOM, and the extra `dicom` is not installed.
        ValueError: the file is no film, is damaged, has several pages or frames, has more than MAX_PIXELS pixels or
            MAX_FILE_BYTES bytes, or keeps more of its depth than can be read; or an argument makes no sense.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.uint8, np.float32):
        raise ValueError(f"dtype must be uint8 or float32, not {dtype}.")
    if window is not None and not (len(window) == 2 and 0 <= window[0] < window[1] <= 100):
        raise ValueError(f"window must be two rising percentiles between 0 and 100, as in (0.5, 99.5), not {window}.")
    if reduce_to is not None and reduce_to < 1:
        raise ValueError(f"reduce_to must be at least 1 pixel, not {reduce_to}.")
    name = name or ("the given bytes" if isinstance(source, bytes) else str(source))
    kind, expected = "an image", f"a whole file of one of {', '.join(IMAGE_FORMATS)} and DICOM"
    try:
        with _open(source) as file, _silence:
            is_dicom = file.read(DICOM_PREFIX_AT + 4)[DICOM_PREFIX_AT:] == b"DICM"
            file.seek(0)
            if not is_dicom:
                return _read_image(file, dtype, window, reduce_to)
            kind, expected = "a DICOM film", "one grey frame of 8 to 16 bits"
            return _read_dicom(file.read(), dtype, window)
    except (FileNotFoundError, ImportError):
        raise
    except Refusal as refusal:
        reason = str(refusal)
    except Exception as error:  # Pillow and pydicom raise a dozen kinds on damaged files, struct.error among them
        # pydicom quotes what it can't parse, and that may be a patient's name.
        reason = "it is damaged" if kind == "a DICOM film" or not str(error) else str(error)
    # Raised out here, the error drags no library's traceback along, nor the header that one may quote.
    raise ValueError(f"Can't read {name} as {kind}: {reason.rstrip('.')}. Expected {expected}.")


def check_size(width: int, height: int) -> None:
    """Refuse, from the header alone, what would be too large or empty once decoded."""
    if width < 1 or height < 1:
        raise Refusal(f"its header tells of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise Refusal(f"its {width} x {height} pixels are more than {MAX_PIXELS:,}")


def _open(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"There is no image file at {source}.")
        if not path.is_file():
            raise Refusal("it is a folder" if path.is_dir() else "it is no regular file")
        size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise Refusal(f"its {size:,} bytes are more than {MAX_FILE_BYTES:,}")
    return io.BytesIO(source) if isinstance(source, bytes) else path.open("rb")


def _read_image(
    file: BinaryIO, dtype: np.dtype, window: tuple[float, float] | None, reduce_to: int | None
) -> np.ndarray:
    try:
        image = Image.open(file, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher unless someone has lowered it
        raise Refusal(f"its pixels are more than {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise Refusal(
            "it is none of the formats below, a variant that Pillow does not read, or its header is damaged"
        ) from None
    with closing(image):  # frees its pixels too, which `with image` does not
        _check_header(image)
        # JPEG only, a no-op for all other formats: straight to luma, without the detour through RGB.
        image.draft("L", None if reduce_to is None else (reduce_to, reduce_to))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "L" and not image.has_transparency_data and dtype == np.uint8 and window is None:
            return _pixels_as_they_are(image)
        values = grey_values(image)
    if not np.isfinite([values.min(), values.max()]).all():
        raise Refusal("it holds NaN or infinity")
    low, high = grey_range(values) if window is None else np.percentile(values, window)
    film = np.empty(values.shape, dtype)
    for rows in blocks_of_rows(values.shape):
        film[rows] = as_dtype(values[rows], low, high, dtype)
    return film


def _pixels_as_they_are(image: Image.Image) -> np.ndarray:
    """`np.array(image)` in half the time, where Pillow keeps the pixels in one block, as it does up to 16 MB."""
    try:
        block = pyarrow.array(image)
    except ValueError:
        return np.array(image)
    return block.to_numpy().reshape(image.height, image.width).copy()


def as_dtype(values: np.ndarray, low: float, high: float, dtype: np.dtype) -> np.ndarray:
    """Grey values as levels from `low` to `high`: rounded to 0 to 255 as uint8, or 0 to 1 as float32."""
    if dtype == np.uint8:
        return np.rint(to_levels(values, low, high, white=255)).astype(np.uint8)
    return to_levels(values, low, high, white=1).astype(np.float32)


def _check_header(image: ImageFile.ImageFile) -> None:
    check_size(*image.size)
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: the film, and its previews after it
        raise Refusal("it holds several pages or frames")
    deep = image.mode.startswith(("I", "F"))
    if not deep and any(";16" in str(tile[3]) for tile in image.tile):
        raise Refusal("it has 16 bits a channel in colour or with opacity, of which Pillow reads 8")
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if not deep and 2 in tags.get(SAMPLEFORMAT, ()):
            raise Refusal("it has signed 8-bit values, which Pillow reads as unsigned")
        if tags.get(TILEWIDTH, 0) * tags.get(TILELENGTH, 0) > MAX_PIXELS:
            raise Refusal(f"one of its tiles has more than {MAX_PIXELS:,} pixels")


def _read_dicom(data: bytes, dtype: np.dtype, window: tuple[float, float] | None) -> np.ndarray:
    try:
        from cxr_backbone.data.dicom import read_dicom

        return read_dicom(data, dtype=dtype, window=window)
    except ImportError as missing:
        raise ImportError(f"DICOM needs {missing.name}: pip install 'cxr-backbone[dicom]'.") from missing


class _Silence:
    """While any thread reads, warnings and the logs of Pillow and pydicom are off: they can quote a header.

    `warnings.catch_warnings` alone is not made for threads: two that overlap leave warnings off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._pillow = logging.getLogger("PIL")
        for name in ("pydicom", "pydicom.pixels.utils", "pydicom.pixels.decoders.base"):  # those that it logs with
            logging.getLogger(name).addFilter(lambda record: self._readers == 0)

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                # Pillow has many loggers, which a level reaches and a filter does not. It quotes tags at DEBUG alone;
                # a change of level clears the caches of all loggers there are, which takes longer than a small film.
                self._level = self._pillow.level
                self._is_loud = self._pillow.isEnabledFor(logging.DEBUG)
                if self._is_loud:
                    self._pillow.setLevel(logging.CRITICAL + 1)
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                self._warnings.__exit__(None, None, None)
                if self._is_loud:
                    self._pillow.setLevel(self._level)


_silence = _Silence()
