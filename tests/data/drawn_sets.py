"""Decoded data sets from arrays of pixels or from files, for the tests of the audit."""

import io

import datasets
import numpy as np
from PIL import Image

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.synthetic import draw_phantom

NAMES = ("NORMAL", "PNEUMONIA")


def decoded(films, *, labels=None, patients=None, ids=None, names=NAMES, multi_label=False):
    """What `decode_once` makes of films, each a uint8 or uint16 array, or the path of a file.

    By default the labels alternate, each film has a patient of its own, and films are called film0, film1, ...
    """
    columns = {
        "image": [png(film) if isinstance(film, np.ndarray) else film for film in films],
        "label": [row % 2 for row in range(len(films))] if labels is None else labels,
        "patient_id": [f"patient{row}" for row in range(len(films))] if patients is None else patients,
        "image_id": [f"film{row}" for row in range(len(films))] if ids is None else ids,
    }
    features = make_features(names, multi_label=multi_label)
    return decode_once(datasets.Dataset.from_dict(columns, features=features), 32)


def phantoms(first, number):
    """Different drawn films."""
    return [draw_phantom(seed, opacity=bool(seed % 2), image_size=96) for seed in range(first, first + number)]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)  # quick
    return file.getvalue()


def jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))
