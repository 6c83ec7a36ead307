"""Random changes that leave the diagnosis as it is, made on a whole batch on the device."""

from collections.abc import Callable
from itertools import count

import kornia.augmentation as K
import torch
from torch import Tensor, nn

SEEDS_A_RUN = 1_000_003  # batches that get a seed of their own before the next run's seeds begin


class Augmentation(nn.Module):
    """What differs between X-ray machines and between positionings: place, size, tilt, exposure, contrast, sharpness,
    noise, and something covering a part. No flips: a mirrored chest has its heart on the wrong side.

    Args:
        strength: in [0, 1]; scales every range. 0 changes nothing.
        stretch: scale width and height apart. Films of all shapes are squeezed into a square, and where shape goes with
            the label, proportions give it away.
    """

    def __init__(self, strength: float, *, stretch: bool = False):
        super().__init__()
        s = strength
        sizes = (1 - 0.2 * s, 1 + 0.35 * s) * 2 if stretch else (1 - 0.15 * s, 1 + 0.25 * s)
        self.layers = nn.Sequential()
        if s > 0:
            self.layers = nn.Sequential(
                K.RandomAffine(
                    degrees=12 * s,
                    translate=(0.08 * s, 0.08 * s),
                    scale=sizes,
                    shear=6 * s,
                    p=0.9,
                ),
                K.RandomGamma(gamma=(1 - 0.4 * s, 1 + 0.7 * s), p=0.5),
                K.RandomContrast(contrast=(1 - 0.4 * s, 1 + 0.4 * s), p=0.5),
                K.RandomBrightness(brightness=(1 - 0.2 * s, 1 + 0.2 * s), p=0.5),
                K.RandomGaussianBlur((5, 5), sigma=(0.1, 0.1 + 1.5 * s), p=0.3),
                K.RandomGaussianNoise(std=0.04 * s, p=0.3),
                K.RandomErasing(scale=(0.02, 0.02 + 0.1 * s), p=0.3 * s),
            )

    @torch.no_grad()
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """Images in [0, 1] (batch, 1, height, width) to images in [0, 1], the same for the same `seed`.

        It seeds torch: what a training draws next, for dropout, follows from `seed` too.
        """
        torch.manual_seed(seed)
        return self.layers(images).clamp(0, 1)

    def of_batches(self, first: int, step: int = 1) -> Callable[[Tensor], Tensor]:
        """What changes one batch of images after the other, with the seeds `first`, `first + step` and so on: the same
        views whenever the same batches are seen from the first on."""
        seeds = count(first, step)
        return lambda images: self(images, seed=next(seeds))
