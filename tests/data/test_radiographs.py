"""A file becomes grey pixels."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from data.film_files import as_dicom, as_file, as_png, as_tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from cxr_backbone import CXRInceptionConfig, CXRInceptionForImageClassification, CXRInceptionImageProcessor
from cxr_backbone.data import radiographs
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.image_processing_cxr_inception import to_grey_uint8

RAMP = np.linspace(300, 50_000, 30 * 40).reshape(30, 40)


def test_real_films_decode_to_the_pixels_of_convert_l(originals):
    for path in originals:
        assert (read_radiograph(path) == np.asarray(Image.open(path).convert("L"))).all()


def test_a_grey_film_stored_as_rgb_jpeg_decodes_to_the_pixels_of_convert_l(originals, tmp_path):
    path = tmp_path / "rgb.jpeg"
    Image.open(originals[0]).convert("RGB").save(path, quality=90)
    with Image.open(path) as stored:
        assert stored.mode == "RGB"
        assert (read_radiograph(path) == np.asarray(stored.convert("L"))).all()


def test_a_path_a_string_and_bytes_read_alike(film):
    pixels = read_radiograph(film)
    assert pixels.dtype == np.uint8
    assert (pixels == draw_phantom(0, opacity=True, image_size=64)).all()
    assert (pixels == read_radiograph(str(film))).all()
    assert (pixels == read_radiograph(film.read_bytes())).all()


def test_sixteen_bit_films_are_windowed_and_not_clipped(tmp_path):
    ramp = np.linspace(1000, 50000, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = read_radiograph(tmp_path / "ramp.png")
    assert pixels.min() == 0 and pixels.max() == 255 and np.mean(pixels == 255) < 0.01


@pytest.mark.parametrize("suffix", ["jpeg", "png", "tiff"])
def test_exif_orientation_is_honoured(tmp_path, suffix):
    upright = draw_phantom(0, opacity=True, image_size=64)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be shown turned a quarter clockwise
    lying = Image.fromarray(np.rot90(upright)[:48])
    lying.save(tmp_path / f"lying.{suffix}", exif=exif, quality=100)
    pixels = read_radiograph(tmp_path / f"lying.{suffix}").astype(int)
    assert pixels.shape == (64, 48)
    assert np.abs(pixels - np.rot90(np.rot90(upright)[:48], -1)).max() < 8


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no image file at .*gone\.png"):
        read_radiograph(tmp_path / "gone.png")


@pytest.mark.parametrize("damage", [lambda whole: b"no image", lambda whole: b"", lambda whole: whole[:500]])
def test_a_damaged_file_is_named(film, damage):
    film.write_bytes(damage(film.read_bytes()))
    with pytest.raises(ValueError, match=r"Can't read .*film\.png as an image"):
        read_radiograph(film)
    with pytest.raises(ValueError, match="Can't read the given bytes as an image"):
        read_radiograph(film.read_bytes())


# Depth


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_sixteen_bit_file_and_its_array_given_to_the_processor_agree(kind):
    deep = RAMP.astype(np.uint16)
    assert (read_radiograph(as_file(deep, kind)) == to_grey_uint8(deep)).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i2", ">i2", "<u4", "<i4", ">i4", "<f4", ">f4"])  # Pillow has no >u4
def test_a_tiff_file_of_any_type_is_read_at_full_depth(dtype):
    values = RAMP.astype("u2").astype(dtype)
    if dtype == "<u4":
        values += np.uint32(2**31)
    elif dtype[1] != "u":
        values = values - values.dtype.type(900)
    pixels = read_radiograph(as_tiff(values, big_endian=dtype[0] == ">"), dtype=np.float32)
    spread = values.astype(np.float64) - values.min()
    np.testing.assert_allclose(pixels, spread / spread.max(), rtol=0, atol=1e-7)


def test_floats_from_zero_to_one_stay_as_they_are():
    values = np.linspace(0.25, 0.5, 48, dtype=np.float32).reshape(6, 8)
    assert (read_radiograph(as_tiff(values), dtype="float32") == values).all()
    assert (read_radiograph(as_tiff(values)) == np.rint(values * 255.0)).all()


def test_eight_bits_as_float_are_divided_by_255(film):
    expected = draw_phantom(0, opacity=True, image_size=64) / np.float32(255)
    np.testing.assert_allclose(read_radiograph(film, dtype="float32"), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_a_tiff_file_in_which_zero_is_white_is_turned_over(dtype, tmp_path):
    values = (RAMP / 196 if dtype == "u1" else RAMP).astype(dtype)
    upright, turned_over = (read_radiograph(as_tiff(values, photometric=it)) for it in (1, 0))
    assert (turned_over == 255 - upright).all() and upright[0, 0] < upright[-1, -1]
    (tmp_path / "film.tiff").write_bytes(as_tiff(values, photometric=0))
    raw = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    assert (CXRInceptionImageProcessor()(tmp_path / "film.tiff", **raw)["pixel_values"][0, 0] == turned_over).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_fill_the_range(bits):
    values = np.arange(64).reshape(8, 8) % 2**bits
    palette = Image.fromarray(values.astype(np.uint8), mode="P") if bits > 1 else None
    if palette is None:
        file = as_file(values.astype(bool), "PNG")
    else:
        palette.putpalette([grey for level in range(2**bits) for grey in 3 * [level * 255 // (2**bits - 1)]])
        file = as_file(palette, "PNG", bits=bits)
    assert (read_radiograph(file) == values * (255 // (2**bits - 1))).all()


def test_a_cmyk_jpeg_is_read_as_grey():
    grey = draw_phantom(0, opacity=True, image_size=64)
    inks = Image.fromarray(grey).convert("RGB").convert("CMYK")
    assert np.abs(read_radiograph(as_file(inks, "JPEG", quality=100)).astype(int) - grey).max() <= 8


def test_transparency_is_black():
    values = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    opacity = np.where(values > 32, 255, 0).astype(np.uint8)
    film = Image.fromarray(np.stack([values, opacity], axis=-1))
    expected = np.where(values > 32, values, 0)
    assert (read_radiograph(as_file(film, "PNG")) == expected).all()
    assert (read_radiograph(as_file(film.convert("RGBA"), "PNG")) == expected).all()
    marked = np.where(values > 32, values, 7)
    assert (read_radiograph(as_file(marked, "PNG", transparency=7)) == expected).all()
    deep = np.where(values > 32, values * np.uint16(1000), 65535).astype(np.uint16)
    assert (
        read_radiograph(as_file(deep, "PNG", transparency=65535)) == to_grey_uint8(np.where(deep == 65535, 33000, deep))
    ).all()


# Windows


@pytest.mark.parametrize("window", [(0, 100), (0.5, 99.5), (40, 60)])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_a_percentile_window_holds_these_percentiles(window, dtype):
    values = (RAMP / 250 if dtype == "u1" else RAMP).astype(dtype)
    low, high = np.percentile(values, window)
    expected = ((values - low) / (high - low)).clip(0, 1)
    pixels = read_radiograph(as_tiff(values), window=window, dtype=np.float32)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 65535), min_size=12, max_size=12), st.sampled_from([None, (0, 100), (10, 70)]))
def test_brighter_in_is_not_darker_out_and_both_types_agree(values, window):
    deep = np.array(values, np.uint16).reshape(3, 4)
    pixels = read_radiograph(as_file(deep, "PNG"), window=window)
    levels = read_radiograph(as_file(deep, "PNG"), window=window, dtype=np.float32)
    order = np.argsort(deep, axis=None)
    assert (np.diff(pixels.ravel()[order].astype(int)) >= 0).all() and (np.diff(levels.ravel()[order]) >= 0).all()
    assert np.abs(levels - pixels / 255.0).max() <= 0.5 / 255 + 1e-6


# Reduced


@pytest.mark.parametrize("size", [150, 299, 5000])
def test_a_reduced_jpeg_is_the_smallest_whose_sides_are_long_enough(originals, size):
    whole = read_radiograph(originals[0])
    scale = max((it for it in (1, 2, 4, 8) if min(whole.shape) // size >= it), default=1)
    reduced = read_radiograph(originals[0], reduce_to=size)
    assert reduced.shape == tuple(-(-side // scale) for side in whole.shape)
    resized = Image.fromarray(whole).resize(reduced.shape[::-1], Image.Resampling.BOX)
    assert np.abs(reduced.astype(int) - np.asarray(resized)).mean() < 3


def test_nothing_but_jpeg_is_reduced(film):
    assert (read_radiograph(film, reduce_to=8) == read_radiograph(film)).all()


# Refusals


def pages(kind, **options):
    film = Image.new("L", (8, 8))
    return as_file(film, kind, save_all=True, append_images=[Image.new("L", (8, 8), 9)], **options)


NOT_A_NUMBER = np.array([[0, 1], [np.nan, 2]], np.float32)
REFUSED = {
    "two pages": (pages("TIFF"), "it holds several pages or frames"),
    "animated": (pages("PNG"), "it holds several pages or frames"),
    "another format": (as_file(np.zeros((8, 8), np.uint8), "GIF"), "it is none of the formats below"),
    "another program's": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of the formats below"),
    "signed bytes": (as_tiff(np.zeros((4, 4), np.int8)), "it has signed 8-bit values"),
    "deep opacity": (
        as_png(16, 4, np.full((4, 4, 4), 7, np.uint8)),
        "it has 16 bits a channel in colour or with opacity",
    ),
    "deep colour": (as_png(16, 2, np.full((4, 4, 6), 7, np.uint8)), "it has 16 bits a channel in colour"),
    "NaN": (as_tiff(NOT_A_NUMBER), "it holds NaN or infinity"),
    "doubles with NaN": (as_tiff(NOT_A_NUMBER.astype(np.float64)), "it is none of the formats below"),
}


@pytest.mark.parametrize(("film", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_single_film_is_refused_with_a_reason(film, reason):
    with pytest.raises(
        ValueError, match=rf"^Can't read a film as an image: {reason}.*\. Expected a whole file of one of"
    ):
        read_radiograph(film, name="a film")


def test_a_second_picture_in_a_jpeg_is_its_preview():
    film, preview = Image.new("L", (32, 32), 90), Image.new("L", (8, 8), 9)
    pixels = read_radiograph(as_file(film, "MPO", save_all=True, append_images=[preview]))
    assert pixels.shape == (32, 32) and (pixels == 90).all()


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Can't read .* as an image: it is a folder\."):
        read_radiograph(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"window": (50, 50)}, "window must be two rising percentiles"),
        ({"window": (-1, 99)}, "window must be two rising percentiles"),
        ({"window": (1, 101)}, "window must be two rising percentiles"),
        ({"window": (float("nan"), 99)}, "window must be two rising percentiles"),
        ({"window": (1, 2, 3)}, "window must be two rising percentiles"),
        ({"dtype": np.uint16}, "dtype must be uint8 or float32, not uint16"),
        ({"reduce_to": 0}, "reduce_to must be at least 1 pixel, not 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(film, option, message):
    with pytest.raises(ValueError, match=message):
        read_radiograph(film, **option)


def test_warnings_are_off_while_films_are_read_and_on_afterwards(film, monkeypatch):
    read = radiographs.grey_values

    def warn_and_read(image):
        warnings.warn("text of a header", stacklevel=1)
        time.sleep(0.01)
        return read(image)

    monkeypatch.setattr(radiographs, "grey_values", warn_and_read)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=read_radiograph, args=[film]) for _ in range(8)]
        for thread in threads:
            thread.start()
            time.sleep(0.003)  # they overlap, and end in the order of their start
        for thread in threads:
            thread.join()
        assert not caught
        warnings.warn("one of our own", stacklevel=1)
        assert len(caught) == 1


# The pipeline


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """The pipeline, on a small untrained model, of which the seed decides how much it minds."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    CXRInceptionForImageClassification(CXRInceptionConfig(depth_multiplier=0.1)).save_pretrained(folder)
    CXRInceptionImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)
    return pipeline("image-classification", model=str(folder), trust_remote_code=False)


def test_the_pipeline_answers_alike_for_a_film_in_any_depth_that_read_radiograph_reads(classify, tmp_path):
    grey = draw_phantom(0, opacity=True, image_size=96)
    grey[0, :2] = 0, 255
    deep = grey * np.uint16(257)
    (tmp_path / "8.png").write_bytes(as_file(grey, "PNG"))
    (tmp_path / "16.png").write_bytes(as_file(deep, "PNG"))
    (tmp_path / "16.dcm").write_bytes(as_dicom(deep))
    paths = [tmp_path / name for name in ("8.png", "16.png", "16.dcm")]

    expected = classify(str(paths[0]))
    assert [classify(read_radiograph(path)) for path in paths] == [expected] * 3
    for answer in classify([read_radiograph(path) for path in paths]):
        assert [it["score"] for it in answer] == pytest.approx([it["score"] for it in expected], abs=1e-6)

    clipped = classify(str(paths[1]))  # transformers opens the file itself
    assert abs(clipped[0]["score"] - expected[0]["score"]) > 1e-3
