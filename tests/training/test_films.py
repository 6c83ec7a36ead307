"""What the data section of a config asks for is what training gets."""

import csv
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cxr_backbone import CXRInceptionConfig
from cxr_backbone.data.decoding import stack_pixels
from cxr_backbone.data.labels import label_names, make_features
from cxr_backbone.data.splits import write_split
from cxr_backbone.data.streaming import FilmStream
from cxr_backbone.data.synthetic import draw_phantom
from cxr_backbone.training.arguments import DataArguments, EvaluationArguments, JointArguments
from cxr_backbone.training.films import (
    audit_films,
    check_classes,
    check_labels,
    check_not_trained_on,
    decode_external,
    decode_films,
    decode_joint,
    open_films,
)


@pytest.fixture
def table(tmp_path):
    """24 drawn films of patients with two films each, one class a patient."""
    rows = []
    for film in range(24):
        name = f"{film}.png"
        Image.fromarray(draw_phantom(film, opacity=film // 2 % 2 == 1, image_size=48)).save(tmp_path / name)
        rows.append({"image": name, "label": ["NORMAL", "ILL"][film // 2 % 2], "patient_id": f"p{film // 2}"})
    return write_table(tmp_path / "films.csv", rows)


def write_table(path, rows):
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, rows[0])
        lines.writeheader()
        lines.writerows(rows)
    return path


def prepare(table, seed=0, **options):
    settings = {"format": "table", "source": str(table), "label_columns": ["label"], "label_names": ["NORMAL", "ILL"]}
    settings |= {"num_folds": 4, "cache_dir": str(table.parent / "cache")}
    data = DataArguments(**(settings | options))
    return decode_films(open_films(data, image_size=32, seed=seed), data, image_size=32, seed=seed)


def image_ids(films):
    return {name: split["image_id"][:] for name, split in films.splits.items()}


def test_films_are_split_and_decoded(table):
    films = prepare(table)
    assert {name: len(rows) for name, rows in films.splits.items()} == {"train": 12, "validation": 6, "test": 6}
    assert films.train is films.splits["train"]
    with_pixels = [films.splits["train"], films.splits["validation"], films.sealed_test]
    assert all(len(row["pixels"]) == 32 * 32 for rows in with_pixels for row in rows)
    assert label_names(films.splits["train"].features) == ["NORMAL", "ILL"] and films.unreadable == {}


def test_the_test_split_has_no_pixels_until_everything_is_decided(table):
    films = prepare(table)
    assert "pixels" not in films.splits["test"].column_names
    settled = CXRInceptionConfig(temperature=1.3, operating_points={})
    assert films.open_test(settled)["image_id"][:] == films.splits["test"]["image_id"][:]
    for undecided in ({}, {"temperature": 1.3}, {"operating_points": {}}):
        with pytest.raises(RuntimeError, match="opens after the temperature and the operating points"):
            films.open_test(settled, CXRInceptionConfig(**undecided))
    with pytest.raises(RuntimeError, match="opens after"):
        films.open_test()


def test_a_sample_of_train_is_as_large_as_validation_and_drawn_from_all_of_it(table, shards):
    for films in (prepare(table), prepare(table, streaming=True, source=str(shards))):
        sample, train = (rows["image_id"][:] for rows in (films.train_sample, films.splits["train"]))
        assert len(set(sample)) == len(films.splits["validation"]) < len(train)
        assert set(sample) < set(train) and sample != train[: len(sample)]
        assert len(films.train_sample[0]["pixels"]) == 32 * 32


MODEL = CXRInceptionConfig(image_size=75, id2label={0: "NORMAL", 1: "ILL"})


def external(table, label_values=("NORMAL=NORMAL", "ILL=ILL"), source=None, name="elsewhere"):
    config = table.parent / f"{name}.yaml"
    data = {"format": "table", "source": str(table), "label_columns": ["label"], "label_values": list(label_values)}
    config.write_text(yaml.safe_dump({"data": data | {"num_folds": 4, "cache_dir": str(table.parent / "cache")}}))
    arguments = EvaluationArguments(external=str(config), external_source=source)
    return decode_external(arguments, MODEL)


def test_all_films_of_an_external_set_are_tested_whatever_their_split(table):
    ((name, films),) = external(table).items()
    assert name == "external elsewhere"
    assert sorted(films["image_id"][:], key=lambda name: int(name[:-4])) == [f"{film}.png" for film in range(24)]
    assert len(films[0]["pixels"]) == 75 * 75
    assert decode_external(EvaluationArguments(), MODEL) == {}


def beside(table, joined, **settings):
    """Films for joint training beside those of `table`."""
    config = joined.parent / "joint.yaml"
    data = {"format": "table", "source": str(joined), "label_columns": ["label"], "patient_column": ""}
    config.write_text(yaml.safe_dump({"data": data | {"cache_dir": str(joined.parent / "cache")}}))
    arguments = JointArguments(films=str(config), **({"batch_size": 2} | settings))
    return decode_joint(arguments, prepare(table), image_size=32, seed=0)


def draw(folder, films):
    """A table of films, of other phantoms than those of `table` if their numbers are others."""
    folder.mkdir()
    rows = [{"image": f"{film}.png", "label": "AP" if film % 3 else "PA"} for film in films]
    for film, row in zip(films, rows, strict=True):
        phantom = draw_phantom(film, opacity=film // 2 % 2 == 1, image_size=48)
        Image.fromarray(phantom).save(folder / row["image"])
    return write_table(folder / "films.csv", rows)


def test_films_for_joint_training_have_labels_of_their_own(table, tmp_path):
    joint = beside(table, draw(tmp_path / "others", range(100, 108)))
    assert joint.widths == {"label": 2} and len(joint.others) == 8
    own = {"pixels": torch.zeros(3, 1, 32, 32, dtype=torch.uint8), "image_id": ["a", "b", "c"]}
    assert joint.beside(own, 0).pixels.shape == (5, 1, 32, 32)
    assert decode_joint(JointArguments(), prepare(table), image_size=32, seed=0) is None


def test_films_that_the_model_is_measured_on_are_not_for_joint_training(table, tmp_path):
    measured = prepare(table).splits["test"]["image_id"][0]
    leaked = draw(tmp_path / "others", [*range(100, 104), int(measured.removesuffix(".png"))])
    with pytest.raises(ValueError, match=rf"joint\.yaml: 1 films stand in validation or test too, .*{measured}"):
        beside(table, leaked)


def test_an_external_set_may_be_small_and_its_patients_unknown(table):
    rows = [{"image": f"{film}.png", "label": ["NORMAL", "ILL"][film // 2 % 2]} for film in range(4)]
    write_table(table, rows)
    config = table.parent / "few.yaml"
    data = {"format": "table", "source": str(table), "label_columns": ["label"], "label_names": ["NORMAL", "ILL"]}
    config.write_text(yaml.safe_dump({"data": data | {"patient_column": "", "cache_dir": str(table.parent / "cache")}}))
    ((_, films),) = decode_external(EvaluationArguments(external=str(config)), MODEL).items()
    assert len(films) == 4 and films["patient_id"][:] == [None] * 4


def test_an_external_set_can_lie_elsewhere(table, tmp_path):
    shutil.copytree(table.parent, tmp_path / "moved")
    ((_, films),) = external(table, source=str(tmp_path / "moved/films.csv")).items()
    assert len(films) == 24


def test_an_external_set_with_other_labels_is_refused(table):
    with pytest.raises(
        ValueError, match=r"elsewhere\.yaml has the labels ILL, NORMAL \(one .*\), and the model NORMAL, ILL"
    ):
        external(table, label_values=("ILL=ILL", "NORMAL=NORMAL"))


def test_findings_are_no_classes_of_the_same_names():
    findings = make_features(["NORMAL", "ILL"], multi_label=True)
    with pytest.raises(
        ValueError, match=r"NORMAL, ILL \(several findings a film\), and the model .* \(one class a film\)"
    ):
        check_labels(findings, MODEL, "films.csv")


def test_films_that_a_model_was_trained_on_are_not_tested_on(table, tmp_path):
    write_split(prepare(table, seed=0).splits, tmp_path / "split.csv")
    check_not_trained_on(prepare(table, seed=0), tmp_path / "split.csv")
    check_not_trained_on(prepare(table, seed=1), tmp_path / "no split.csv")
    with pytest.raises(ValueError, match=r"films of the validation split stood in train when .* --data\.split_file"):
        check_not_trained_on(prepare(table, seed=1), tmp_path / "split.csv")


def test_films_of_joint_training_are_not_tested_on_either(table, tmp_path):
    films = prepare(table)
    write_split(datasets.DatasetDict(joint=films.splits["test"]), tmp_path / "joint.csv")
    with pytest.raises(ValueError, match="6 films of the test split"):
        check_not_trained_on(films, tmp_path / "split.csv")


def test_labels_are_permuted_before_anything_is_learnt_from_them_but_not_in_test(table):
    plain, permuted = prepare(table), prepare(table, permute_labels=True)
    assert image_ids(plain) == image_ids(permuted)
    assert plain.splits["train"]["label"][:] != permuted.splits["train"]["label"][:]
    assert plain.splits["test"]["label"][:] == permuted.splits["test"]["label"][:]


def test_leaks_stop_what_does_not_allow_them(table):
    films = prepare(table)
    shutil.copy(table.parent / f"{films.splits['train']['image_id'][0]}", table.parent / "copy.png")
    with table.open(newline="") as file:
        rows = [row | {"side": "train"} for row in csv.DictReader(file)]
    leaked = {"image": "copy.png", "label": "ILL", "patient_id": "p0", "side": "test"}
    rows += [leaked, leaked | {"image": "0.png", "label": "NORMAL", "patient_id": "p99"}]
    rows = list({row["image"]: row for row in rows}.values())
    films = prepare(write_table(table, rows), split_column="side")
    with pytest.raises(ValueError, match=r"--data\.allow_leaks (patients|duplicates)"):
        audit_films(films, DataArguments("table", source=str(table)))
    allowed = DataArguments("table", source=str(table), allow_leaks=["patients", "duplicates"])
    assert audit_films(films, allowed)["patients_across_splits"]["count"] > 0


def test_several_processes_decode_to_the_same_films(table):
    assert prepare(table, num_workers=2).splits["train"][:] == prepare(table).splits["train"][:]


def test_fold_and_seed_decide_the_split(table):
    first = image_ids(prepare(table))
    assert first == image_ids(prepare(table))
    assert first["validation"] != image_ids(prepare(table, fold=1))["validation"]
    assert first["test"] == image_ids(prepare(table, fold=1))["validation"]
    assert first != image_ids(prepare(table, seed=1))


def test_a_split_on_file_is_repeated(table, tmp_path):
    first = prepare(table, seed=5)
    write_split(first.splits, tmp_path / "split.csv")
    repeated = prepare(table, seed=6, split_file=str(tmp_path / "split.csv"))
    assert image_ids(repeated) == image_ids(first) != image_ids(prepare(table, seed=6))


def test_a_film_that_cannot_be_read_is_fatal_and_by_choice_skipped(table):
    (table.parent / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)1 of .* films can't be read.*3\.png"):
        prepare(table)
    films = prepare(table, unreadable="skip")
    assert [path.rpartition("/")[2] for path in films.unreadable] == ["3.png"]
    assert sum(map(len, films.splits.values())) == 23


def test_reduced_decoding_is_another_decoding(table):
    for film in range(24):
        large = Image.fromarray(draw_phantom(film, opacity=True, image_size=160))
        large.save(table.parent / f"{film}.png", "JPEG")
    exact, reduced = (
        stack_pixels(list(prepare(table, decoding=decoding).splits["train"])).astype(int)
        for decoding in ("exact", "reduced")
    )
    assert 0 < np.abs(exact - reduced).mean() < 5


@pytest.fixture
def shards(table):
    folder = table.parent / "shards"
    folder.mkdir()
    films = prepare(table)
    everything = datasets.concatenate_datasets(list(films.splits.values()))
    rows = [
        {
            "image": {"bytes": (table.parent / row["image_id"]).read_bytes(), "path": row["image_id"]},
            "label": row["label"],
            "patient_id": row["patient_id"],
        }
        for row in everything
    ]
    features = {"image": datasets.Image(), "label": films.splits["train"].features["label"]}
    features["patient_id"] = datasets.Value("string")
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    for index in range(2):
        dataset.shard(2, index).to_parquet(folder / f"train-{index}.parquet")
    return folder


def test_a_stream_gives_the_same_films(table, shards, tmp_path):
    streamed = prepare(table, streaming=True, source=str(shards), num_workers=1)
    assert isinstance(streamed.train, FilmStream) and streamed.train.num_workers == 1
    assert len(streamed.train) == len(streamed.splits["train"]) == 12
    plain = prepare(table)
    with_pixels = [plain.splits["train"], plain.splits["validation"], plain.sealed_test]
    pixels = {row["image_id"]: row["pixels"] for rows in with_pixels for row in rows}
    for rows in (streamed.train.rows, streamed.train_sample, streamed.sealed_test):
        assert all(row["pixels"] == pixels[row["image_id"]] for row in rows)


def test_a_stream_repeats_a_split_and_skips_what_cannot_be_read(table, shards, tmp_path):
    first = prepare(table, streaming=True, source=str(shards))
    write_split(first.splits, tmp_path / "split.csv")
    repeated = prepare(table, streaming=True, source=str(shards), seed=9, split_file=str(tmp_path / "split.csv"))
    # What is held out comes back in the order of the shards.
    assert {name: sorted(ids) for name, ids in image_ids(repeated).items()} == {
        name: sorted(ids) for name, ids in image_ids(first).items()
    }


def test_an_option_that_a_stream_does_not_know_is_refused(table, shards):
    with pytest.raises(ValueError, match=r"data\.split_column means nothing to data\.streaming"):
        prepare(table, streaming=True, source=str(shards), split_column="split")


def test_a_class_that_a_split_lacks_is_named(table):
    rows = [dict(row, split="test") for row in csv.DictReader(table.open()) if row["label"] == "NORMAL"][:4]
    rows += [
        dict(row, split="train")
        for row in csv.DictReader(table.open())
        if row["image"] not in {r["image"] for r in rows}
    ]
    write_table(table, rows)
    with pytest.raises(ValueError, match=r"data\.source: the test split of .*films\.csv has no image of class ILL"):
        check_classes(prepare(table, split_column="split").splits, DataArguments("table", source=str(table)))


def test_findings_of_which_nothing_is_known_are_refused(table):
    with table.open(newline="") as file:
        rows = [row | {"Edema": "1", "Mass": "0"} for row in csv.DictReader(file)]
    blank = {row["image"]: {"Edema": "", "Mass": ""} for row in rows if row["patient_id"] in ("p0", "p1")}
    write_table(
        table,
        [row | blank.get(row["image"], {}) | {"side": "test" if row["image"] in blank else "train"} for row in rows],
    )
    splits = prepare(table, label_columns=["Edema", "Mass"], label_names=[], split_column="side").splits
    with pytest.raises(ValueError, match="nothing is known of any film in the test split"):
        check_classes(splits, DataArguments("table", source=str(table)))


def test_embedded_films_that_are_skipped_keep_their_names_apart(shards, tmp_path):
    """A row of the same number, broken, in two splits."""
    for split in ("train", "test"):
        rows = datasets.load_dataset("parquet", data_files=[str(path) for path in shards.glob("*.parquet")])["train"]
        broken = rows.cast_column("image", datasets.Image(decode=False)).to_list()
        broken[3]["image"] = {"bytes": b"no image", "path": None}
        broken = [row | {"patient_id": f"{split}-{row['patient_id']}"} for row in broken]
        datasets.Dataset.from_list(broken, features=rows.features).to_parquet(tmp_path / "sides" / f"{split}-0.parquet")
    films = prepare(shards.parent / "films.csv", source=str(tmp_path / "sides"), unreadable="skip")
    assert len(films.unreadable) == 2 and all("no image" not in name for name in films.unreadable)


def test_the_cache_is_where_it_was_asked_for(table):
    shutil.rmtree(table.parent / "cache", ignore_errors=True)
    prepare(table)
    assert list((table.parent / "cache").rglob("*.arrow"))
