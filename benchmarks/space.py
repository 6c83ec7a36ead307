"""How soon does the page of `space/` answer, where does the time go, and does its memory stay as it is?

python benchmarks/space.py path/to/films [--uploads 200]

The page is started as a user starts it, in a process of its own, and asked over HTTP through gradio_client: upload,
answer. Memory is what the operating system counts for it (RSS) after some uploads and after all. The parts of an answer
are timed in this process; what is left of an answer's time is HTTP and the queue.
"""

import argparse
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from gradio_client import Client, handle_file
from timing import interleaved, machine, spread

from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.embeddings import find_films
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.evaluation.saliency import grad_cam
from cxr_backbone.guard import guarded_pipeline

ROOT = Path(__file__).parents[1]
WARM = 10  # uploads, before memory is looked at for the first time
REPETITIONS = 9  # of the parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="films, in folders of any depth")
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cxr-inception"))
    parser.add_argument("--uploads", type=int, default=200)
    given = parser.parse_args()
    films = [Path(path) for path in find_films(given.folder).paths]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.perf_counter()
    page = subprocess.Popen([sys.executable, ROOT / "space/app.py", "--model", given.model, "--port", str(port)])
    try:
        client = when_it_answers(f"http://127.0.0.1:{port}", page)
        started = time.perf_counter() - begin
        seconds, memory = [], []
        for film in itertools.islice(itertools.cycle(films), given.uploads):
            before = time.perf_counter()
            client.predict(handle_file(film), api_name="/classify")
            seconds.append(time.perf_counter() - before)
            memory.append(psutil.Process(page.pid).memory_info().rss / 2**20)
    finally:
        page.terminate()
        page.wait()
    print(f"from the start to the first answer: {started + seconds[0]:.1f} s; the page was there after {started:.1f} s")
    print(f"each answer after it, over HTTP: {spread(np.array(seconds[1:]))} s, {max(seconds[1:]):.2f} at most")
    warm = min(WARM, len(memory) - 1)
    print(f"memory: {memory[warm]:.0f} MiB after {warm + 1} uploads, {memory[-1]:.0f} after {len(memory)}\n")

    took = interleaved(parts_of_an_answer(given.model, films[0]), REPETITIONS)
    rows = [[name, spread(1000 * values)] for name, values in took.items()]
    print(markdown_table(["part of an answer", "ms"], rows))
    print(f"\n{torch.get_num_threads()} threads. {machine('torch', 'transformers', 'gradio', 'captum')}")


def when_it_answers(url: str, page: subprocess.Popen) -> Client:
    while page.poll() is None:
        try:
            return Client(url, verbose=False)
        except Exception:  # of httpx, of which there are several while nobody listens
            time.sleep(0.05)
    raise SystemExit(f"The page ended with {page.returncode}.")


def parts_of_an_answer(source: str, film: Path) -> dict[str, Callable[[], object]]:
    classify: Any = guarded_pipeline(source)
    pixels = read_radiograph(film)
    pixel_values = classify.image_processor(pixels, return_tensors="pt").pixel_values
    return {
        "reading the file": lambda: read_radiograph(film),
        "pipeline: image processor, network, guard": lambda: classify(pixels, top_k=None),
        "image processor again, for the picture": lambda: classify.image_processor(pixels, return_tensors="pt"),
        "Grad-CAM": lambda: grad_cam(classify.model, pixel_values, [0]),
    }


if __name__ == "__main__":
    main()
