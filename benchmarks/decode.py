"""How long does a full-size JPEG take to become a small square, and what does the faster way cost? Ours and others'.

python benchmarks/decode.py ../shared/data/kermany-originals [--image_size 299] [--repetitions 7]

One thread; the ways take turns at each film, so that other work on the machine slows all of them alike. "Plain" is what
most training code does: open, convert to RGB, resize. A ratio compares two ways within one repetition. Differences are
in grey levels (0 to 255), against the plain result turned to grey.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from timing import machine, spread
from transformers import ViTImageProcessorPil

from cxr_backbone.data.decoding import decode_film
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.evaluation.report import markdown_table

Way = Callable[[Path], Image.Image | np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="full-size JPEG files, in folders of any depth")
    parser.add_argument("--image_size", type=int, default=299, help="side of the square, in pixels")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"no JPEG file in {arguments.folder}")

    ways = make_ways(arguments.image_size)
    squares = {name: [as_grey(way(path)) for path in paths] for name, way in ways.items()}  # warms up, too
    seconds = {name: np.zeros(arguments.repetitions) for name in ways}
    for repetition in range(arguments.repetitions):
        for path in paths:
            for name, way in ways.items():
                start = time.perf_counter()
                way(path)
                seconds[name][repetition] += (time.perf_counter() - start) / len(paths)

    rows = []
    for name in ways:
        difference = np.abs(np.array(squares[name], dtype=int) - np.array(squares["plain"], dtype=int))
        ratio = seconds["plain"] / seconds[name]
        rows.append(
            [name, spread(seconds[name] * 1000), spread(ratio), f"{difference.mean():.3f}", f"{difference.max()}"]
        )
    print(f"{len(paths)} films to {arguments.image_size} x {arguments.image_size}; ", end="")
    print(f"median (interquartile range) of {arguments.repetitions} repetitions:\n")
    print(markdown_table(["way", "ms a film", "times as fast as plain", "mean difference", "largest"], rows))
    same = sum(np.array_equal(read_radiograph(path), grey_pixels(path)) for path in paths)
    print(f'\nAt full size, the pixels of read_radiograph are those of convert("L") in {same} of {len(paths)} films.')
    print(machine("pillow", "transformers", "datasets"))


def make_ways(image_size: int) -> dict[str, Way]:
    """Each way: from the path of a film to the square; the peer that the others are compared with comes first."""
    size = (image_size, image_size)
    processor = ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    image_column = datasets.Image()

    def plain(path):
        with Image.open(path) as image:
            return image.convert("RGB").resize(size, resample=Image.Resampling.BILINEAR)

    def ours_exact(path):
        return Image.fromarray(read_radiograph(path)).resize(size, resample=Image.Resampling.BILINEAR)

    def ours_reduced(path):
        grey = read_radiograph(path, reduce_to=image_size)
        return Image.fromarray(grey).resize(size, resample=Image.Resampling.BILINEAR)

    def ours_with_facts(path):
        film = decode_film({"path": str(path), "bytes": None}, image_size)
        return np.frombuffer(film["pixels"], np.uint8).reshape(size)

    def ours_reduced_with_facts(path):
        film = decode_film({"path": str(path), "bytes": None}, image_size, reduced=True)
        return np.frombuffer(film["pixels"], np.uint8).reshape(size)

    def datasets_image(path):
        image = image_column.decode_example({"path": str(path), "bytes": None})
        return image.convert("RGB").resize(size, resample=Image.Resampling.BILINEAR)

    def vit_processor(path):
        with Image.open(path) as image:
            return processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]

    return {
        "plain": plain,
        "ours, exact": ours_exact,
        "ours, exact, with facts": ours_with_facts,
        "ours, reduced": ours_reduced,
        "ours, reduced, with facts": ours_reduced_with_facts,
        "datasets.Image": datasets_image,
        "ViT image processor": vit_processor,
    }


def as_grey(square: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 (size, size), from any way's result."""
    if isinstance(square, np.ndarray) and square.dtype != np.uint8:  # the ViT processor's: (3, size, size) in [-1, 1]
        square = np.rint((square.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    return np.asarray((Image.fromarray(square) if isinstance(square, np.ndarray) else square).convert("L"))


def grey_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


if __name__ == "__main__":
    main()
