"""A data set becomes pixels once."""

import io
import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from cxr_backbone import CXRInceptionImageProcessor
from cxr_backbone.data.decoding import decode_film, decode_once, stack_pixels
from cxr_backbone.data.facts import FILM_FEATURES
from cxr_backbone.data.synthetic import draw_phantom, load_synthetic


@pytest.fixture(scope="module")
def thousands(tmp_path_factory):
    """Paths of 2,000 films of one grey level each; row 5 is cut short, row 700 is text, row 1999 is gone."""
    folder = tmp_path_factory.mktemp("films")
    paths = [folder / f"{row}.png" for row in range(2000)]
    for row, path in enumerate(paths):
        Image.new("L", (8, 8), row % 256).save(path)
    paths[5].write_bytes(paths[5].read_bytes()[:40])
    paths[700].write_text("no image")
    paths[1999].unlink()
    return paths


@pytest.fixture
def no_decoding(monkeypatch):
    """A function: after its call, decoding fails the test."""
    return lambda: monkeypatch.setattr("cxr_backbone.data.decoding.read_radiograph", None)


def dataset_of(paths):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [str(path) for path in paths], "label": list(range(len(paths)))}
    return datasets.Dataset.from_dict(columns, features=features)


def embedded(*images):
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": list(images)}, features)


def num_caches(folder):
    return len(list(folder.glob("*.arrow")))


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
    carried = [column for column in films.column_names if column != "image"]
    assert decoded.column_names == [*carried, "pixels", "film"]
    assert decoded.select_columns(carried).features == films.select_columns(carried).features
    assert decoded.select_columns(carried)[:] == films.select_columns(carried)[:]
    expected = np.stack([np.asarray(image) for image in films["image"]])
    assert (stack_pixels(decoded.__getitems__(list(range(10)))) == expected).all()


def test_stacked_pixels_can_be_written_to(film, tmp_path):
    pixels = stack_pixels([decode_once(dataset_of([film]), 16, tmp_path)[0]])
    pixels[:] = 7


def test_the_facts_are_those_of_the_file_at_any_size(originals, tmp_path):
    small, large = (decode_once(dataset_of(originals[:3]), size, tmp_path) for size in (16, 299))
    assert small.features["film"] == datasets.Features(FILM_FEATURES)
    assert small["film"][:] == large["film"][:]
    for path, facts in zip(originals, small["film"], strict=False):
        with Image.open(path) as image:
            assert (facts["width"], facts["height"]) == image.size
        assert facts["file_bytes"] == path.stat().st_size


def test_reduced_films_are_nearly_the_exact_ones(originals, tmp_path):
    films = dataset_of(originals[:6])
    exact, reduced = decode_once(films, 299, tmp_path), decode_once(films, 299, tmp_path, reduced=True)
    pixels = [stack_pixels([rows[i] for i in range(6)]).astype(int) for rows in (exact, reduced)]
    assert 0 < np.abs(pixels[0] - pixels[1]).mean() < 1
    for fact in ("height", "width", "file_bytes"):
        assert [film[fact] for film in exact["film"]] == [film[fact] for film in reduced["film"]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_film_keeps_the_size_it_has_upright(originals, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    with Image.open(originals[0]) as image:
        image.save(file, "JPEG", exif=exif)
    image = {"bytes": file.getvalue(), "path": None}
    exact, reduced = decode_film(image, 64)["film"], decode_film(image, 64, reduced=True)["film"]
    assert exact["pixel_hash"] != reduced["pixel_hash"]
    assert (exact["height"], exact["width"]) == (reduced["height"], reduced["width"])


def test_only_a_jpeg_can_be_reduced(film):
    image = {"bytes": None, "path": str(film)}
    assert decode_film(image, 16, reduced=True) == decode_film(image, 16)


def test_a_second_call_reads_the_cache(film, tmp_path, no_decoding):
    first = decode_once(dataset_of([film]), 16, tmp_path)[0]
    no_decoding()
    assert decode_once(dataset_of([film]), 16, tmp_path)[0] == first
    assert num_caches(tmp_path) == 1


def test_several_processes_decode_the_same_and_find_the_same_cache(thousands, tmp_path, no_decoding):
    films = dataset_of(thousands[10:510])
    alone = decode_once(films, 8, tmp_path / "alone")
    together = decode_once(films, 8, tmp_path / "together", num_proc=2)
    assert together[:] == alone[:]
    no_decoding()
    for num_proc in (None, 1, 3):
        again = decode_once(films, 8, tmp_path / "together", num_proc=num_proc)
        assert again[:] == alone[:] and again._fingerprint == alone._fingerprint
        assert decode_once(films, 8, tmp_path / "alone", num_proc=num_proc)[:] == alone[:]
    assert (num_caches(tmp_path / "alone"), num_caches(tmp_path / "together")) == (1, 2)


def test_a_change_of_file_bytes_labels_size_or_way_is_decoded_anew(film, tmp_path):
    decode_once(dataset_of([film]), 16, tmp_path)
    decode_once(dataset_of([film]), 17, tmp_path)
    assert num_caches(tmp_path) == 2
    decode_once(dataset_of([film]), 16, tmp_path, reduced=True)
    assert num_caches(tmp_path) == 3
    os.utime(film, (1, 1))
    decode_once(dataset_of([film]), 16, tmp_path)
    assert num_caches(tmp_path) == 4
    decode_once(dataset_of([film]).map(lambda row: {"label": 5}), 16, tmp_path)
    assert num_caches(tmp_path) == 5
    for seed in (0, 1):
        png = io.BytesIO()
        Image.fromarray(draw_phantom(seed, opacity=True, image_size=64)).save(png, "PNG")
        decode_once(embedded({"bytes": png.getvalue(), "path": "same name.png"}), 16, tmp_path)
    assert num_caches(tmp_path) == 7


def test_unreadable_films_among_thousands_are_named_together_and_cost_no_second_pass(thousands, tmp_path, no_decoding):
    films = dataset_of(thousands)
    with pytest.raises(ValueError) as error:
        decode_once(films, 8, tmp_path)
    first, *named = str(error.value).splitlines()
    assert first.startswith("3 of 2000 films can't be read")
    for line, row in zip(named, (5, 700, 1999), strict=True):
        assert str(thousands[row]) in line
    no_decoding()
    for _ in range(2):  # from the cache both times, and each call reports
        skipped = {}
        decoded = decode_once(films, 8, tmp_path, on_unreadable=skipped.__setitem__)
        assert list(skipped) == [str(thousands[row]) for row in (5, 700, 1999)]
        assert all(path in reason for path, reason in skipped.items())
        assert decoded["label"][:] == [row for row in range(2000) if row not in (5, 700, 1999)]
        assert all(row["pixels"] == bytes([row["label"] % 256] * 64) for row in decoded)
    with pytest.raises(ValueError, match="3 of 2000"):
        decode_once(films, 8, tmp_path)


def test_several_processes_skip_the_same_films(thousands, tmp_path):
    skipped = []
    decoded = decode_once(
        dataset_of(thousands), 8, tmp_path, num_proc=2, on_unreadable=lambda *film: skipped.append(film)
    )
    assert [path for path, _ in skipped] == [str(thousands[row]) for row in (5, 700, 1999)]
    assert len(decoded) == 1997


def test_a_film_that_comes_back_is_decoded(film, tmp_path):
    late = tmp_path / "late.png"
    films = dataset_of([film, late])
    assert len(decode_once(films, 16, tmp_path, on_unreadable=lambda *film: None)) == 1
    shutil.copy(film, late)
    assert len(decode_once(films, 16, tmp_path)) == 2


def test_ten_unreadable_films_are_named_and_the_rest_counted(film, tmp_path):
    films = dataset_of([film, *(tmp_path / f"gone-{i}.png" for i in range(12))])
    with pytest.raises(ValueError, match=r"(?s)^12 of 13 films.*gone-9\.png.*and 2 more$"):
        decode_once(films, 16, tmp_path)


def test_films_without_a_name_are_called_by_their_row(film, tmp_path):
    skipped = []
    films = embedded({"bytes": film.read_bytes(), "path": None}, {"bytes": b"no image", "path": None}, None)
    assert len(decode_once(films, 16, tmp_path, on_unreadable=lambda *film: skipped.append(film))) == 1
    assert [name for name, _ in skipped] == ["row 1 of the data set", "row 2 of the data set"]
    assert all(name in reason for name, reason in skipped)


def test_a_data_set_of_unreadable_films_is_an_error_even_where_they_are_skipped(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)^2 of 2 films.*gone\.png"):
        decode_once(dataset_of([tmp_path / "gone.png"] * 2), 16, tmp_path, on_unreadable=lambda *film: None)


def test_a_failure_that_is_not_the_films_fault_stops_the_pass_and_leaves_no_cache(film, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError("denied")

    monkeypatch.setattr("cxr_backbone.data.decoding.read_radiograph", denied)
    with pytest.raises(PermissionError):
        decode_once(dataset_of([film]), 16, tmp_path, on_unreadable=lambda *film: None)
    assert num_caches(tmp_path) == 0


def test_a_data_set_without_films_is_refused(film, tmp_path):
    with pytest.raises(ValueError, match="needs a column `image`; it has label"):
        decode_once(datasets.Dataset.from_dict({"label": [0]}), 16, tmp_path)
    with pytest.raises(ValueError, match="no rows; expected at least one film"):
        decode_once(dataset_of([]), 16, tmp_path)
    with pytest.raises(ValueError, match="a column error already"):
        decode_once(dataset_of([film]).add_column("error", [0.5]), 16, tmp_path)
    with pytest.raises(ValueError, match="image_size must be at least 1 pixel, not 0"):
        decode_once(dataset_of([film]), 0, tmp_path)
