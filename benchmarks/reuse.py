"""Is our backbone a better start for other X-ray work than ImageNet's, or none? With how many labels, and how soon?

python benchmarks/reuse.py --nih path/to/nih-subset/labels.csv --kermany path/to/chest_xray --output_dir runs/reuse \
    --starts ours=checkpoints/cxr-inception imagenet=timm/inception_v3.tv_in1k random= [--model.image_mean 0 …]

Three questions: opacity or normal (RSNA's radiologists, adults), NIH's label of pneumonia (adults), bacteria or virus
(children); each with 10, 25, 50 and 100 % of the labels, drawn by patient, and five seeds. A linear probe (logistic
regression on the frozen backbone, C by cross-validation) has all of these labels; fine-tuning, by both phases of the
recipe, keeps one patient in five for validation. The AUROC comes from films that are the same for all and that nothing
was trained on or chosen by: those of patients with odd numbers (NIH), the official test split (Kermany).

Each result is a line of <output_dir>/results.jsonl, and the same command goes on after a stop. The tables have, for
each question, way and share of the labels, the mean AUROC over the seeds with a 95 % interval from resampled patients;
the paired difference from the second start; and after how many epochs and seconds fine-tuning had the validation loss
that was the lowest of the second start. --model.image_mean and what else describes weights goes to bare weights files
only. --ways probe asks for the linear probe alone, which takes minutes.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import ClassLabel, Dataset
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from timing import machine
from torch import Tensor

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.kermany import load_kermany
from cxr_backbone.data.splits import all_films
from cxr_backbone.data.table import load_table
from cxr_backbone.evaluation.bootstrap import PatientBootstrap
from cxr_backbone.evaluation.report import markdown_table
from cxr_backbone.training.arguments import Arguments, parse_arguments
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.hardware import choose_precision, use_threads
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.loop import predict
from cxr_backbone.training.phases import fine_tune, fit_head
from cxr_backbone.training.probe import FOLDS, fit_probe
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import TrainingRun, read_log

CONFIG = Path(__file__).parents[1] / "recipes/configs/table.yaml"
WAYS = ("probe", "fine-tuned")
SHARES = (0.1, 0.25, 0.5, 1.0)
OF_WEIGHTS = ("--model.image_mean", "--model.image_std", "--model.avg_pool_count_include_pad")


class Question(NamedTuple):
    """Films with two classes: those whose labels are drawn from, and those that are tested on."""

    pool: Dataset
    test: Dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nih", help="table of the NIH subset")
    parser.add_argument("--kermany", help="data.source of the Kermany set")
    parser.add_argument("--starts", nargs="+", required=True, help="name=model.init; nothing after it: random weights")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--most_films", type=int, default=1000, help="of a question, to draw labels from")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of reusing a start")
    given, options = parser.parse_known_args()
    starts = dict(start.split("=", 1) for start in given.starts)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    results = given.output_dir / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []

    with tempfile.TemporaryDirectory() as cache, results.open("a") as file:
        size = settings(cache, None, options).model.image_size
        asked = dict(questions(given, size, cache))
        keys = itertools.product(range(given.seeds), asked, SHARES, starts, given.ways)
        for seed, name, share, start, way in keys:
            key = {"question": name, "share": share, "seed": seed, "start": start, "way": way}
            if any(key.items() <= line.items() for line in done):
                continue
            rows = _drawn(asked[name].pool, share, seed)
            if rows is None:
                continue
            line = key | ask(asked[name], way, rows, seed, starts[start] or None, options, cache)
            done.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(key, round(line["auroc"], 3), flush=True)
    for name, question in asked.items():
        for way in given.ways:
            lines = [line for line in done if line["question"] == name and line["way"] == way]
            if not lines:
                continue
            print(f"\n{name}, {way}: up to {len(question.pool)} labels, tested on {len(question.test)} films\n")
            print(markdown_table(*summarised(lines, question.test, list(starts))))
    print(f"\n{machine('torch', 'transformers', 'scikit-learn')}")


def questions(given: argparse.Namespace, size: int, cache: str | None) -> Iterator[tuple[str, Question]]:
    if given.nih:
        for name, column, values in (
            ("opacity (RSNA)", "rsna_class", ["Normal=NORMAL", "Lung Opacity=OPACITY"]),
            ("pneumonia (NIH)", "label", ["No_findings=NONE", "Pneumonia=PNEUMONIA"]),
        ):
            rows = load_table(given.nih, image_column="path", label_columns=[column], label_values=values, carve=False)
            films = decode_once(all_films(rows), size, cache)
            is_odd = np.array([int(patient) % 2 == 1 for patient in films["patient_id"]])
            pool, test = (films.select(np.flatnonzero(chosen)) for chosen in (~is_odd, is_odd))
            yield name, Question(_sample(pool, given.most_films), test)
    if given.kermany:
        splits = load_kermany(given.kermany)
        pool, test = (with_subtypes(splits[split]) for split in ("train", "test"))
        pool = _sample(pool, given.most_films)
        yield "virus (Kermany)", Question(*(decode_once(films, size, cache) for films in (pool, test)))


def with_subtypes(films: Dataset) -> Dataset:
    """The pneumonias among films of the Kermany set, with bacteria or virus for their label."""
    ill = films.select([row for row, subtype in enumerate(films["subtype"]) if subtype != "normal"])
    label = [int(subtype == "virus") for subtype in ill["subtype"]]
    ill = ill.remove_columns("label").add_column("label", label)
    return ill.cast_column("label", ClassLabel(names=["bacteria", "virus"]))


def ask(
    question: Question, way: str, rows: np.ndarray, seed: int, init: str | None, options: list[str], cache: str
) -> dict[str, Any]:
    """What a probe or a fine-tuned network says of the test films after training on some of the pool."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(folder, init, [*options, "--run.seed", str(seed)])
        accelerator, tuning = prepared(arguments), arguments.fine_tuning
        model, image_processor = start_model(arguments.model, question.pool.features["label"].names)

        def features_of(films: Dataset) -> tuple[Tensor, Tensor]:
            return extract_features(
                model.cxr_inception, films, image_processor, accelerator, batch_size=32, cache_dir=Path(cache)
            )

        drawn = question.pool.select(rows)
        if way == "probe":
            features, labels = features_of(question.pool)
            layer, _ = fit_probe(features[rows], labels[rows], drawn["patient_id"][:], seed=seed)
            of_test, truth = features_of(question.test)
            return {"labels": len(rows)} | _said(layer(of_test).detach(), truth)

        chosen = _held_out(drawn, FOLDS, seed)
        validation = drawn.select(chosen)
        train = drawn.select(np.setdiff1d(np.arange(len(drawn)), chosen))
        run = TrainingRun(arguments)
        run.claim()
        run.accelerator = accelerator
        fit_head(model, [features_of(train)], features_of(validation), arguments.frozen, run.log)
        begin = time.perf_counter()
        fine_tune(model, train, validation, image_processor, accelerator, tuning, run=run, interruption=Interruption())
        seconds = time.perf_counter() - begin
        tuned_model = type(model).from_pretrained(run.fine_tuned).eval().to(accelerator.device)
        tuned, truth = predict(tuned_model, question.test, image_processor, accelerator, batch_size=32)
        curve = [(line["epoch"], line["validation_loss"]) for line in read_log(run.path) if "after_steps" in line]
        return {"labels": len(rows), "curve": curve, "seconds": seconds} | _said(tuned, truth)


def prepared(arguments: Arguments) -> Accelerator:
    """An accelerator as the recipe's, once seed, threads and precision are set."""
    arguments.run.mixed_precision = choose_precision(arguments.run.mixed_precision)
    set_seed(arguments.run.seed)
    use_threads(arguments.run.cpu_threads)
    return Accelerator(
        mixed_precision=arguments.run.mixed_precision,
        gradient_accumulation_steps=arguments.fine_tuning.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.run.seed),
    )


def settings(folder: str, init: str | None, options: list[str]) -> Arguments:
    """Ten epochs of fine-tuning at the recipe's rates, in smaller batches, for there are few films."""
    words = ["--run.output_dir", f"{folder}/run", "--model.init", init or "null", "--evaluation.report", "false"]
    words += ["--fine_tuning.epochs", "10", "--fine_tuning.batch_size", "8", "--fine_tuning.evaluations_per_epoch", "1"]
    if init is None:  # random weights have no statistics to keep
        words += ["--fine_tuning.freeze_batch_norm", "false"]
    if init is None or not Path(init).is_file():
        options = [
            word
            for name, value in zip(options[::2], options[1::2], strict=True)
            if name not in OF_WEIGHTS
            for word in (name, value)
        ]
    return parse_arguments([str(CONFIG), *words, *options])


def summarised(lines: list[dict[str, Any]], test: Dataset, starts: list[str]) -> tuple[list[str], list[list[str]]]:
    """Of one way: a row for each share of the labels and start."""
    bootstrap = PatientBootstrap(test["patient_id"][:])
    truth = np.array(test["label"][:]) == 1
    header, rows = ["labels", "start", "AUROC", f"beyond {starts[1]}"], []
    tuned = "curve" in lines[0]
    if tuned:
        header.append(f"epochs to the best of {starts[1]}")
    for share in sorted({line["share"] for line in lines}):
        of = {start: [line for line in lines if line["share"] == share and line["start"] == start] for start in starts}
        peer, of_peer = _resampled(of[starts[1]], truth, bootstrap)
        for start in starts:
            auroc, samples = _resampled(of[start], truth, bootstrap)
            beyond = "" if start == starts[1] else _interval(auroc - peer, samples - of_peer, sign="+")
            row = [f"{np.mean([line['labels'] for line in of[start]]):.0f}", start, _interval(auroc, samples), beyond]
            if tuned:
                reached = [_reached(ours, peer) for ours, peer in zip(of[start], of[starts[1]], strict=True)]
                epochs, seconds = np.median(np.array(reached), axis=0)
                row.append("not in half of the seeds" if np.isinf(epochs) else f"{epochs:.0f} ({seconds:.0f} s)")
            rows.append(row)
    return header, rows


def _reached(ours: dict[str, Any], peer: dict[str, Any]) -> tuple[float, float]:
    """Epochs and seconds until our validation loss is what the peer's was at its lowest."""
    best = min(loss for _, loss in peer["curve"])
    curve = ours["curve"]
    epochs = next((epoch for epoch, loss in curve if loss <= best), np.inf)
    return epochs, epochs * ours["seconds"] / curve[-1][0]


def _resampled(lines: list[dict[str, Any]], truth: np.ndarray, bootstrap: PatientBootstrap) -> tuple[float, np.ndarray]:
    """The mean AUROC over the seeds, and that of each resample of the patients."""
    films = np.arange(len(truth))
    samples = [bootstrap.rank_figures(films, truth, np.array(line["scores"]))[0] for line in lines]
    return float(np.mean([line["auroc"] for line in lines])), np.mean(samples, axis=0)


def _interval(value: float, samples: np.ndarray, sign: str = "") -> str:
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _said(logits: Tensor, truth: Tensor) -> dict[str, Any]:
    scores = (logits[:, 1] - logits[:, 0]).double().numpy()
    return {"auroc": float(roc_auc_score(truth.numpy(), scores)), "scores": scores.round(5).tolist()}


def _drawn(films: Dataset, share: float, seed: int) -> np.ndarray | None:
    """Rows of a share of the patients, ill and not, if each label has enough of them to cross-validate."""
    labels, patients = np.array(films["label"][:]), np.array(films["patient_id"][:])
    ill = np.unique(patients[labels == 1])
    groups = (np.random.default_rng(seed).permutation(group) for group in (ill, np.setdiff1d(patients, ill)))
    chosen = np.concatenate([group[: round(share * len(group))] for group in groups])
    rows = np.flatnonzero(np.isin(patients, chosen))
    fewest = min(len(np.unique(patients[rows][labels[rows] == label])) for label in (0, 1))
    return rows if fewest >= FOLDS else None


def _held_out(films: Dataset, folds: int, seed: int) -> np.ndarray:
    """Rows of one fold of several, by patient, the classes in their proportions."""
    labels, patients = films["label"][:], films["patient_id"][:]
    _, rows = next(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, patients))
    return rows


def _sample(films: Dataset, most: int) -> Dataset:
    """About as many films, by patient."""
    return films if len(films) <= most else films.select(_held_out(films, max(2, round(len(films) / most)), seed=0))


if __name__ == "__main__":
    main()
