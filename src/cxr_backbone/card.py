"""The model card: what a finished run has on file, said in the words of a template (`model_card.md`)."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cxr_backbone.data.audit import count_of
from cxr_backbone.evaluation import report
from cxr_backbone.evaluation.report import NOT_DEFINED, figure_text, markdown_table
from cxr_backbone.weights import KERAS_SUFFIXES, TORCH_SUFFIXES, is_hub_id

MODEL = "fine_tuned"  # the one of a run that is published

# What the template and this file read. A run that was stopped, or one of an older version, has not all of it.
NEEDED = {
    "metrics.json": ("resamples", f"models.{MODEL}.splits.test.figures", f"models.{MODEL}.seconds"),
    "environment.json": (
        *("command", "python", "packages", "initial_weights_sha256"),
        *("device", "threads", "processes", "mixed_precision"),
    ),
    "config.yaml": ("run", "data.provenance", "model.init_provenance", "frozen", "fine_tuning", "joint", "evaluation"),
    "audit.json": (
        "splits",
        "patients_across_splits",
        "duplicates",
        "metadata_baseline",
        "intensity",
        "sizes",
        "unreadable",
    ),
}


def write_card(run: Path, folder: Path, template: Path, repo_id: str) -> None:
    """Write `README.md` into a folder that is about to be published. Every figure in it comes from the run's files.

    The card is public: of a path that says where things are on this machine (absolute, `~` or `..`) it keeps the last
    part. It names no patient and no film. It depends on nothing but the files named here.

    Args:
        run: a finished run, with metrics.json, environment.json, config.yaml and audit.json.
        folder: has the model's config.json, and figures/*.png if pictures were drawn; those that are there are shown.
        template: a Jinja template.
        repo_id: the name to load the model by.

    Raises:
        ValueError: a file is missing, can't be read, or lacks what a finished run writes, or the template has a
            mistake; the message names it.
    """
    metrics, environment, settings, audit = (read_run_file(run / name, needed) for name, needed in NEEDED.items())
    config = read_run_file(folder / "config.json", ("id2label", "image_size", "num_channels", "problem_type"))
    model = metrics["models"][MODEL]
    test = model["splits"]["test"]
    is_control = is_control_run(settings["data"])
    data_set = _data_set(settings["data"])
    init = _initial_weights(settings["model"], environment)
    external = {name: split for key, split in model["splits"].items() if (name := _external_name(key))}
    about_external = read_run_file(run / "external.yaml", ("data",))["data"] if external else {}
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["chest-x-ray", "radiography", "medical-imaging", "inception-v3", "cxr-backbone"],
        base_model=init.hub_id,
        datasets=[data_set.hub_id] if data_set.hub_id else None,
        # Leaderboards don't read warnings: a control run tells them nothing.
        model_name=None if is_control else repo_id,
        eval_results=None if is_control else _eval_results(model["splits"], data_set),
    )
    said = dict(
        card_data=card_data.to_yaml(),
        repo_id=repo_id,
        config=config,
        labels=list(config["id2label"].values()),
        multi_label=config["problem_type"] == "multi_label_classification",
        settings=settings,
        environment=environment,
        audit=audit,
        metrics=metrics,
        model=model,
        test=test,
        external=external,
        external_provenance=about_external.get("provenance"),
        data_set=data_set,
        joint=_joint_set(run) if settings["joint"]["films"] else None,
        init=init,
        command=_command(environment["command"]),
        resolved=_resolved(settings),
        pictures=_pictures(folder / "figures", list(test["targets"])),
        comparison_table=partial(report.comparison_table, metrics),
        operating_points_table=partial(_operating_points_table, metrics),
        subgroups={
            name: table
            for name, split in {"the test split": test, **external}.items()
            if (table := report.subgroups_table(split["targets"]))
        },
        points=[point for its in test["targets"].values() for point in its["operating_points"]],
        giveaways={
            fact: found
            for fact, found in audit["metadata_baseline"]["facts"].items()
            if fact == "combined" or fact in audit["metadata_baseline"]["alarm"]
        },
        calibration_table=report.calibration_table,
        findings_table=report.findings_table,
        splits_table=_splits_table,
    )
    try:
        text = _ENVIRONMENT.from_string(template.read_text(encoding="utf-8")).render(said)
    except jinja2.TemplateError as error:
        raise ValueError(f"{template}, line {getattr(error, 'lineno', None) or '?'}: {error}") from error
    # A part that is left out leaves the blank lines around it.
    ModelCard(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").save(folder / "README.md")


def is_control_run(data: Mapping[str, Any]) -> bool:
    """Whether the data section of a run's config.yaml is that of a model which nobody must take for a real one: trained
    on noise, or chosen on its test split."""
    return bool(data.get("permute_labels")) or data.get("protocol") == "selected_on_test"


def read_run_file(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """A JSON or YAML file of a finished run.

    Args:
        needed: names that it must have, as in `data.format`.

    Raises:
        ValueError: it is missing, can't be read, or lacks one of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        trouble = "is not there" if isinstance(error, FileNotFoundError) else f"can't be read ({error})"
        raise ValueError(f"{path} {trouble}. Finish the run first.") from error
    for name in needed:
        found = content
        for key in name.split("."):
            if not isinstance(found, dict) or key not in found:
                raise ValueError(f"{path} lacks {name}. Finish the run first.")
            found = found[key]
    return content


class DataSet(NamedTuple):
    """What was trained on: its name in the card, its kind, its Hub id if it came from there, else what it was read
    from, unless that is the name."""

    name: str
    kind: str
    hub_id: str | None = None
    read_from: str | None = None


class JointSet(NamedTuple):
    """Films of another source that were learnt from beside the run's own: how many, and where they come from."""

    films: int
    provenance: str | None


class InitialWeights(NamedTuple):
    """Where training started: kind is random, hub, file or checkpoint (a folder)."""

    kind: str
    name: str
    hub_id: str | None = None
    sha256: str | None = None
    provenance: str | None = None


def _operating_points_table(metrics: dict[str, Any], split: str = "test") -> str:
    """As that of the report, and empty if there is no operating point."""
    targets = metrics["models"][MODEL]["splits"][split]["targets"].values()
    return report.operating_points_table(metrics, split) if any(its["operating_points"] for its in targets) else ""


def _splits_table(splits: Mapping[str, Any]) -> str:
    """How many films, patients and films of each label the splits have.

    Args:
        splits: of audit.json.
    """
    labels = list(dict.fromkeys(label for split in splits.values() for label in split["labels"]))
    rows = [["films", *(f"{split['films']:,}" for split in splits.values())]]
    patients = [split["patients"] for split in splits.values()]
    rows.append(["patients", *("not known" if number is None else f"{number:,}" for number in patients)])
    rows += [[label, *(f"{split['labels'].get(label, 0):,}" for split in splits.values())] for label in labels]
    return markdown_table(["", *splits], rows)


def _data_set(data: Mapping[str, Any]) -> DataSet:
    kind, source = data["format"], data["source"]
    if kind in _KNOWN_SETS:
        name, hub_id = _KNOWN_SETS[kind]
        if data["protocol"] not in (None, "official"):
            name += f", protocol {data['protocol']}"
        if source is None or source == hub_id:
            return DataSet(name, kind, source)
        return DataSet(name, kind, read_from=_public(source))  # a copy, of which nobody knows what was done to it
    # A folder of classes is always here; a table may be on the Hub.
    on_hub = kind == "table" and is_hub_id(source) and not source.endswith(_TABLE_SUFFIXES)
    return DataSet(_public(source), kind, source if on_hub else None)


def _joint_set(run: Path) -> JointSet:
    about = read_run_file(run / "joint.yaml", ("data",))["data"]
    with (run / "joint.csv").open(newline="", encoding="utf-8") as file:
        films = sum(1 for _ in csv.DictReader(file))
    return JointSet(films, about.get("provenance"))


def _initial_weights(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> InitialWeights:
    init = settings["init"]
    if init is None:
        return InitialWeights("random", "random")
    provenance = settings["init_provenance"]
    if sha256 := environment["initial_weights_sha256"]:
        kind = "file" if init.endswith(TORCH_SUFFIXES + KERAS_SUFFIXES) else "checkpoint"
        return InitialWeights(kind, PureWindowsPath(init).name, sha256=sha256, provenance=provenance)
    return InitialWeights("hub", init, hub_id=init, provenance=provenance)


def _eval_results(splits: Mapping[str, Any], data_set: DataSet) -> list[EvalResult]:
    """The figures that are defined, of the test split and of each external set."""
    results = []
    for split, its in splits.items():
        external = _external_name(split)
        if split != "test" and not external:
            continue
        num_targets = 1 if its["confusion_matrix"] is None else len(its["confusion_matrix"])
        for figure, found in its["figures"].items():
            if found["value"] is None:
                continue
            results.append(
                EvalResult(
                    task_type="image-classification",
                    task_name="Image classification",
                    dataset_type=external or data_set.hub_id or data_set.kind,
                    dataset_name=external or data_set.name,
                    dataset_split="external" if external else "test",  # without it, sets of one kind would be one
                    metric_type=_HUB_METRICS.get(figure, figure),
                    metric_name=_metric_name(figure, found, several_classes=num_targets > 2),
                    metric_value=round(found["value"], 4),
                )
            )
    return results


def _external_name(split: str) -> str:
    """`external nih_opacity` is nih_opacity; other splits have no such name."""
    return split.removeprefix("external ") if split.startswith("external ") else ""


def _metric_name(figure: str, found: Mapping[str, Any], *, several_classes: bool) -> str:
    name = report.figure_name(figure)
    name = name[0].upper() + name[1:]
    if several_classes and figure in ("f1", "auroc", "auprc"):
        name += ", mean of the classes"
    if found["low"] is None:
        return f"{name} (interval {NOT_DEFINED})"
    return f"{name} (95 % interval {found['low']:.3f} to {found['high']:.3f})"


def _pictures(figures: Path, targets: list[str]) -> dict[str, str]:
    """For each kind of picture those that are there, as Markdown; several of a kind can be opened by a click."""
    shown = {}
    for kind, about in PICTURES.items():
        found = []
        for path in figures.glob(f"{kind}*.png"):
            match = re.fullmatch(rf"{kind}(?:-(\d+)-\w*)?\.png", path.name, flags=re.ASCII)
            if match is None:
                continue
            target = f": {targets[int(match[1]) - 1]}" if match[1] else ""
            found.append((int(match[1] or 0), f"![{about}{target}](figures/{path.name})"))
        pictures = "\n\n".join(picture for _, picture in sorted(found))
        summary = f"<summary>{about}: {len(found)} pictures</summary>"
        shown[kind] = f"<details>{summary}\n\n{pictures}\n\n</details>" if len(found) > 1 else pictures
    return shown


def _command(argv: list[str]) -> str:
    """The command of a run for a shell, an option a line."""
    lines = [["accelerate", "launch", f"recipes/{argv[0]}"]]
    for word in argv[1:]:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(_public(word))
    return " \\\n    ".join(map(shlex.join, lines))


def _resolved(settings: Mapping[str, Any]) -> str:
    """The settings of a run as YAML, without what is not set and what changes nothing that is measured."""
    kept = {
        section: {name: value for name, value in settings[section].items() if value is not None and value != []}
        for section in ("run", "data", "model", "frozen", "fine_tuning", "joint", "evaluation")
    }
    if "films" not in kept["joint"]:
        del kept["joint"]
    kept["run"] = {name: value for name, value in kept["run"].items() if name in ("seed", "mixed_precision")}
    for section, names in {
        "data": ("cache_dir", "num_workers", "provenance"),
        "model": ("init_provenance",),
        "evaluation": ("report",),
    }.items():
        for name in names:
            kept[section].pop(name, None)
    shown = {
        section: {name: _public(value) if isinstance(value, str) else value for name, value in values.items()}
        for section, values in kept.items()
    }
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110).strip()


def _public(word: str) -> str:
    """A word of a command, with nothing but the last part of a path that tells where things are on this machine.
    Relative paths and Hub ids stay as they are."""
    option, separator, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if "://" in value:  # without an account, a password or a key
        address = urlsplit(value)
        return f"{option}{separator}{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
    for path in (PurePosixPath(value), PureWindowsPath(value)):
        if path.is_absolute() or ".." in path.parts or value.startswith(("~", "file:")):
            return option + separator + path.name
    return word


_TABLE_SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".parquet")
# Name, and Hub id of the copy that is `data.source` in the recipe's own config.
_KNOWN_SETS: dict[str, tuple[str, str | None]] = {
    "kermany": ("Chest X-Ray Images (Pneumonia)", "hf-vision/chest-xray-pneumonia"),
    "chestxray14": ("NIH ChestX-ray14", None),
    "pneumoniamnist": ("PneumoniaMNIST", None),
    "synthetic": ("Chest phantoms", None),
}
# Ids at https://huggingface.co/metrics of the same figure; others go by their own name.
_HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "mcc": "matthews_correlation",
    "brier": "brier_score",
    **dict.fromkeys(("auroc", "auroc_macro", "auroc_micro"), "roc_auc"),
}
PICTURES = {
    "learning_curves": "Training and validation loss of both phases",
    "roc": "ROC and precision-recall curves",
    "confusion": "Confusion matrices",
    "scores": "Histogram of scores",
    "reliability": "Reliability diagram",
    "inside_outside": "Test split and external films",
}
_ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["sentence"] = lambda text: " ".join(text.split()).removesuffix(".") + "."
_ENVIRONMENT.filters.update(figure=figure_text, figure_name=report.figure_name, counted=count_of)
