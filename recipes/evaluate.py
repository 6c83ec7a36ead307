"""Test a model: figures with intervals, predictions and a report, as at the end of two_stage.py.

    python recipes/evaluate.py --model runs/sample/fine_tuned --data runs/sample/config.yaml --output_dir runs/tested \\
        [--compare runs/sample/frozen] [--section.field value ...]

--model and --compare are folders or Hub ids; --data is a YAML file with a data section: the config of a training, or
the config.yaml of its run directory, which names the same validation and test films. What else can be set, such as
--data.source or --evaluation.external, is in `cxr_backbone.training.arguments`.

A model without a temperature or operating points gets them from the validation split, as in a training, and is saved
with them in <output_dir>/settled. One that has both is tested as it is.
"""

import argparse
import logging
import sys
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import disable_progress_bar

from cxr_backbone import CXRInceptionConfig
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.examine import Examiner
from cxr_backbone.training.films import (
    audit_films,
    check_classes,
    check_labels,
    check_not_trained_on,
    decode_external,
    decode_films,
    open_films,
)
from cxr_backbone.training.hardware import choose_precision, use_threads
from cxr_backbone.training.state import RunDirectory, read_log


def main() -> None:
    given, others = parse_command_line(sys.argv[1:])
    disable_progress_bar()  # of loading and saving
    try:
        arguments, run, films, external, report = prepare(given, others)
        use_threads(arguments.run.cpu_threads)
        accelerator = Accelerator(mixed_precision=arguments.run.mixed_precision)
        batch_size, seed = arguments.frozen.batch_size, arguments.run.seed
        examiner = Examiner(accelerator, arguments.evaluation, batch_size=batch_size, seed=seed)
        sources = [source for source in (given.compare, given.model) if source]
        candidates = {name_of(source, sources): examiner.load(source) for source in sources}
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"evaluate.py: {' '.join(str(error).split())}")

    run.start(arguments, films, report, accelerator)
    validation = films.splits["validation"]
    for name, candidate in candidates.items():
        if candidate.config.temperature is None or candidate.config.operating_points is None:
            examiner.settle(candidate, validation)
            if accelerator.is_main_process:
                candidate.save(run.path / "settled" / name)
    test = films.open_test(*(candidate.config for candidate in candidates.values()))
    splits = {"train": films.train_sample, "validation": validation, "test": test, **external}
    predictions = examiner.ask(candidates, splits)
    if accelerator.is_main_process:
        folder = Path(given.model)
        log = read_log(folder.parent) if folder.name == "fine_tuned" else []  # a run's log is that of its last model
        examiner.write(run, candidates, predictions, test, log=log)


def parse_command_line(argv):
    """What this recipe asks for by name, and the words that are fields of sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--compare", help="folder or Hub id of a model to measure it against")
    parser.add_argument("--data", required=True, help="YAML file with a data section")
    parser.add_argument("--output_dir", required=True, help="must be new or empty")
    return parser.parse_known_args(argv)


def prepare(given, others):
    """The resolved arguments, the directory of results, the decoded films, those of another source, and the audit."""
    arguments = parse_arguments([given.data, "--run.output_dir", given.output_dir, *others])
    arguments.run.mixed_precision = choose_precision(arguments.run.mixed_precision)
    if given.compare and Path(given.compare).resolve() == Path(given.model).resolve():
        raise ValueError(f"--compare is the same as --model, {given.model}; expected another model.")
    run = RunDirectory(given.output_dir)
    config = CXRInceptionConfig.from_pretrained(given.model)
    other = CXRInceptionConfig.from_pretrained(given.compare or given.model)
    if other.image_size != config.image_size:
        raise ValueError(
            f"--compare takes images of {other.image_size} pixels, --model of {config.image_size}; expected the same."
        )
    settings = {"image_size": config.image_size, "seed": arguments.run.seed}
    films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    for model_config in (config, other):
        check_labels(films.train_sample.features, model_config, given.data)
    check_classes(films.splits, arguments.data)
    check_not_trained_on(films, Path(given.model).parent / "split.csv")
    external = decode_external(arguments.evaluation, config)
    return arguments, run, films, external, audit_films(films, arguments.data)


def name_of(source, sources):
    """The last part of a folder or Hub id; all of it if two models have the same. Files are called so, too."""
    names = [Path(each).resolve().name for each in sources]
    return Path(source).resolve().name if len(set(names)) == len(names) else source.strip("/").replace("/", "-")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
