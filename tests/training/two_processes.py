"""Both processes that torchrun starts with this fine-tune a tiny network three times, and tell what each one holds.

    torchrun --nproc_per_node 2 two_processes.py <folder>

In the second and third training a loss of process 1 is NaN. Each process writes <folder>/told by process <number>.json,
and has a run directory of its own for each training, so that one sees which of them writes.
"""

import hashlib
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from narrow import PROCESSOR, accelerator, deaf_interruption, tiny_model, training_run

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.training.arguments import FineTuningArguments
from cxr_backbone.training.nonfinite import NonfiniteError
from cxr_backbone.training.phases import fine_tune

BAD_STEP = 3  # of five


def main(folder):
    prepared = accelerator()
    process = prepared.process_index
    films = {
        split: decode_once(rows, 75, folder / f"cache of process {process}")
        for split, rows in load_synthetic(40, image_size=75).items()
    }

    told, error = {}, None
    for name, nonfinite in (("sound", "stop"), ("skip", "skip"), ("stop", "stop")):
        model = tiny_model(dropout=0.2)
        model.freeze_backbone()
        start = digests(model)
        if process == 1:  # has started from something else
            with torch.no_grad():
                model.classifier.output_layer.bias.add_(1)
            if name != "sound":
                spoil(model, BAD_STEP, gradient_too=name == "skip")
        # Without decay only gradients move weights.
        arguments = FineTuningArguments(
            epochs=1, batch_size=4, learning_rate=3e-3, weight_decay=0.0, nonfinite=nonfinite
        )
        run = training_run(folder / f"{name} of process {process}", prepared)
        rest = [films["train"], films["validation"], PROCESSOR, prepared, arguments]
        try:
            fine_tune(model, *rest, run=run, interruption=deaf_interruption())
        except NonfiniteError as caught:
            error = str(caught)
        told[name] = {"start": start, "end": digests(model)}
    (folder / f"told by process {process}.json").write_text(json.dumps(told | {"error": error}))
    prepared.wait_for_everyone()  # the launcher stops the others when one ends
    sys.exit(error)


def digests(model):
    return {
        name: hashlib.sha256(parameter.detach().contiguous().numpy()).hexdigest()
        for name, parameter in model.named_parameters()
    }


def spoil(model, step, *, gradient_too):
    """Let the loss at a step be NaN; with its gradient, which the other process gets a share of, or without."""
    steps = itertools.count()

    def hook(module, inputs, output):
        if next(steps) == step:
            output.loss = output.loss * math.nan if gradient_too else output.loss + math.nan

    model.register_forward_hook(hook)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
