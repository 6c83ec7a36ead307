"""Any radiograph becomes the same grey pixels, without clipping, and those become `pixel_values`."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from cxr_backbone import CXRInceptionImageProcessor
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.image_processing_cxr_inception import to_grey_uint8

SIZE = {"height": 80, "width": 96}
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey value once
WIDE_RAMP = np.linspace(0, 65535, 64 * 100).astype(np.uint16).reshape(64, 100)


@pytest.fixture(scope="module")
def grey():
    """A drawn film, uint8 (120, 120)."""
    return draw_phantom(0, opacity=True, image_size=120)


@pytest.fixture(scope="module")
def image_processor():
    return CXRInceptionImageProcessor(size=SIZE, image_mean=[0.4], image_std=[0.2])


def by_hand(grey: np.ndarray, mean: float = 0.4, std: float = 0.2) -> np.ndarray:
    """What `pixel_values` of one channel are defined to be, with Pillow and numpy alone."""
    resized = Image.fromarray(grey).resize((SIZE["width"], SIZE["height"]), Image.Resampling.BILINEAR)
    return (np.asarray(resized, dtype=np.float64) / 255 - mean) / std


def assert_pixel_values(outputs, expected: np.ndarray) -> None:
    """One image of one channel with the `expected` values."""
    pixel_values = outputs["pixel_values"]
    assert pixel_values.shape == (1, 1, SIZE["height"], SIZE["width"]) and pixel_values.dtype == np.float32
    np.testing.assert_allclose(pixel_values[0, 0], expected, rtol=0, atol=1e-5)


# to_grey_uint8: PIL images


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "I", "F"])
def test_a_grey_film_keeps_its_values_in_any_mode(mode):
    image = Image.fromarray(RAMP).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    pixels = to_grey_uint8(image)
    assert pixels.dtype == np.uint8
    assert (pixels == RAMP).all()


def test_a_palette_is_looked_up():
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([255 - value // 3 for value in range(768)])  # turned over: index 0 is white
    assert (to_grey_uint8(image) == 255 - RAMP).all()


def test_one_bit_is_black_and_white():
    image = Image.fromarray(RAMP).point(lambda value: 255 * (value > 99), mode="1")
    assert (to_grey_uint8(image) == np.where(RAMP > 99, 255, 0)).all()


def test_colour_becomes_luma_as_in_pillow():
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    assert (to_grey_uint8(Image.fromarray(colours)) == expected).all()
    # Pillow rounds in integers; an array may differ by that rounding.
    assert np.abs(to_grey_uint8(colours).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opacity_is_composited_over_black(mode):
    image = Image.new("L", (16, 16), 200).convert(mode)
    image.putalpha(Image.fromarray(RAMP))
    expected = np.rint(200 * (RAMP / 255))
    assert (to_grey_uint8(image) == expected).all()
    if mode == "RGBA":
        assert (to_grey_uint8(np.asarray(image)) == expected).all()


@pytest.mark.parametrize("transparent", [None, 7])
def test_a_transparent_palette_entry_is_black(tmp_path, transparent):
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([value // 3 for value in range(768)])
    options = {} if transparent is None else {"transparency": transparent}
    image.save(tmp_path / "palette.png", **options)
    expected = np.where(transparent == RAMP, 0, RAMP)
    with Image.open(tmp_path / "palette.png") as stored:
        assert stored.mode == "P"
        assert (to_grey_uint8(stored) == expected).all()


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tiff"])
def test_sixteen_bits_are_windowed_in_order_and_not_clipped(tmp_path, name):
    Image.fromarray(WIDE_RAMP).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "I;16"
        pixels = to_grey_uint8(image)
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()
    assert (np.unique(pixels) == np.arange(256)).all()
    assert np.mean(pixels == 255) < 0.01


def test_twelve_bits_in_sixteen_fill_the_range():
    twelve = (WIDE_RAMP // 16 + 100).astype(np.uint16).clip(max=4095)
    pixels = to_grey_uint8(Image.fromarray(twelve))
    assert (np.unique(pixels) == np.arange(256)).all()
    assert (pixels == np.rint((twelve - 100.0) * 255 / 3995)).all()


# to_grey_uint8: arrays


@pytest.mark.filterwarnings("error")  # a division by a range of zero
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RAMP, RAMP),
        (RAMP[..., None], RAMP),
        (RAMP.astype(np.uint16), RAMP),
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float64)[..., None] / 255, RAMP),
        (RAMP.astype(np.uint16) * 257, RAMP),
        (RAMP.astype(np.int32) * 100 - 7, RAMP),
        (RAMP.astype(np.float32) * 8 - 1000, RAMP),  # Hounsfield units
        (RAMP.astype(np.int16) - 128, RAMP),
        (RAMP.astype(np.float32) * 2, RAMP),
        (RAMP.astype(np.float64) * 1e9, RAMP),
        (RAMP.astype(">u2") * 257, RAMP),
        (np.eye(4, dtype=np.uint16), np.eye(4)),
        (np.full((4, 4), 9, np.uint8), 9),
        (np.full((4, 4), 9, np.uint16), 9),
        (np.full((4, 4), 0.2), 51),
        (np.full((4, 4), 5000, np.uint16), 0),
        (np.full((4, 4), -1000.0), 0),
        (np.zeros((4, 4)), 0),
        (np.ones((4, 4)), 255),
    ],
    ids=lambda it: f"{it.dtype}{list(it.shape)}" if isinstance(it, np.ndarray) else str(it),
)
def test_an_array_keeps_eight_bits_and_windows_anything_else(array, expected):
    before = array.copy()
    pixels = to_grey_uint8(array)
    assert pixels.dtype == np.uint8 and pixels.shape == array.shape[:2]
    assert (pixels == expected).all()
    assert (array == before).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_array_with_one_value_that_is_not_finite_is_refused(value):
    array = RAMP.astype(np.float32)
    array[3, 4] = value
    with pytest.raises(ValueError, match="The image holds NaN or infinity"):
        to_grey_uint8(array)
    with pytest.raises(ValueError, match="The image holds NaN or infinity"):
        to_grey_uint8(Image.fromarray(array))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (5, 5, 0), (5,), (5, 5, 2), (5, 5, 5), (3, 9, 9), (2, 5, 5, 1)])
def test_an_empty_array_or_one_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"An image of shape \(.*\) can't be read; expected \(height, width\) or"):
        to_grey_uint8(np.zeros(shape))


# The processor


def test_pixel_values_are_what_pillow_and_the_formula_give(image_processor, grey):
    assert_pixel_values(image_processor(Image.fromarray(grey), return_tensors="np"), by_hand(grey))


def test_a_real_film_becomes_what_pillow_and_the_formula_give(image_processor, shared):
    path = next((shared / "data/kermany-originals").rglob("*.jpeg"))
    with Image.open(path) as film:
        expected = by_hand(np.asarray(film.convert("L")))
        assert_pixel_values(image_processor(film, return_tensors="np"), expected)
    assert_pixel_values(image_processor(str(path), return_tensors="np"), expected)


@pytest.mark.parametrize(
    "layout",
    [
        lambda grey: grey,
        lambda grey: grey[None],
        lambda grey: grey[..., None],
        lambda grey: np.stack([grey] * 3),
        lambda grey: np.stack([grey] * 3, axis=-1),
        lambda grey: np.stack([grey] * 3 + [np.full_like(grey, 255)]),
        lambda grey: grey[None, None],
        lambda grey: grey.astype(np.float32) / 255,
    ],
    ids=["H W", "1 H W", "H W 1", "3 H W", "H W 3", "4 H W", "1 1 H W", "float"],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_arrays_and_tensors_of_any_layout_give_the_values_of_the_image(image_processor, grey, layout, kind):
    array = np.ascontiguousarray(layout(grey))
    for images in (kind(array), [kind(array)]):
        assert_pixel_values(image_processor(images, return_tensors="np"), by_hand(grey))


@pytest.mark.parametrize(("data_format", "axis"), [("channels_first", 0), ("channels_last", -1)])
def test_a_layout_that_is_given_is_believed(image_processor, grey, data_format, axis):
    square = np.stack([grey[:3, :3]] * 3, axis=axis)  # (3, 3, 3) tells nothing
    outputs = image_processor(square, input_data_format=data_format, return_tensors="np")
    assert_pixel_values(outputs, by_hand(grey[:3, :3]))


def test_a_batch_of_many_kinds_keeps_its_order(image_processor, grey, tmp_path):
    films = [np.roll(grey, 30 * turn, axis=0)[: 120 - turn] for turn in range(4)]
    Image.fromarray(films[1]).save(tmp_path / "film.png")
    batch = [Image.fromarray(films[0]), str(tmp_path / "film.png"), films[2], torch.tensor(films[3])]
    pixel_values = image_processor(batch, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (4, 1, 80, 96) and pixel_values.dtype == torch.float32
    for film, values in zip(films, pixel_values, strict=True):
        np.testing.assert_allclose(values[0], by_hand(film), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_to_a_sixteen_bit_film_is_not_clipped(image_processor, tmp_path, kind):
    Image.fromarray(WIDE_RAMP).save(tmp_path / "ramp.png")
    outputs = image_processor(kind(tmp_path / "ramp.png"), return_tensors="np")
    assert_pixel_values(outputs, by_hand(np.rint(WIDE_RAMP / 257).astype(np.uint8)))


def test_a_path_to_a_film_that_lies_on_its_side_sets_it_upright(image_processor, grey, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned a quarter clockwise
    Image.fromarray(np.rot90(grey)).save(tmp_path / "lying.png", exif=exif)
    assert_pixel_values(image_processor(tmp_path / "lying.png", return_tensors="np"), by_hand(grey))


def test_three_channels_are_the_grey_film_normalised_one_by_one(grey):
    means, stds = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image_processor = CXRInceptionImageProcessor(size=SIZE, num_channels=3, image_mean=means, image_std=stds)
    pixel_values = image_processor(grey, return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (1, 3, 80, 96)
    expected = np.stack([by_hand(grey, mean, std) for mean, std in zip(means, stds, strict=True)])
    np.testing.assert_allclose(pixel_values[0], expected, rtol=0, atol=1e-5)


def test_without_arguments_it_is_what_the_default_config_takes(grey):
    pixel_values = CXRInceptionImageProcessor()(grey, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 1, 299, 299) and pixel_values.dtype == torch.float32
    assert pixel_values.min() >= -1 and pixel_values.max() <= 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((90, 90), np.nan), "The image holds NaN or infinity"),
        (np.zeros((0, 90)), r"An image of shape \(0, 90, 1\) can't be read"),
        (np.zeros((90, 90, 2)), "Unable to infer channel dimension format"),
        (np.zeros(90), "Could not make a flat list of images"),
        ("gone.png", "gone.png"),
    ],
)
def test_what_is_no_image_is_refused(image_processor, image, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image)


def test_what_is_saved_comes_back_exactly_through_the_auto_class(grey, tmp_path):
    image_processor = CXRInceptionImageProcessor(
        size=SIZE, num_channels=3, image_mean=[0.1 + 0.2, 1 / 3, 0.5], image_std=[0.229, 0.224, 2 / 3]
    )
    image_processor.save_pretrained(tmp_path)
    for loader in (AutoImageProcessor, CXRInceptionImageProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is CXRInceptionImageProcessor
        assert loaded.to_dict() == image_processor.to_dict()
        outputs, expected = (it(grey, return_tensors="np")["pixel_values"] for it in (loaded, image_processor))
        assert np.array_equal(outputs, expected)
