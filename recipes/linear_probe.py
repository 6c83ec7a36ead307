"""A linear probe: logistic regression on the features of a frozen backbone, nothing else trained.

    python recipes/linear_probe.py recipes/configs/table.yaml --model.init path/or/id [--section.field value ...]

Takes the configs of two_stage.py; of their sections `frozen` gives only the batch size, and `fine_tuning` nothing. C is
chosen by cross-validation within train, with each patient in one fold. Validation gives the temperature and the
operating points. Ends as two_stage.py does: a model that the pipeline opens (<run.output_dir>/linear_probe), figures
on the test split, a report.
"""

import logging
import sys

from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import disable_progress_bar

from cxr_backbone.data.labels import is_multi_label, label_names
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.examine import Candidate, Examiner
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.films import audit_films, check_classes, decode_external, decode_films, open_films
from cxr_backbone.training.hardware import choose_precision, use_threads
from cxr_backbone.training.probe import fit_probe
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import RunDirectory


def main() -> None:
    disable_progress_bar()  # of loading and saving
    try:
        arguments, run, films, external, report, model, image_processor = prepare(sys.argv[1:])
        accelerator = Accelerator(mixed_precision=arguments.run.mixed_precision)
        run.start(arguments, films, report, accelerator)
        features, labels = extract_features(
            model.cxr_inception,
            films.train,
            image_processor,
            accelerator,
            batch_size=arguments.frozen.batch_size,
            cache_dir=run.path / "features",
        )
        patients = films.splits["train"]["patient_id"][:]
        model.classifier.output_layer, strengths = fit_probe(features, labels, patients, seed=arguments.run.seed)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"linear_probe.py: {' '.join(str(error).split())}")
    print(f"C, chosen by cross-validation: {', '.join(f'{strength:g}' for strength in strengths)}")

    examiner = Examiner(
        accelerator, arguments.evaluation, batch_size=arguments.frozen.batch_size, seed=arguments.run.seed
    )
    candidate = Candidate(model.to(accelerator.device).eval(), image_processor)
    examiner.settle(candidate, films.splits["validation"])
    candidate.save(run.path / "linear_probe")
    examiner.fit_guard(candidate, films.train_sample, films.splits["validation"]).save(run.path / "linear_probe")
    test = films.open_test(candidate.config)
    splits = {"train": films.train_sample, "validation": films.splits["validation"], "test": test, **external}
    candidates = {"linear_probe": candidate}
    examiner.write(run, candidates, examiner.ask(candidates, splits), test, log=[])


def prepare(argv):
    """The resolved arguments, the run directory, the decoded films, those of another source, the audit, the model and
    its image processor."""
    arguments = parse_arguments(argv)
    arguments.run.mixed_precision = choose_precision(arguments.run.mixed_precision)
    if arguments.data.streaming:
        raise ValueError("data.streaming=True is not allowed; a probe cross-validates on the films of a table.")
    if arguments.model.head_hidden_sizes:
        raise ValueError("model.head_hidden_sizes is not allowed; a linear probe has no hidden layers.")
    run = RunDirectory(arguments.run.output_dir)
    set_seed(arguments.run.seed)
    use_threads(arguments.run.cpu_threads)
    settings = {"image_size": arguments.model.image_size, "seed": arguments.run.seed}
    films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    features = films.splits["train"].features
    model, image_processor = start_model(arguments.model, label_names(features), multi_label=is_multi_label(features))
    check_classes(films.splits, arguments.data)
    external = decode_external(arguments.evaluation, model.config)
    return arguments, run, films, external, audit_films(films, arguments.data), model, image_processor


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
