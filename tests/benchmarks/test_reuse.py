"""The benchmarks of what a backbone is worth for other work, on a narrow network and drawn films: what they print."""

import csv
import json

import numpy as np
import pytest
import torch
from narrow import PROCESSOR, in_use, tiny_model
from PIL import Image
from tables import names, number, run

from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.guard import Guard, pooled_stages

QUICK = ["--model.image_size", "75", "--model.depth_multiplier", "0.1", "--fine_tuning.epochs", "1"]
QUICK += ["--run.mixed_precision", "no", "--run.cpu_threads", "1"]


@pytest.fixture(scope="module")
def films():
    return [draw_phantom(number, opacity=number % 2 == 1, image_size=75) for number in range(100)]


@pytest.fixture(scope="module")
def adults(films, tmp_path_factory):
    """A table with the columns of the NIH subset that are read; patients with odd numbers and with even ones."""
    folder = tmp_path_factory.mktemp("adults")
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "patient_id", "rsna_class", "label"])
        for index, film in enumerate(films):
            Image.fromarray(film).save(folder / f"{index}.png")
            ill = index % 2 == 1
            kinds = ["Lung Opacity", "Pneumonia"] if ill else ["Normal", "No_findings"]
            rows.writerow([f"{index}.png", index // 2, *kinds])
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def children(films, tmp_path_factory):
    """Phantoms under the names of the Kermany set."""
    root = tmp_path_factory.mktemp("children")
    for index, film in enumerate(films):
        split, subtype = "train" if index < 80 else "test", ["virus", "bacteria"][index // 2 % 2]
        folder = root / split / ("PNEUMONIA" if index % 2 else "NORMAL")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"person{index}_{subtype}_{index}.jpeg" if index % 2 else f"IM-{index:04}-0001.jpeg"
        Image.fromarray(film).save(folder / name)
    return root


@pytest.fixture(scope="module")
def model(films, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), in_use(tiny_model())
    with torch.no_grad():
        said = model(**PROCESSOR(films, return_tensors="pt"), output_hidden_states=True)
    features = pooled_stages(said.hidden_states)
    Guard.fit(features[:60], features[60:]).save(folder)
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def test_embedding_is_timed_beside_the_network_alone(adults):
    options = ["--films", 20, "--repetitions", 1, "--threads", 1, "--depth_multiplier", 0.1]
    (table,), printed = run("embedding", adults.parent, *options)
    assert names(table) == ["the network alone", "embed()", "embed(num_workers=1)"] and number(table[0][2]) == 1
    assert printed.startswith("20 films")


def test_the_guard_is_measured_on_whatever_is_no_film(adults, children, model, tmp_path):
    config = tmp_path / "children.yaml"
    config.write_text(json.dumps({"data": {"format": "kermany", "source": str(children)}}))
    ankle = tmp_path / "ankle.png"
    Image.fromarray(np.zeros((80, 80), np.uint8) + np.arange(80, dtype=np.uint8)).save(ankle)
    (table,), _ = run("guard", "--model", model, "--data", config, "--adults", adults, "--ankles", ankle, "--most", 12)
    assert [int(row[1]) for row in table] == [12, *[12] * 6, 12, 100, 12, 1]
    assert names(table)[0] == "test films" and names(table)[-2:] == ["adults", "ankles"]
    assert number(dict(zip(names(table), (row[2] for row in table), strict=True))["patches of photos"]) > 0.8


def test_reuse_compares_starts_with_few_labels_and_with_many(adults, model, tmp_path):
    words = ["--nih", adults, "--starts", f"ours={model}", "random=", "--output_dir", tmp_path, "--seeds", 1, *QUICK]
    tables, _ = run("reuse", *words)
    # Two questions, each probed and fine-tuned, with a quarter of the labels, half and all; a tenth is too few.
    assert [[row[1] for row in table] for table in tables] == [["ours", "random"] * 3] * 4
    assert [row[0] for row in tables[0]] == ["12", "12", "24", "24", "50", "50"]
    assert all(0 <= number(row[2]) <= 1 for table in tables for row in table)
    assert [len(table[0]) for table in tables] == [4, 5, 4, 5]  # only fine-tuning takes epochs
    asked = (tmp_path / "results.jsonl").read_text()
    again, _ = run("reuse", *words)
    assert again == tables and (tmp_path / "results.jsonl").read_text() == asked


def test_experiments_stand_side_by_side_and_never_open_the_test_split(adults, children, tmp_path):
    words = ["recipes/configs/pneumonia.yaml", "--output_dir", tmp_path, "--nih", adults, *QUICK]
    words += ["--data.source", children, "--data.num_folds", 2, "--fine_tuning.batch_size", 8, "--model.init", "null"]
    run("experiments", *words, "--name", "plain")
    (table,), _ = run("experiments", *words, "--name", "subtypes", "--joint.subgroups", "subtype")
    assert names(table) == [*["plain"] * 3, *["subtypes"] * 3]
    assert [row[1] for row in table] == ["0", "0.5", "1"] * 2
    assert table[0][2:] == table[3][2:]
    assert not list(tmp_path.rglob("*test.parquet"))
