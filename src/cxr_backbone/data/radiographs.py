"""One film in, grey 8-bit pixels out; and a whole data set decoded once into an Arrow file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

from cxr_backbone.image_processing_cxr_inception import to_grey_uint8

logger = logging.getLogger(__name__)

# 64 films of 299 x 299 are under 6 MB: memory stays flat however large the data set is.
FILMS_PER_BATCH = 64

# Part of every cache name. Raise it when the pixels that decode_once writes change.
CACHE_FORMAT = 1


def read_radiograph(source: str | Path | bytes) -> np.ndarray:
    """Read one radiograph as grey pixels, upright and at full size.

    A JPEG is decoded straight to its luminance, which skips the detour through RGB. Sixteen-bit and
    floating-point images are windowed by `to_grey_uint8`, never clipped. An EXIF orientation is applied.

    Args:
        source: path of an image file in any format Pillow reads, or the bytes of such a file.

    Returns:
        uint8 array (height, width), 0 black to 255 white.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file is no image or a damaged one.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), name="the given bytes")
    if not Path(source).exists():
        raise FileNotFoundError(f"There is no image file at {source}.")
    return _decode(Path(source), name=str(source))


def decode_once(dataset: datasets.Dataset, image_size: int, cache_dir: str | Path | None = None) -> datasets.Dataset:
    """Decode and resize every film of a data set, once; later calls read the result from an Arrow file.

    The resize is Pillow's bilinear resize of the grey image, the one that the image processor makes, so the
    pixels are the processor's own. The aspect ratio is not kept.

    Args:
        dataset: has an `image` column (`datasets.Image`); every other column is carried over.
        image_size: side S of the square result, in pixels.
        cache_dir: folder of the Arrow files; `cxr_backbone` in the cache of `datasets` by default. A file is
            named after everything it was made from: path, size and modification time of each film (or a hash
            of its bytes, where they are embedded), the other columns, and S.

    Returns:
        The data set without `image` and with `pixels`: S * S bytes a row, row-major. `stack_pixels` turns
        rows into an array. (Raw bytes come back ten times as fast as `datasets.Array2D`, and stay uint8.)

    Raises:
        FileNotFoundError: a film is not where the data set says.
        ValueError: no `image` column, an `image_size` below 1, or a film that can't be read, which it names.
    """
    if "image" not in dataset.column_names:
        raise ValueError(f"The data set needs a column `image`; it has {', '.join(dataset.column_names)}.")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, not {image_size}.")
    undecoded = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "cxr_backbone")
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(undecoded, image_size)
    arrow_file = folder / f"pixels-{fingerprint}.arrow"
    if arrow_file.exists():
        logger.info("Reading %d decoded films from %s", len(dataset), arrow_file)
    else:
        logger.info("Decoding %d films into %s", len(dataset), arrow_file)

    def to_pixels(batch: dict[str, list[Any]]) -> dict[str, list[bytes]]:
        return {"pixels": [_square_pixels(image, image_size) for image in batch["image"]]}

    features = datasets.Features({**undecoded.features, "pixels": datasets.Value("binary")})
    del features["image"]
    # `map` writes to a temporary file and renames it at the end: a killed run leaves no half-written cache.
    return undecoded.map(
        to_pixels,
        batched=True,
        batch_size=FILMS_PER_BATCH,
        writer_batch_size=FILMS_PER_BATCH,
        remove_columns=["image"],
        features=features,
        cache_file_name=str(arrow_file),
        load_from_cache_file=True,
        new_fingerprint=fingerprint,
        desc="Decoding films",
    )


def stack_pixels(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The films of some rows of a `decode_once` data set as one array; made for a DataLoader's `collate_fn`.

    Args:
        rows: at least one row, as `[dataset[i] for i in indices]` or `dataset.__getitems__(indices)` gives.

    Returns:
        uint8 array (len(rows), S, S), the caller's own copy.
    """
    side = math.isqrt(len(rows[0]["pixels"]))
    joined = bytearray().join(row["pixels"] for row in rows)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(rows), side, side)


def _decode(file: Path | io.BytesIO, name: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            # JPEG only, a no-op for all other formats. No size is given, so nothing is scaled down.
            image.draft("L", None)
            return to_grey_uint8(ImageOps.exif_transpose(image))
    except Exception as reason:  # Pillow raises a dozen kinds on damaged files, struct.error among them
        raise ValueError(
            f"Can't read {name} as an image: {reason}. Expected a whole file of a format that Pillow reads."
        ) from reason


def _square_pixels(image: Mapping[str, Any], image_size: int) -> bytes:
    """`image` is what `datasets.Image(decode=False)` gives: a path, or bytes with the file's name as path."""
    if image["bytes"] is None:
        grey = read_radiograph(image["path"])
    else:
        grey = _decode(io.BytesIO(image["bytes"]), name=image["path"] or "an embedded image without a name")
    square = Image.fromarray(grey).resize((image_size, image_size), resample=Image.Resampling.BILINEAR)
    return square.tobytes()


def _fingerprint(undecoded: datasets.Dataset, image_size: int) -> str:
    digest = hashlib.sha256(f"{CACHE_FORMAT} {image_size} {undecoded.features}".encode())
    for row, columns in enumerate(undecoded):
        image = columns.pop("image")
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError(f"Row {row} of the data set has no image; expected a path or a file's bytes.")
        digest.update(repr(image["path"]).encode())
        if image["bytes"] is not None:
            digest.update(hashlib.sha256(image["bytes"]).digest())
        else:
            try:
                status = Path(image["path"]).stat()
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"There is no image file at {image['path']} (row {row} of the data set)."
                ) from None
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        digest.update(json.dumps(columns, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:32]
