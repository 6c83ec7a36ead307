"""The training loop of phase two, and the evaluation pass that both phases share."""

import math
from collections.abc import Callable
from typing import cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import FineTuningArguments
from cxr_backbone.training.augmentation import Augmentation
from cxr_backbone.training.batches import run_through, to_images, to_pixel_values, training_loader

SEEDS_A_RUN = 1_000_003  # steps that get an augmentation seed of their own before the next run's seeds begin


def predict(
    model: CXRInceptionForImageClassification,
    films: Dataset | FilmStream,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    batch_size: int,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (images, num_labels) in eval mode, float32 on the CPU, and the labels beside them, in the order of
    `batches.run_through`, which also says what `change` is.

    The head runs in float32 whatever the backbone does: logits of bfloat16 have three digits, and scores would tie."""

    def forward(pixel_values: Tensor) -> Tensor:
        features = model.cxr_inception(pixel_values).pooler_output
        with torch.autocast(features.device.type, enabled=False):
            return model.classifier(features.float())

    was_training = model.training
    model.eval()
    logits, labels = run_through(
        forward,
        films,
        image_processor,
        accelerator,
        batch_size=batch_size,
        desc="predict",
        change=change,
    )
    model.train(was_training)
    return logits, labels


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What models are compared by: the mean negative log-likelihood (nats) of the labels that are known, without the
    label smoothing and weights of the training loss.

    Args:
        logits: (images, num_labels).
        labels: class indices (images,), or findings (images, num_labels): 1, 0, or NaN for unknown.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    known = ~labels.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], labels[known])


def train(
    model: CXRInceptionForImageClassification,
    train_films: Dataset | FilmStream,
    validation_films: Dataset,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    arguments: FineTuningArguments,
    optimizer: torch.optim.Optimizer,
    make_scheduler: Callable[[int], torch.optim.lr_scheduler.LRScheduler],
    *,
    seed: int,
    log: Callable[..., None],
    save: Callable[[CXRInceptionForImageClassification, int, bool], None],
) -> None:
    """Train all weights that ask for gradients, and at each evaluation `save` the averaged model, with the steps it
    took and whether its validation loss is the lowest so far. It is saved before the first step too: fine-tuning that
    never helps leaves what it started from.

    Raises:
        RuntimeError: if a loss is NaN or infinite. What was saved before stays.
    """
    loader = training_loader(train_films, arguments.batch_size, accelerator, seed=seed)
    # Copied before `prepare`, which patches the forward method of what it is given.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay), use_buffers=True)
    averaged = cast(CXRInceptionForImageClassification, average.module)
    model, optimizer = accelerator.prepare(model, optimizer)
    steps_per_epoch = len(loader)
    # `accumulate` steps at an epoch's last batch too, however few came before it.
    updates = arguments.epochs * math.ceil(steps_per_epoch / arguments.gradient_accumulation_steps)
    scheduler = make_scheduler(updates)
    augmentation = Augmentation(arguments.augmentation)
    evaluate_at = {
        round(steps_per_epoch * part / arguments.evaluations_per_epoch) - 1
        for part in range(1, arguments.evaluations_per_epoch + 1)
    }
    lowest, evaluations_since = math.inf, 0
    losses: list[Tensor] = []  # since the last evaluation; kept on the device, so that a step does not wait for them

    def evaluate(steps: int) -> bool:
        """Look at validation after so many steps; True if training should stop."""
        nonlocal lowest, evaluations_since
        logits, labels = predict(
            averaged, validation_films, image_processor, accelerator, batch_size=arguments.batch_size
        )
        loss = plain_loss(logits, labels).item()
        train_loss = torch.stack(losses).mean().item() if losses else None
        losses.clear()
        log(
            phase="fine_tuning",
            after_steps=steps,
            epoch=steps / steps_per_epoch,
            train_loss=train_loss,
            validation_loss=loss,
        )
        evaluations_since += 1
        if is_best := loss < lowest:
            lowest, evaluations_since = loss, 0
        save(averaged, steps, is_best)
        return evaluations_since >= arguments.patience

    evaluate(0)
    progress = tqdm(
        total=arguments.epochs * steps_per_epoch,
        desc="fine-tuning",
        disable=None if accelerator.is_main_process else True,
    )
    for epoch in range(arguments.epochs):
        model.train()
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader):
            # Seeded by position, not by history: a resumed run draws the same changes.
            position = epoch * steps_per_epoch + step
            images = augmentation(
                to_images(batch["pixels"]),
                seed=(seed * SEEDS_A_RUN + position) * accelerator.num_processes + accelerator.process_index,
            )
            with accelerator.accumulate(model):
                loss = model(to_pixel_values(images, image_processor), labels=batch["label"]).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                average.update_parameters(accelerator.unwrap_model(model))
            losses.append(loss.detach())
            progress.update()
            if step in evaluate_at:
                _log_steps(losses, position, log, accelerator)
                if evaluate(position + 1):
                    progress.close()
                    return
    progress.close()


def _log_steps(losses: list[Tensor], last: int, log: Callable[..., None], accelerator: Accelerator) -> None:
    """One line a step since the last evaluation; the loss is the mean over processes."""
    means = accelerator.reduce(torch.stack(losses), reduction="mean").tolist()
    for step, loss in enumerate(means, start=last - len(means) + 1):
        log(phase="fine_tuning", step=step, train_loss=loss)
        if not math.isfinite(loss):
            raise RuntimeError(f"The training loss is {loss} at step {step}; try a lower fine_tuning.learning_rate.")
