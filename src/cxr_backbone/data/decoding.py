"""A data set of films, decoded once into Arrow files."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from cxr_backbone.data.facts import FILM_FEATURES, film_facts
from cxr_backbone.data.radiographs import read_radiograph

logger = logging.getLogger(__name__)

# 64 films of 299 x 299 are under 7 MB: memory stays flat however large the data set is.
FILMS_PER_BATCH = 64

# Part of every cache name. Raise it when what decode_once writes changes.
CACHE_FORMAT = 2

# How many films an error names.
NAMED_FILMS = 10


def decode_once(
    dataset: datasets.Dataset,
    image_size: int,
    cache_dir: str | Path | None = None,
    *,
    reduced: bool = False,
    on_unreadable: Callable[[str, str], None] | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Decode and resize every film of a data set, once; later calls read the result from Arrow files.

    The resize is Pillow's bilinear resize of the grey image, the one that the image processor makes, so the
    pixels are the processor's own. The aspect ratio is not kept.

    All films are tried before an unreadable one is an error, and the others stay in the cache: a second call, with
    `on_unreadable` say, decodes nothing again.

    Args:
        dataset: has an `image` column (`datasets.Image`); every other column is carried over.
        image_size: side S of the square result, in pixels.
        cache_dir: folder of the Arrow files; `cxr_backbone` in the cache of `datasets` by default. A file is
            named after everything it was made from: path, size and modification time of each film (or a hash
            of its bytes, where they are embedded), the other columns, S and `reduced`.
        reduced: decode JPEG files at a half, a quarter or an eighth of their size, whichever is the smallest that
            covers S x S. Faster, but the pixels are not exactly those of the image processor any more.
        on_unreadable: called with path and reason for each film that can't be read, at every call, from the cache
            too; the film is left out. By default such a film is an error.
        num_proc: how many processes decode; by default this one does. The result is the same.

    Returns:
        The data set without `image` and with two more columns. `pixels`: S * S bytes a row, row-major; `stack_pixels`
        turns rows into an array. (Raw bytes come back ten times as fast as `datasets.Array2D`, and stay uint8.)
        `film`: see `decode_film`.

    Raises:
        ValueError: no `image` column, no rows, a column with a name that this function needs, an `image_size` below
            1; films that can't be read, of which it names the first ten; or not one film that can, whatever
            `on_unreadable` is.
    """
    _check(dataset, image_size)
    undecoded = dataset.with_format(None).cast_column("image", datasets.Image(decode=False))
    folder = cache_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(undecoded, image_size, reduced)
    is_cached = any(folder.glob(f"pixels-{fingerprint}*.arrow"))  # several processes write a file each
    logger.info("%s %d films: %s", "Reading decoded" if is_cached else "Decoding", len(dataset), folder)

    new_columns = {"pixels": datasets.Value("binary"), "film": FILM_FEATURES, "error": datasets.Value("string")}
    features = datasets.Features({**undecoded.features, **new_columns})
    del features["image"]
    # `map` writes to a temporary file and renames it at the end: a killed run leaves no half-written cache. It finds
    # the files of an earlier call whatever `num_proc` was then.
    decoded = undecoded.map(
        _decode_batch,
        with_indices=True,
        fn_kwargs={"image_size": image_size, "reduced": reduced},
        batched=True,
        batch_size=FILMS_PER_BATCH,
        writer_batch_size=FILMS_PER_BATCH,
        remove_columns=["image"],
        features=features,
        cache_file_name=str(folder / f"pixels-{fingerprint}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=fingerprint,
        num_proc=num_proc and min(num_proc, len(undecoded)),
        desc="Decoding films",
    )

    def name_of(row: int) -> str:
        columns = undecoded[row]
        return _film_name(columns["image"], columns.get("image_id"), row)

    return leave_out_unreadable(decoded, name_of, on_unreadable)


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Where decoded films are kept: `cache_dir`, or `cxr_backbone` in the cache of `datasets`."""
    return Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "cxr_backbone")


def leave_out_unreadable(
    decoded: datasets.Dataset, name_of: Callable[[int], str], on_unreadable: Callable[[str, str], None] | None
) -> datasets.Dataset:
    """The rows without an `error`, and without that column.

    Args:
        name_of: what a film is called, by its row.
        on_unreadable: as in `decode_once`.

    Raises:
        ValueError: rows with an error and no `on_unreadable`, or no row without one.
    """
    reasons = {row: reason for row, reason in enumerate(decoded["error"][:]) if reason is not None}
    decoded = decoded.remove_columns("error")
    if not reasons:
        return decoded
    if on_unreadable is None or len(reasons) == len(decoded):
        raise ValueError(_unreadable_message(list(reasons.values()), len(decoded)))
    for row, reason in reasons.items():
        on_unreadable(name_of(row), reason)
    return decoded.select([row for row in range(len(decoded)) if row not in reasons])


def decode_film(
    image: Mapping[str, Any] | None, image_size: int, *, reduced: bool = False, name: str | None = None
) -> dict[str, Any]:
    """What `decode_once` does with one film.

    Args:
        image: what `datasets.Image(decode=False)` gives: `path`, and `bytes` where the file is embedded.
        image_size, reduced: as in `decode_once`.
        name: what an error calls an embedded film; by default its path, if it has one.

    Returns:
        pixels: S * S bytes, row-major uint8.
        film: the facts about the film that `facts.film_facts` lists. If the film was reduced, height, width and
            file_bytes are still those of the file, and the rest is measured on the reduced film.

    Raises:
        FileNotFoundError: there is no file at the path.
        ValueError: the file is no film that `read_radiograph` reads, or there is neither path nor bytes.
    """
    path, content = (image["path"], image["bytes"]) if image is not None else (None, None)
    source = path if content is None else content
    if source is None:
        raise ValueError(f"There is no image in {name or 'the row'}; expected a path or the bytes of a file.")
    called = path if content is None else name or path
    grey = read_radiograph(source, reduce_to=image_size if reduced else None, name=called)
    height, width = _native_size(source, grey) if reduced else grey.shape
    file_bytes = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    facts = film_facts(grey, native_size=(height, width), file_bytes=file_bytes)
    square = Image.fromarray(grey).resize((image_size, image_size), resample=Image.Resampling.BILINEAR)
    return {"pixels": square.tobytes(), "film": facts}


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


def _check(dataset: datasets.Dataset, image_size: int) -> None:
    if "image" not in dataset.column_names:
        raise ValueError(f"The data set needs a column `image`; it has {', '.join(dataset.column_names)}.")
    if not len(dataset):
        raise ValueError("The data set has no rows; expected at least one film.")
    if taken := {"pixels", "film", "error"}.intersection(dataset.column_names):
        raise ValueError(f"The data set has a column {min(taken)} already; rename it, decoding writes one.")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, not {image_size}.")


def _decode_batch(
    batch: Mapping[str, Any], rows: Sequence[int], image_size: int, reduced: bool
) -> dict[str, list[Any]]:
    decoded: dict[str, list[Any]] = {"pixels": [], "film": [], "error": []}
    image_ids = batch.get("image_id") or [None] * len(rows)
    for row, image, image_id in zip(rows, batch["image"], image_ids, strict=True):
        film: dict[str, Any] = {"pixels": None, "film": None, "error": None}
        try:
            film |= decode_film(image, image_size, reduced=reduced, name=_film_name(image, image_id, row))
        except (FileNotFoundError, ValueError) as reason:
            film["error"] = str(reason)
        for column, values in decoded.items():
            values.append(film[column])
    return decoded


def _film_name(image: Mapping[str, Any] | None, image_id: str | None, row: int) -> str:
    """The path of a file; of an embedded film its image_id, since paths that are kept with bytes need not be unique."""
    path = image["path"] if image else None
    is_embedded = bool(image and image["bytes"] is not None)
    return (image_id if is_embedded else None) or path or image_id or f"row {row} of the data set"


def _unreadable_message(reasons: list[str], total: int) -> str:
    named = "".join(f"\n- {reason}" for reason in reasons[:NAMED_FILMS])
    rest = f"\n- and {len(reasons) - NAMED_FILMS} more" if len(reasons) > NAMED_FILMS else ""
    return f"{len(reasons)} of {total} films can't be read; repair them, or take them out of the data set:{named}{rest}"


def _native_size(source: str | bytes, grey: np.ndarray) -> tuple[int, ...]:
    """Height and width of a film before it was reduced, which only a JPEG is; its header tells."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=["JPEG"]) as image:
            is_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if is_on_its_side else image.size[::-1]
    except UnidentifiedImageError:
        return grey.shape


def _fingerprint(undecoded: datasets.Dataset, image_size: int, reduced: bool) -> str:
    digest = hashlib.sha256(f"{CACHE_FORMAT} {image_size} {reduced} {undecoded.features}".encode())
    for columns in undecoded:
        image = columns.pop("image") or {"bytes": None, "path": None}
        digest.update(repr(image["path"]).encode())
        if image["bytes"] is not None:
            digest.update(hashlib.sha256(image["bytes"]).digest())
        elif image["path"] is not None:
            try:
                status = Path(image["path"]).stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            except (OSError, ValueError):  # no file, or no name that a file can have
                digest.update(b"missing")
        digest.update(json.dumps(columns, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:32]
