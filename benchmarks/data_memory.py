"""How much memory does loading take, and does it grow with the data set? Ours, and a data set held in memory.

python benchmarks/data_memory.py [--films 1000] [--image_size 128]

Each work is done on so many films and on ten times as many, in a process of its own, and the table tells by how much
the process's anonymous memory (RssAnon of /proc/self/status, so Linux only; looked at every two milliseconds) rose at
most over what it had before. Arrow files are mapped into memory: what was read of them counts as resident too, but the
kernel takes it back whenever something else wants the room, so it is left out.
"""

import argparse
import io
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.labels import make_features
from cxr_backbone.data.shards import open_stream
from cxr_backbone.data.splits import complete_splits
from cxr_backbone.data.streaming import decode_stream
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training import batches

BATCH = 32
SHARDS = 4
ROW_GROUP = 10  # films that a reader of a shard has in memory at once
NAMES = ["NORMAL", "PNEUMONIA"]
MB = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=1000, help="of the smaller set")
    parser.add_argument("--image_size", type=int, default=128, help="side of the square, in pixels")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    # A stream is shuffled in a buffer of a fixed number of films. It has to be full at both sizes.
    batches.SHUFFLE_BUFFER = min(batches.SHUFFLE_BUFFER, arguments.films // 4)

    sizes = (arguments.films, 10 * arguments.films)
    peaks: dict[str, list[int]] = {work: [] for work in WORKS}
    for films in sizes:
        with tempfile.TemporaryDirectory() as folder:
            in_a_process(write_films, Path(folder), films, arguments.image_size)
            for name, work in WORKS.items():
                peaks[name].append(in_a_process(peak_of, work, Path(folder), arguments.image_size))

    pixels = arguments.image_size**2
    rows = []
    for name, (small, large) in peaks.items():
        added = (large - small) / (sizes[1] - sizes[0])
        rows.append([name, f"{small / MB:.1f}", f"{large / MB:.1f}", f"{added:,.0f}", f"{added / pixels:.1%}"])
    few, many = (f"{films:,} films ({films * pixels / MB:,.0f} MB of pixels)" for films in sizes)
    print(f"Peak memory over what the process had before, MB; a film has {pixels:,} bytes of pixels.\n")
    print(markdown_table(["work", few, many, "bytes per added film", "share of its pixels"], rows))


def decode(folder: Path, image_size: int) -> None:
    """Files to an Arrow file."""
    decode_once(listed(folder), image_size, folder / "cache")


def train_on_decoded(folder: Path, image_size: int) -> None:
    """An epoch of batches from the Arrow file."""
    run_through(
        batches.training_loader(decode_once(listed(folder), image_size, folder / "cache"), BATCH, cpu(), seed=0)
    )


def train_on_stream(folder: Path, image_size: int) -> None:
    """A first look at all shards, what is held out decoded, and an epoch of batches from the rest."""
    stream = open_stream(str(folder / "shards"), label_columns=["label"], label_names=NAMES)
    divide = partial(complete_splits, num_folds=3, fold=0, seed=0)
    _, films = decode_stream(stream, image_size, divide, cache_dir=folder / "cache")
    run_through(batches.training_loader(films, BATCH, cpu(), seed=0))


def hold_in_memory(folder: Path, image_size: int) -> None:
    """The peer: an epoch of batches from one tensor that holds all films."""
    rows = decode_once(listed(folder), image_size, folder / "cache")
    films = torch.empty(len(rows), image_size**2, dtype=torch.uint8)
    for film, row in zip(films, rows, strict=True):
        film.copy_(torch.frombuffer(bytearray(row["pixels"]), dtype=torch.uint8))
    run_through(DataLoader(TensorDataset(films), batch_size=BATCH, shuffle=True))


Work = Callable[[Path, int], None]
WORKS: dict[str, Work] = {
    "decode once": decode,
    "an epoch of decoded films": train_on_decoded,
    "an epoch of a stream": train_on_stream,
    "peer: all films in one tensor": hold_in_memory,
}


def peak_of(work: Work, folder: Path, image_size: int) -> int:
    """By how many bytes anonymous memory rises at most while the work is done."""
    cpu()  # what it takes once is not the films'
    before = peak = anonymous_bytes()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work(folder, image_size)
    finally:
        is_done.set()
        watcher.join()
    return peak - before


def anonymous_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Forked from this one, which only imports: no work finds memory that another left behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        return process.submit(function, *arguments).result()


def write_films(folder: Path, number: int, image_size: int) -> None:
    """The same films of noise as PNG files and in Parquet shards; few images, of which each film changes four bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (16, image_size, image_size), dtype=np.uint8)
    (folder / "files").mkdir()
    (folder / "shards").mkdir()
    for shard, films in enumerate(np.array_split(np.arange(number), SHARDS)):
        rows = []
        for film in films.tolist():
            pixels = noise[film % len(noise)]
            pixels[0, :4] = np.frombuffer(film.to_bytes(4, "little"), dtype=np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG", compress_level=0)
            (folder / f"files/{film}.png").write_bytes(png.getvalue())
            image = {"bytes": png.getvalue(), "path": f"{film}.png"}
            rows.append({"image": image, "label": NAMES[film % 2], "patient_id": f"p{film}"})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"shards/train-{shard}.parquet", row_group_size=ROW_GROUP)


def listed(folder: Path) -> datasets.Dataset:
    names = sorted(path.name for path in (folder / "files").iterdir())
    columns = {
        "image": [f"{folder}/files/{name}" for name in names],
        "label": [row % 2 for row in range(len(names))],
        "patient_id": names,
        "image_id": names,
    }
    return datasets.Dataset.from_dict(columns, features=make_features(NAMES))


def cpu() -> Accelerator:
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    return Accelerator(cpu=True, dataloader_config=loaders)


def run_through(loader: Iterable[Any]) -> None:
    for _ in loader:
        pass


if __name__ == "__main__":
    main()
