"""PneumoniaMNIST loads from MedMNIST's file pixel by pixel, with its own splits; other files are refused."""

import numpy as np
import pytest

from cxr_backbone.data.labels import make_features
from cxr_backbone.data.pneumoniamnist import load_pneumoniamnist


def arrays(side=28, films=(6, 4, 2)):
    drawn = np.random.default_rng(side)
    return {
        f"{name}_{kind}": drawn.integers(0, *shape_and_top, dtype=np.uint8)
        for name, count in zip(("train", "val", "test"), films, strict=True)
        for kind, shape_and_top in {"images": (256, (count, side, side)), "labels": (2, (count, 1))}.items()
    }


def write(path, **changed):
    """A drawn file, some arrays changed or, if None, left out."""
    content = {name: array for name, array in (arrays() | changed).items() if array is not None}
    np.savez_compressed(path, **content)
    return path


def test_the_real_file_has_the_published_counts_and_keeps_its_pixels(shared, caplog):
    path = shared / "data/pneumoniamnist/pneumoniamnist_rebuilt.npz"
    splits = load_pneumoniamnist(path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 4708, "validation": 524, "test": 624}
    assert not caplog.records
    with np.load(path) as file:
        for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
            assert splits[split]["label"][:] == file[f"{name}_labels"][:, 0].tolist()
            images, stored = file[f"{name}_images"], splits[split]
            for row in (0, 17, len(images) - 1):
                np.testing.assert_array_equal(np.asarray(stored[row]["image"]), images[row])
                assert stored[row]["image_id"] == f"{split}/{row}" and stored[row]["patient_id"] is None
    assert sum(splits["test"]["label"]) == 390
    assert splits["test"].features == make_features(["NORMAL", "PNEUMONIA"])


@pytest.mark.parametrize("side", [28, 64, 128, 224])
def test_films_of_each_published_size_keep_their_pixels(tmp_path, side):
    drawn = arrays(side)
    np.savez(tmp_path / f"pneumoniamnist_{side}.npz", **drawn)
    splits = load_pneumoniamnist(str(tmp_path / f"pneumoniamnist_{side}.npz"))
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        np.testing.assert_array_equal(
            np.stack([np.asarray(f) for f in splits[split]["image"]]), drawn[f"{name}_images"]
        )
        assert splits[split]["label"][:] == drawn[f"{name}_labels"][:, 0].tolist()


def test_a_file_of_another_size_is_told_of(tmp_path, caplog):
    load_pneumoniamnist(write(tmp_path / "few.npz"))
    assert "has 6 films in train; PneumoniaMNIST has 4708" in caplog.text


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.npz", test_labels=np.zeros((2, 1), dtype=np.uint8))
    assert load_pneumoniamnist(path)["test"]["label"][:] == [0, 0]
    write(path, test_labels=np.ones((2, 1), dtype=np.int64))
    assert load_pneumoniamnist(path)["test"]["label"][:] == [1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": None}, r"it has the arrays \['test_images', .*expected \['test_images', 'test_labels', "),
        ({"extra": np.zeros(1)}, r"it has the arrays \['extra', "),
        ({"val_images": np.zeros((4, 28, 28))}, r"val_images is float64 \(4, 28, 28\), expected uint8"),
        ({"val_images": np.zeros((4, 28, 28, 3), np.uint8)}, r"val_images is uint8 \(4, 28, 28, 3\), expected uint8"),
        ({"val_images": np.zeros((4, 28, 64), np.uint8)}, r"val_images is uint8 \(4, 28, 64\), expected uint8"),
        ({"val_images": np.zeros((4, 30, 30), np.uint8)}, r"a side of 30 pixels, expected one of \(28, 64, 128, 224\)"),
        ({"val_images": np.zeros((4, 64, 64), np.uint8)}, r"sides of \[28, 64\] pixels, expected one size"),
        ({"val_labels": np.zeros((4, 14), np.uint8)}, r"val_labels is uint8 \(4, 14\), expected integers \(4, 1\)"),
        ({"val_labels": np.zeros((3, 1), np.uint8)}, r"val_labels is uint8 \(3, 1\), expected integers \(4, 1\)"),
        ({"val_labels": np.zeros((4, 1))}, r"val_labels is float64"),
        ({"val_labels": np.full((4, 1), 2)}, r"val_labels has 2, expected 0 \(NORMAL\) and 1 \(PNEUMONIA\)"),
        ({"val_labels": np.array([[None]] * 4)}, r"allow_pickle=False"),
        (
            {"val_images": np.zeros((0, 28, 28), np.uint8), "val_labels": np.zeros((0, 1), int)},
            "val_images has no films",
        ),
    ],
)
def test_other_content_is_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=rf"other\.npz is no PneumoniaMNIST file: .*{message}"):
        load_pneumoniamnist(write(tmp_path / "other.npz", **changed))


def test_an_archive_that_would_unpack_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cxr_backbone.data.pneumoniamnist.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"bomb\.npz is no .*: its arrays take \d+ bytes, expected at most 1000"):
        load_pneumoniamnist(write(tmp_path / "bomb.npz"))


def test_a_missing_damaged_or_other_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*gone\.npz"):
        load_pneumoniamnist(tmp_path / "gone.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one\.npy is no npz file"):
        load_pneumoniamnist(tmp_path / "one.npy")
    whole = write(tmp_path / "whole.npz").read_bytes()
    middle = len(whole) // 2
    (tmp_path / "flipped.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=r"flipped\.npz is no PneumoniaMNIST file: "):
        load_pneumoniamnist(tmp_path / "flipped.npz")
