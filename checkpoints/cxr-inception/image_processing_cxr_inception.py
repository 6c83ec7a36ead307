"""Image processor of CXRInception: any radiograph to `pixel_values`."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs, Unpack


class CXRInceptionImageProcessorKwargs(ImagesKwargs, total=False):
    num_channels: int


class CXRInceptionImageProcessor(PilBackend):
    """Turn radiographs into `pixel_values` (batch, num_channels, height, width), float32.

    Every image becomes 8-bit grey first (`to_grey_uint8`), exactly as training sees it, then is resized (bilinear, with
    antialiasing; the aspect ratio is not kept), rescaled to [0, 1] and normalised with `image_mean` and `image_std`.

    Args:
        size (`dict`): height and width in pixels, 299 by default.
        num_channels (`int`): 1, or 3 for a network that takes the grey image three times.
        image_mean, image_std (`list[float]`): one value a channel, on the [0, 1] scale.

    Raises:
        ValueError: for an image that is empty, holds NaN or infinity, or has no known layout of channels.
    """

    valid_kwargs = CXRInceptionImageProcessorKwargs
    _auto_class = "AutoImageProcessor"

    do_resize = True
    size = {"height": 299, "width": 299}
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    do_normalize = True
    image_mean: tuple[float, ...] = (0.5,)
    image_std: tuple[float, ...] = (0.5,)
    num_channels = 1

    def __init__(self, **kwargs: Unpack[CXRInceptionImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # typed for the keywords of transformers' own processors
        if len(self.image_mean) == len(self.image_std) == 1:  # one value stands for all channels
            self.image_mean = tuple(self.image_mean) * self.num_channels
            self.image_std = tuple(self.image_std) * self.num_channels

    def fetch_images(self, images):
        # transformers opens files through convert("RGB"), which turns 16-bit radiographs white.
        if isinstance(images, str | Path) and Path(images).is_file():
            image = Image.open(images)
            ImageOps.exif_transpose(image, in_place=True)
            return image
        return super().fetch_images(str(images) if isinstance(images, Path) else images)

    def _prepare_images_structure(self, images, expected_ndims: int = 3):
        # transformers wants a channel axis; a radiograph in memory is often (height, width).
        images = images if isinstance(images, list | tuple) else [images]
        images = [image[..., None] if getattr(image, "ndim", None) == 2 else image for image in images]
        return super()._prepare_images_structure(images, expected_ndims)

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        """One PIL image, array or tensor to uint8 (num_channels, height, width)."""
        if hasattr(image, "detach"):  # a tensor
            image = image.detach().cpu()
        if not isinstance(image, Image.Image):
            image = _channels_last(np.asarray(image), input_data_format)
        return np.repeat(to_grey_uint8(image)[None], kwargs.get("num_channels", self.num_channels), axis=0)


def to_grey_uint8(image: Image.Image | np.ndarray) -> np.ndarray:
    """Any image as 8-bit grey, without clipping.

    Args:
        image: a PIL image of any mode, or an array (height, width) or (height, width, 1 | 3 | 4) of any numeric type.
            A fourth channel is opacity; it is composited over black, the background of a radiograph.

    Returns:
        uint8 (height, width). 8-bit values stay as they are, and so do wider types that hold 0 to 255. Floats in [0, 1]
        are multiplied by 255. Anything else (16-bit, Hounsfield units, raw detector counts) is windowed: the image's
        own minimum becomes 0 and its own maximum 255.

    Raises:
        ValueError: if the image is empty, has another shape, or holds NaN or infinity.
    """
    values = grey_values(image) if isinstance(image, Image.Image) else np.asarray(image)
    if values.size == 0 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))):
        raise ValueError(
            f"An image of shape {values.shape} can't be read; expected (height, width) or (height, width, 1 | 3 | 4)."
        )
    if not np.isfinite([values.min(), values.max()]).all():  # NaN is both the minimum and the maximum of its array
        raise ValueError("The image holds NaN or infinity; expected finite grey values.")
    colours, opacity = (values, None) if values.ndim == 2 else (values[..., :3], values[..., 3:])
    low, high = grey_range(colours)
    opaque = 1.0
    if opacity is not None and opacity.size:
        opaque = np.iinfo(opacity.dtype).max if opacity.dtype.kind in "iu" else max(opacity.max(), 1)
    grey = np.empty(values.shape[:2], np.uint8)
    for rows in blocks_of_rows(values.shape):
        block = to_levels(colours[rows], low, high, white=255)
        if opacity is not None and opacity.size:
            block = block * (opacity[rows] / opaque)
        if block.ndim == 3:
            # ITU-R 601-2 luma, Pillow's weights for RGB to grey
            block = block @ np.array([0.299, 0.587, 0.114]) if block.shape[2] == 3 else block[..., 0]
        grey[rows] = np.rint(block)
    return grey


def grey_values(image: Image.Image) -> np.ndarray:
    """The grey values of a PIL image as they are stored.

    Returns:
        (height, width): uint8 for 8-bit modes, where colour becomes luma and what is transparent black; otherwise the
        type of the image, 16 or 32 bits. A TIFF file in which 0 is white is turned over at any depth.
    """
    if not image.mode.startswith(("I", "F")):
        if image.has_transparency_data:
            image = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
            image = Image.composite(image.convert("L"), Image.new("L", image.size), image.getchannel("A"))
        elif image.mode != "L":
            image = (image if image.mode == "1" else image.convert("RGB")).convert("L")
        return np.array(image)
    values = np.empty((image.height, image.width), np.asarray(image.crop((0, 0, 1, 1))).dtype)
    for rows in blocks_of_rows(values.shape):  # np.asarray of the whole would hold it three times
        values[rows] = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if image.mode == "I" and tags.get(SAMPLEFORMAT, (0,))[0] == 1:
        values = values.view(np.uint32)  # Pillow keeps unsigned integers in signed ones
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white, which Pillow heeds in 8 bits only
        values = -values if image.mode == "F" else ~values
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # 16-bit PNG
        opaque = values != transparent
        values[~opaque] = values[opaque].min() if opaque.any() else 0
    return values


def grey_range(values: np.ndarray) -> tuple[float, float]:
    """The values that become black and white: see `to_grey_uint8`."""
    low, high = float(values.min()), float(values.max())
    if values.dtype == bool or (np.issubdtype(values.dtype, np.floating) and low >= 0 and high <= 1):
        return 0, 1
    return (0, 255) if low >= 0 and high <= 255 else (low, high)


def to_levels(values: np.ndarray, low: float, high: float, *, white: float) -> np.ndarray:
    """Grey values as float64 from 0, at `low` and below, to `white`, at `high` and above."""
    if high > low:
        return np.clip((values.astype(np.float64) - low) * (white / (high - low)), 0, white)
    return np.where(values > low, white, 0.0)  # a blank image carries nothing to window


def blocks_of_rows(shape: tuple[int, ...]) -> list[slice]:
    """Slices of rows of about a megapixel: float64 for a whole film of 50 megapixels would take 400 MB."""
    step = max(1, 2**20 // max(1, shape[1]))
    return [slice(top, min(top + step, shape[0])) for top in range(0, shape[0], step)]


def _channels_last(image: np.ndarray, data_format: str | ChannelDimension | None) -> np.ndarray:
    if image.ndim != 3:
        return image
    data_format = data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    return np.moveaxis(image, 0, -1) if ChannelDimension(data_format) == ChannelDimension.FIRST else image


__all__ = [
    "CXRInceptionImageProcessor",
    "blocks_of_rows",
    "grey_range",
    "grey_values",
    "to_grey_uint8",
    "to_levels",
]
