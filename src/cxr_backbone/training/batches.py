"""From rows of decoded images to normalised batches on the device."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import send_to_device
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.data.labels import stack_labels
from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
SHUFFLE_BUFFER = 1000  # decoded films of a stream held to draw from: 50 MB at 224 x 224


class TrainingLoader(Protocol):
    """Batches of this process's share, shuffled anew in every epoch and all full: BatchNorm can't learn from a last
    batch of one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def set_epoch(self, epoch: int) -> None: ...


def training_loader(
    films: Dataset | FilmStream, batch_size: int, accelerator: Accelerator, *, seed: int
) -> TrainingLoader:
    """Batches of `pixels` uint8 (batch, 1, size, size) and `label`, int64 (batch,) or float32 (batch, findings), on the
    device, and `image_id`, a list. The processes share the films out among themselves."""
    if isinstance(films, FilmStream):
        return _StreamLoader(films, batch_size, accelerator, seed)
    rows = films.select_columns(["pixels", "label", "image_id"])
    loader = DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=_collate_named)
    return cast(TrainingLoader, accelerator.prepare(loader))


def run_through(
    forward: Callable[[Tensor], Tensor],
    films: Dataset | FilmStream,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    batch_size: int,
    desc: str,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `forward` makes of the `pixel_values` of each batch, without gradients, float32 on the CPU, and the labels
    beside it.

    Each process does its share, and all get the whole. Rows of a `Dataset` come back in its order; a stream that
    several processes read comes back one process's share after the other's.

    Args:
        change: makes other images of a batch of images in [0, 1] (batch, 1, height, width), before they are normalised.

    Raises:
        ValueError: there are too few films, or shards with any, for so many processes.
    """
    if len(films) < accelerator.num_processes:
        raise ValueError(f"{len(films)} films are too few for {accelerator.num_processes} processes; start fewer.")
    rows = films.rows if isinstance(films, FilmStream) else films
    share = split_dataset_by_node(
        rows.select_columns(["pixels", "label"]), accelerator.process_index, accelerator.num_processes
    )
    workers = films.num_workers if isinstance(films, FilmStream) else 0
    loader: DataLoader = DataLoader(share, batch_size=batch_size, collate_fn=_collate, num_workers=workers)
    results, labels = [], []
    for batch in tqdm(loader, desc=desc, disable=None if accelerator.is_main_process else True, leave=False):
        images = to_images(batch["pixels"].to(accelerator.device))
        pixel_values = to_pixel_values(change(images) if change else images, image_processor)
        with torch.no_grad(), accelerator.autocast():
            results.append(forward(pixel_values).float())
        labels.append(batch["label"].to(accelerator.device))
    if not results:
        raise ValueError("The shards that this process reads hold no film of this split; start fewer processes.")
    return _gather_shares(torch.cat(results), accelerator), _gather_shares(torch.cat(labels), accelerator)


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (batch, 1, height, width) to float32 in [0, 1]."""
    return pixels.float().div_(255)


def to_pixel_values(images: Tensor, image_processor: CXRInceptionImageProcessor) -> Tensor:
    """Images in [0, 1] (batch, 1, height, width) to what the network takes: the image processor's own normalisation,
    a batch at a time and on the device. Returns (batch, num_channels, height, width), channels last in memory."""
    mean = torch.tensor(image_processor.image_mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(image_processor.image_std, device=images.device).view(1, -1, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


class _StreamLoader(DataLoaderStateMixin):
    """As many batches an epoch as the whole stream fills, the same number in every process.

    Shards need not be of one size, so a process may come to the end of its share before that; it starts again.
    Accelerate is told where an epoch ends, as by its own loaders, so that gradients of two epochs are not added up.
    """

    def __init__(self, films: FilmStream, batch_size: int, accelerator: Accelerator, seed: int):
        if films.rows.num_shards % accelerator.num_processes:
            logger.warning(
                "%d shards for %d processes: each decodes all films and leaves out those of the others. "
                "Make the number of shards a multiple of the number of processes.",
                films.rows.num_shards,
                accelerator.num_processes,
            )
        self.gradient_state = accelerator.gradient_state
        share = split_dataset_by_node(films.rows, accelerator.process_index, accelerator.num_processes)
        self.rows = share.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).repeat(None)
        self.loader: DataLoader = DataLoader(
            self.rows, batch_size=batch_size, collate_fn=_collate_named, num_workers=films.num_workers
        )
        self.steps = len(films) // (batch_size * accelerator.num_processes)
        self.device = accelerator.device

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        self.begin()
        for step, batch in enumerate(islice(self.loader, self.steps)):
            self.end_of_dataloader = step == self.steps - 1
            yield send_to_device(batch, self.device)
        self.end()
        if not self.end_of_dataloader:
            raise RuntimeError("The shards that this process reads hold no film of train; start fewer processes.")

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)


def _gather_shares(share: Tensor, accelerator: Accelerator) -> Tensor:
    """The shares of all processes, of whatever lengths, one after the other, on the CPU."""
    lengths = accelerator.gather(torch.tensor([len(share)], device=accelerator.device)).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(share, dim=0))
    return torch.cat([part[:length] for part, length in zip(padded.chunk(len(lengths)), lengths, strict=True)]).cpu()


def _collate_named(rows: list[dict]) -> Batch:
    return {**_collate(rows), "image_id": [row["image_id"] for row in rows]}


def _collate(rows: list[dict]) -> Batch:
    return {
        "pixels": torch.from_numpy(stack_pixels(rows)).unsqueeze(1),
        "label": torch.from_numpy(stack_labels(rows)),
    }
