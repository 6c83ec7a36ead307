"""The Kermany set is read from each of its layouts, split by patient, and refused when anything is off."""

import csv
import logging
import shutil
from collections import Counter

import datasets
import pytest
from PIL import Image
from releases import needs_balanced_folds

from cxr_backbone.data.kermany import FEATURES, load_kermany
from cxr_backbone.data.synthetic import draw_phantom

# Ten patients a class in train, so that a tenth can be held out; Kaggle's and Mendeley's file names.
KAGGLE = {
    "train/NORMAL": [f"IM-{n:04}-0001.jpeg" for n in range(115, 120)]
    + [f"NORMAL2-IM-{n:04}-0001-0001.jpeg" for n in range(832, 837)],
    "train/PNEUMONIA": [f"person{n}_bacteria_{3317 + n}.jpeg" for n in range(1, 10)]
    + ["person10_virus_921.jpeg", "person10_virus_921_1.jpeg"],
    "val/NORMAL": ["NORMAL2-IM-1427-0001.jpeg"],
    "val/PNEUMONIA": ["person1946_bacteria_4874.jpeg"],
    "test/NORMAL": ["IM-0001-0001.jpeg"],
    "test/PNEUMONIA": ["person1_virus_6.jpeg"],
}
MENDELEY = {
    "train/NORMAL": [f"NORMAL-{1003233 + n}-0001.jpeg" for n in range(10)],
    "train/PNEUMONIA": [f"BACTERIA-{1135262 + n // 2}-000{1 + n % 2}.jpeg" for n in range(20)],
    "test/NORMAL": ["NORMAL-11419-0001.jpeg"],
    "test/PNEUMONIA": ["VIRUS-1135263-0001.jpeg"],
}


def write_films(root, layout):
    drawn = Image.fromarray(draw_phantom(0, opacity=False, image_size=32))
    for folder, names in layout.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            drawn.save(root / folder / name)
    return root


def write_parquet(root, layout, *, keep_names=True, **columns):
    """Shards as the Hub's copies have them: bytes and file name in the image, a ClassLabel."""
    (root / "data").mkdir()
    for split, name in {"train": "train", "val": "validation", "test": "test"}.items():
        files = [(folder, file) for folder in layout if folder.startswith(split) for file in layout[folder]]
        films = write_films(root / f"films-{split}", {f: n for f, n in layout.items() if f.startswith(split)})
        rows = {
            "image": [
                {"bytes": (films / folder / file).read_bytes(), "path": file if keep_names else None}
                for folder, file in files
            ],
            "label": [folder.rpartition("/")[2] for folder, _ in files],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")} | columns)
        shard = root / "data" / f"{name}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(shard)
    return root


@pytest.fixture
def kaggle(tmp_path):
    return write_films(tmp_path / "chest_xray", KAGGLE)


@pytest.fixture(scope="module")
def real(shared):
    return load_kermany(shared / "data/kermany224")


def test_the_real_set_has_the_published_counts(real):
    assert len(real["train"]) + len(real["validation"]) == 5216
    assert len(real["test"]) == 624
    subtypes = Counter(real["train"]["subtype"]) + Counter(real["validation"]["subtype"])
    assert subtypes == {"normal": 1341, "bacteria": 2530, "virus": 1345}
    assert Counter(real["test"]["subtype"]) == {"normal": 234, "bacteria": 242, "virus": 148}


def test_no_patient_of_the_real_set_stands_in_train_and_validation(real):
    assert not set(real["train"]["patient_id"]) & set(real["validation"]["patient_id"])


@needs_balanced_folds
def test_validation_of_the_real_set_is_a_tenth_with_the_shares_of_train(real):
    train, validation = (Counter(real[name]["subtype"]) for name in ("train", "validation"))
    assert validation.total() / 5216 == pytest.approx(0.1, abs=0.015)
    for subtype, films in train.items():
        assert validation[subtype] / validation.total() == pytest.approx(films / train.total(), abs=0.015)


def test_the_seed_decides_validation(real, shared):
    def held_out(seed):
        return load_kermany(shared / "data/kermany224", seed=seed)["validation"]["patient_id"][:]

    assert held_out(0) == real["validation"]["patient_id"][:] != held_out(1)


def test_images_are_paths_until_they_are_asked_for(real):
    stored = real["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert stored["bytes"] is None and stored["path"].endswith(".jpg")
    assert real["train"].features == FEATURES
    assert real["train"][0]["image"].size == (224, 224)


def test_the_real_films_in_kaggle_layout_give_the_same_splits(real, shared, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(shared / "data/kermany224" / split)
    unlisted = load_kermany(tmp_path)
    for name, split in real.items():
        assert Counter(unlisted[name]["subtype"]) == Counter(split["subtype"])
        if name == "test":
            assert set(unlisted[name]["patient_id"]) == set(split["patient_id"])


def test_kaggle_names_tell_patient_and_subtype(kaggle):
    splits = load_kermany(kaggle)
    films = datasets.concatenate_datasets([splits["train"], splits["validation"]])
    found = set(zip(films["patient_id"], films["subtype"], films["label"], strict=True))
    assert ("IM-0115", "normal", 0) in found
    assert ("NORMAL2-IM-0832", "normal", 0) in found
    assert ("person1", "bacteria", 1) in found
    assert ("person10", "virus", 1) in found
    assert len(films) == 21 and len(found) == 20


def test_the_official_validation_is_left_out_and_said_to_be(kaggle, caplog):
    with caplog.at_level(logging.INFO):
        splits = load_kermany(kaggle)
    patients = {patient for split in splits.values() for patient in split["patient_id"]}
    assert not patients & {"person1946", "NORMAL2-IM-1427"}
    assert "Leaving out the official validation split of 2 films" in caplog.text


def test_the_unzipped_parent_folder_works_and_what_a_mac_leaves_behind_is_ignored(kaggle):
    (kaggle / "train/NORMAL/._IM-0115-0001.jpeg").write_bytes(b"")
    (kaggle / "train/.DS_Store").write_bytes(b"")
    (kaggle.parent / "__MACOSX").mkdir()
    (kaggle / "train/__MACOSX").mkdir()
    assert load_kermany(kaggle.parent)["train"].num_rows == load_kermany(str(kaggle))["train"].num_rows


def test_mendeley_layout_without_validation_loads(tmp_path):
    splits = load_kermany(write_films(tmp_path, MENDELEY))
    assert len(splits["train"]) + len(splits["validation"]) == 30
    assert splits["test"]["patient_id"][:] == ["11419", "1135263"]
    assert splits["test"]["subtype"][:] == ["normal", "virus"]
    assert not set(splits["train"]["patient_id"]) & set(splits["validation"]["patient_id"])


@pytest.mark.parametrize(
    "label",
    [
        datasets.ClassLabel(names=["NORMAL", "PNEUMONIA"]),
        datasets.ClassLabel(names=["PNEUMONIA", "NORMAL"]),
        datasets.Value("string"),
    ],
)
def test_parquet_shards_load_with_their_own_order_of_labels(tmp_path, label):
    splits = load_kermany(write_parquet(tmp_path, KAGGLE, label=label))
    assert len(splits["train"]) + len(splits["validation"]) == 21
    assert not set(splits["train"]["patient_id"]) & set(splits["validation"]["patient_id"])
    assert splits["train"].features == FEATURES
    assert splits["test"]["label"][:] == [0, 1]
    assert splits["test"]["patient_id"][:] == ["IM-0001", "person1"]
    assert splits["test"][0]["image"].size == (32, 32)


def test_a_hub_id_loads_like_its_shards(tmp_path, monkeypatch):
    shards = write_parquet(tmp_path, KAGGLE)
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id: load_dataset(str(shards / "data")))
    assert len(load_kermany("someone/chest-xray-pneumonia")["test"]) == 2


def test_parquet_images_without_a_file_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 has no file name in its image, so patients can't be kept apart"):
        load_kermany(write_parquet(tmp_path, KAGGLE, keep_names=False))


def test_parquet_images_with_a_name_that_tells_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 1, file 17\.jpeg doesn't tell its patient"):
        load_kermany(write_parquet(tmp_path, KAGGLE | {"test/PNEUMONIA": ["17.jpeg"]}))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*gone"):
        load_kermany(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="There is no file or folder gone"):
        load_kermany("gone")


def test_an_unreachable_hub_id_is_named(monkeypatch):
    def refuse(hub_id):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match="no-one/nothing is neither here nor a Hub data set"):
        load_kermany("no-one/nothing")


def test_a_folder_of_no_known_layout_is_told_which_were_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"none of the layouts looked for: labels\.csv; .*Parquet"):
        load_kermany(tmp_path)


def test_an_empty_or_missing_class_folder_is_named(shared, kaggle):
    with pytest.raises(ValueError, match=r"test/NORMAL holds no images"):
        load_kermany(shared / "data/kermany-originals")
    shutil.rmtree(kaggle / "test/PNEUMONIA")
    (kaggle / "test/PNEUMONIA").mkdir()
    with pytest.raises(ValueError, match=r"test/PNEUMONIA holds no images"):
        load_kermany(kaggle)


def test_an_unknown_class_folder_is_named(kaggle):
    (kaggle / "train/COVID").mkdir()
    with pytest.raises(ValueError, match=r"train/COVID is no known class; expected NORMAL, PNEUMONIA"):
        load_kermany(kaggle)


def test_a_file_name_that_tells_no_patient_is_named(kaggle):
    shutil.copy(kaggle / "test/NORMAL/IM-0001-0001.jpeg", kaggle / "train/NORMAL/scan.jpeg")
    with pytest.raises(ValueError, match=r"scan\.jpeg doesn't tell its patient"):
        load_kermany(kaggle)


def test_a_file_in_the_wrong_class_folder_is_named(kaggle):
    shutil.copy(kaggle / "test/NORMAL/IM-0001-0001.jpeg", kaggle / "train/NORMAL/person3_virus_15.jpeg")
    with pytest.raises(ValueError, match=r"person3_virus_15\.jpeg is labelled NORMAL but its subtype is virus"):
        load_kermany(kaggle)


def write_labels_csv(kaggle, **changed):
    """A labels.csv of the Kaggle folder, with some fields of its first row changed or, if None, left out."""
    rows = []
    for path in sorted(kaggle.glob("t*/*/*.jpeg")):
        split, label, name = path.relative_to(kaggle).parts
        subtype = "normal" if label == "NORMAL" else name.split("_")[1]
        rows.append([f"{split}/{label}/{name}", label, split, name[:9], subtype])
    table = [dict(zip(["path", "label", "split", "patient_id", "subtype"], row, strict=True)) for row in rows]
    left_out = [column for column, value in changed.items() if value is None]
    table[0] |= changed
    with (kaggle / "labels.csv").open("w", newline="") as file:
        columns = [column for column in table[0] if column not in left_out]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    return kaggle


def test_labels_csv_decides_over_folders_and_file_names(kaggle):
    splits = load_kermany(write_labels_csv(kaggle, patient_id="someone"))
    assert "someone" in splits["test"]["patient_id"]


def test_a_path_in_labels_csv_that_leads_out_of_the_folder_is_refused(kaggle):
    shutil.copy(kaggle / "test/NORMAL/IM-0001-0001.jpeg", kaggle.parent / "secret.jpeg")
    with pytest.raises(ValueError, match=r"line 2 lists \.\./secret\.jpeg, which is outside"):
        load_kermany(write_labels_csv(kaggle, path="../secret.jpeg"))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"subtype": None}, ValueError, r"labels\.csv lacks the columns subtype"),
        (
            {"label": "COVID"},
            ValueError,
            r"labels\.csv, line 2 has the label 'COVID'; expected NORMAL or PNEUM",
        ),
        ({"subtype": "fungus"}, ValueError, r"line 2 has the subtype 'fungus'"),
        ({"subtype": "virus"}, ValueError, r"line 2 is labelled NORMAL but its subtype is virus"),
        ({"split": "holdout"}, ValueError, r"line 2 has the split 'holdout'; expected train, val or test"),
        ({"patient_id": ""}, ValueError, r"line 2 has no patient_id"),
        ({"path": "gone.jpeg"}, FileNotFoundError, r"line 2 lists 'gone\.jpeg', which is no file in"),
    ],
)
def test_a_fault_in_labels_csv_is_named_by_line(kaggle, changed, error, message):
    with pytest.raises(error, match=message):
        load_kermany(write_labels_csv(kaggle, **changed))


def test_a_set_without_a_test_split_is_refused(kaggle):
    write_labels_csv(kaggle)
    table = (kaggle / "labels.csv").read_text().splitlines()
    (kaggle / "labels.csv").write_text("\n".join(line for line in table if ",test," not in line))
    with pytest.raises(ValueError, match="has no test split; it has train"):
        load_kermany(kaggle)
