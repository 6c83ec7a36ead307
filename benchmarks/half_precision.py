"""What does half precision change? A model in float32, float16 and bfloat16, on the same validation films.

python benchmarks/half_precision.py runs/pneumonia-0 [--data.source path/to/chest_xray]

Takes the fine-tuned model of a finished run, and its validation split (the test split stays closed). Prints what each
precision takes in memory, how far it moves a score, how many films it moves across the operating point `youden`, and
the AUROC. On a CPU. The row `as measured` is what the run itself predicted, in its mixed precision.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from cxr_backbone import CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.labels import label_names
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.batches import run_through
from cxr_backbone.training.films import decode_films, open_films

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
BATCH_SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a training with one label a film")
    given, others = parser.parse_known_args()
    # The report is none of this script's business, and may need packages that are not here.
    arguments = parse_arguments([str(given.run / "config.yaml"), "--evaluation.report", "false", *others])
    settings = {"image_size": arguments.model.image_size, "seed": arguments.run.seed}
    films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings).splits["validation"]
    truth = np.array(films["label"][:]) == 1

    said = pq.read_table(given.run / "predictions/fine_tuned validation.parquet")
    label = label_names(films.features)[1]
    measured = dict(zip(said["image_id"].to_pylist(), said[f"score {label}"].to_pylist(), strict=True))

    reference, rows = np.empty(0), []
    for dtype in PRECISIONS:
        model = CXRInceptionForImageClassification.from_pretrained(given.run / "fine_tuned", dtype=dtype).eval()
        threshold = next(iter(model.config.operating_points.values()))["youden"]["threshold"]
        scores = scores_of(model, CXRInceptionImageProcessor.from_pretrained(given.run / "fine_tuned"), films)
        reference = scores if dtype == torch.float32 else reference
        megabytes = f"{model.get_memory_footprint() / 1e6:.1f}"
        rows.append([str(dtype).removeprefix("torch."), megabytes, *compared(scores, reference, truth, threshold)])
    scores = np.array([measured[image_id] for image_id in films["image_id"][:]])
    rows.append(["as measured", "", *compared(scores, reference, truth, threshold)])
    print(f"{len(films):,} validation films:\n")
    header = ["", "MB", "largest change of a score", "films that change sides", "AUROC"]
    print(markdown_table(header, rows))


def compared(scores: np.ndarray, reference: np.ndarray, truth: np.ndarray, threshold: float) -> list[str]:
    return [
        f"{np.abs(scores - reference).max():.4f}",
        str(((scores >= threshold) != (reference >= threshold)).sum()),
        f"{roc_auc_score(truth, scores):.5f}",
    ]


def scores_of(
    model: CXRInceptionForImageClassification, image_processor: CXRInceptionImageProcessor, films: Dataset
) -> np.ndarray:
    """The probability of the second label, float64 (films,)."""
    logits, _ = run_through(
        lambda pixel_values: model(pixel_values).logits,
        films,
        image_processor,
        Accelerator(cpu=True),
        batch_size=BATCH_SIZE,
        desc=str(model.dtype),
    )
    return logits.double().softmax(-1)[:, 1].numpy()


if __name__ == "__main__":
    main()
