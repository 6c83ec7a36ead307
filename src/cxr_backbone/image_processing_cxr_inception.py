"""Image processor of CXRInception: any radiograph to `pixel_values`."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
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
            return ImageOps.exif_transpose(Image.open(images))
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
    if isinstance(image, Image.Image):
        if image.mode in ("L", "RGB"):
            return np.asarray(image.convert("L"))
        if not image.mode.startswith(("I", "F")):  # palettes, opacity, CMYK and other 8-bit modes
            image = image.convert("RGBA")
    values = np.asarray(image)
    if values.size == 0 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3, 4))):
        raise ValueError(
            f"An image of shape {values.shape} can't be read; expected (height, width) or (height, width, 1 | 3 | 4)."
        )
    if not np.isfinite(values).all():
        raise ValueError("The image holds NaN or infinity; expected finite grey values.")
    grey = values[..., :3] if values.ndim == 3 else values
    grey = _to_byte_range(grey)
    if values.ndim == 3 and values.shape[2] == 4:
        opacity = values[..., 3:]
        grey = grey * (opacity / (np.iinfo(opacity.dtype).max if opacity.dtype.kind in "iu" else max(opacity.max(), 1)))
    if grey.ndim == 3:
        # ITU-R 601-2 luma, Pillow's weights for RGB to grey
        grey = grey @ np.array([0.299, 0.587, 0.114]) if grey.shape[2] == 3 else grey[..., 0]
    return np.rint(grey).astype(np.uint8)


def _to_byte_range(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    is_float = np.issubdtype(values.dtype, np.floating)
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if is_float and low >= 0 and high <= 1:
        return values * 255
    if low >= 0 and high <= 255:
        return values
    # A blank image carries nothing to window.
    return (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)


def _channels_last(image: np.ndarray, data_format: str | ChannelDimension | None) -> np.ndarray:
    if image.ndim != 3:
        return image
    data_format = data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    return np.moveaxis(image, 0, -1) if ChannelDimension(data_format) == ChannelDimension.FIRST else image


__all__ = ["CXRInceptionImageProcessor", "to_grey_uint8"]
