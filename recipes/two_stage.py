"""Transfer learning in two phases: first the head on a frozen backbone, then the whole network.

    accelerate launch recipes/two_stage.py recipes/configs/pneumonia.yaml [--section.field value ...]

Everything it does is in the run directory (run.output_dir); what can be set is in `cxr_backbone.training.arguments`.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

from cxr_backbone import CXRInceptionForImageClassification
from cxr_backbone.data.kermany import load_kermany
from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.evaluation.metrics import binary_metrics, positive_scores
from cxr_backbone.evaluation.report import comparison_table
from cxr_backbone.hub import check_push_access, push_folder, write_card
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.batches import make_loader
from cxr_backbone.training.features import extract_features
from cxr_backbone.training.hardware import choose_precision, use_threads
from cxr_backbone.training.loop import predict
from cxr_backbone.training.phases import fine_tune, fit_head
from cxr_backbone.training.start import start_model
from cxr_backbone.training.state import RunDirectory

MODEL_CARD = Path(__file__).parents[1] / "model_card.md"


def main() -> None:
    # Everything that can be wrong with what was asked for comes to light here, before any training.
    try:
        arguments, run, model, image_processor, films, data = prepare(sys.argv[1:])
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"two_stage.py: {' '.join(str(error).split())}")
    seed = arguments.run.seed

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
    run.start(arguments, data, accelerator)
    model.to(accelerator.device, memory_format=torch.channels_last)
    labels = {split: torch.tensor(rows["label"]) for split, rows in data.items()}

    def log(**values):
        if accelerator.is_main_process:
            run.log(**values)
        numbers = {f"{values['phase']}/{name}": value for name, value in values.items() if isinstance(value, float)}
        accelerator.log(numbers, step=values.get("step", values.get("after_steps")))

    def save(trained, folder):
        if accelerator.is_main_process:
            trained.save_pretrained(folder)
            image_processor.save_pretrained(folder)

    # Phase one: the backbone is frozen, so each image goes through it once; the head is fitted to the features.
    started = time.perf_counter()
    model.freeze_backbone()
    features = {
        split: extract_features(
            model.cxr_inception,
            data[split],
            image_processor,
            accelerator,
            batch_size=arguments.frozen.batch_size,
            cache_dir=run.path / "features",
        )
        for split in ("train", "validation")
    }
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
        data["train"],
        data["validation"],
        image_processor,
        accelerator,
        arguments.fine_tuning,
        seed=seed,
        log=log,
        save=lambda trained: save(trained, run.fine_tuned),
    )
    seconds["fine_tuned"] = time.perf_counter() - started
    accelerator.wait_for_everyone()

    # The test split is opened here, once, by both models.
    metrics: dict[str, dict[str, Any]] = {}
    for phase, folder in (("frozen", run.frozen), ("fine_tuned", run.fine_tuned)):
        trained = CXRInceptionForImageClassification.from_pretrained(folder).eval()
        trained.to(accelerator.device, memory_format=torch.channels_last)
        metrics[phase] = {"seconds": seconds[phase]}
        for split in ("train", "validation", "test"):
            if phase == "frozen" and split in features:
                with torch.no_grad():
                    logits = trained.classifier(features[split].to(accelerator.device)).cpu()
            else:
                loader = make_loader(data[split], arguments.frozen.batch_size, accelerator)
                logits = predict(trained, loader, image_processor, accelerator)
            metrics[phase][split] = binary_metrics(labels[split].numpy(), positive_scores(logits))

    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    run.write_json(run.metrics, metrics)
    write_card(run.path, run.fine_tuned, MODEL_CARD, arguments.run.hub_model_id or run.path.name)
    print(comparison_table(metrics))
    classify = pipeline("image-classification", model=str(run.fine_tuned), trust_remote_code=False)
    film = films["test"][0]
    print(f"{run.fine_tuned} says of a test image of class {films['test'].features['label'].int2str(film['label'])}:")
    print(classify(film["image"]))
    if arguments.run.push_to_hub:
        print(push_folder(run.fine_tuned, arguments.run.hub_model_id))


def prepare(argv):
    """The resolved arguments, the run directory, the model with its image processor, the images, and the same images
    decoded."""
    arguments = parse_arguments(argv)
    arguments.run.mixed_precision = choose_precision(arguments.run.mixed_precision)
    set_seed(arguments.run.seed)
    run = RunDirectory(arguments.run.output_dir)
    if arguments.run.push_to_hub:
        check_push_access(arguments.run.hub_model_id)

    if arguments.data.source == "synthetic":
        films = load_synthetic(
            arguments.data.num_patients, image_size=arguments.model.image_size, seed=arguments.run.seed
        )
    else:
        films = load_kermany(
            arguments.data.source,
            num_folds=round(1 / arguments.data.validation_fraction),
            seed=arguments.run.seed,
        )
    names = films["train"].features["label"].names
    for split, rows in films.items():
        for index, name in enumerate(names):
            if index not in rows["label"]:
                raise ValueError(
                    f"data.source: the {split} split of {arguments.data.source} has no image of class {name}."
                )
    if len(films["train"]) < arguments.fine_tuning.batch_size:
        raise ValueError(
            f"fine_tuning.batch_size={arguments.fine_tuning.batch_size} is more than the "
            f"{len(films['train'])} images to train on."
        )
    model, image_processor = start_model(arguments.model, names)
    data = DatasetDict(
        {
            split: decode_once(rows, arguments.model.image_size, arguments.data.cache_dir)
            for split, rows in films.items()
        }
    )
    return arguments, run, model, image_processor, films, data


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
