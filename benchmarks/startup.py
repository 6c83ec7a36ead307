"""What does it cost to import the package, and to open a checkpoint? Beside what every user of Transformers pays.

python benchmarks/startup.py [--repetitions 9]

Seconds of a new Python process that imports torch and `PreTrainedModel`, and of one that imports `cxr_backbone`, too,
and its classes; without what Python itself takes to start. Then, in this process, seconds to open a saved model of full
size, beside building torchvision's network as it comes by default.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.util import find_spec

import numpy as np
from timing import interleaved, machine, ratio, spread

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification
from cxr_backbone.evaluation.report import markdown_table

THEIRS = "torch, PreTrainedModel"
IMPORTS = {
    "nothing": "pass",
    THEIRS: "import torch; from transformers import PreTrainedModel",
    "these and cxr_backbone": "import torch; from transformers import PreTrainedModel; import cxr_backbone; "
    "cxr_backbone.CXRInceptionForImageClassification; cxr_backbone.CXRInceptionImageProcessor",
}
OPENING = "from_pretrained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--depth_multiplier", type=float, default=1.0, help="a narrower network, to try the script out")
    given = parser.parse_args()

    seconds = interleaved({name: lambda code=code: python(code) for name, code in IMPORTS.items()}, given.repetitions)
    nothing = seconds.pop("nothing")
    net = {name: values - np.median(nothing) for name, values in seconds.items()}
    rows = [[name, spread(values), spread(values / net[THEIRS])] for name, values in net.items()]
    print(f"Median (interquartile range) of {given.repetitions} repetitions:\n")
    print(markdown_table(["import", "seconds", "times theirs"], rows))

    with tempfile.TemporaryDirectory() as folder:
        config = CXRInceptionConfig(depth_multiplier=given.depth_multiplier)
        CXRInceptionForImageClassification(config).save_pretrained(folder)
        ways = {OPENING: lambda: CXRInceptionForImageClassification.from_pretrained(folder)}
        if find_spec("torchvision"):
            from torchvision.models import inception_v3

            ways["torchvision's default"] = lambda: inception_v3(init_weights=True)
        opening = interleaved(ways, given.repetitions)
    peer = "torchvision's default"
    rows = [[name, spread(opening[name]), ratio(opening, name, peer)] for name in opening]
    print(f"\n{markdown_table(['model', 'seconds', 'times as fast'], rows)}")
    print(f"\n{machine('torch', 'transformers', 'torchvision')}")


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


if __name__ == "__main__":
    main()
