"""The end of a run: what validation decides, then every figure on every split. Two recipes share it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

from cxr_backbone.configuration_cxr_inception import CXRInceptionConfig
from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.data.labels import label_names
from cxr_backbone.data.subgroups import subgroups_of
from cxr_backbone.evaluation.calibration import fit_temperature, fold_temperature
from cxr_backbone.evaluation.operating_points import choose_operating_points
from cxr_backbone.evaluation.predictions import Predictions
from cxr_backbone.evaluation.report import comparison_table, operating_points_table
from cxr_backbone.evaluation.results import examine
from cxr_backbone.guard import Guard, pooled_stages
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import EvaluationArguments
from cxr_backbone.training.augmentation import SEEDS_A_RUN, Augmentation
from cxr_backbone.training.batches import run_through, to_images, to_pixel_values
from cxr_backbone.training.loop import plain_loss, predict
from cxr_backbone.training.state import RunDirectory, save_model
from cxr_backbone.weights import open_checkpoint

if TYPE_CHECKING:
    from cxr_backbone.evaluation.saliency import SalientFilm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model under test, and the image processor that was saved with it: two models need not share one."""

    model: CXRInceptionForImageClassification
    image_processor: CXRInceptionImageProcessor

    @property
    def config(self) -> CXRInceptionConfig:
        return self.model.config

    def save(self, folder: Path) -> None:
        save_model(folder, self.model, self.image_processor)


class Examiner:
    """Asks models about films, and writes down what comes of it.

    Args:
        batch_size: films a forward pass.
        seed: of perturbed views and of the resamples.
    """

    def __init__(self, accelerator: Accelerator, arguments: EvaluationArguments, *, batch_size: int, seed: int):
        self.accelerator, self.arguments = accelerator, arguments
        self.batch_size, self.seed = batch_size, seed

    def load(self, folder: str | Path) -> Candidate:
        """A saved model, ready to predict.

        Raises:
            ValueError, OSError: as `weights.open_checkpoint`.
        """
        model, image_processor = open_checkpoint(folder, CXRInceptionForImageClassification)
        model.eval()
        model.to(self.accelerator.device, memory_format=torch.channels_last)
        return Candidate(model, image_processor)

    def restore(
        self, weights: Path, config: CXRInceptionConfig, image_processor: CXRInceptionImageProcessor
    ) -> Candidate:
        """A model of a training as it was at an evaluation (`TrainingRun.save_evaluated`), ready to predict."""
        model = CXRInceptionForImageClassification(copy.deepcopy(config)).eval()
        model.load_state_dict(load_file(weights))
        model.to(self.accelerator.device, memory_format=torch.channels_last)
        return Candidate(model, image_processor)

    def settle(self, candidate: Candidate, validation: Dataset) -> None:
        """Fix the operating points of a model, and before them its temperature unless it has one, in place, by what it
        says of validation.

        With `evaluation.perturbed_views` it is asked about so many views of each film instead, at full strength of
        `Augmentation`. A validation split that a model separates (almost) perfectly says little about where a threshold
        should be; such views are harder.
        """
        change = Augmentation(1.0).of_batches(self.seed * SEEDS_A_RUN)
        views = [
            self.predictions(candidate, validation, change=change) for _ in range(self.arguments.perturbed_views)
        ] or [self.predictions(candidate, validation)]
        asked = replace(
            views[0],
            labels=np.concatenate([view.labels for view in views]),
            logits=np.concatenate([view.logits for view in views]),
            image_ids=views[0].image_ids * len(views),
            patient_ids=views[0].patient_ids * len(views),
            groups={},
        )
        if candidate.config.temperature is None:
            temperature = fit_temperature(asked.logits, asked.labels)
            fold_temperature(candidate.model, temperature)
            asked = replace(asked, logits=asked.logits / np.asarray(temperature))
        candidate.config.operating_points = choose_operating_points(asked)

    def fit_guard(self, candidate: Candidate, training: Dataset, validation: Dataset) -> Guard:
        """An input check for a model, fitted to films that it was trained on; validation fixes the threshold."""
        backbone = candidate.model.cxr_inception.fuse(torch.float32)  # as the pipeline runs it

        def forward(pixel_values: Tensor) -> Tensor:
            with torch.autocast(pixel_values.device.type, enabled=False):
                return pooled_stages(backbone(pixel_values, output_hidden_states=True).hidden_states)

        features = [
            run_through(
                forward, films, candidate.image_processor, self.accelerator, batch_size=self.batch_size, desc="guard"
            )[0]
            for films in (training, validation)
        ]
        return Guard.fit(*features)

    def predictions(self, candidate: Candidate, films: Dataset, **options: Any) -> Predictions:
        """What a model says of films."""
        logits, labels = self._predict(candidate, films, **options)
        return Predictions(
            names=label_names(films.features),
            labels=labels.numpy(),
            logits=logits.double().numpy(),
            image_ids=films["image_id"][:],
            patient_ids=films["patient_id"][:],
            groups=subgroups_of(films),
        )

    def ask(
        self, candidates: Mapping[str, Candidate], splits: Mapping[str, Dataset]
    ) -> dict[str, dict[str, Predictions]]:
        """What each model says of each split."""
        return {
            name: {split: self.predictions(candidate, films) for split, films in splits.items()}
            for name, candidate in candidates.items()
        }

    def checkpoint_losses(
        self, folder: Path, candidate: Candidate, splits: Mapping[str, Dataset]
    ) -> list[dict[str, Any]]:
        """The loss (nats) on each split of each evaluation of a training (`TrainingRun.evaluated`), oldest first.

        Args:
            candidate: takes up the weights of each checkpoint in turn, and keeps those of the last.
        """
        lines = []
        for file in sorted(folder.glob("*.safetensors")):
            candidate.model.load_state_dict(load_file(file))
            losses = {split: plain_loss(*self._predict(candidate, films)).item() for split, films in splits.items()}
            lines.append({"after_steps": int(file.stem), **losses})
        return lines

    def write(
        self,
        run: RunDirectory,
        candidates: Mapping[str, Candidate],
        predictions: Mapping[str, Mapping[str, Predictions]],
        test: Dataset,
        *,
        log: list[dict[str, Any]],
        seconds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Write metrics.json, the predictions and the report to the run directory, and print the main tables.

        Args:
            log: of the training, `RunDirectory.read_log`; may be empty.
            seconds: that each model took to train.
        """
        configs = {name: candidate.config for name, candidate in candidates.items()}
        metrics = examine(configs, predictions, resamples=self.arguments.resamples, seed=self.seed)
        for name, its_seconds in seconds.items():
            metrics["models"][name]["seconds"] = its_seconds
        if is_complete(log):
            metrics["overfitting"] = overfitting(log)
            if metrics["overfitting"]["chosen"] == 0:
                logger.warning(
                    "No evaluation of the fine-tuning had a lower validation loss than its start: fine_tuned/ is the "
                    "frozen model. Try fine_tuning.perturbed_validation, more epochs or a lower learning rate."
                )
        run.write_results(metrics, predictions)
        print(comparison_table(metrics))
        print(operating_points_table(metrics))
        if self.arguments.report:
            # Not before: matplotlib and captum, which it needs, come with the extra `report`.
            from cxr_backbone.evaluation.report_page import write_report

            *_, (name, candidate) = candidates.items()
            salient = self._salient_films(candidate, predictions[name]["test"], test)
            print(f"The report: {write_report(run.path, metrics, predictions, log=log, saliency=salient)}")

    def _salient_films(self, candidate: Candidate, said: Predictions, test: Dataset) -> list[SalientFilm]:
        """The test films that say most about a model, asked for its most frequent target."""
        from cxr_backbone.evaluation.saliency import choose_films, salient_films

        target = max(said.targets, key=lambda target: said.question(target)[1].sum())
        points = (candidate.config.operating_points or {}).get(target, {})
        threshold = points["youden"]["threshold"] if "youden" in points else 0.5
        chosen = choose_films(said, target, threshold=threshold)
        pixels = stack_pixels([test[film] for films in chosen.values() for film in films])  # (films, size, size)
        images = to_images(torch.from_numpy(pixels).unsqueeze(1))
        pixel_values = to_pixel_values(images, candidate.image_processor)
        return salient_films(candidate.model, said, target, chosen, pixels, pixel_values, threshold=threshold)

    def _predict(self, candidate: Candidate, films: Dataset, **options: Any) -> tuple[Tensor, Tensor]:
        model, image_processor = candidate.model, candidate.image_processor
        return predict(model, films, image_processor, self.accelerator, batch_size=self.batch_size, **options)


def is_complete(log: list[dict[str, Any]]) -> bool:
    """Whether the loss of every checkpoint is in the log; not so if the run was stopped before."""
    evaluated = {line["after_steps"] for line in log if line["phase"] == "fine_tuning" and "after_steps" in line}
    return bool(evaluated) and evaluated == {line["after_steps"] for line in log if line["phase"] == "checkpoints"}


def chosen_evaluation(log: list[dict[str, Any]]) -> int:
    """After how many steps the validation loss was lowest (that of perturbed views, if those chose); the first time, if
    it was so twice."""
    lines = [line for line in log if line["phase"] == "fine_tuning" and "after_steps" in line]
    return min(lines, key=lambda line: line.get("perturbed_loss", line["validation_loss"]))["after_steps"]


def overfitting(log: list[dict[str, Any]]) -> dict[str, Any]:
    """From a run's log: the losses of each checkpoint, and of the chosen one the gap from train to validation."""
    measured = {line["after_steps"]: line for line in log if line["phase"] == "checkpoints"}
    curve = [
        {
            "after_steps": line["after_steps"],
            "epoch": line["epoch"],
            "train": measured[line["after_steps"]]["train"],
            "validation": line["validation_loss"],
            "test": measured[line["after_steps"]]["test"],
        }
        for line in log
        if line["phase"] == "fine_tuning" and "after_steps" in line
    ]
    (chosen,) = [line for line in curve if line["after_steps"] == chosen_evaluation(log)]
    return {"curve": curve, "chosen": chosen["after_steps"], "gap": chosen["validation"] - chosen["train"]}
