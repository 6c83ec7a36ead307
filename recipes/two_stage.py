"""Transfer learning in two phases: first the head on a frozen backbone, then the whole network.

    accelerate launch recipes/two_stage.py recipes/configs/pneumonia.yaml [--section.field value ...]

Everything it does is in the run directory (run.output_dir); what can be set is in `cxr_backbone.training.arguments`.
"""

import logging
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.data.labels import is_multi_label, label_names
from cxr_backbone.data.shards import Stream
from cxr_backbone.hub import check_push_access, check_repo_id, publish
from cxr_backbone.package import assemble, check_worth_publishing
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.examine import Candidate, Examiner
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.films import audit_films, check_classes, decode_external, decode_films, open_films
from cxr_backbone.training.hardware import choose_precision, use_threads
from cxr_backbone.training.phases import fine_tune, fit_head
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import RunDirectory

ROOT = Path(__file__).parents[1]


def main() -> None:
    # Everything that can be wrong with what was asked for comes to light here, before any training.
    try:
        arguments, run, films, external, report, model, image_processor = prepare(sys.argv[1:])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"two_stage.py: {' '.join(str(error).split())}")
    seed, batch_size = arguments.run.seed, arguments.frozen.batch_size
    validation = films.splits["validation"]

    disable_progress_bar()  # of saving and loading; training has its own
    use_threads(arguments.run.cpu_threads)
    accelerator = Accelerator(
        mixed_precision=arguments.run.mixed_precision,
        gradient_accumulation_steps=arguments.fine_tuning.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        log_with=None if arguments.run.report_to == "none" else arguments.run.report_to,
        project_dir=run.path,
    )
    accelerator.init_trackers("cxr-backbone")
    run.start(arguments, films, report, accelerator)
    model.to(accelerator.device, memory_format=torch.channels_last)

    def log(**values):
        if accelerator.is_main_process:
            run.log(**values)
        numbers = {f"{values['phase']}/{name}": value for name, value in values.items() if isinstance(value, float)}
        accelerator.log(numbers, step=values.get("step", values.get("after_steps")))

    def save(trained, folder):
        if accelerator.is_main_process:
            Candidate(trained, image_processor).save(folder)

    def save_evaluated(trained, steps, is_best):
        if accelerator.is_main_process:
            run.keep_checkpoint(trained, steps)
        if is_best:
            save(trained, run.fine_tuned)

    # Phase one: the backbone is frozen, so each image goes through it once; the head is fitted to the features.
    started = time.perf_counter()
    model.freeze_backbone()
    features, labels = {}, {}
    for split, rows in (("train", films.train), ("validation", validation)):
        features[split], labels[split] = extract_features(
            model.cxr_inception,
            rows,
            image_processor,
            accelerator,
            batch_size=batch_size,
            cache_dir=run.path / "features",
        )
    fit_head(
        model,
        features["train"],
        labels["train"],
        features["validation"],
        labels["validation"],
        arguments.frozen,
        log,
    )
    save(model, run.frozen)
    seconds = {"frozen": time.perf_counter() - started}

    # Phase two: all weights, lower stages at lower rates; the best by validation loss is kept.
    started = time.perf_counter()
    fine_tune(
        model,
        films.train,
        validation,
        image_processor,
        accelerator,
        arguments.fine_tuning,
        seed=seed,
        log=log,
        save=save_evaluated,
    )
    seconds["fine_tuned"] = time.perf_counter() - started
    accelerator.wait_for_everyone()

    # Validation fixes the temperature and the operating points of both models. The test split does not open before.
    examiner = Examiner(accelerator, arguments.evaluation, batch_size=batch_size, seed=seed)
    candidates = {folder.name: examiner.load(folder) for folder in (run.frozen, run.fine_tuned)}
    for name, candidate in candidates.items():
        examiner.settle(candidate, validation)
        save(candidate.model, run.path / name)
    test = films.open_test(*(candidate.config for candidate in candidates.values()))
    splits = {"train": films.train_sample, "validation": validation, "test": test}
    predictions = examiner.ask(candidates, splits | external)
    trained = Candidate(accelerator.unwrap_model(model), image_processor)
    measured = {"train": films.train_sample, "test": test}  # validation is in the log already
    for line in examiner.checkpoint_losses(run.checkpoints, trained, measured):
        log(phase="checkpoints", **line)

    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    examiner.write(run, candidates, predictions, test, log=run.read_log(), seconds=seconds)
    shutil.rmtree(run.checkpoints)
    classify = pipeline("image-classification", model=str(run.fine_tuned), trust_remote_code=False)
    film = Image.fromarray(stack_pixels([test[0]])[0])
    print(f"{run.fine_tuned} says of a test image labelled {label_text(test)}:")
    print(classify(film))
    try:
        repo_id = arguments.run.hub_model_id or "your-name/cxr-inception"
        package = assemble(run.path, repo_id=repo_id, template=ROOT / "model_card.md", licence=ROOT / "LICENSE")
        if arguments.run.push_to_hub:
            print(f"Published: {publish(package, repo_id, private=arguments.run.hub_private_repo)}")
    except (ValueError, OSError) as error:
        sys.exit(f"two_stage.py: {run.path} is complete, but not published: {error} See recipes/publish.py.")


def prepare(argv):
    """The resolved arguments, the run directory, the decoded films, those of another source, the audit, the model and
    its image processor."""
    arguments = parse_arguments(argv)
    arguments.run.mixed_precision = choose_precision(arguments.run.mixed_precision)
    set_seed(arguments.run.seed)
    run = RunDirectory(arguments.run.output_dir)
    if repo_id := arguments.run.hub_model_id:
        check_repo_id(repo_id)
        if arguments.run.push_to_hub:
            check_worth_publishing(asdict(arguments.data))
            check_push_access(repo_id, private=arguments.run.hub_private_repo)

    settings = {"image_size": arguments.model.image_size, "seed": arguments.run.seed}
    opened = open_films(arguments.data, **settings)
    features = opened.features if isinstance(opened, Stream) else opened["train"].features
    names = label_names(features)
    model, image_processor = start_model(arguments.model, names, multi_label=is_multi_label(features))
    external = decode_external(arguments.evaluation, model.config)
    films = decode_films(opened, arguments.data, **settings)
    check_classes(films.splits, arguments.data)
    if len(films.train) < arguments.fine_tuning.batch_size:
        raise ValueError(
            f"fine_tuning.batch_size={arguments.fine_tuning.batch_size} is more than the "
            f"{len(films.train)} images to train on."
        )
    report = audit_films(films, arguments.data)
    return arguments, run, films, external, report, model, image_processor


def label_text(rows):
    """The label of the first film in words."""
    label, names = rows[0]["label"], rows.features["label"]
    if isinstance(label, dict):
        return ", ".join(name for name, value in label.items() if value == 1) or "none of the findings"
    return names.int2str(label)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
