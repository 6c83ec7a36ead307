"""A file becomes grey pixels, and a data set becomes pixels once."""

import io
import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from cxr_backbone import CXRInceptionImageProcessor
from cxr_backbone.data.radiographs import decode_once, read_radiograph, stack_pixels
from cxr_backbone.data.synthetic import draw_phantom, load_synthetic


@pytest.fixture
def originals(shared):
    """Full-size JPEGs of the Kermany set."""
    return sorted((shared / "data/kermany-originals").rglob("*.jpeg"))


@pytest.fixture
def film(tmp_path):
    """A drawn film as a PNG file."""
    path = tmp_path / "film.png"
    Image.fromarray(draw_phantom(0, opacity=True, image_size=64)).save(path)
    return path


def dataset_of(paths):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [str(path) for path in paths], "label": list(range(len(paths)))}
    return datasets.Dataset.from_dict(columns, features=features)


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


@pytest.mark.parametrize("suffix", ["jpeg", "png"])
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


def test_decoded_pixels_are_those_of_the_image_processor(originals, tmp_path):
    decoded = decode_once(dataset_of(originals[:6]), 224, tmp_path)
    processor = CXRInceptionImageProcessor(size={"height": 224, "width": 224})
    images = [Image.open(path) for path in originals[:6]]
    expected = processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    pixels = stack_pixels([decoded[i] for i in range(6)])
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 224, 224)
    assert (pixels == expected[:, 0]).all()


def test_the_other_columns_stay_beside_their_film(tmp_path):
    films = load_synthetic(20, image_size=32)["train"].select(range(5, 15))
    decoded = decode_once(films, 32, tmp_path)
    assert decoded.column_names == ["label", "patient_id", "subtype", "pixels"]
    assert decoded.features["label"] == films.features["label"]
    assert decoded["patient_id"][:] == films["patient_id"][:]
    expected = np.stack([np.asarray(image) for image in films["image"]])
    assert (stack_pixels(decoded.__getitems__(list(range(10)))) == expected).all()


def test_stacked_pixels_can_be_written_to(film, tmp_path):
    pixels = stack_pixels([decode_once(dataset_of([film]), 16, tmp_path)[0]])
    pixels[:] = 7


def test_a_second_call_reads_the_cache(film, tmp_path, monkeypatch):
    first = decode_once(dataset_of([film]), 16, tmp_path)[0]
    monkeypatch.setattr("cxr_backbone.data.radiographs.read_radiograph", None)  # decoding again would fail
    assert decode_once(dataset_of([film]), 16, tmp_path)[0] == first
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_change_of_file_bytes_labels_or_size_is_decoded_anew(film, tmp_path):
    def num_caches():
        return len(list(tmp_path.glob("*.arrow")))

    decode_once(dataset_of([film]), 16, tmp_path)
    decode_once(dataset_of([film]), 17, tmp_path)
    assert num_caches() == 2
    os.utime(film, (1, 1))
    decode_once(dataset_of([film]), 16, tmp_path)
    assert num_caches() == 3
    decode_once(dataset_of([film]).map(lambda row: {"label": 5}), 16, tmp_path)
    assert num_caches() == 4
    for seed in (0, 1):
        png = io.BytesIO()
        Image.fromarray(draw_phantom(seed, opacity=True, image_size=64)).save(png, "PNG")
        embedded = {"image": [{"bytes": png.getvalue(), "path": "same name.png"}]}
        decode_once(datasets.Dataset.from_dict(embedded, datasets.Features({"image": datasets.Image()})), 16, tmp_path)
    assert num_caches() == 6


def test_a_missing_or_damaged_film_of_a_data_set_is_named_and_leaves_no_cache(film, tmp_path):
    damaged = shutil.copy(film, tmp_path / "damaged.png")
    damaged.write_bytes(b"no image")
    with pytest.raises(FileNotFoundError, match=r"gone\.png \(row 1"):
        decode_once(dataset_of([film, tmp_path / "gone.png"]), 16, tmp_path)
    with pytest.raises(ValueError, match=r"Can't read .*damaged\.png"):
        decode_once(dataset_of([film, damaged]), 16, tmp_path)
    assert not list(tmp_path.glob("*.arrow"))


def test_a_data_set_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a column `image`; it has label"):
        decode_once(datasets.Dataset.from_dict({"label": [0]}), 16, tmp_path)
    empty = datasets.Dataset.from_dict({"image": [None]}, datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match="Row 0 of the data set has no image"):
        decode_once(empty, 16, tmp_path)
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, not 0"):
        decode_once(empty, 0, tmp_path)
