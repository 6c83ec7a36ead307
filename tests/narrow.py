"""A network of the real one's shape, narrow enough for tests, and what it is trained with."""

import signal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from safetensors.torch import save_file
from torch import nn

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.layers_cxr_inception import CXRInceptionConvLayer
from cxr_backbone.training.arguments import (
    Arguments,
    DataArguments,
    EvaluationArguments,
    FineTuningArguments,
    FrozenArguments,
    JointArguments,
    ModelArguments,
    RunArguments,
)
from cxr_backbone.training.batches import to_images, to_pixel_values
from cxr_backbone.training.interruption import Interruption
from cxr_backbone.training.state import TrainingRun
from cxr_backbone.weights import CONV_NAMES

PROCESSOR = CXRInceptionImageProcessor(size={"height": 75, "width": 75})


def tiny_model(labels=2, **settings):
    torch.manual_seed(0)
    defaults = {"dropout": 0.0, "problem_type": "single_label_classification", "image_size": 75}
    defaults["id2label"] = {index: f"class {index}" for index in range(labels)}
    return CXRInceptionForImageClassification(CXRInceptionConfig(depth_multiplier=0.1, **(defaults | settings)))


def in_use(model):
    """The model, its BatchNorm with weights and statistics as some training leaves them: far from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.5, 0.5, generator=generator)
            layer.running_var.uniform_(0.1, 4, generator=generator)
            nn.init.uniform_(layer.weight, 0.3, 1.5, generator=generator)
            nn.init.uniform_(layer.bias, -0.3, 0.3, generator=generator)
    return model.eval()


def all_pixel_values(rows):
    pixels = torch.from_numpy(stack_pixels(list(rows))).unsqueeze(1)
    return to_pixel_values(to_images(pixels), PROCESSOR)


def accelerator(accumulation=1):
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=loaders)


def training_run(folder, accelerator, *, fine_tuning=None, **settings):
    """A run directory in use, without the films that `start` asks for."""
    arguments = Arguments(
        RunArguments(output_dir=str(folder), **settings),
        DataArguments(format="synthetic"),
        ModelArguments(),
        FrozenArguments(),
        fine_tuning or FineTuningArguments(),
        JointArguments(),
        EvaluationArguments(report=False),
    )
    run = TrainingRun(arguments)
    run.accelerator = accelerator
    run.claim()
    return run


def deaf_interruption():
    """One that no signal reaches: those of the test process keep their handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interruption = Interruption()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return interruption


def write_published_weights(path):
    """A narrow backbone's weights for three channels, under timm's and torchvision's names."""
    model = tiny_model(num_channels=3)
    layers = [module for module in model.modules() if isinstance(module, CXRInceptionConvLayer)]
    tensors = {}
    for name, layer in zip(CONV_NAMES, layers, strict=True):
        tensors[f"{name}.conv.weight"] = layer.convolution.weight.detach()
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name}.bn.{tensor}"] = getattr(layer.normalization, tensor).detach().clone()
    save_file(tensors, path)
    return path
