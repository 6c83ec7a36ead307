"""Embeddings and scores of any number of X-rays, in Parquet files.

    python recipes/embed.py --model runs/sample/fine_tuned --films path/to/films --output_dir embeddings

--model is a folder or a Hub id; --films a folder, searched to the bottom, or a table (CSV, JSON lines, Parquet) whose
column --image_column has paths. Columns of the result: id, embedding (2,048 numbers), and a score for each label.
Stopped at any moment, the same command goes on; several processes share the films out among themselves:

    torchrun --nproc_per_node 2 recipes/embed.py …
"""

import argparse
import csv
import logging
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import disable_progress_bar

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.embeddings import embed, find_films
from cxr_backbone.training.hardware import choose_precision, join_processes, use_threads
from cxr_backbone.weights import open_checkpoint


def main() -> None:
    given = parse_command_line()
    disable_progress_bar()  # of loading
    try:
        join_processes()
        use_threads(None)
        accelerator = Accelerator(mixed_precision=choose_precision(given.precision))
        model, image_processor = open_checkpoint(given.model, CXRInceptionForImageClassification)
        films = find_films(given.films, given.image_column)
        unreadable = embed(
            model,
            image_processor,
            films,
            given.output_dir,
            accelerator,
            batch_size=given.batch_size,
            num_workers=given.num_workers,
        )
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"embed.py: {' '.join(str(error).split())}")
    unreadable = gather_object(list(unreadable.items()))
    if not accelerator.is_main_process:
        return
    print(f"{len(films.ids) - len(unreadable)} of {len(films.ids)} films are in {given.output_dir}.")
    if unreadable:
        listed = Path(given.output_dir) / "unreadable.csv"
        with listed.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "reason"), *unreadable])
        film, reason = unreadable[0]
        sys.exit(f"embed.py: {len(unreadable)} films can't be read, all in {listed}; {film}: {reason}")


def parse_command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--films", required=True, help="folder or table")
    parser.add_argument("--image_column", default="image", help="of a table: paths, relative to its folder (image)")
    parser.add_argument("--output_dir", required=True, help="new, empty, or of this command when it was stopped")
    parser.add_argument("--precision", default="auto", help="no (float32), bf16, fp16 or auto")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode ahead, each")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
