"""Phase one's single pass: the frozen backbone turns every image into its pooled features, once."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor

from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor
from cxr_backbone.modeling_cxr_inception import CXRInceptionModel, CXRInceptionPreTrainedModel
from cxr_backbone.training.atomic import naming, replacing
from cxr_backbone.training.augmentation import SEEDS_A_RUN, Augmentation
from cxr_backbone.training.batches import run_through
from cxr_backbone.training.hardware import inference_copy


class View(NamedTuple):
    """Another look at each film, augmented; `number` tells the views of a run apart."""

    number: int
    strength: float
    seed: int
    stretch: bool = False


def extract_features(
    backbone: CXRInceptionModel,
    films: Dataset | FilmStream,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    batch_size: int,
    cache_dir: Path,
    view: View | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled features (len(films), 2048), float32, and the labels beside them, in the order of `batches.run_through`.

    The features are mapped from a file in `cache_dir`, `features-<fingerprint>.npy`, and take memory only while they
    are read. The fingerprint is of weights, processor, precision, data and view; a later call with the same finds the
    file. A pass that was stopped goes on after its last whole batch.
    """
    name = _fingerprint(backbone, image_processor, accelerator, films, view)
    path, labels_path = (cache_dir / f"{kind}-{name}.npy" for kind in ("features", "labels"))
    # The main process looks for all: were they to see different things, they would wait for each other.
    (is_there,) = broadcast_object_list([path.is_file()])
    if not is_there:
        processes = accelerator.num_processes
        parts = [path.with_name(f"{path.stem}-{process}-of-{processes}.part") for process in range(processes)]
        part = _Part(parts[accelerator.process_index], inference_copy(backbone, accelerator), batch_size)
        _, labels = run_through(
            part.extract,
            films,
            image_processor,
            accelerator,
            batch_size=batch_size,
            desc="features",
            change=None if view is None else _augmented(view, len(films), batch_size, accelerator),
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with replacing(labels_path) as file, file.open("wb") as stream:
                np.save(stream, labels.numpy())
            _join(parts, path, (len(labels), part.width))
        accelerator.wait_for_everyone()
    # "c": what is read may be changed in memory, never in the file. (torch warns of arrays that may not be.)
    features, labels = (torch.from_numpy(np.load(file, mmap_mode="c")) for file in (path, labels_path))
    return features, labels


def model_digest(model: CXRInceptionPreTrainedModel, image_processor: CXRInceptionImageProcessor) -> "hashlib._Hash":
    """SHA-256 of all that decides what a model makes of a film, to be gone on with."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for text in (model.config.to_json_string(), image_processor.to_json_string()):
        digest.update(text.encode())
    return digest


class _Part:
    """The features of one process's share, in a file that grows by a batch at a time."""

    def __init__(self, path: Path, backbone: CXRInceptionModel, batch_size: int):
        self.path, self.backbone = path, backbone
        self.width = backbone.config.hidden_sizes[-1]
        batch_bytes = 4 * self.width * batch_size
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:  # what an earlier pass has left, without a batch that it was stopped in
            self.batches_left = file.tell() // batch_bytes
            file.truncate(self.batches_left * batch_bytes)

    def extract(self, pixel_values: Tensor) -> Tensor:
        """Write the features of the next batch, unless they are there. Returns (batch, 0): they are in the file."""
        if self.batches_left:
            self.batches_left -= 1
        else:
            features = self.backbone(pixel_values).pooler_output.float().cpu()
            with naming(self.path), self.path.open("ab") as file:
                file.write(features.numpy().tobytes())
        return pixel_values.new_empty(len(pixel_values), 0)


def _augmented(view: View, films: int, batch_size: int, accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """The images of each batch as a view shows them, the same whenever it is asked about that batch."""
    processes = accelerator.num_processes
    batches = films // batch_size + processes  # at most, of all processes
    first = view.seed * SEEDS_A_RUN + view.number * batches + accelerator.process_index
    return Augmentation(view.strength, stretch=view.stretch).of_batches(first, processes)


def _join(parts: list[Path], path: Path, shape: tuple[int, int]) -> None:
    # Written, not mapped: where a disk is full, writing raises an error and a mapped file kills the process.
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
    for part in parts:
        part.unlink()


def _fingerprint(
    backbone: CXRInceptionModel,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    films: Dataset | FilmStream,
    view: View | None,
) -> str:
    digest = model_digest(backbone, image_processor)
    for text in (
        accelerator.mixed_precision,
        films.fingerprint if isinstance(films, FilmStream) else films._fingerprint,
        repr(view),
    ):
        digest.update(text.encode())
    return digest.hexdigest()[:32]
