"""A folder of class folders becomes splits by patient; DICOM and TIFF are films too; nothing is dropped in silence."""

import logging
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from cxr_backbone.data.imagefolder import load_imagefolder
from cxr_backbone.data.labels import make_features

PATIENT = r"p\d+"


def draw(root, *folders, patients=range(12), name="p{patient}_1.png"):
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for patient in patients:
            Image.fromarray(np.full((4, 4), 99, dtype=np.uint8)).save(root / folder / name.format(patient=patient))
    return root


def load(root, pattern=PATIENT, **options):
    return load_imagefolder(root, patient_pattern=pattern, **options)


def ids(splits):
    return {image_id for split in splits.values() for image_id in split["image_id"]}


def test_class_folders_are_split_by_patient(tmp_path):
    splits = load(draw(tmp_path, "PNEUMONIA", "NORMAL"), num_folds=4)
    assert splits["train"].features == make_features(["NORMAL", "PNEUMONIA"])
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "validation": 6, "test": 6}
    assert not set(splits["train"]["patient_id"]) & set(splits["test"]["patient_id"])
    assert all(row["label"] == row["image_id"].startswith("PNEUMONIA/") for row in splits["train"])
    assert splits["train"][0]["image"].size == (4, 4)


def test_split_folders_give_the_splits_and_what_is_missing_is_carved(tmp_path):
    draw(tmp_path, "train/A", "train/B")
    draw(tmp_path, "Test/A", "Test/B", patients=range(50, 53))
    splits = load(tmp_path, num_folds=4)
    assert {name: len(split) for name, split in splits.items()} == {"train": 18, "validation": 6, "test": 6}
    draw(tmp_path, "valid/A", "valid/B", patients=range(60, 62))
    assert {name: len(split) for name, split in load(tmp_path, None).items()} == {
        "train": 24,
        "validation": 4,
        "test": 6,
    }


def test_the_real_kermany_folder_loads(shared, caplog):
    splits = load(shared / "data/kermany224", r"person\d+|(?:NORMAL2-)?IM-\d+")
    assert {name: len(split) for name, split in splits.items()} == {"train": 5216, "validation": 16, "test": 624}
    assert np.bincount(splits["test"]["label"]).tolist() == [234, 390]
    assert splits["test"]["patient_id"][0] == "IM-0001"
    assert "Leaving out 2 files beside the class folders" in caplog.text and "labels.csv" in caplog.text


def test_dicom_and_tiff_files_are_films_and_patients_may_have_folders(shared, tmp_path):
    for number, film in enumerate(sorted((shared / "data/dicom").glob("*.dcm"))):
        folder = tmp_path / ("ankle" if "ankle" in film.name else "chest") / f"p{number}"
        folder.mkdir(parents=True)
        shutil.copy(film, folder / "1.dcm")
    draw(tmp_path, "chest/p7", "ankle/p8", patients=[0], name="{patient}.TIFF")
    splits = load(tmp_path, num_folds=3)
    assert splits["train"].features["label"].names == ["ankle", "chest"]
    assert len(ids(splits)) == 8 and {"ankle/p0/1.dcm", "chest/p7/0.TIFF"} <= ids(splits)
    assert {patient for split in splits.values() for patient in split["patient_id"]} == {
        f"p{n}" for n in (*range(6), 7, 8)
    }


def test_the_order_of_classes_can_be_given_and_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        splits = load(draw(tmp_path, "healthy", "ill"), label_names=["ill", "healthy"])
    assert splits["train"].features["label"].names == ["ill", "healthy"]
    assert "class 1 is healthy (12 films), the positive class" in caplog.text


def test_what_systems_leave_behind_is_ignored(tmp_path):
    draw(tmp_path, "A", "B")
    for name in ("A/.DS_Store", "A/Thumbs.db", ".cache/x.png", "__MACOSX/A/p1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert len(ids(load(tmp_path))) == 24


def test_metadata_tells_label_and_patient_in_place_of_folders(tmp_path):
    draw(tmp_path, "films", name="{patient}.png")
    lines = [f"films/{n}.png,{'sick' if n % 2 else 'well'},{n // 2}" for n in range(12)]
    (tmp_path / "metadata.csv").write_text("file_name,label,patient_id\n" + "\n".join(lines))
    splits = load(tmp_path, None, num_folds=3)
    assert splits["train"].features == make_features(["sick", "well"])
    assert len(ids(splits)) == 12 and set(splits["train"]["patient_id"]) <= {str(n) for n in range(6)}


def test_metadata_of_each_split_folder_brings_the_splits(tmp_path):
    for split, first in {"train": 0, "validation": 20, "test": 40}.items():
        draw(tmp_path, split, patients=range(first, first + 6))
        lines = [f'{{"file_name": "p{n}_1.png", "label": {n % 2}}}' for n in range(first, first + 6)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    splits = load(tmp_path, label_names=["well", "sick"])
    assert splits["test"]["image_id"][0] == "test/p40_1.png" and splits["test"]["patient_id"][0] == "p40"
    assert splits["validation"]["label"][:] == [0, 1] * 3


def test_metadata_beside_split_folders_is_refused(tmp_path):
    draw(tmp_path, "train", "test")
    (tmp_path / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(ValueError, match=r"metadata\.csv stands beside split folders, so the split .* is not certain"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "A/notes.txt").touch(), r"A/notes\.txt is no film; expected files in \.bmp, \.dcm"),
        (lambda root: shutil.copy(root / "A/p1_1.png", root), r"p1_1\.png is in no class folder"),
        (lambda root: (root / "C").mkdir(), r"C holds no films; expected files in \.bmp"),
        (lambda root: shutil.rmtree(root / "B"), r"has 1 class folders; expected two or more"),
        (
            lambda root: (root / "A").rename(root / "train"),
            r"has the folders B, train; expected splits alone, or class",
        ),
        (lambda root: (root / "A/p9.png").symlink_to("/etc/hostname"), r"p9\.png is a link out of"),
        (lambda root: (root / "C").symlink_to(root / "A"), r"C is a link to a folder"),
        (lambda root: (root / "A/x.png").touch(), r"x\.png: patient_pattern=.* finds no patient in 'A/x\.png'"),
        (lambda root: draw(root, "a"), r"has the classes \['A', 'B', 'a'\]; expected two or more that differ in more"),
    ],
)
def test_a_folder_that_is_not_as_expected_is_refused(tmp_path, damage, message):
    damage(draw(tmp_path, "A", "B"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_split_folders_that_do_not_agree_are_refused(tmp_path):
    draw(tmp_path, "train/A", "train/B", "test/A", "test/C")
    with pytest.raises(ValueError, match=r"train has the classes \['A', 'B'\], but .*test has \['A', 'C'\]"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "test")
    draw(tmp_path, "val/A", "val/B", "dev/A", "dev/B")
    with pytest.raises(ValueError, match="has the folders dev, train, val, of which two are the same split"):
        load(tmp_path)


def test_an_unknown_class_or_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"B/p0_1\.png has 'B' in column folder; expected A, C\."):
        load(draw(tmp_path, "A", "B"), label_names=["A", "C"])
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*gone"):
        load(tmp_path / "gone")


def test_splits_that_have_to_be_carved_need_patients(tmp_path):
    with pytest.raises(ValueError, match="brings no validation and no test split, and patients are not known"):
        load(draw(tmp_path, "A", "B"), None)


def test_no_film_is_decoded(tmp_path):
    for path in draw(tmp_path, "A", "B").glob("*/*.png"):
        path.write_bytes(b"no image")
    stored = load(tmp_path)["train"].cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str(tmp_path / stored[0]["image_id"])}
