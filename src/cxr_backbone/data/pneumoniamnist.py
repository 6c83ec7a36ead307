"""PneumoniaMNIST of MedMNIST v2 (Yang et al., Scientific Data 2023)."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from cxr_backbone.data.labels import make_features

logger = logging.getLogger(__name__)

LABELS = ["NORMAL", "PNEUMONIA"]
NAME_IN_FILE = {"train": "train", "validation": "val", "test": "test"}
SIZES = (28, 64, 128, 224)
PUBLISHED_COUNTS = {"train": 4708, "validation": 524, "test": 624}
# The largest published file, 5,856 films of 224 x 224, has 0.3 GB of pixels.
MAX_BYTES = 1 << 30


def load_pneumoniamnist(source: str | Path) -> datasets.DatasetDict:
    """Load PneumoniaMNIST from the file that MedMNIST publishes, with its official splits.

    5,856 films, CC BY 4.0 (https://medmnist.com). They are the films of the Kermany set, cropped to a square and
    resized: never take it for an external test of a model that was trained on that set. And the file has no patients:
    its validation split was drawn from Kermany's train without regard to them, so a child may stand on both sides.

    Args:
        source: `pneumoniamnist.npz`, or `pneumoniamnist_64.npz`, `_128` or `_224`, of the films' side in pixels.

    Returns:
        Splits train, validation and test with the columns of `make_features`: the image as PNG bytes (lossless),
        label (NORMAL 0, PNEUMONIA 1), patient_id (null), image_id (`train/17`: split, and row in the file).
        They are written to the cache of `datasets`, a film at a time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of that kind: other keys, shapes, types or labels.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    labels = _read_labels(path)
    for split, values in labels.items():
        if len(values) != PUBLISHED_COUNTS[split]:
            published = PUBLISHED_COUNTS[split]
            logger.warning("%s has %d films in %s; PneumoniaMNIST has %d.", path, len(values), split, published)
    status = path.stat()
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_generator(
                _films,
                features=make_features(LABELS),
                # What the cached result is named after; a changed file has another size or time.
                gen_kwargs={
                    "path": str(path.absolute()),
                    "split": split,
                    "state": f"{status.st_size} {status.st_mtime_ns}",
                },
                split=split,
            )
            for split in NAME_IN_FILE
        }
    )


def _read_labels(path: Path) -> dict[str, np.ndarray]:
    """The labels of each split, after a check of everything in the file."""
    expected = {f"{name}_{kind}" for name in NAME_IN_FILE.values() for kind in ("images", "labels")}
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no npz file.")
    labels, sides = {}, set()
    try:
        with np.load(path, allow_pickle=False) as file:
            if set(file.files) != expected:
                raise ValueError(f"it has the arrays {sorted(file.files)}, expected {sorted(expected)}")
            if (size := sum(entry.file_size for entry in file.zip.infolist())) > MAX_BYTES:
                raise ValueError(f"its arrays take {size} bytes, expected at most {MAX_BYTES}")
            for split, name in NAME_IN_FILE.items():
                images, labels[split] = file[f"{name}_images"], file[f"{name}_labels"]
                _check_split(name, images, labels[split])
                sides.add(images.shape[1])
        if len(sides) > 1:
            raise ValueError(f"its films have sides of {sorted(sides)} pixels, expected one size")
    except Exception as reason:  # damaged files raise half a dozen kinds
        raise ValueError(f"{path} is no PneumoniaMNIST file: {reason}.") from reason
    return labels


def _check_split(name: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"{name}_images is {images.dtype} {images.shape}, expected uint8 (films, side, side)")
    if len(images) == 0:
        raise ValueError(f"{name}_images has no films")
    if images.shape[1] not in SIZES:
        raise ValueError(f"{name}_images has a side of {images.shape[1]} pixels, expected one of {SIZES}")
    if labels.shape != (len(images), 1) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}_labels is {labels.dtype} {labels.shape}, expected integers ({len(images)}, 1)")
    if unknown := set(labels.ravel().tolist()) - set(range(len(LABELS))):
        raise ValueError(f"{name}_labels has {min(unknown)}, expected 0 ({LABELS[0]}) and 1 ({LABELS[1]})")


def _films(path: str, split: str, state: str) -> Iterator[dict[str, Any]]:
    """The rows of one split. `state` does nothing here, see the call."""
    name = NAME_IN_FILE[split]
    with np.load(path, allow_pickle=False) as file:
        images, labels = file[f"{name}_images"], file[f"{name}_labels"]
    for row, (pixels, label) in enumerate(zip(images, labels[:, 0].tolist(), strict=True)):
        image_id, png = f"{split}/{row}", io.BytesIO()
        Image.fromarray(pixels).save(png, format="PNG", compress_level=1)  # the cache is no archive
        yield {
            "image": {"bytes": png.getvalue(), "path": f"{image_id}.png"},
            "label": label,
            "patient_id": None,
            "image_id": image_id,
        }
