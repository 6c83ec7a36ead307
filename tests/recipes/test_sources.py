"""The recipe takes findings as well as classes, and shards as well as files; one process or two."""

import json

import datasets
import pytest
from running import Run

from cxr_backbone.data.synthetic import load_synthetic
from cxr_backbone.evaluation.report import comparison_table

SMALL = {
    **{"model.image_size": [75], "model.depth_multiplier": [0.1], "model.init": ["null"]},
    **{"fine_tuning.epochs": [1], "fine_tuning.batch_size": [8]},
}


def results(run, split, model="fine_tuned"):
    return run.read("metrics.json")["models"][model]["splits"][split]


@pytest.fixture(scope="module")
def findings_run(chestxray14, tmp_path_factory):
    return Run(
        tmp_path_factory.mktemp("findings"),
        "recipes/configs/chestxray14.yaml",
        **(SMALL | {"data.source": [chestxray14], "data.num_folds": [4]}),
    )


def test_fourteen_findings_have_an_auroc_each_and_their_mean(findings_run):
    test = results(findings_run, "test")
    aurocs = {name: target["figures"]["auroc"]["value"] for name, target in test["targets"].items()}
    assert len(aurocs) == 14 and {"Pneumonia", "Hernia"} <= set(aurocs)
    defined = [value for value in aurocs.values() if value is not None]
    assert len(defined) > 5 and all(0 <= value <= 1 for value in defined)
    assert test["figures"]["auroc_macro"]["value"] == pytest.approx(sum(defined) / len(defined))


def test_they_are_told_apart_by_age_sex_and_view(findings_run):
    effusion = results(findings_run, "test")["targets"]["Effusion"]
    assert set(effusion["subgroups"]) == {"age", "sex", "view"}
    assert sum(group["films"] for group in effusion["subgroups"]["sex"].values()) == effusion["films"]


def test_the_saved_model_is_a_multi_label_one_and_its_card_says_so(findings_run):
    config = json.loads((findings_run.path / "fine_tuned/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and len(config["id2label"]) == 14
    card = (findings_run.path / "hub/README.md").read_text()
    assert comparison_table(findings_run.read("metrics.json")) in card
    assert "A finding's figures come from the films of which it is known" in card and "highest score" not in card


def test_the_pipeline_scores_each_finding_on_its_own(findings_run):
    answers = findings_run.process.stdout.splitlines()[-1]
    scores = [answer["score"] for answer in json.loads(answers.replace("'", '"'))]
    assert len(scores) == 5 and all(0 < score < 1 for score in scores)  # the pipeline's top five, sigmoids


def test_chexnets_task_is_one_option(chestxray14, tmp_path):
    run = Run(
        tmp_path,
        "recipes/configs/chestxray14.yaml",
        **(SMALL | {"data.source": [chestxray14], "data.num_folds": [4], "data.task": ["pneumonia"]}),
    )
    assert set(results(run, "test")["figures"]) >= {"auroc", "balanced_accuracy"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Phantoms in two shards a split."""
    folder = tmp_path_factory.mktemp("shards")
    for name, rows in load_synthetic(40, image_size=75).items():
        # `to_parquet` writes paths alone where it has them, so the rows go by way of their bytes.
        undecoded = rows.cast_column("image", datasets.Image(decode=False))
        embedded = datasets.Dataset.from_list(list(undecoded), features=rows.features)
        for index in range(2):
            embedded.shard(2, index).to_parquet(folder / f"{name}-{index}.parquet")
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def stream_run(request, shards, tmp_path_factory):
    overrides = {"data.streaming": ["true"], "data.source": [shards], "data.label_columns": ["label"]}
    overrides |= SMALL | {"fine_tuning.batch_size": [4], "fine_tuning.epochs": [2]}
    return Run(tmp_path_factory.mktemp("stream"), "recipes/configs/table.yaml", request.param, **overrides)


def test_a_stream_is_trained_on_and_every_film_is_counted_once(stream_run):
    films = {name: len(rows) for name, rows in load_synthetic(40, image_size=75).items()}
    assert {name: split["films"] for name, split in stream_run.read("audit.json")["splits"].items()} == films
    films["train"] = films["validation"]  # a sample of train
    for model in ("frozen", "fine_tuned"):
        assert {name: results(stream_run, name, model)["films"] for name in films} == films


def test_processes_take_steps_together(stream_run):
    processes = stream_run.read("environment.json")["processes"]
    steps = [line["step"] for line in stream_run.log if "step" in line]
    films = len(load_synthetic(40, image_size=75)["train"])
    assert steps == list(range(2 * (films // (4 * processes))))
    assert [line for line in stream_run.log if line["phase"] == "fine_tuning"][-1]["epoch"] == 2


def test_no_decoded_copy_of_train_is_kept(stream_run, tmp_path_factory):
    """Facts and thumbnails are; pixels are those of what models are tested on."""
    decoded = {path.parts[-5]: path for path in stream_run.path.parent.rglob("cxr_backbone/**/*.arrow")}
    held_out = [path for path in decoded.values() if b"pixels" in path.read_bytes()]
    assert decoded and len(held_out) == 3  # and the sample of train


def test_adults_are_learnt_from_beside_children(real_films, shared, tmp_path):
    run = Run(
        tmp_path,
        "recipes/configs/pneumonia.yaml",
        **(SMALL | {"data.source": [real_films], "data.num_folds": [4], "evaluation.report": ["false"]}),
        **{"joint.films": ["recipes/configs/rsna_normals.yaml"], "joint.batch_size": [4]},
        **{"joint.films_source": [shared / "data/rsna-normals/labels.csv"]},
    )
    joint = (run.path / "joint.csv").read_text().splitlines()
    assert joint[0] == "split,image_id,patient_id" and len(joint) > 3000
    assert (
        f"learnt what is known of {len(joint) - 1:,} films of another source"
        in (run.path / "hub/README.md").read_text()
    )
    config = json.loads((run.path / "fine_tuned/config.json").read_text())
    assert set(config["id2label"].values()) == {"NORMAL", "PNEUMONIA"}
