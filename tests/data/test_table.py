"""A table of any kind becomes splits by patient; what would go wrong in silence is refused with its line."""

import csv
import io
import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from cxr_backbone.data.decoding import decode_once
from cxr_backbone.data.labels import label_counts, labels_of, make_features
from cxr_backbone.data.sources import load_films
from cxr_backbone.data.subgroups import subgroups_of
from cxr_backbone.data.table import load_table

FINDINGS = ["Edema", "Pleural Effusion"]


@pytest.fixture
def films(tmp_path):
    """Forty films of twenty patients, and the rows of a table of them."""
    rows = []
    for film in range(40):
        path = tmp_path / f"images/p{film // 2}_{film}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), film, dtype=np.uint8)).save(path)
        rows.append(
            {
                "image": f"images/{path.name}",
                "label": "PNEUMONIA" if film % 4 < 2 else "NORMAL",
                "patient_id": f"{film // 2:03}",
                "Edema": [1, 0, -1, None][film % 4],
                "Pleural Effusion": film % 2,
                "split": ["train", "Val", "TEST", "train"][film // 10],
            }
        )
    return rows


@pytest.fixture
def write(tmp_path, films):
    """Write the rows, some fields of the third (line 4) changed, in a format."""

    def write(name="table.csv", columns=None, **changed):
        films[2] |= changed
        columns = columns or list(films[0])
        rows = [{column: row[column] for column in columns} for row in films]
        table = tmp_path / name
        if table.suffix == ".jsonl":
            table.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        elif table.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), table)
        else:
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        return table

    return write


def all_films(splits):
    films = datasets.concatenate_datasets(list(splits.values()))
    return films.select(np.argsort(films["image_id"]))


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.parquet"])
def test_each_kind_of_file_gives_the_same_splits(write, name):
    splits = load_table(write(name), label_columns=["label"])
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].features == make_features(["NORMAL", "PNEUMONIA"])
    everything = all_films(splits)
    assert len(everything) == 40 and len(set(everything["image_id"])) == 40
    assert set(everything["patient_id"]) == {f"{patient:03}" for patient in range(20)}
    sides = [set(split["patient_id"]) for split in splits.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    for row in everything:
        film = int(row["image_id"].split("_")[1].removesuffix(".png"))
        assert row["image"].getpixel((0, 0)) == film and row["label"] == (film % 4 < 2)


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.parquet"])
def test_findings_are_1_0_or_nan_by_policy(write, name):
    splits = load_table(write(name), label_columns=FINDINGS, uncertain="ones")
    assert splits["test"].features == make_features(FINDINGS, multi_label=True)
    everything = all_films(splits)
    film = np.array([int(name.split("_")[1].removesuffix(".png")) for name in everything["image_id"]])
    np.testing.assert_array_equal(labels_of(everything)[:, 0], np.float32([1, 0, 1, np.nan])[film % 4])
    np.testing.assert_array_equal(labels_of(everything)[:, 1], film % 2)


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.parquet"])
def test_given_splits_stay_in_their_order(write, name):
    splits = load_table(write(name), label_columns=["label"], split_column="split", patient_column=None)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 10, "test": 10}
    assert splits["test"]["image_id"][:2] == ["images/p10_20.png", "images/p10_21.png"]
    assert set(splits["test"]["patient_id"]) == {None}


def test_no_image_is_decoded(write, films, tmp_path):
    for film in films:
        (tmp_path / film["image"]).write_bytes(b"no image")
    stored = load_table(write(), label_columns=["label"])["train"].cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str((tmp_path / stored[0]["image_id"]).resolve())}


def test_chexpert_as_published_loads(tmp_path):
    small = tmp_path / "CheXpert-v1.0-small"
    lines = ["Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Pleural Effusion"]
    for patient in range(1, 13):
        path = f"CheXpert-v1.0-small/train/patient{patient:05}/study1/view1_frontal.jpg"
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        lines.append(f"{path},Female,68,Frontal,AP,{'1.0' if patient % 2 else ''},{'-1.0' if patient % 3 else '1.0'},")
    (small / "train.csv").write_text("\n".join(lines) + "\n")
    splits = load_table(
        small / "train.csv",
        images_dir=tmp_path,
        image_column="Path",
        label_columns=["No Finding", *FINDINGS],
        patient_pattern=r"patient\d+",
        missing="zeros",
        num_folds=3,
    )
    everything = all_films(splits)
    assert everything["patient_id"][:] == [f"patient{patient:05}" for patient in range(1, 13)]
    expected = [[patient % 2, np.nan if patient % 3 else 1, 0] for patient in range(1, 13)]
    np.testing.assert_array_equal(labels_of(everything), np.float32(expected))


def test_real_tables_load(shared):
    kermany = load_table(
        shared / "data/kermany224/labels.csv", image_column="path", label_columns=["label"], split_column="split"
    )
    assert {name: len(split) for name, split in kermany.items()} == {"train": 5216, "validation": 16, "test": 624}
    assert np.bincount(kermany["test"]["label"]).tolist() == [234, 390]
    nih = load_table(
        shared / "data/nih-subset/labels.csv",
        image_column="path",
        label_columns=["label"],
        label_names=["No_findings", "Pneumonia"],
    )
    assert sum(len(split) for split in nih.values()) == 507
    assert sum(sum(split["label"]) for split in nih.values()) == 251
    assert nih["validation"][0]["image"].size == (320, 320)


def test_columns_are_carried_over_for_subgroups_as_numbers_or_text(write, films):
    for film, row in enumerate(films):
        row |= {"age": None if film == 3 else film, "view": ["PA", "AP", ""][film % 3], "scanner": f"0{film % 2}b"}
    columns = ["age", "view", "scanner"]
    for name in ("table.csv", "table.jsonl", "table.parquet"):
        splits = load_table(write(name), label_columns=["label"], subgroup_columns=columns)
        kinds = {column: splits["test"].features[column].dtype for column in columns}
        assert kinds == {"age": "float64", "view": "string", "scanner": "string"}
        for row in all_films(splits):
            film = int(row["image_id"].split("_")[1].removesuffix(".png"))
            assert row["age"] == (None if film == 3 else film)
            assert (row["view"], row["scanner"]) == (["PA", "AP", None][film % 3], f"0{film % 2}b")
        decoded = decode_once(splits["train"], 8)
        assert [decoded[column][:] for column in columns] == [splits["train"][column][:] for column in columns]


VALUES = ["Normal=NORMAL", "Lung Opacity=PNEUMONIA", "Effusion=PNEUMONIA"]


@pytest.fixture
def readings(write, films):
    """Films of four readings, one of them blank, and one film of a fifth."""
    for film, row in enumerate(films):
        row["reading"] = ["Normal", "Lung Opacity", "", "Not Normal"][film % 4] if film < 39 else "Effusion"
    return write()


def test_values_that_name_a_class_are_taken_and_films_with_others_left_out(readings, caplog):
    with caplog.at_level(logging.INFO):
        splits = load_table(readings, label_columns=["reading"], label_values=VALUES, num_folds=4)
    everything = all_films(splits)
    assert everything.features == make_features(["NORMAL", "PNEUMONIA"])
    labels = dict(zip(everything["image_id"], everything["label"], strict=True))
    kept = {**{film: film % 4 for film in range(39) if film % 4 < 2}, 39: 1}
    assert labels == {f"images/p{film // 2}_{film}.png": label for film, label in kept.items()}
    assert "class 0 is NORMAL (10 films); class 1 is PNEUMONIA (11 films), the positive class" in caplog.text
    assert "Leaving out 19 films whose label reading is none of these (10 of them blank)" in caplog.text
    assert "Not Normal" not in caplog.text


def test_the_external_set_is_the_films_that_radiologists_read(shared):
    config = Path(__file__).parents[2] / "recipes/configs/nih_opacity.yaml"
    settings = yaml.safe_load(config.read_text())["data"] | {"source": shared / "data/nih-subset/labels.csv"}
    assert "108 films of NIH" in settings.pop("provenance")
    everything = all_films(load_films(**settings, seed=0, image_size=32))
    assert len(everything) == 108 and label_counts(everything) == {"NORMAL": 37, "PNEUMONIA": 71}
    subgroups = {column: Counter(values) for column, values in subgroups_of(everything).items()}
    assert subgroups["sex"] == {"M": 57, "F": 51} and subgroups["view"] == {"AP": 60, "PA": 48}
    assert subgroups["age"] == {"under 18": 7, "18 to 39": 30, "40 to 64": 57, "65 and over": 14}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_names": ["NORMAL", "PNEUMONIA"]}, "label_values goes with one label column, and without label_names"),
        (
            {"missing": "zeros"},
            "label_values goes with one label column, .* without label_names, uncertain and missing",
        ),
        ({"label_columns": FINDINGS}, "label_values goes with one label column"),
        ({"label_values": [*VALUES, "Normal=HEALTHY"]}, "label_values has the value 'Normal' twice"),
        (
            {"label_values": [*VALUES, "Mass=OTHER"]},
            "label_values has the value 'Mass', which no film has in column read",
        ),
        ({"label_values": ["Normal", "Effusion=ILL"]}, r"label_values has 'Normal'; expected value=CLASS, such as"),
        ({"label_values": ["=NORMAL", "Effusion=ILL"]}, r"label_values has '=NORMAL'; expected value=CLASS"),
        ({"label_values": ["Normal=", "Effusion=ILL"]}, r"label_values has 'Normal='; expected value=CLASS"),
        ({"label_values": ["Normal=A", "Effusion=A"]}, r"has the classes \['A'\]; expected two or more"),
        ({"subgroup_columns": ["split", "split"]}, "column split is asked for twice"),
        ({"subgroup_columns": ["reading"]}, "column reading is asked for twice"),
        ({"subgroup_columns": ["sex"]}, r"table\.csv lacks the columns sex"),
        ({"subgroup_columns": ["label"]}, "subgroup_columns has 'label', a name that films have for themselves"),
    ],
)
def test_label_values_and_subgroups_that_make_no_sense_are_refused(readings, settings, message):
    with pytest.raises(ValueError, match=message):
        load_table(readings, **{"label_columns": ["reading"], "label_values": VALUES, **settings})


def test_the_log_says_which_class_is_positive(write, caplog):
    with caplog.at_level(logging.INFO):
        load_table(write(label=""), label_columns=["label"])
    assert "class 0 is NORMAL (19 films); class 1 is PNEUMONIA (20 films), the positive class" in caplog.text
    assert "Leaving out 1 films" in caplog.text


def test_films_without_a_class_are_left_out_and_the_others_keep_theirs(write):
    splits = load_table(write(label=""), label_columns=["label"], split_column="split")
    assert len(splits["train"]) == 19 and "images/p1_2.png" not in splits["train"]["image_id"]
    assert all(row["label"] == (row["image"].getpixel((0, 0)) % 4 < 2) for row in splits["train"])


def png(film):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), film, dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


def embedded(numbers, kind, names=lambda film: f"{film}.png"):
    """Rows with the bytes of films, as parquet files hold them, and a ClassLabel in an order of its own."""
    images = [png(film) for film in numbers]
    if kind != "bytes":
        images = [{"bytes": image, "path": names(film)} for image, film in zip(images, numbers, strict=True)]
    feature = {"image": datasets.Image()} if kind == "image" else {}
    label = datasets.ClassLabel(names=["PNEUMONIA", "NORMAL"])
    rows = {"image": images, "label": [film % 2 for film in numbers], "patient_id": [film // 2 for film in numbers]}
    dataset = datasets.Dataset.from_dict(rows)
    return dataset.cast(datasets.Features({**dataset.features, **feature, "label": label}))


@pytest.mark.parametrize("kind", ["image", "struct", "bytes"])
def test_embedded_images_keep_their_bytes_and_the_order_of_their_classes(tmp_path, kind):
    embedded(range(40), kind).to_parquet(tmp_path / "films.parquet")
    splits = load_table(tmp_path / "films.parquet", label_columns=["label"])
    assert splits["train"].features == make_features(["PNEUMONIA", "NORMAL"])
    for row in all_films(splits):
        film = row["image"].getpixel((0, 0))
        assert row["image_id"] == (f"row {film}" if kind == "bytes" else f"{film}.png")
        assert row["label"] == film % 2 and row["patient_id"] == str(film // 2)


def test_the_order_of_classes_can_be_turned_round(tmp_path):
    embedded(range(40), "image").to_parquet(tmp_path / "films.parquet")
    splits = load_table(tmp_path / "films.parquet", label_columns=["label"], label_names=["NORMAL", "PNEUMONIA"])
    assert all(row["label"] == 1 - row["image"].getpixel((0, 0)) % 2 for row in splits["train"])


def test_shards_bring_their_splits_and_what_is_missing_is_carved(tmp_path):
    embedded(range(30), "image").to_parquet(tmp_path / "train-00000-of-00002.parquet")
    embedded(range(30, 40), "image").to_parquet(tmp_path / "train-00001-of-00002.parquet")
    embedded(range(40, 46), "image", names=lambda film: "1.png").to_parquet(tmp_path / "test-00000-of-00001.parquet")
    splits = load_table(tmp_path, label_columns=["label"], num_folds=5)
    assert {name: len(split) for name, split in splits.items()} == {"train": 32, "validation": 8, "test": 6}
    assert splits["test"]["image_id"][:2] == ["test/1.png (row 0)", "test/1.png (row 1)"]
    assert splits["test"][5]["image"].getpixel((0, 0)) == 45
    with pytest.raises(ValueError, match=r"comes in splits; expected split_column=None, not 'patient_id'"):
        load_table(tmp_path, label_columns=["label"], patient_column=None, split_column="patient_id")


def test_a_hub_id_loads_like_its_shards(tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        embedded(range(4), "image").to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id: load_dataset(str(tmp_path)))
    splits = load_table("someone/chest-xrays", label_columns=["label"], patient_column=None)
    assert splits["validation"]["image_id"][0] == "validation/0.png"


def test_a_path_in_an_image_without_bytes_is_checked_like_any_other(tmp_path, films):
    def load(path):
        rows = [{"image": {"bytes": None, "path": f["image"]}, "label": f["label"]} for f in films]
        rows[7]["image"]["path"] = path
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "films.parquet")
        return load_table(tmp_path / "films.parquet", label_columns=["label"], patient_pattern=r"p\d+")

    assert "images/p3_7.png" in all_films(load("images/p3_7.png"))["image_id"]
    (tmp_path.parent / "p0.png").touch()
    with pytest.raises(ValueError, match=r"films\.parquet, row 7 lists \.\./p0\.png, which is outside"):
        load("../p0.png")


def test_images_partly_with_bytes_are_refused(tmp_path):
    rows = [
        {"image": {"bytes": png(0), "path": "0"}, "label": "a"},
        {"image": {"bytes": None, "path": "1"}, "label": "b"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "films.parquet")
    with pytest.raises(ValueError, match=r"films\.parquet, row 1 has no image bytes, unlike other rows"):
        load_table(tmp_path / "films.parquet", label_columns=["label"], patient_column=None)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"image": "images/gone.png"}, FileNotFoundError, r"lists 'images/gone\.png', which is no file in"),
        ({"image": ""}, FileNotFoundError, r"lists '', which is no file in"),
        ({"image": "../outside.png"}, ValueError, r"lists \.\./outside\.png, which is outside"),
        ({"image": "images/p0_0.png"}, ValueError, r"has the image 'images/p0_0\.png', which another row has"),
        ({"patient_id": " "}, ValueError, r"has no patient_id, so patients can't be kept apart"),
        ({"Edema": 2}, ValueError, r"has '2' in column Edema; expected 1, 0, -1 \(uncertain\) or blank"),
        ({"split": "holdout"}, ValueError, r"has the split 'holdout'; expected one of train"),
        ({"split": ""}, ValueError, r"has the split ''; expected one of train"),
    ],
)
@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.parquet"])
def test_a_fault_is_named_by_line(write, tmp_path, changed, error, message, name):
    (tmp_path.parent / "outside.png").touch()
    line = {"table.csv": "line 4", "table.jsonl": "line 3", "table.parquet": "row 2"}[name]
    with pytest.raises(error, match=rf"{name}, {line} {message}"):
        load_table(write(name, **changed), label_columns=FINDINGS, split_column="split")


def test_splits_that_have_to_be_carved_need_patients(write):
    with pytest.raises(
        ValueError, match=r"brings no validation and no test split, and patients are not known.*pattern"
    ):
        load_table(write(), label_columns=["label"], patient_column=None)


def test_arguments_that_do_not_fit_are_refused(write, tmp_path):
    with pytest.raises(ValueError, match="label_columns is empty"):
        load_table(write(), label_columns=[])
    with pytest.raises(ValueError, match="column Edema is asked for twice"):
        load_table(write(), label_columns=["Edema", "Edema"])
    with pytest.raises(ValueError, match="label_names goes with one label column"):
        load_table(write(), label_columns=FINDINGS, label_names=["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*gone"):
        load_table(write(), label_columns=["label"], images_dir=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"table\.csv lacks the columns label; it has image, split"):
        load_table(write(columns=["image", "split"]), label_columns=["label"], patient_column=None)
    with pytest.raises(ValueError, match="fold=7 must be"):
        load_table(write(), label_columns=["label"], num_folds=5, fold=7)
