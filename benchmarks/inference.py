"""How long does an answer take? Our ways and others' to run the network on a CPU, in one run.

python benchmarks/inference.py [--run runs/pneumonia-0 [--data.source path/to/chest_xray]]

Milliseconds an image in batches and alone, and how many times as fast as torchvision's network in eager float32, which
is what most code runs. Ways in bfloat16 where the CPU has instructions for it. With --run, the weights are those of a
finished run's fine-tuned model, and each of our ways is also asked about its test split: its AUROC.
"""

import argparse
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from timing import interleaved, machine, ratio, spread
from torch import Tensor

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.engines import export_to_onnx, on_onnxruntime, on_openvino
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.batches import run_through
from cxr_backbone.training.films import decode_films, open_films
from cxr_backbone.training.hardware import choose_precision

# Pixel values (batch, 1, size, size), float32, to logits (batch, labels), float32.
Way = Callable[[Tensor], Tensor]
PEER = "torchvision"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory of a training with one label a film")
    parser.add_argument("--image_size", type=int, default=299, help="side of the images that are timed, in pixels")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depth_multiplier", type=float, default=1.0, help="a narrower network, to try the script out")
    given, others = parser.parse_known_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.run is None:
        config = CXRInceptionConfig(image_size=given.image_size, depth_multiplier=given.depth_multiplier)
        model = CXRInceptionForImageClassification(config).eval()
    else:
        model = CXRInceptionForImageClassification.from_pretrained(given.run / "fine_tuned").eval()

    ours, peers = our_ways(model, given.threads), peer_ways()
    batch = torch.rand(given.batch_size, 1, given.image_size, given.image_size)
    with torch.inference_mode():
        seconds = interleaved(peers | ours, given.repetitions, batch)
        alone = interleaved(peers | ours, given.repetitions, batch[:1])
    aurocs = {} if given.run is None else test_aurocs(ours, given.run, others)
    rows = [
        [
            name,
            spread(seconds[name] / given.batch_size * 1000),
            ratio(seconds, name, PEER),
            spread(alone[name] * 1000),
            ratio(alone, name, PEER),
            aurocs.get(name, ""),
        ]
        for name in seconds
    ]
    print(f"{given.image_size} x {given.image_size} pixels, batches of {given.batch_size} and single images, ", end="")
    print(f"{given.threads} thread(s); median (interquartile range) of {given.repetitions} repetitions:\n")
    header = ["way", "ms an image", "times as fast", "ms, alone", "times as fast, alone", "AUROC, test"]
    print(markdown_table(header, rows))
    print(f"\n{machine('torch', 'transformers', 'onnxruntime', 'openvino', *peers)}")


def peer_ways() -> dict[str, Way]:
    """Of the peers that are installed: their networks as they come, eager, float32, three channels."""
    ways = {}
    if find_spec("torchvision"):
        from torchvision.models import inception_v3

        network = inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
        ways[PEER] = lambda images: network(images.expand(-1, 3, -1, -1))
    if find_spec("timm"):
        import timm

        other = timm.create_model("inception_v3").eval()
        ways["timm"] = lambda images: other(images.expand(-1, 3, -1, -1))
    return ways


def our_ways(model: CXRInceptionForImageClassification, threads: int) -> dict[str, Way]:
    fused, has_bf16 = model.fuse(), choose_precision("auto") == "bf16"
    ways: dict[str, Way] = {"as trained": lambda images: model(images).logits}
    ways["fuse()"] = lambda images: fused(_channels_last(images)).logits
    if has_bf16:
        half = model.fuse(torch.bfloat16)
        ways["fuse(bfloat16)"] = lambda images: half(_channels_last(images)).logits.float()

    with tempfile.TemporaryDirectory() as folder:
        export_to_onnx(model, CXRInceptionImageProcessor(), folder)
        ways["onnxruntime"] = on_onnxruntime(folder, threads)
        ways["OpenVINO, f32"] = on_openvino(folder, threads=threads)
        if has_bf16:
            ways["OpenVINO, bf16"] = on_openvino(folder, dtype=torch.bfloat16, threads=threads)
    return ways


def test_aurocs(ways: dict[str, Way], run: Path, others: list[str]) -> dict[str, str]:
    # The report is none of this script's business, and may need packages that are not here.
    arguments = parse_arguments([str(run / "config.yaml"), "--evaluation.report", "false", *others])
    settings = {"image_size": arguments.model.image_size, "seed": arguments.run.seed}
    decoded = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    films = decoded.open_test(CXRInceptionConfig.from_pretrained(run / "fine_tuned"))
    image_processor = CXRInceptionImageProcessor.from_pretrained(run / "fine_tuned")
    truth, aurocs = np.array(films["label"][:]) == 1, {}
    for name, way in ways.items():
        logits, _ = run_through(way, films, image_processor, Accelerator(cpu=True), batch_size=8, desc=name)
        aurocs[name] = f"{roc_auc_score(truth, (logits[:, 1] - logits[:, 0]).double().numpy()):.5f}"
    return aurocs


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
