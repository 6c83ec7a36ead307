"""Which training is best? Trains one variant of the recipe and tells what validation says of it, beside those before.

python benchmarks/experiments.py recipes/configs/pneumonia.yaml --name plain --output_dir runs/experiments \
    --nih path/to/nih-subset/labels.csv [--section.field value ...]

The test split plays no part. Validation is asked as it is and under shifts that no training makes in this strength
(darker, brighter, flatter, blurred, cropped, stretched either way): AUROC of all shifted films together, which one
threshold has to serve, and their mean loss. What the backbone is worth for other films is asked of linear probes, the
mean AUROC of folds by patient: opacity or normal and NIH's pneumonia on the adults with even patient numbers (those
with odd ones are what `reuse.py` tests on), bacteria or virus on the pneumonias of validation. `kept` is how much of
what fine-tuning changed is kept: 1 is the model that validation chose, 0 the frozen one, between them both are
interpolated.

Each variant is a line of <output_dir>/results.jsonl. One that was stopped goes on; of one that is done the table alone
is printed.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from kornia.filters import gaussian_blur2d
from reuse import prepared, questions, with_subtypes
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torch.nn import functional as F

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.data.labels import label_names
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.films import decode_films, decode_joint, open_films
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.loop import plain_loss, predict
from cxr_backbone.training.phases import fine_tune, fit_head
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import TrainingRun

KEPT = (0.0, 0.5, 1.0)
FOLDS, REPEATS = 5, 3
STRENGTH = 1e-3  # C of scikit-learn: one for all, since no variant may choose its own here
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "darker": lambda images: images**1.8,
    "brighter": lambda images: images**0.55,
    "flatter": lambda images: 0.25 + images / 2,
    "blurred": lambda images: gaussian_blur2d(images, (9, 9), (2.0, 2.0)),
    "cropped": lambda images: _middle(images, 0.8, 0.8),
    # What the set's squashed squares give away: pneumonias were wider on file than normal films.
    "wider": lambda images: _middle(images, 1.0, 0.83),
    "narrower": lambda images: _middle(images, 0.83, 1.0),
}
FIGURES = ["auroc", "loss", "shifted auroc", "shifted loss", "opacity (RSNA)", "pneumonia (NIH)", "virus"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the recipe, for the Kermany set")
    parser.add_argument("--name", required=True, help="of the variant")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--nih", required=True, help="table of the NIH subset")
    given, options = parser.parse_known_args()
    results = given.output_dir / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if given.name not in {line["name"] for line in done}:
        lines = [{"name": given.name, "options": options} | line for line in measure(given, options)]
        with results.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        done += lines
    rows = [[line["name"], f"{line['kept']:g}", *(f"{line[figure]:.4f}" for figure in FIGURES)] for line in done]
    print(markdown_table(["variant", "kept", *FIGURES], rows))


def measure(given: argparse.Namespace, options: list[str]) -> list[dict[str, Any]]:
    """The figures of a variant, trained as the recipe trains, for each of KEPT."""
    folder = given.output_dir / given.name
    arguments = parse_arguments(
        [given.config, *options, "--run.output_dir", str(folder), "--evaluation.report", "false"]
    )
    accelerator = prepared(arguments)
    settings = {"image_size": arguments.model.image_size, "seed": arguments.run.seed}
    films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    films.joint = decode_joint(arguments.joint, films, **settings)
    validation = films.splits["validation"]
    model, image_processor = start_model(arguments.model, label_names(validation.features))
    model.to(accelerator.device, memory_format=torch.channels_last)

    def features_of(films: Dataset, place: Path) -> tuple[Tensor, Tensor]:
        batch_size = arguments.frozen.batch_size
        backbone = model.cxr_inception
        return extract_features(backbone, films, image_processor, accelerator, batch_size=batch_size, cache_dir=place)

    run = TrainingRun(arguments)
    run.claim()
    run.accelerator = accelerator
    state = run.newest_state()
    if state is None:
        of_train, of_validation = (features_of(films, run.path / "features") for films in (films.train, validation))
        fit_head(model, [of_train], of_validation, arguments.frozen, run.log)
    fine_tune(
        model,
        films.train,
        validation,
        image_processor,
        accelerator,
        arguments.fine_tuning,
        run=run,
        interruption=Interruption(),
        joint=films.joint,
        state=state,
    )

    start = load_file(run.evaluated / f"{0:09d}.safetensors")
    end = CXRInceptionForImageClassification.from_pretrained(run.fine_tuned).state_dict()
    adults = argparse.Namespace(nih=given.nih, kermany=None, most_films=1000)
    asked_of_adults = questions(adults, arguments.model.image_size, arguments.data.cache_dir)
    probed = {name: question.pool for name, question in asked_of_adults} | {"virus": with_subtypes(validation)}
    lines = []
    for kept in KEPT:
        mixed = {name: torch.lerp(start[name].float(), end[name].float(), kept) for name in end}
        model.load_state_dict(mixed)

        def asked(change: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
            return predict(model, validation, image_processor, accelerator, batch_size=32, change=change)

        plain, labels = asked()
        shifted = [asked(change)[0] for change in SHIFTS.values()]
        line = {"kept": kept, "auroc": _auroc(plain, labels), "loss": plain_loss(plain, labels).item()}
        line["shifted auroc"] = _auroc(torch.cat(shifted), labels.repeat(len(shifted)))
        line["shifted loss"] = float(np.mean([plain_loss(logits, labels).item() for logits in shifted]))
        with tempfile.TemporaryDirectory() as place:
            for name, pool in probed.items():
                line[name] = _probe_auroc(*features_of(pool, Path(place)), np.array(pool["patient_id"][:]))
        lines.append(line)
    return lines


def _probe_auroc(features: Tensor, labels: Tensor, patients: np.ndarray) -> float:
    scaled = ((features - features.mean(dim=0)) / features.std()).numpy()
    answers, aurocs = labels.numpy(), []
    for seed in range(REPEATS):
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        for inside, outside in folds.split(scaled, answers, patients):
            probe = LogisticRegression(C=STRENGTH, max_iter=1000).fit(scaled[inside], answers[inside])
            aurocs.append(roc_auc_score(answers[outside], probe.decision_function(scaled[outside])))
    return float(np.mean(aurocs))


def _auroc(logits: Tensor, labels: Tensor) -> float:
    return float(roc_auc_score(labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy()))


def _middle(images: Tensor, of_height: float, of_width: float) -> Tensor:
    """The middle of images, stretched to their size."""
    shares = zip(images.shape[-2:], (of_height, of_width), strict=True)
    top, left = (round(size * (1 - share) / 2) for size, share in shares)
    height, width = images.shape[-2:]
    return F.interpolate(images[..., top : height - top, left : width - left], (height, width), mode="bilinear")


if __name__ == "__main__":
    main()
