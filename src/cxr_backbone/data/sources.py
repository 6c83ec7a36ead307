"""One door to all sources: the name of a format, and the loader behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import datasets

from cxr_backbone.data.chestxray14 import load_chestxray14
from cxr_backbone.data.imagefolder import load_imagefolder
from cxr_backbone.data.kermany import load_kermany
from cxr_backbone.data.pneumoniamnist import load_pneumoniamnist
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.data.table import load_table

LOADERS: dict[str, Callable[..., datasets.DatasetDict]] = {
    "kermany": load_kermany,
    "chestxray14": load_chestxray14,
    "pneumoniamnist": load_pneumoniamnist,
    "table": load_table,
    "imagefolder": load_imagefolder,
    "synthetic": load_synthetic,
}


FOR_EVERY_LOADER = ("seed", "image_size", "carve")  # no options of the data, but of what it is loaded for


def load_films(format: str, *, seed: int, image_size: int, carve: bool = True, **options: Any) -> datasets.DatasetDict:
    """Train, validation and test of a source, with the columns of `labels.make_features`. No film is decoded.

    Args:
        format: a key of `LOADERS`.
        seed, image_size, carve: for the loaders that split or draw.
        options: the other arguments of the loader; `source` first of all.

    Raises:
        ValueError: as `check_options`, or whatever the loader refuses.
        FileNotFoundError: as the loader.
    """
    loader = LOADERS[format]
    check_options(loader, options, f"data.format={format}")
    known = inspect.signature(loader).parameters
    of_every = {"seed": seed, "image_size": image_size, "carve": carve}
    options |= {name: value for name, value in of_every.items() if name in known}
    return loader(**options)


def check_options(loader: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Refuse an option that a loader doesn't have; left alone, it would be a mistake that nobody notices.

    Raises:
        ValueError: it names the option and those that there are.
    """
    known = {name: it for name, it in inspect.signature(loader).parameters.items() if name not in FOR_EVERY_LOADER}
    if unknown := sorted(options.keys() - known.keys()):
        raise ValueError(f"data.{unknown[0]} means nothing to {what}; it takes {', '.join(known)}.")
    required = [name for name, option in known.items() if option.default is option.empty]
    if lacking := [name for name in required if name not in options]:
        raise ValueError(f"{what} needs data.{lacking[0]}.")
