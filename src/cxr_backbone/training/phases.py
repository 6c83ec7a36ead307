"""The two phases: the head alone on a frozen backbone, then the whole network."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call
from transformers import get_cosine_schedule_with_warmup

from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.layers_cxr_inception import CXRInceptionHead
from cxr_backbone.modeling_cxr_inception import CXRInceptionForImageClassification
from cxr_backbone.training.arguments import FineTuningArguments, FrozenArguments
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.joint import JointModel, JointTargets
from cxr_backbone.training.loop import Trainer, plain_loss
from cxr_backbone.training.nonfinite import NonfiniteError
from cxr_backbone.training.state import TrainingRun

logger = logging.getLogger(__name__)


def fit_head(
    model: CXRInceptionForImageClassification,
    views: Sequence[tuple[Tensor, Tensor]],
    validation: tuple[Tensor, Tensor],
    arguments: FrozenArguments,
    log: Callable[..., None],
) -> None:
    """Phase one: fit `model.classifier` to the features of the frozen backbone, in place.

    For each L2 strength the head is trained by L-BFGS on all features at once, centred and scaled, until a step lowers
    the penalised loss by less than 1e-7; the strength with the lowest validation loss is kept. For a head without
    hidden layers this is multinomial logistic regression, whose optimum is unique, and for findings one such regression
    each. Dropout is off: the penalty does its work here.

    Args:
        views: features (images, 2048) and labels of the training films as they are, then of augmented views of them.
        validation: features and labels. Labels are as `CXRInceptionForImageClassification` takes them.

    Raises:
        NonfiniteError: no strength has a validation loss that is a number.
    """
    best_loss, best_strength, best_parameters = math.inf, math.nan, {}
    head = _ScaledHead(copy.deepcopy(model.classifier).cpu().eval(), like=views[0][0])

    def training_loss(features: Tensor, labels: Tensor) -> Tensor:
        return model.compute_loss(head(features), labels)

    # From the strongest to the weakest, each started where the last one ended: a fraction of the iterations.
    for strength in sorted(arguments.l2_strengths, reverse=True):
        iterations = _minimise(head.head, training_loss, views, strength, arguments.max_iterations)
        with torch.no_grad():
            train_loss, validation_loss = (
                plain_loss(head(features), labels).item() for features, labels in (views[0], validation)
            )
        log(
            phase="frozen",
            l2=strength,
            iterations=iterations,
            train_loss=train_loss,
            validation_loss=validation_loss,
        )
        if validation_loss < best_loss:
            best_loss, best_strength = validation_loss, strength
            best_parameters = {name: values.detach().clone() for name, values in head.for_plain_features().items()}
    if not math.isfinite(best_loss):
        raise NonfiniteError("The validation loss of the frozen phase is no number at any of frozen.l2_strengths.")
    if len(arguments.l2_strengths) > 1 and best_strength in (
        min(arguments.l2_strengths),
        max(arguments.l2_strengths),
    ):
        logger.warning(
            "The frozen head is best at l2=%g, an end of frozen.l2_strengths; try a wider range.",
            best_strength,
        )
    model.classifier.load_state_dict(best_parameters)  # copies into the model's own dtype


def fine_tune(
    model: CXRInceptionForImageClassification,
    train_films: Dataset | FilmStream,
    validation_films: Dataset,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    arguments: FineTuningArguments,
    *,
    run: TrainingRun,
    interruption: Interruption,
    joint: JointTargets | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Phase two: train the whole network, lower stages at lower rates, as `loop.Trainer` says.

    Args:
        joint: what is learnt beside the labels.
        state: of `run.newest_state`, to go on from.
    """
    model.unfreeze_backbone()
    if arguments.freeze_batch_norm:
        model.freeze_batch_norm()
    if arguments.sync_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    trained = JointModel(model, joint.widths) if joint else model
    optimizer = make_optimizer(trained, arguments, accelerator)

    def make_scheduler(updates: int):
        return get_cosine_schedule_with_warmup(optimizer, round(arguments.warmup_ratio * updates), updates)

    trainer = Trainer(
        trained,
        train_films,
        validation_films,
        image_processor,
        accelerator,
        arguments,
        optimizer,
        make_scheduler,
        run=run,
        interruption=interruption,
        joint=joint,
    )
    trainer.train(state)


def make_optimizer(
    model: CXRInceptionForImageClassification | JointModel, arguments: FineTuningArguments, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, fused, except under fp16: its scaler leaves a step out by itself, unless the
    optimizer is a fused one."""
    return torch.optim.AdamW(parameter_groups(model, arguments), fused=accelerator.scaler is None)


def parameter_groups(
    model: CXRInceptionForImageClassification | JointModel, arguments: FineTuningArguments
) -> list[dict]:
    """Optimizer groups: the heads at `learning_rate`, each stage below them at `stage_decay` times the rate above it,
    and weight decay on the weights of convolutions and linear layers only."""
    classifier = model.model if isinstance(model, JointModel) else model
    stages = list(classifier.cxr_inception.encoder.stages.children())  # stem first
    heads = [module for name, module in classifier.named_children() if name != classifier.base_model_prefix]
    if isinstance(model, JointModel):
        heads.append(model.heads)
    groups = []
    for depth, module in enumerate([nn.ModuleList(heads), *reversed(stages)]):
        rate = arguments.learning_rate * arguments.stage_decay**depth
        decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        plain = [parameter for parameter in module.parameters() if parameter.ndim == 1]
        groups.append({"params": decayed, "lr": rate, "weight_decay": arguments.weight_decay})
        groups.append({"params": plain, "lr": rate, "weight_decay": 0.0})
    return groups


class _ScaledHead(nn.Module):
    """A head that sees features centred, and divided by one number: their common standard deviation.

    A scale for each would blow up those that hardly vary: a head that leans on them is worse on validation, and falls
    over as soon as fine-tuning moves the backbone. Its first layer does the scaling, so that the features, which may be
    more than fit in memory, are read from their file as they are.
    """

    def __init__(self, head: CXRInceptionHead, like: Tensor):
        super().__init__()
        self.head, self.mean, self.scale = head, like.mean(dim=0), like.std(dim=0).square().mean().sqrt()
        self.first = next(name for name, layer in head.named_modules() if isinstance(layer, nn.Linear))

    def forward(self, features: Tensor) -> Tensor:
        return functional_call(self.head, self.for_plain_features(), (features,))

    def for_plain_features(self) -> dict[str, Tensor]:
        """The head's parameters with the scaling folded in."""
        parameters = dict(self.head.named_parameters())
        weight = parameters[f"{self.first}.weight"] / self.scale
        bias = parameters[f"{self.first}.bias"] - weight @ self.mean
        return parameters | {f"{self.first}.weight": weight, f"{self.first}.bias": bias}


def _minimise(
    head: nn.Module,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    views: Sequence[tuple[Tensor, Tensor]],
    strength: float,
    limit: int,
) -> int:
    """Minimise the mean loss of the views plus `strength` / 2 times the squared weights; returns the iterations."""
    weights = [layer.weight for layer in head.modules() if isinstance(layer, nn.Linear)]
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=limit,
        history_size=50,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = strength / 2 * sum((weight.square().sum() for weight in weights), start=torch.zeros(()))
        total.backward()
        for view in views:  # one after the other: each may be as large as memory
            loss = loss_function(*view) / len(views)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)
    return optimizer.state[next(head.parameters())]["n_iter"]
