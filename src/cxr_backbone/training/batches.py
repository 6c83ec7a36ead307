"""From rows of decoded images to normalised batches on the device."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.image_processing_cxr_inception import CXRInceptionImageProcessor


def make_loader(dataset: Dataset, batch_size: int, accelerator: Accelerator, *, training: bool = False) -> DataLoader:
    """Batches of `pixels` uint8 (batch, 1, size, size) and `label` int64 (batch,), from rows of `decode_once`, shared
    out over the processes and moved to the device.

    Training batches are shuffled and all full: BatchNorm can't learn from a last batch of one.
    """
    loader = DataLoader(
        dataset.select_columns(["pixels", "label"]),
        batch_size=batch_size,
        shuffle=training,
        drop_last=training,
        collate_fn=_collate,
    )
    return accelerator.prepare(loader)


def run_through(
    forward: Callable[[Tensor], Tensor],
    loader: DataLoader,
    image_processor: CXRInceptionImageProcessor,
    accelerator: Accelerator,
    *,
    desc: str,
) -> Tensor:
    """What `forward` makes of the `pixel_values` of each batch, without gradients: float32 on the CPU, all processes'
    results in the order of the data set behind `loader`."""
    results = []
    for batch in tqdm(loader, desc=desc, disable=None if accelerator.is_main_process else True, leave=False):
        pixel_values = to_pixel_values(to_images(batch["pixels"]), image_processor)
        with torch.no_grad(), accelerator.autocast():
            result = forward(pixel_values)
        results.append(accelerator.gather_for_metrics(result.float()).cpu())
    return torch.cat(results)


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (batch, 1, height, width) to float32 in [0, 1]."""
    return pixels.float().div_(255)


def to_pixel_values(images: Tensor, image_processor: CXRInceptionImageProcessor) -> Tensor:
    """Images in [0, 1] (batch, 1, height, width) to what the network takes: the image processor's own normalisation,
    a batch at a time and on the device. Returns (batch, num_channels, height, width), channels last in memory."""
    mean = torch.tensor(image_processor.image_mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(image_processor.image_std, device=images.device).view(1, -1, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def _collate(rows: list[dict]) -> dict[str, Tensor]:
    return {
        "pixels": torch.from_numpy(stack_pixels(rows)).unsqueeze(1),
        "label": torch.tensor([row["label"] for row in rows]),
    }
