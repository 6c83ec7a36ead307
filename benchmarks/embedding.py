"""What does embedding films cost beyond the network itself? `cxr_backbone.embeddings.embed`, from files to Parquet.

python benchmarks/embedding.py path/to/films [--films 512] [--repetitions 3] [--threads 2]

The peer is the same folded network on batches of the same size that lie ready in memory: no program that embeds films
can be faster. Files are read again where there are fewer than --films.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from timing import interleaved, machine, ratio, spread

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.embeddings import NamedFilms, embed, find_films
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.hardware import choose_precision, inference_copy

BATCH_SIZE = 32
PEER = "the network alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="films, in folders of any depth")
    parser.add_argument("--films", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth_multiplier", type=float, default=1.0, help="a narrower network, to try the script out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = find_films(given.folder)
    paths = list(itertools.islice(itertools.cycle(found.paths), given.films))
    films = NamedFilms([str(number) for number in range(given.films)], paths)

    accelerator = Accelerator(cpu=True, mixed_precision=choose_precision("auto"))
    config = CXRInceptionConfig(depth_multiplier=given.depth_multiplier)
    model = CXRInceptionForImageClassification(config).eval()
    image_processor = CXRInceptionImageProcessor(size={"height": config.image_size, "width": config.image_size})
    backbone = inference_copy(model.cxr_inception, accelerator)

    def network_alone() -> None:
        batch = torch.rand(BATCH_SIZE, 1, config.image_size, config.image_size)
        with torch.no_grad(), accelerator.autocast():
            for first in range(0, given.films, BATCH_SIZE):
                backbone(batch[: given.films - first])

    def embedded(num_workers: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            embed(model, image_processor, films, folder, accelerator, batch_size=BATCH_SIZE, num_workers=num_workers)

    ways = {PEER: network_alone, "embed()": lambda: embedded(0), "embed(num_workers=1)": lambda: embedded(1)}
    seconds = interleaved(ways, given.repetitions)
    rows = [[name, spread(given.films / seconds[name]), ratio(seconds, name, PEER)] for name in seconds]
    print(f"{given.films} films, {accelerator.mixed_precision}, {given.threads} thread(s); ", end="")
    print(f"median (interquartile range) of {given.repetitions} repetitions:\n")
    print(markdown_table(["way", "films a second", "times as fast"], rows))
    print(f"\n{machine('torch', 'transformers', 'pillow', 'pyarrow')}")


if __name__ == "__main__":
    main()
