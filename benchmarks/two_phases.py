"""How much does fine-tuning add to a frozen backbone, and does it overfit? Several finished runs (seeds), side by side.

python benchmarks/two_phases.py runs/pneumonia-0 runs/pneumonia-1 runs/pneumonia-2 [--permuted runs/permuted]

--permuted is a run with --data.permute_labels true: what training makes of labels that mean nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from cxr_backbone.evaluation.report import NOT_DEFINED, figure_text, markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one a seed, or those of evaluate.py")
    parser.add_argument("--permuted", type=Path, help="run directory of a training on permuted labels")
    arguments = parser.parse_args()
    if len({run.name for run in arguments.runs}) < len(arguments.runs):
        parser.error("two runs have the same name; expected one each")
    runs = {run.name: json.loads((run / "metrics.json").read_text()) for run in arguments.runs}

    *_, any_run = runs.values()
    for split in any_run["models"]["fine_tuned"]["splits"]:
        if split == "test" or split.startswith("external "):
            print(f"{split}, mean ± standard deviation over {len(runs)} runs:\n\n{spread_table(runs, split)}\n")
            print(f"{split}, each run with its 95 % intervals:\n\n{auroc_table(runs, split)}\n")

    print("Overfitting: losses (nats) before the temperature and AUROC of the checkpoint that was kept.\n")
    if arguments.permuted:
        runs[f"{arguments.permuted.name}, permuted labels"] = json.loads(
            (arguments.permuted / "metrics.json").read_text()
        )
    print(overfitting_table(runs))


def spread_table(runs: dict[str, Any], split: str) -> str:
    rows = []
    for name in figures_of(next(iter(runs.values())), "frozen", split):
        frozen, tuned = (
            np.array([figures_of(run, model, split)[name]["value"] for run in runs.values()], dtype=float)
            for model in ("frozen", "fine_tuned")
        )
        rows.append([name.replace("_", " "), spread(frozen), spread(tuned), spread(tuned - frozen, sign="+")])
    return markdown_table(["", "frozen", "fine-tuned", "difference"], rows)


def auroc_table(runs: dict[str, Any], split: str) -> str:
    rows = []
    for name, run in runs.items():
        for target, delong in run["comparison"][split]["delong"].items():
            figures = [
                run["models"][model]["splits"][split]["targets"][target]["figures"]["auroc"]
                for model in ("frozen", "fine_tuned")
            ]
            difference = figure_text({"low": None, **delong, "value": delong.get("difference")}, signed=True)
            p = NOT_DEFINED if delong.get("p") is None else f"{delong['p']:.3f}"
            rows.append([name, target, *map(figure_text, figures), difference, p])
    return markdown_table(["run", "", "frozen", "fine-tuned", "difference (DeLong)", "p"], rows)


def overfitting_table(runs: dict[str, Any]) -> str:
    rows = []
    for name, run in runs.items():
        if "overfitting" not in run:  # the results of evaluate.py, which trains nothing
            continue
        curve = run["overfitting"]["curve"]
        (kept,) = (line for line in curve if line["after_steps"] == run["overfitting"]["chosen"])
        both = [figures_of(run, "fine_tuned", split) for split in ("train", "validation")]
        aurocs = [figures[("auroc" if "auroc" in figures else "auroc_macro")]["value"] for figures in both]
        losses = [kept["train"], kept["validation"], run["overfitting"]["gap"], kept["test"]]
        seconds = [f"{run['models'][model]['seconds']:.0f}" for model in ("frozen", "fine_tuned")]
        steps = f"{kept['after_steps']} of {curve[-1]['after_steps']}"
        rows.append(
            [
                name,
                steps,
                *(NOT_DEFINED if value is None else f"{value:.3f}" for value in (*losses, *aurocs)),
                *seconds,
            ]
        )
    header = ["run", "step", "train", "validation", "gap", "test", "AUROC train", "AUROC validation"]
    return markdown_table([*header, "s frozen", "s fine-tuning"], rows)


def figures_of(run: dict[str, Any], model: str, split: str) -> dict[str, Any]:
    return run["models"][model]["splits"][split]["figures"]


def spread(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
