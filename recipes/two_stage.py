"""Transfer learning in two phases: first the head on a frozen backbone, then the whole network.

    accelerate launch recipes/two_stage.py recipes/configs/pneumonia.yaml [--section.field value ...]

Everything it does is in the run directory (run.output_dir); what can be set is in `cxr_backbone.training.arguments`.
Stopped at any moment, the same command goes on from the last checkpoint and ends in the same weights.
"""

import logging
import sys
from dataclasses import asdict
from functools import partial
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
from cxr_backbone.training.examine import Candidate, Examiner, chosen_evaluation
from cxr_backbone.training.features import View, extract_features
from cxr_backbone.training.films import (
    audit_films,
    check_classes,
    decode_external,
    decode_films,
    decode_joint,
    open_films,
)
from cxr_backbone.training.hardware import choose_precision, join_processes, use_deterministic_kernels, use_threads
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.nonfinite import NonfiniteError
from cxr_backbone.training.phases import fine_tune, fit_head
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import TrainingRun, read_log

ROOT = Path(__file__).parents[1]


def main() -> None:
    interruption = Interruption()
    # Everything that can be wrong with what was asked for comes to light here, before any training.
    try:
        arguments, run, films, external, report, model, image_processor = prepare(sys.argv[1:])
        accelerator = Accelerator(
            mixed_precision=arguments.run.mixed_precision,
            gradient_accumulation_steps=arguments.fine_tuning.gradient_accumulation_steps,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.run.seed),
            log_with=None if arguments.run.report_to == "none" else arguments.run.report_to,
            project_dir=run.path,
        )
        run.start(arguments, films, report, accelerator)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"two_stage.py: {' '.join(str(error).split())}")
    try:
        train(run, films, external, model, image_processor, accelerator, interruption)
    except NonfiniteError as error:
        sys.exit(f"two_stage.py: {error}")
    except OSError as error:  # no room on the disk, say
        sys.exit(f"two_stage.py: {error} What {run.path} holds is whole: put this right, and the same command goes on.")


def train(run, films, external, model, image_processor, accelerator, interruption):
    """Both phases, and what is measured in the end; or what is left of it, if the run was stopped."""
    arguments, validation = run.arguments, films.splits["validation"]
    batch_size = arguments.frozen.batch_size
    accelerator.init_trackers("cxr-backbone")
    model.to(accelerator.device, memory_format=torch.channels_last)
    state = run.newest_state()  # there is one from phase two on

    # Phase one: the backbone is frozen, so each image goes through it once; the head is fitted to the features.
    if state is None:
        with run.timed("frozen"):
            model.freeze_backbone()
            extract = partial(
                extract_features,
                backbone=model.cxr_inception,
                image_processor=image_processor,
                accelerator=accelerator,
                batch_size=batch_size,
                cache_dir=run.path / "features",
            )
            tuning, seed = arguments.fine_tuning, arguments.run.seed
            numbers = range(arguments.frozen.augmented_views)
            views = [None, *(View(number, tuning.augmentation, seed, tuning.stretch) for number in numbers)]
            of_train = [extract(films=films.train, view=view) for view in views]
            fit_head(model, of_train, extract(films=validation), arguments.frozen, run.log)
            run.save_model(run.frozen, model, image_processor)

    # Phase two: all weights, lower stages at lower rates; the best by validation loss is kept.
    with run.timed("fine_tuned"):
        fine_tune(
            model,
            films.train,
            validation,
            image_processor,
            accelerator,
            arguments.fine_tuning,
            run=run,
            interruption=interruption,
            joint=films.joint,
            state=state,
        )
    accelerator.wait_for_everyone()

    # Validation fixes the temperature and the operating points of both models. The test split does not open before.
    # (Both are taken from their evaluations: if this was stopped before, frozen/ and fine_tuned/ have theirs already.)
    examiner = Examiner(accelerator, arguments.evaluation, batch_size=batch_size, seed=arguments.run.seed)
    candidates = {}
    for folder, steps in ((run.frozen, 0), (run.fine_tuned, chosen_evaluation(read_log(run.path)))):
        weights = run.evaluated / f"{steps:09d}.safetensors"
        candidate = candidates[folder.name] = examiner.restore(weights, model.config, image_processor)
        examiner.settle(candidate, validation)
        run.save_model(folder, candidate.model, image_processor)
    guard = examiner.fit_guard(candidates["fine_tuned"], films.train_sample, validation)
    if accelerator.is_main_process:
        guard.save(run.fine_tuned)
    test = films.open_test(*(candidate.config for candidate in candidates.values()))
    splits = {"train": films.train_sample, "validation": validation, "test": test}
    predictions = examiner.ask(candidates, splits | external)
    trained = Candidate(accelerator.unwrap_model(model), image_processor)
    measured = {"train": films.train_sample, "test": test}  # validation is in the log already
    for line in examiner.checkpoint_losses(run.evaluated, trained, measured):
        run.log(phase="checkpoints", **line)

    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    examiner.write(run, candidates, predictions, test, log=read_log(run.path), seconds=run.seconds)
    classify = pipeline("image-classification", model=str(run.fine_tuned), trust_remote_code=False)
    film = Image.fromarray(stack_pixels([test[0]])[0])
    print(f"{run.fine_tuned} says of a test image labelled {label_text(test)}:")
    print(classify(film))
    repo_id = arguments.run.hub_model_id or "your-name/cxr-inception"
    try:
        package = assemble(run.path, repo_id=repo_id, template=ROOT / "model_card.md", licence=ROOT / "LICENSE")
    except ValueError as error:
        sys.exit(f"two_stage.py: {error} Put this right, and the same command goes on.")
    run.complete()
    if arguments.run.push_to_hub:
        try:
            print(f"Published: {publish(package, repo_id, private=arguments.run.hub_private_repo)}")
        except (ValueError, OSError) as error:
            sys.exit(f"two_stage.py: {run.path} is complete, but not published: {error} See recipes/publish.py.")


def prepare(argv):
    """The resolved arguments, the run directory, the decoded films, those of another source, the audit, the model and
    its image processor."""
    arguments = parse_arguments(argv)
    arguments.run.mixed_precision = choose_precision(arguments.run.mixed_precision)
    run = TrainingRun(arguments)
    if run.is_complete:
        print(f"{run.path} is complete. To train again, choose a new run.output_dir.")
        sys.exit(0)
    processes = join_processes()
    if processes.is_main_process and run.path.exists():
        run.claim()
    if arguments.fine_tuning.sync_batch_norm and not torch.cuda.is_available():
        raise ValueError("fine_tuning.sync_batch_norm=True needs GPUs; torch has no such BatchNorm for CPUs.")
    if arguments.run.deterministic:
        use_deterministic_kernels()
    set_seed(arguments.run.seed)
    use_threads(arguments.run.cpu_threads)
    disable_progress_bar()  # of saving and loading; training has its own
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
    films.joint = decode_joint(arguments.joint, films, **settings)
    check_classes(films.splits, arguments.data)
    if len(films.train) < arguments.fine_tuning.batch_size * processes.num_processes:
        raise ValueError(
            f"fine_tuning.batch_size={arguments.fine_tuning.batch_size} in each of {processes.num_processes} processes "
            f"is more than the {len(films.train)} images to train on."
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
