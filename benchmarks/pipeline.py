"""From file to answer: how many full-size films a second does a pipeline classify? Ours and others', on the same files.

python benchmarks/pipeline.py ../shared/data/kermany-originals [--repetitions 5] [--threads 1]

Each row is a `transformers.pipeline("image-classification")` that is given the files, one image at a time as it does by
default, or eight. The others are ViT-base and timm's Inception V3, as they come. Ours is given the files; then films
that `read_radiograph` has read at reduced size. A second table says where the time goes.
"""

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from timing import interleaved, machine, ratio, spread
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.hardware import choose_precision

PEERS = ("ViT-base", "timm")
TASK: Final = "image-classification"
SIZE = 299


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="full-size JPEG files, in folders of any depth")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth_multiplier", type=float, default=1.0, help="a narrower network, to try the script out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    paths = sorted(path for path in given.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"no JPEG file in {given.folder}")

    model = CXRInceptionForImageClassification(CXRInceptionConfig(depth_multiplier=given.depth_multiplier)).eval()
    ways, parts = peer_ways(), {}
    for name, chosen in our_models(model).items():
        ours = pipeline(
            TASK, model=chosen, image_processor=CXRInceptionImageProcessor(size={"height": SIZE, "width": SIZE})
        )
        ways[f"ours, {name}"] = as_given(ours, batch_size=1)
        parts = parts_of(ours, paths)
    ways[f"ours, {name}, read reduced, eights"] = read_reduced(ours, batch_size=8)
    files = [str(path) for path in paths]
    seconds = interleaved(ways, given.repetitions, files)

    rows = [
        [name, spread(len(paths) / seconds[name]), *(ratio(seconds, name, peer) for peer in PEERS)] for name in seconds
    ]
    print(
        f"{len(paths)} films, {given.threads} thread(s); median (interquartile range) of {given.repetitions} ", end=""
    )
    print("repetitions:\n")
    print(markdown_table(["pipeline", "films a second", *(f"times as fast as {peer}" for peer in PEERS)], rows))

    part_seconds = interleaved(parts, given.repetitions)
    rows = [[part, spread(values / len(paths) * 1000)] for part, values in part_seconds.items()]
    print(f"\nWhere the time of {name} goes:\n\n{markdown_table(['part', 'ms a film'], rows)}")
    print(f"\n{machine('torch', 'transformers', 'pillow', 'timm', 'torchvision')}")


def peer_ways() -> dict[str, Callable[[list[str]], object]]:
    vit = pipeline(TASK, model=ViTForImageClassification(ViTConfig()).eval(), image_processor=ViTImageProcessorPil())
    ways = {"ViT-base": as_given(vit, batch_size=1)}
    if find_spec("timm") and find_spec("torchvision"):  # Transformers' wrapper asks for both
        from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

        config = TimmWrapperConfig(architecture="inception_v3")
        network = TimmWrapperForImageClassification(config).eval()
        processor = TimmWrapperImageProcessor(network.timm_model.pretrained_cfg, architecture="inception_v3")
        ways["timm"] = as_given(pipeline(TASK, model=network, image_processor=processor), batch_size=1)
    return ways


def our_models(model: CXRInceptionForImageClassification) -> dict[str, CXRInceptionForImageClassification]:
    models = {"as trained": model, "fuse()": model.fuse()}
    if choose_precision("auto") == "bf16":
        models["fuse(bfloat16)"] = model.fuse(torch.bfloat16)
    return models


def as_given(classify: Any, batch_size: int) -> Callable[[list[str]], object]:
    return lambda files: classify(files, batch_size=batch_size)


def read_reduced(classify: Any, batch_size: int) -> Callable[[list[str]], object]:
    def films(files: list[str]) -> Iterator[Image.Image]:
        for file in files:
            yield Image.fromarray(read_radiograph(file, reduce_to=SIZE))

    return lambda files: deque(classify(films(files), batch_size=batch_size), maxlen=0)


def parts_of(classify: Any, paths: list[Path]) -> dict[str, Callable[[], object]]:
    """What a pipeline does, one thing at a time, over all files."""
    films = [Image.open(path).convert("RGB") for path in paths]
    inputs = [classify.preprocess(film) for film in films]

    @torch.inference_mode()
    def run() -> None:
        for given in inputs:
            classify.model(**given)

    return {
        "decode, as the pipeline does": lambda: [Image.open(path).convert("RGB") for path in paths],
        "decode, read_radiograph": lambda: [read_radiograph(path) for path in paths],
        "decode, read_radiograph reduced": lambda: [read_radiograph(path, reduce_to=SIZE) for path in paths],
        "image processor": lambda: [classify.preprocess(film) for film in films],
        "network": run,
    }


if __name__ == "__main__":
    main()
