"""What a run can be told: a dataclass for each section of the YAML file; each field is also `--section.field`."""

import difflib
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from cxr_backbone.data.sources import LOADERS


@dataclass
class RunArguments:
    output_dir: str = field(metadata={"help": "run directory; must be new or empty"})
    seed: int = field(
        default=0, metadata={"help": "decides the validation split, the head's start, order and augmentation"}
    )
    mixed_precision: str = field(
        default="auto", metadata={"help": "no, fp16, bf16, or auto: bf16 where the hardware multiplies it"}
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "threads a process (default: without a GPU, all cores shared among the processes)"},
    )
    save_minutes: float = field(
        default=5.0, metadata={"help": "minutes of training between checkpoints, from which a stopped run goes on"}
    )
    deterministic: bool = field(
        default=False, metadata={"help": "GPU kernels that give the same result each time; slower"}
    )
    report_to: str = field(
        default="none", metadata={"help": "a tracker of Accelerate (tensorboard, wandb, trackio), or none"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "upload the final folder when the run is done"})
    hub_model_id: str | None = field(default=None, metadata={"help": "org/name on the Hub"})
    hub_private_repo: bool = field(default=False, metadata={"help": "make that repository private, if it is new"})

    def __post_init__(self):
        _require(
            self.mixed_precision in ("auto", "no", "fp16", "bf16"),
            "run.mixed_precision",
            self.mixed_precision,
            "auto, no, fp16 or bf16",
        )
        _require_at_least(self, "run", cpu_threads=1, save_minutes=0)
        trackers = ("none", "tensorboard", "wandb", "trackio")
        _require(self.report_to in trackers, "run.report_to", self.report_to, ", ".join(trackers))
        allowed = not self.push_to_hub or self.hub_model_id is not None
        _require(allowed, "run.hub_model_id", None, "org/name on the Hub, for run.push_to_hub")


@dataclass
class DataArguments:
    """Where the films come from. Fields that default to nothing are for some formats only; docs/data.md says which."""

    format: str = field(metadata={"help": ", ".join(LOADERS)})
    source: str | None = field(default=None, metadata={"help": "a folder, a file, or a Hub id; synthetic has none"})
    provenance: str | None = field(
        default=None, metadata={"help": "for the card: where the films come from, whom they show, and their licence"}
    )
    streaming: bool = field(default=False, metadata={"help": "train from shards without a decoded copy on disk"})
    num_workers: int = field(
        default=0, metadata={"help": "processes that decode: a set, once; a stream, ahead of training"}
    )
    num_folds: int | None = field(default=None, metadata={"help": "parts that train is dealt out to (10)"})
    fold: int | None = field(default=None, metadata={"help": "which part is held out for validation (0)"})
    split_file: str | None = field(default=None, metadata={"help": "split.csv of an earlier run, to be repeated"})
    protocol: str | None = field(
        default=None,
        metadata={"help": "kermany: official, pooled_by_image, pooled_by_patient or selected_on_test (official)"},
    )
    permute_labels: bool = field(
        default=False, metadata={"help": "a control run: train and validation get noise for labels"}
    )
    task: str | None = field(default=None, metadata={"help": "chestxray14: findings, or pneumonia (CheXNet's)"})
    num_patients: int | None = field(default=None, metadata={"help": "synthetic: patients to draw (300)"})
    image_column: str | None = field(default=None, metadata={"help": "table: path or bytes of the film (image)"})
    label_columns: list[str] = field(
        default_factory=list, metadata={"help": "table: one column of classes, or several findings"}
    )
    label_names: list[str] = field(
        default_factory=list, metadata={"help": "table, imagefolder: classes, index 0 first (sorted)"}
    )
    label_values: list[str] = field(
        default_factory=list,
        metadata={"help": "table: value=CLASS for each value that names a class; films with others are left out"},
    )
    subgroup_columns: list[str] = field(
        default_factory=list, metadata={"help": "table: what divides the films into subgroups, such as age or view"}
    )
    patient_column: str | None = field(default=None, metadata={"help": "table: (patient_id); '' if there is none"})
    patient_pattern: str | None = field(
        default=None, metadata={"help": "table, imagefolder: regular expression that finds the patient in the path"}
    )
    split_column: str | None = field(default=None, metadata={"help": "table: train, validation or test"})
    images_dir: str | None = field(default=None, metadata={"help": "table: what its paths start from (its folder)"})
    uncertain: str | None = field(default=None, metadata={"help": "labels of -1: ignore, zeros or ones (ignore)"})
    missing: str | None = field(default=None, metadata={"help": "blank labels: ignore, zeros or ones (ignore)"})
    decoding: str = field(
        default="exact", metadata={"help": "exact, or reduced: JPEG decoded near the target size, faster and inexact"}
    )
    unreadable: str = field(default="fatal", metadata={"help": "a film that can't be read is fatal, or: skip"})
    allow_leaks: list[str] = field(
        default_factory=list, metadata={"help": "patients, duplicates: what may stand in two splits"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "where decoded images are kept (default: the datasets cache)"}
    )

    def __post_init__(self):
        for name, choices in {
            "format": tuple(LOADERS),
            "decoding": ("exact", "reduced"),
            "unreadable": ("fatal", "skip"),
        }.items():
            _require(getattr(self, name) in choices, f"data.{name}", getattr(self, name), ", ".join(choices))
        for leak in self.allow_leaks:
            _require(leak in ("patients", "duplicates"), "data.allow_leaks", leak, "patients, duplicates")
        _require(
            (self.source is None) == (self.format == "synthetic"),
            "data.source",
            self.source,
            "a folder, a file or a Hub id (and nothing for data.format synthetic)",
        )
        _require(not self.streaming or self.format == "table", "data.format", self.format, "table, for data.streaming")
        _require(not (self.permute_labels and self.streaming), "data.permute_labels", True, "false, for data.streaming")
        _require(self.fold is None or self.split_file is None, "data.fold", self.fold, "nothing beside data.split_file")
        _require_at_least(self, "data", num_workers=0)


@dataclass
class ModelArguments:
    init: str | None = field(
        default=None,
        metadata={
            "help": "Inception V3 weights (Hub id or file), a CXRInception checkpoint, or nothing: start at random"
        },
    )
    init_provenance: str | None = field(
        default=None, metadata={"help": "for the card: where a weights file comes from, and its licence"}
    )
    image_size: int = field(default=299, metadata={"help": "pixels"})
    num_channels: int = field(default=1, metadata={"help": "1 or 3"})
    depth_multiplier: float | None = field(
        default=None, metadata={"help": "scales the width of every layer (1, or a checkpoint's own)"}
    )
    dropout: float = field(default=0.2, metadata={"help": "in the head"})
    head_hidden_sizes: list[int] = field(default_factory=list, metadata={"help": "extra hidden layers of the head"})
    label_smoothing: float = field(default=0.0, metadata={"help": "of the training loss"})
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "that a bare weights file expects, [0, 1] scale"}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "that a bare weights file expects, [0, 1] scale"}
    )
    avg_pool_count_include_pad: bool | None = field(
        default=None, metadata={"help": "false for weights that come from Keras"}
    )

    def __post_init__(self):
        allowed = self.init_provenance is None or self.init is not None
        _require(allowed, "model.init_provenance", self.init_provenance, "nothing without model.init")


@dataclass
class FrozenArguments:
    """Phase one. The head is fitted at each strength until its loss stands still; validation loss picks one."""

    l2_strengths: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        metadata={
            "help": "L2 penalties to try on the head's weights (features centred, and scaled to unit variance together)"
        },
    )
    max_iterations: int = field(default=1000, metadata={"help": "of L-BFGS, a strength"})
    batch_size: int = field(default=64, metadata={"help": "images per forward pass of the frozen backbone"})
    augmented_views: int = field(
        default=0,
        metadata={
            "help": "of each film that the head sees too, as fine_tuning.augmentation and fine_tuning.stretch say"
        },
    )

    def __post_init__(self):
        allowed = bool(self.l2_strengths) and min(self.l2_strengths) >= 0
        _require(allowed, "frozen.l2_strengths", self.l2_strengths, "one or more penalties of 0 or more")
        _require_at_least(self, "frozen", max_iterations=1, batch_size=1, augmented_views=0)


@dataclass
class FineTuningArguments:
    """Phase two. All weights are trained; the checkpoint with the lowest validation loss is kept."""

    epochs: int = field(default=4, metadata={"help": "at most"})
    batch_size: int = field(default=32, metadata={"help": "images a process and forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes a step"})
    learning_rate: float = field(default=3e-4, metadata={"help": "peak, of the head"})
    stage_decay: float = field(
        default=0.7, metadata={"help": "factor on the learning rate for each stage down from the head"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW; not on biases and BatchNorm"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps; cosine decay to 0 after it"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.99, metadata={"help": "of the moving average of the weights that is evaluated and kept"}
    )
    augmentation: float = field(default=1.0, metadata={"help": "strength in [0, 1]; 0 turns it off"})
    stretch: bool = field(default=False, metadata={"help": "augmentation scales width and height apart"})
    start_scale: float = field(
        default=1.0, metadata={"help": "size of the first epoch's images, 1 the last's; between them they grow"}
    )
    evaluations_per_epoch: int = field(default=2, metadata={"help": "looks at the validation split"})
    perturbed_validation: bool = field(
        default=False,
        metadata={"help": "of these looks, the loss on augmented views chooses, and not that on the films as they are"},
    )
    patience: int = field(default=4, metadata={"help": "evaluations without a lower validation loss before stopping"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, more time"})
    freeze_batch_norm: bool = field(
        default=False, metadata={"help": "train with BatchNorm's statistics of the start, and leave them as they are"}
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "BatchNorm over the batches of all processes together (GPUs only)"}
    )
    nonfinite: str = field(
        default="stop", metadata={"help": "at a loss or gradient that is NaN or infinite: stop, or skip the batch"}
    )

    def __post_init__(self):
        # In a batch of one, BatchNorm would take every image for its own mean.
        _require_at_least(self, "fine_tuning", epochs=1, batch_size=2, gradient_accumulation_steps=1)
        _require_at_least(self, "fine_tuning", evaluations_per_epoch=1, patience=1, weight_decay=0)
        _require(self.nonfinite in ("stop", "skip"), "fine_tuning.nonfinite", self.nonfinite, "stop or skip")
        for name in ("learning_rate", "stage_decay", "max_grad_norm", "start_scale"):
            _require(getattr(self, name) > 0, f"fine_tuning.{name}", getattr(self, name), "above 0")
        for name in ("augmentation", "ema_decay", "warmup_ratio", "start_scale"):
            _require(0 <= getattr(self, name) <= 1, f"fine_tuning.{name}", getattr(self, name), "in [0, 1]")


@dataclass
class JointArguments:
    """Joint training: what phase two learns beside the labels, each thing by a head that is thrown away in the end.
    Films of another source keep the backbone from forgetting what is not in the run's own; each of their labels and
    subgroups gets a head."""

    subgroups: list[str] = field(
        default_factory=list, metadata={"help": "columns of the run's own films that get a head too, such as subtype"}
    )
    films: str | None = field(default=None, metadata={"help": "YAML file whose data section names them"})
    films_source: str | None = field(default=None, metadata={"help": "its data.source, where that is elsewhere"})
    batch_size: int = field(default=16, metadata={"help": "of them, beside each fine_tuning.batch_size films"})
    weight: float = field(default=1.0, metadata={"help": "of the mean of the heads' losses, beside that of the labels"})

    def __post_init__(self):
        _require_at_least(self, "joint", batch_size=1, weight=0)
        allowed = self.films_source is None or self.films is not None
        _require(allowed, "joint.films_source", self.films_source, "nothing without joint.films")


@dataclass
class EvaluationArguments:
    """What is measured in the end, and on what."""

    perturbed_views: int = field(
        default=0,
        metadata={
            "help": "temperature and operating points come from this many augmented views of each validation film; "
            "0: from the films as they are"
        },
    )
    external: str | None = field(
        default=None, metadata={"help": "YAML file whose data section names films of another source to test on"}
    )
    external_source: str | None = field(default=None, metadata={"help": "its data.source, where that is elsewhere"})
    resamples: int = field(default=2000, metadata={"help": "of the patients, for the intervals"})
    report: bool = field(default=True, metadata={"help": "draw report.html (needs the extra `report`)"})

    def __post_init__(self):
        _require_at_least(self, "evaluation", perturbed_views=0, resamples=100)
        allowed = self.external_source is None or self.external is not None
        _require(allowed, "evaluation.external_source", self.external_source, "nothing without evaluation.external")
        if self.report and (lacking := [name for name in ("matplotlib", "captum") if find_spec(name) is None]):
            raise ValueError(
                f"evaluation.report needs {lacking[0]}: pip install 'cxr-backbone[report]'; without: "
                "--evaluation.report false"
            )


@dataclass
class Arguments:
    run: RunArguments
    data: DataArguments
    model: ModelArguments
    frozen: FrozenArguments
    fine_tuning: FineTuningArguments
    joint: JointArguments
    evaluation: EvaluationArguments


def parse_arguments(argv: list[str]) -> Arguments:
    """`config.yaml --section.field value …` as `Arguments`; the command line wins over the file.

    Raises:
        FileNotFoundError: if there is no such YAML file.
        ValueError: for a section or field that does not exist, or a value of the wrong type. The message names it.
    """
    if not argv or argv[0].startswith("-"):
        raise ValueError("The first argument must be a YAML file, for example recipes/configs/pneumonia.yaml.")
    settings = _read_yaml(Path(argv[0]))
    for name, value in _read_overrides(argv[1:]).items():
        section, _, key = name.partition(".")
        settings.setdefault(section, {})[key] = value

    sections = {section.name: section.type for section in fields(Arguments)}
    for name in settings:
        if name not in sections:
            raise ValueError(f"There is no section {name!r}{_did_you_mean(name, sections)}")
    return Arguments(**{name: _parse_section(name, kind, settings.get(name, {})) for name, kind in sections.items()})


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if isinstance(settings, dict):
        settings = {name: {} if section is None else section for name, section in settings.items()}
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise ValueError(f"{path}: expected sections (run, data, model, …) with fields under each.")
    return settings


def _read_overrides(argv: list[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            name, separator, value = token[2:].partition("=")
            if "." not in name:
                raise ValueError(
                    f"--{name} is not known; fields are given as --section.field, for example --run.seed 1."
                )
            overrides[name] = [value] if separator else []
        elif name is None:
            raise ValueError(f"{token!r} does not belong to any --section.field.")
        else:
            overrides[name].append(token)
    for name, values in overrides.items():
        if not values:
            raise ValueError(f"--{name} needs a value, for example --run.push_to_hub true.")
    return overrides


def _parse_section(name: str, kind: Any, settings: dict[str, Any]) -> Any:
    known = {item.name: str(item.type) for item in fields(kind)}
    tokens = []
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"There is no field {name}.{key}{_did_you_mean(key, known)}")
        if value in (None, [], ["null"]):  # the field's default
            continue
        if key == "mixed_precision" and value is False:  # YAML reads a bare no as false
            value = "no"
        values = value if isinstance(value, list) else [value]
        # Lists of lists, by way of YAML's aliases, can stand for more than any memory holds.
        if any(isinstance(item, list | dict) for item in values):
            raise ValueError(f"{name}.{key} holds lists or fields of its own; expected one value, or a list of values.")
        _require(len(values) == 1 or "list" in known[key], f"{name}.{key}", values, "one value")
        tokens += [f"--{key}", *map(str, values)]
    return _SectionParser(kind, prog=name).parse_args_into_dataclasses(args=tokens, look_for_args_file=False)[0]


class _SectionParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print its usage and exit
        raise ValueError(f"In section {self.prog!r}: {message}")


def _did_you_mean(name: str, known) -> str:
    guess = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {guess[0]!r}?" if guess else f"; known are {', '.join(sorted(known))}."


def _require(allowed: bool, name: str, value: object, expected: str) -> None:
    if not allowed:
        raise ValueError(f"{name}={value!r} is not allowed; expected {expected}.")


def _require_at_least(section: Any, section_name: str, **lowest: int) -> None:
    for name, limit in lowest.items():
        value = getattr(section, name)
        _require(value is None or value >= limit, f"{section_name}.{name}", value, f"{limit} or more")
