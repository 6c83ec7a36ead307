"""How much does fine-tuning add to a frozen backbone? Both phases of several finished runs (seeds), side by side.

python benchmarks/two_phases.py runs/pneumonia-0 runs/pneumonia-1 runs/pneumonia-2 [--curves docs/learning_curves.png]
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cxr_backbone.evaluation.metrics import METRICS
from cxr_backbone.evaluation.plots import learning_curves, read_log
from cxr_backbone.evaluation.report import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one a seed")
    parser.add_argument("--curves", type=Path, help="draw the learning curves to this file")
    arguments = parser.parse_args()
    metrics = [json.loads((run / "metrics.json").read_text()) for run in arguments.runs]

    print(f"Test split, mean ± standard deviation over {len(metrics)} runs:\n")
    rows = []
    for name in METRICS:
        frozen, tuned = (np.array([run[phase]["test"][name] for run in metrics]) for phase in ("frozen", "fine_tuned"))
        rows.append([name.replace("_", " "), spread(frozen), spread(tuned), spread(tuned - frozen, sign="+")])
    print(markdown_table(["", "frozen", "fine-tuned", "difference"], rows))

    print("\nOverfitting: losses of the checkpoint that was kept, on images as they are.\n")
    rows = []
    for run, figures in zip(arguments.runs, metrics, strict=True):
        validation = [line["validation_loss"] for line in read_log(run, "fine_tuning")]
        train, kept = (figures["fine_tuned"][split]["loss"] for split in ("train", "validation"))
        losses = [f"{value:.4f}" for value in (train, kept, kept - train, min(validation), validation[-1])]
        rows.append([run.name, *losses, *(f"{figures[phase]['seconds']:.0f}" for phase in ("frozen", "fine_tuned"))])
    header = ["run", "train", "validation", "gap", "lowest validation", "last validation", "s frozen", "s fine-tuning"]
    print(markdown_table(header, rows))
    if arguments.curves:
        learning_curves(arguments.runs, arguments.curves)


def spread(values: np.ndarray, sign: str = "") -> str:
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():{sign}.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
