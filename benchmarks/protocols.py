"""How much of a published figure is the split? The same two-stage recipe under the protocols that people quote.

python benchmarks/protocols.py --kermany path/to/chest_xray --pneumoniamnist path/to/pneumoniamnist.npz \\
    [--output_dir runs/protocols] [--only official pooled_by_image] [--section.field value ...]

Trains recipes/configs/protocols/*.yaml one after the other, passing --section.field on to recipes/two_stage.py, and
prints one table: each protocol beside what was published under it. A run that is finished is not repeated.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from cxr_backbone.data.splits import SPLITS
from cxr_backbone.evaluation.report import figure_text, markdown_table
from cxr_backbone.training.state import read_log

ROOT = Path(__file__).parents[1]

# Test figures as published; for Stephen et al. and Sagar the authors' "validation" figures on these films.
PUBLISHED = {
    "official": "Kermany et al. 2018, Inception V3: AUROC .968, accuracy .928",
    "selected_on_test": "Sagar, notebook: accuracy .910",
    "pooled_by_image": "Stephen et al. 2019: accuracy .937",
    "pooled_by_patient": "none known",
    "pneumoniamnist": "MedMNIST v2 (Yang et al. 2023), AUROC / accuracy: ResNet-18 .944 / .854, ResNet-50 .948 / .854, "
    "Google AutoML Vision .991 / .946; at 224 pixels ResNet-18 .956 / .864, ResNet-50 .962 / .884",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kermany", required=True, help="data.source of the Kermany set")
    parser.add_argument("--pneumoniamnist", required=True, help="data.source of PneumoniaMNIST")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/protocols"))
    parser.add_argument("--only", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), help="some of the protocols")
    given, passed_on = parser.parse_known_args()
    output_dir = given.output_dir.resolve()
    rows = []
    for protocol in given.only:
        run = output_dir / protocol
        if not (run / "metrics.json").is_file():
            source = given.pneumoniamnist if protocol == "pneumoniamnist" else given.kermany
            source = str(Path(source).resolve()) if Path(source).exists() else source  # or a Hub id
            train(protocol, ["--data.source", source, "--run.output_dir", str(run), *passed_on])
        rows.append(row_of(run, protocol))
    header = ["protocol", "films (train / validation / test)", "patients in train and test", "frozen AUROC"]
    header += ["fine-tuned AUROC", "fine-tuned accuracy", "epochs, s fine-tuning", "published"]
    print(markdown_table(header, rows))


def train(protocol: str, options: list[str]) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "recipes/two_stage.py"]
    config = ROOT / f"recipes/configs/protocols/{protocol}.yaml"
    subprocess.run([*launch, str(config), *options], cwd=ROOT, check=True)


def row_of(run: Path, protocol: str) -> list[str]:
    models = json.loads((run / "metrics.json").read_text())["models"]
    with (run / "split.csv").open(newline="", encoding="utf-8") as file:
        films = list(csv.DictReader(file))
    patients = {name: {film["patient_id"] for film in films if film["split"] == name} for name in SPLITS}
    shared = patients["train"] & patients["test"]
    frozen, tuned = (models[name]["splits"]["test"]["figures"] for name in ("frozen", "fine_tuned"))
    epochs = max(line["epoch"] for line in read_log(run) if line["phase"] == "fine_tuning" and "epoch" in line)
    return [
        protocol,
        " / ".join(f"{sum(film['split'] == name for film in films):,}" for name in SPLITS),
        "not known" if "" in shared else str(len(shared)),
        *[figure_text(figure) for figure in (frozen["auroc"], tuned["auroc"], tuned["accuracy"])],
        f"{epochs:.1f}, {models['fine_tuned']['seconds']:.0f}",
        PUBLISHED[protocol],
    ]


if __name__ == "__main__":
    main()
