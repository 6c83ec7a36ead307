"""ChestX-ray14 loads as published, by its official lists; whatever does not fit together is refused."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from cxr_backbone.data.chestxray14 import FINDINGS, load_chestxray14
from cxr_backbone.data.labels import label_counts, labels_of

# As published; the commas in the brackets and at the end are part of it.
HEADER_2017 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
FILMS = [f"{patient:08}_{film:03}.png" for patient in range(1, 31) for film in range(2)]


def table_line(name, findings="No Finding", age="58", patient=None):
    return f"{name},{findings},0,{patient or int(name[:8])},{age},M,PA,2682,2749,0.143,0.143,"


def write(root, lines, *, test, header=HEADER_2017, table="Data_Entry_2017.csv", images="images"):
    """The published layout: `lines` of the table, films whose patient is in `test` on the test list."""
    root.mkdir(exist_ok=True)
    (root / table).write_text("\n".join([header, *lines]) + "\n")
    names = [line.split(",")[0] for line in lines]
    for file_name, side in (("train_val_list.txt", False), ("test_list.txt", True)):
        (root / file_name).write_text("\n".join(name for name in names if (int(name[:8]) in test) == side))
    (root / images).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / images / name).touch()
    return root


@pytest.fixture
def drawn(tmp_path):
    lines = [table_line(name, "Pneumonia|Mass" if name < "00000016" else "No Finding") for name in FILMS]
    return write(tmp_path / "nih", lines, test=range(1, 31, 5))


@pytest.fixture(scope="module")
def rows(shared):
    with (shared / "data/nih-subset/labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def real(shared, rows, tmp_path_factory):
    """The real films of the shared subset, as PNG files in the published layout of images_001 to images_003."""
    root = tmp_path_factory.mktemp("nih")
    lines, listed = [], {"train_val_list.txt": [], "test_list.txt": []}
    for number, row in enumerate(rows):
        name = row["path"].removeprefix("images/").replace(".jpg", ".png")
        folder = root / f"images_{1 + number % 3:03}/images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(shared / "data/nih-subset" / row["path"]).save(folder / name, compress_level=1)
        spacing = "2682,2749,0.143,0.143"
        findings, sex, view = row["finding_labels"], row["sex"], row["view"]
        lines.append(f"{name},{findings},{row['followup']},{row['patient_id']},{row['age']},{sex},{view},{spacing}")
        listed["test_list.txt" if int(row["patient_id"]) % 4 == 0 else "train_val_list.txt"].append(name)
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER_2017.removesuffix(","), *lines]) + "\n")
    for file_name, names in listed.items():
        (root / file_name).write_text("\n".join(names) + "\n")
    return root


def test_real_films_keep_their_findings_age_sex_and_view(real, rows):
    splits = load_chestxray14(real)
    films = {film["image_id"]: film for split in splits.values() for film in split}
    assert len(films) == len(rows) == 507
    for row in rows:
        film = films[row["path"].removeprefix("images/").replace(".jpg", ".png")]
        shown = {finding for finding, value in film["label"].items() if value == 1}
        assert shown == set(row["finding_labels"].split("|")) - {"No Finding"}
        assert [film["patient_id"], str(film["age"]), film["sex"], film["view"]] == [
            row[column] for column in ("patient_id", "age", "sex", "view")
        ]
        assert film["image"].size == (320, 320)


def test_real_findings_are_those_of_the_paper_with_their_counts(real):
    splits = load_chestxray14(real)
    assert list(splits["train"].features["label"]) == FINDINGS and len(FINDINGS) == 14
    assert set(np.unique(labels_of(splits["train"]))) == {0, 1}
    counts = [label_counts(split) for split in splits.values()]
    total = {finding: sum(count[finding] for count in counts) for finding in FINDINGS}
    assert total["Pneumonia"] == 251 and total["Edema"] == 51 and total["Hernia"] == 0


def test_the_task_of_chexnet_is_pneumonia_against_the_rest(real):
    splits = load_chestxray14(real, task="pneumonia")
    assert splits["train"].features["label"].names == ["No pneumonia", "Pneumonia"]
    assert sum(sum(split["label"]) for split in splits.values()) == 251
    findings = load_chestxray14(real)["test"]
    assert splits["test"]["label"][:] == [int(label["Pneumonia"]) for label in findings["label"]]


def test_the_official_test_split_stays_and_validation_is_carved_by_patient(real):
    splits, other = load_chestxray14(real), load_chestxray14(real, fold=1)
    listed = (real / "test_list.txt").read_text().split()
    assert splits["test"]["image_id"][:] == listed == other["test"]["image_id"][:]
    assert not set(splits["train"]["patient_id"]) & set(splits["validation"]["patient_id"])
    assert not set(splits["validation"]["patient_id"]) & set(other["validation"]["patient_id"])


@pytest.mark.parametrize("images", ["images", "images_001", "images_012/images"])
def test_images_may_lie_in_any_of_the_published_folders(tmp_path, images):
    root = write(tmp_path, [table_line(name) for name in FILMS], test=range(1, 7), images=images)
    path = load_chestxray14(root)["test"].to_pandas()["image"][0]["path"]
    assert path == str(tmp_path / images / FILMS[0])


@pytest.mark.parametrize(
    ("cell", "age"), [("58", 58), ("058Y", 58), ("411", None), ("120", 120), ("018M", 1), ("007D", 0), ("", None)]
)
def test_ages_are_years_and_none_above_120(tmp_path, cell, age):
    root = write(tmp_path, [table_line(name, age=cell) for name in FILMS], test=range(1, 7))
    assert set(load_chestxray14(root)["train"]["age"]) == {age}


def test_films_in_neither_list_are_left_out_and_counted(drawn, caplog):
    names = (drawn / "train_val_list.txt").read_text().split()
    (drawn / "train_val_list.txt").write_text("\n".join(names[:-2]))
    caplog.set_level("INFO")
    assert sum(len(split) for split in load_chestxray14(drawn).values()) == 58
    assert "Leaving out 2 films of" in caplog.text


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


NAME = "00000002_000.png"  # on line 4 of the table and on the train list
ON_TEST = "00000001_000.png"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "Data_Entry_2017.csv",
            "Pneumonia|Mass",
            "Pneumonya|Mass",
            r"csv, line 2 has the finding 'Pneumonya'; expected",
        ),
        ("Data_Entry_2017.csv", "Pneumonia|Mass", "No Finding|Mass", "line 2 has 'No Finding' beside a finding"),
        ("Data_Entry_2017.csv", "Pneumonia|Mass", "", "line 2 has the finding ''"),
        ("Data_Entry_2017.csv", "Patient ID", "PatientID", "csv lacks the columns Patient ID"),
        ("Data_Entry_2017.csv", ",58,", ",old,", "line 2 has a Patient Age that is none"),
        ("Data_Entry_2017.csv", f"{NAME},Pneumonia|Mass,0,2", f"{NAME},Pneumonia|Mass,0,", "line 4 has no Patient ID"),
        ("Data_Entry_2017.csv", NAME, ON_TEST, f"line 4 has {ON_TEST}, which an earlier line has"),
        ("Data_Entry_2017.csv", "1,58,M,PA,2682,2749,0.143,0.143,", "1", "line 2 ends before its columns do"),
        ("Data_Entry_2017.csv", f"{NAME},Pneumonia|Mass,0,2", f"{NAME},Mass,0,1", "share 1 patients; expected none"),
        ("test_list.txt", ON_TEST, "99999999_000.png", r"test_list\.txt lists 99999999_000\.png, which .*csv lacks"),
        ("test_list.txt", ON_TEST, NAME, rf"test_list\.txt lists {NAME}, which .*train_val_list\.txt lists before"),
        ("test_list.txt", ON_TEST, "00000001_001.png", r"test_list\.txt lists .*, which .*test_list\.txt lists before"),
    ],
)
def test_what_does_not_fit_together_is_refused(drawn, file, old, new, message):
    replace(drawn / file, old, new)
    with pytest.raises(ValueError, match=message):
        load_chestxray14(drawn)


def test_a_table_that_is_no_text_is_refused(drawn):
    (drawn / "Data_Entry_2017.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"Data_Entry_2017\.csv is no CSV table in UTF-8"):
        load_chestxray14(drawn)


@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "train_val_list.txt", "test_list.txt"])
def test_a_missing_file_is_named(drawn, name):
    (drawn / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"There is no {name.partition('.')[0]}.* in .*nih"):
        load_chestxray14(drawn)


def test_a_half_download_is_refused_with_its_count(drawn):
    shutil.move(drawn / "images" / FILMS[0], drawn)
    (drawn / "images" / FILMS[7]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"2 of the 60 images .* are in none of its .*, {FILMS[7]} the first"):
        load_chestxray14(drawn)


def test_two_tables_or_two_files_for_a_film_are_refused(drawn):
    shutil.copytree(drawn / "images", drawn / "images_001")
    with pytest.raises(ValueError, match=r"_00\d\.png is in .*images and in .*images_001; expected one file a film"):
        load_chestxray14(drawn)
    shutil.copy(drawn / "Data_Entry_2017.csv", drawn / "Data_Entry_2017_v2020.csv")
    with pytest.raises(ValueError, match=r"has Data_Entry_2017\.csv and Data_Entry_2017_v2020\.csv; expected one"):
        load_chestxray14(drawn)


def test_an_unknown_task_or_folder_is_refused(drawn):
    with pytest.raises(ValueError, match="task='tuberculosis' is no task; expected findings or pneumonia"):
        load_chestxray14(drawn, task="tuberculosis")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*gone"):
        load_chestxray14(drawn / "gone")


def test_no_link_leads_out_of_the_images(drawn, tmp_path):
    image = min((drawn / "images").iterdir())
    image.rename(tmp_path / "secret.png")
    image.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=rf"{image.name} is a link out of"):
        load_chestxray14(drawn)
