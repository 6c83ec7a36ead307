"""What all tests share: caches of their own, and the folder of real data where there is one."""

import csv
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from PIL import Image

# The Hugging Face libraries read these on import, so they are set before any test module is. A cache or a
# token that the user has set up is neither written nor sent.
HF_HOME = tempfile.mkdtemp(prefix="cxr-backbone-tests-")
for name in list(os.environ):
    if name.startswith(("HF_", "HUGGINGFACE_")) and name.endswith(("CACHE", "TOKEN")):
        del os.environ[name]
os.environ["HF_HOME"] = HF_HOME
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real radiographs and weights: `$CXR_SHARED`, by default `../shared` of the repository."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("CXR_SHARED", root / "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs real data: {folder} is missing (set CXR_SHARED)")
    return folder


@pytest.fixture(scope="session")
def chestxray14(shared, tmp_path_factory):
    """160 real adult films in NIH's published layout, every fourth patient in the test list."""
    folder = tmp_path_factory.mktemp("chestxray14")
    (folder / "images_001/images").mkdir(parents=True)
    with (shared / "data/nih-subset/labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::3][:160]
    # The commas inside the brackets are the published header's own.
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    header += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    lines, lists = [header], {"train_val_list.txt": [], "test_list.txt": []}
    for row in rows:
        name = row["path"].split("/")[-1].replace(".jpg", ".png")
        Image.open(shared / "data/nih-subset" / row["path"]).save(folder / "images_001/images" / name)
        about = [row["followup"], row["patient_id"], row["age"], row["sex"], row["view"]]
        lines.append(",".join([name, row["finding_labels"], *about, *["224", "224", "0.1", "0.1", ""]]))
        lists["test_list.txt" if int(row["patient_id"]) % 4 == 0 else "train_val_list.txt"].append(name)
    (folder / "Data_Entry_2017.csv").write_text("\n".join(lines) + "\n")
    for name, images in lists.items():
        (folder / name).write_text("\n".join(images) + "\n")
    return folder


@pytest.fixture(scope="session")
def real_films(shared, tmp_path_factory):
    """64 + 24 films of the Kermany set in Kaggle's layout; two a patient, while there are any."""
    source, folder = shared / "data/kermany224", tmp_path_factory.mktemp("kaggle")
    with (source / "labels.csv").open(newline="") as file:
        films = [row for row in csv.DictReader(file) if row["split"] != "val"]
    for split, number in (("train", 32), ("test", 12)):
        for label in ("NORMAL", "PNEUMONIA"):
            patients = {}
            for row in films:
                if (row["split"], row["label"]) == (split, label):
                    patients.setdefault(row["patient_id"], []).append(row)
            several_first = sorted(patients.values(), key=lambda rows: len(rows) < 2)
            chosen = [row for rows in several_first for row in rows[:2]]
            (folder / split / label).mkdir(parents=True)
            for row in chosen[:number]:
                shutil.copy(source / row["path"], folder / split / label)  # a link out of the folder is refused
            assert len(list((folder / split / label).iterdir())) == number
    return folder
