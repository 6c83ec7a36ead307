"""A DICOM file becomes the grey pixels that the standard describes, computed here by hand."""

import logging
import sys
import warnings

import numpy as np
import pytest
from data.film_files import as_dicom, as_file, lossless_jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from cxr_backbone.data import dicom
from cxr_backbone.data.radiographs import read_radiograph
from cxr_backbone.image_processing_cxr_inception import to_grey_uint8

UNCOMPRESSED = [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
LOSSLESS = [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless]
TWELVE = np.linspace(100, 4000, 40 * 41).astype(np.uint16).reshape(40, 41)


def every_value(bits, signed):
    """A film with the smallest and the largest value that can be stored, and noise between them."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    stored = np.random.default_rng(bits).integers(low, high, (37, 41), endpoint=True)
    stored[0, :2] = low, high
    return stored.astype(("i" if signed else "u") + ("1" if bits == 8 else "2"))


def stretched(values):
    values = values.astype(np.float64)
    return (values - values.min()) / (values.max() - values.min())


def lookup_table(entries, first, bits):
    table = Dataset()
    table.LUTDescriptor = [len(entries), first, bits]
    table.add_new("LUTData", "US", [int(entry) for entry in entries])
    return table


@pytest.mark.filterwarnings("ignore")  # pydicom's, about what is written
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("syntax", [*UNCOMPRESSED, *LOSSLESS], ids=lambda syntax: syntax.keyword)
def test_stored_values_are_read_at_full_depth_in_every_lossless_syntax(syntax, bits, signed):
    stored = every_value(bits, signed)
    film = as_dicom(stored, bits=bits, syntax=syntax)
    pixels = read_radiograph(film, dtype=np.float32)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, stretched(stored), rtol=0, atol=1e-7)
    assert (read_radiograph(film) == to_grey_uint8(stored)).all()


@pytest.mark.parametrize("syntax", [uid.JPEGLossless, uid.JPEGLosslessSV1], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_jpeg_is_read_at_full_depth(syntax, bits):
    stored = every_value(bits, signed=False)
    film = as_dicom(stored, bits=bits, syntax=syntax, frame=lossless_jpeg(stored, bits))
    np.testing.assert_allclose(read_radiograph(film, dtype=np.float32), stretched(stored), rtol=0, atol=1e-7)


def test_baseline_jpeg_is_what_pillow_decodes():
    grey = (TWELVE >> 4).astype(np.uint8)
    frame = as_file(grey, "JPEG")
    film = as_dicom(grey, syntax=uid.JPEGBaseline8Bit, frame=frame)
    assert (read_radiograph(film) == read_radiograph(frame)).all()


def test_twelve_bit_jpeg_is_read():
    path = get_testdata_file("JPGExtended.dcm")  # travels with pydicom, as the next two do
    stored = dcmread(path).pixel_array
    assert stored.max() > 255
    np.testing.assert_allclose(read_radiograph(path, dtype=np.float32), stretched(stored), rtol=0, atol=1e-6)


def test_lossy_jpeg_2000_and_near_lossless_jpeg_ls_are_close():
    for name in ("JPEG2000.dcm", "JPEGLSNearLossless_16.dcm"):
        path = get_testdata_file(name)
        pixels = read_radiograph(path, dtype=np.float32, window=(0, 100))
        np.testing.assert_allclose(pixels, stretched(dcmread(path).pixel_array), rtol=0, atol=1e-6)


def test_eight_bits_without_a_window_stay_as_they_are():
    grey = np.random.default_rng(0).integers(20, 200, (9, 11), dtype=np.uint8)
    assert (read_radiograph(as_dicom(grey)) == grey).all()
    assert (read_radiograph(as_dicom(grey, PhotometricInterpretation="MONOCHROME1")) == 255 - grey).all()


def test_unused_bits_are_ignored():
    noise = np.random.default_rng(0).integers(0, 16, TWELVE.shape).astype(np.uint16) << 12
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless):
        film = as_dicom(TWELVE | noise, bits=12, syntax=syntax)
        assert (read_radiograph(film) == read_radiograph(as_dicom(TWELVE, bits=12))).all()


# Windows and tables


@pytest.mark.parametrize("rescale", [(1, 0), (2.5, -1024), (-1, 4095)])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
def test_the_first_window_is_applied_after_the_rescale(function, rescale):
    slope, intercept = rescale
    center, width = 2000.0, 1500.0
    tags = {"WindowCenter": [center, 7.0], "WindowWidth": [width, 9.0], "RescaleSlope": slope}
    tags |= {"RescaleIntercept": intercept} | ({"VOILUTFunction": function} if function else {})
    values = TWELVE * float(slope) + intercept
    expected = {  # PS3.3 C.11.2.1.2 and C.11.2.1.3
        "LINEAR_EXACT": ((values - center) / width + 0.5).clip(0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (values - center) / width)),
    }.get(function, ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1))
    film = as_dicom(TWELVE, bits=12, **tags)
    np.testing.assert_allclose(read_radiograph(film, dtype=np.float32), expected, rtol=0, atol=1e-6)
    inverse = as_dicom(TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1", **tags)
    assert (read_radiograph(inverse) == 255 - read_radiograph(film)).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_voi_table_comes_before_a_window_and_holds_its_ends(bits):
    entries = np.linspace(0, 2**bits - 1, 3000).round() ** 1
    film = as_dicom(TWELVE, bits=12, VOILUTSequence=[lookup_table(entries, 500, bits)], WindowCenter=9, WindowWidth=9)
    expected = entries[np.clip(TWELVE.astype(int) - 500, 0, 2999)] / (2**bits - 1)
    np.testing.assert_allclose(read_radiograph(film, dtype=np.float32), expected, rtol=0, atol=1e-6)


def test_a_modality_table_is_looked_up():
    entries = np.arange(4096)[::-1] * 10
    film = as_dicom(TWELVE, bits=12, ModalityLUTSequence=[lookup_table(entries, 0, 16)])
    np.testing.assert_allclose(read_radiograph(film, dtype="float32"), 1 - stretched(TWELVE), rtol=0, atol=1e-6)


def test_a_blank_window_is_none():
    blank = as_dicom(TWELVE, bits=12, WindowCenter=None, WindowWidth=None, RescaleSlope=None, RescaleIntercept=None)
    assert (read_radiograph(blank) == to_grey_uint8(TWELVE)).all()


def test_percentiles_replace_the_films_own_window():
    film = as_dicom(TWELVE, bits=12, WindowCenter=9, WindowWidth=9, RescaleSlope=2, RescaleIntercept=-7)
    low, high = np.percentile(TWELVE, (10, 95))
    expected = ((TWELVE - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(read_radiograph(film, dtype="float32", window=(10, 95)), expected, rtol=0, atol=1e-6)


def test_the_percentiles_of_a_film_turned_over_are_those_of_what_is_seen():
    film = as_dicom(TWELVE, bits=12, PhotometricInterpretation="MONOCHROME1")
    seen = 4095.0 - TWELVE
    low, high = np.percentile(seen, (10, 95))
    expected = ((seen - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(read_radiograph(film, dtype="float32", window=(10, 95)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [None, (0, 100)])
def test_padding_is_black_and_counts_for_no_window(photometric, window):
    stored = TWELVE.astype(np.int16)
    stored[:5], stored[5:8] = -2000, -1990
    film = as_dicom(
        stored, PhotometricInterpretation=photometric, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1985
    )
    expected = np.zeros(stored.shape)
    expected[8:] = stretched(stored[8:]) if photometric == "MONOCHROME2" else 1 - stretched(stored[8:])
    np.testing.assert_allclose(read_radiograph(film, dtype="float32", window=window), expected, rtol=0, atol=1e-6)


def test_a_film_of_padding_is_black():
    assert not read_radiograph(as_dicom(np.full((4, 4), 9, np.uint16), PixelPaddingValue=9)).any()


# Real films


def test_the_chest_films_are_eight_bits_as_the_jpeg_says(shared):
    folder = shared / "data/dicom"
    grey = read_radiograph(folder / "rsna_cr_monochrome2.dcm")
    assert grey.shape == (1024, 1024) and grey.min() == 0 and grey.max() == 254
    # The spine is white and the lungs are dark.
    assert grey[300:600, 500:540].mean() > grey[300:600, 250:400].mean() + 40
    assert (read_radiograph(folder / "rsna_cr_tagged_monochrome1.dcm") == 255 - grey).all()


def test_the_fifteen_bit_chest_film_is_turned_over_within_its_window(shared):
    path = shared / "data/dicom/chest_cr_15bit_monochrome1_jpeg2000.dcm"
    stored = dcmread(path).pixel_array.astype(float)  # window 15000 / 30000
    expected = 1 - ((stored - 14999.5) / 29999 + 0.5).clip(0, 1)
    pixels = read_radiograph(path, dtype=np.float32)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)
    assert len(np.unique(pixels)) > 20_000
    assert pixels[600:1200, 900:980].mean() > pixels[600:1200, 400:600].mean()  # spine and lung


def test_the_ankle_is_upright_and_its_bone_white(shared):
    pixels = read_radiograph(shared / "data/dicom/ankle_cr_jpeg2000_reversible.dcm").astype(int)
    lossy = read_radiograph(shared / "data/dicom/ankle_cr_jpeg2000_irreversible.dcm")
    assert np.abs(pixels - lossy).mean() < 2
    heel, shaft, background = pixels[1580:1700, 780:860], pixels[300:900, 820:880], pixels[300:900, 460:560]
    assert heel.mean() > shaft.mean() > background.mean() + 80


# Refusals


def colour():
    film = as_dicom(np.zeros((4, 12), np.uint8), Columns=4, SamplesPerPixel=3, PlanarConfiguration=0)
    return film.replace(b"MONOCHROME2", b"RGB        ")


GREY = np.zeros((8, 8), np.uint16)
REFUSED = {
    "several frames": (as_dicom(GREY, Rows=4, NumberOfFrames=2), "it holds several frames"),
    "colour": (colour(), "it is in colour"),
    "palette": (as_dicom(GREY, PhotometricInterpretation="PALETTE COLOR"), "it is in colour"),
    "no pixels": (as_dicom(GREY, without=["PixelData"]), "it has no pixel data"),
    "one bit": (as_dicom(GREY, BitsAllocated=1, BitsStored=1, HighBit=0), "it stores 1 bits a pixel in 1"),
    "32 bits": (as_dicom(GREY, Columns=4, BitsAllocated=32, BitsStored=32, HighBit=31), "it stores 32 bits a pixel"),
    "high bits": (as_dicom(TWELVE << 4, bits=12, HighBit=15), "its values don't stand in the low bits"),
    "too short": (as_dicom(GREY, Rows=9), "its pixel data is not as long as"),
    "too long": (as_dicom(GREY, Rows=4), "its pixel data is not as long as"),
    "empty": (as_dicom(GREY, Rows=0), "its header tells of 8 x 0 pixels"),
    "absurd": (as_dicom(GREY, Rows=65535, Columns=65535), r"its 65535 x 65535 pixels are more than 50,000,000"),
    "deflated": (as_dicom(GREY, syntax=uid.DeflatedExplicitVRLittleEndian), "its transfer syntax is none of"),
    "video": (as_dicom(GREY, syntax=uid.MPEG2MPML, frame=b"film"), "its transfer syntax is none of"),
    "window": (as_dicom(TWELVE, bits=12, WindowCenter=9, WindowWidth=0), "its VOI window can't be applied"),
    "rescale": (as_dicom(TWELVE, bits=12, RescaleSlope="1e308", RescaleIntercept="0"), "its rescale or its window"),
    "no number": (as_dicom(GREY, without=["Rows"]), "it is damaged"),
}


@pytest.mark.parametrize(("film", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_single_grey_film_is_refused_with_a_reason(film, reason):
    with pytest.raises(ValueError, match=rf"^Can't read a\.dcm as a DICOM film: {reason}.*\. Expected one grey frame"):
        read_radiograph(film, name="a.dcm")


@pytest.mark.parametrize("syntax", [*LOSSLESS, uid.JPEGLosslessSV1, uid.JPEGBaseline8Bit], ids=lambda it: it.keyword)
def test_a_frame_of_another_size_than_the_header_is_refused(syntax):
    grey = np.arange(64 * 64).reshape(64, 64).astype(np.uint8)
    frames = {uid.JPEGLosslessSV1: lambda: lossless_jpeg(grey, 8), uid.JPEGBaseline8Bit: lambda: as_file(grey, "JPEG")}
    film = as_dicom(grey, syntax=syntax, frame=frames.get(syntax, lambda: None)(), Rows=65)
    with pytest.raises(ValueError, match="as a DICOM film: "):
        read_radiograph(film)


def test_nothing_of_a_header_reaches_a_log_a_warning_or_an_error(caplog, capfd):
    def swapped(film, old, new):
        assert old in film and len(old) == len(new)
        return film.replace(old, new)

    rescaled = as_dicom(TWELVE, bits=12, RescaleSlope="1", RescaleIntercept="0", SpecificCharacterSet="ISO_IR 100")
    films = [
        swapped(rescaled, b"MONOCHROME2 ", b"Secret^Name "),
        swapped(rescaled, b"DS\x02\x001 ", b"DS\x02\x00S^"),
        swapped(rescaled, b"ISO_IR 100", b"Secret^Nam"),
        swapped(rescaled, b"1.2.840.10008.1.2.1", b"1.Secret^Name.1.2.1"),
        as_dicom(TWELVE, syntax=uid.JPEG2000Lossless, bits=12)[:-900],
        as_dicom(TWELVE, syntax=uid.RLELossless, bits=12, NumberOfFrames="1")[:-900],
    ]
    errors = []
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        for film in films:
            try:
                read_radiograph(film)
            except ValueError as error:
                assert error.__cause__ is None and error.__context__ is None
                errors.append(str(error))
    assert len(errors) == 5  # an unknown character set is no one's concern
    assert not any("S^" in error or "Secret" in error for error in errors)
    assert not caught and not caplog.records and capfd.readouterr() == ("", "")


def test_without_pydicom_the_extra_is_named(monkeypatch):
    film = as_dicom(GREY)
    monkeypatch.delitem(sys.modules, "cxr_backbone.data.dicom", raising=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"DICOM needs pydicom: pip install 'cxr-backbone\[dicom\]'"):
        read_radiograph(film)
    assert read_radiograph(as_file(Image.new("L", (3, 4)), "PNG")).shape == (4, 3)


def test_without_the_decoder_of_a_compression_the_extra_is_named(monkeypatch):
    film = as_dicom(TWELVE, bits=12, syntax=uid.JPEGLosslessSV1, frame=lossless_jpeg(TWELVE, 12))
    monkeypatch.setitem(dicom.PLUGINS, uid.JPEGLosslessSV1, "gone")
    with pytest.raises(
        ImportError, match=r"DICOM needs a decoder of JPEG Lossless.*: pip install 'cxr-backbone\[dicom"
    ):
        read_radiograph(film)


# Properties


@st.composite
def films(draw):
    """Stored values of any depth and shape, and their bits."""
    bits, signed = draw(st.integers(8, 16)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    values = draw(st.lists(st.integers(low, high), min_size=height * width, max_size=height * width))
    return np.array(values).reshape(height, width).astype(("i" if signed else "u") + "12"[bits > 8]), bits


WINDOWS = st.sampled_from([{}, {"WindowCenter": 40, "WindowWidth": 300}, {"RescaleSlope": 3, "RescaleIntercept": -9}])


@settings(deadline=None, max_examples=60)
@given(films(), WINDOWS, st.sampled_from([None, (0, 100), (0.5, 99.5), (20, 60)]))
def test_brighter_in_is_not_darker_out_and_both_types_agree(film, tags, window):
    stored, bits = film
    pixels = read_radiograph(as_dicom(stored, bits=bits, **tags), window=window)
    levels = read_radiograph(as_dicom(stored, bits=bits, **tags), window=window, dtype=np.float32)
    order = np.argsort(stored, axis=None, kind="stable")
    assert (np.diff(pixels.ravel()[order].astype(int)) >= 0).all() and (np.diff(levels.ravel()[order]) >= 0).all()
    assert levels.min() >= 0 and levels.max() <= 1
    assert np.abs(levels - pixels / 255.0).max() <= 0.5 / 255 + 1e-6


@settings(deadline=None, max_examples=40)
@given(films(), WINDOWS, st.sampled_from([None, (0, 100), (10, 90)]))
def test_monochrome1_is_the_complement(film, tags, window):
    stored, bits = film
    one, two = (
        read_radiograph(as_dicom(stored, bits=bits, PhotometricInterpretation=it, **tags), window=window).astype(int)
        for it in ("MONOCHROME1", "MONOCHROME2")
    )
    seen = np.percentile(stored, (0, 100) if window is None else window)
    if window is None or seen[0] < seen[1]:  # a window without width only tells what is above it
        assert (one + two == 255).all()
