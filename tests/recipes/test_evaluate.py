"""What evaluate.py says of a model is what its training said, and what it can't test it refuses."""

import json

import pytest
import torch
import yaml
from narrow import PROCESSOR, tiny_model
from PIL import Image
from running import sample_run
from safetensors.torch import load_file
from transformers import pipeline

from cxr_backbone.data.synthetic import draw_phantom

SAMPLE = "recipes/configs/sample.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return sample_run(tmp_path_factory.mktemp("trained"), **{"data.num_patients": [60], "evaluation.resamples": [200]})


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A table of films of another source, whose labels have other names."""
    folder = tmp_path_factory.mktemp("elsewhere")
    lines = ["image,reading,patient_id,view"]
    for film in range(40):
        ill = film // 2 % 2 == 1
        Image.fromarray(draw_phantom(1000 + film, opacity=ill, image_size=75)).save(folder / f"{film}.png")
        lines.append(f"{film}.png,{['clear', 'opaque'][ill]},p{film // 2},{'AP' if film % 3 else 'PA'}")
    (folder / "films.csv").write_text("\n".join(lines))
    data = {"format": "table", "source": "nowhere.csv", "label_columns": ["reading"], "subgroup_columns": ["view"]}
    data["label_values"] = ["clear=NORMAL", "opaque=PNEUMONIA"]
    (folder / "elsewhere.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


def evaluate(trained, *words):
    return trained.python("recipes/evaluate.py", *words, "--run.mixed_precision", "no", "--run.cpu_threads", 1)


@pytest.fixture(scope="module")
def tested(trained, elsewhere, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tested") / "results"
    models = ["--model", trained.path / "fine_tuned", "--compare", trained.path / "frozen"]
    words = [*models, "--data", trained.path / "config.yaml", "--output_dir", folder]
    external = ["--evaluation.external", elsewhere / "elsewhere.yaml"]
    external += ["--evaluation.external_source", elsewhere / "films.csv"]
    process = evaluate(trained, *words, *external)
    assert process.returncode == 0, process.stderr
    return folder, process


def test_it_says_what_the_training_said(trained, tested):
    expected, found = trained.read("metrics.json"), json.loads((tested[0] / "metrics.json").read_text())
    for model in expected["models"].values():
        del model["seconds"]
    for model in found["models"].values():
        del model["splits"]["external elsewhere"]
    del found["comparison"]["external elsewhere"]
    assert found == expected


def test_it_leaves_the_same_files(trained, tested):
    folder, process = tested
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {path.name for path in (trained.path / "figures").iterdir()} < names
    assert {path.name for path in (trained.path / "predictions").iterdir()} < {
        path.name for path in (folder / "predictions").iterdir()
    }
    assert f"The report: {folder / 'report.html'}" in process.stdout


def test_films_of_another_source_are_tested_beside_the_test_split(tested):
    splits = json.loads((tested[0] / "metrics.json").read_text())["models"]["fine_tuned"]["splits"]
    outside = splits["external elsewhere"]
    assert (outside["films"], outside["patients"]) == (40, 20)
    assert set(outside["targets"]["PNEUMONIA"]["subgroups"]["view"]) == {"AP", "PA"}
    assert "external elsewhere" in (tested[0] / "report.html").read_text()


def test_a_model_that_has_operating_points_is_left_as_it_is(trained, tested):
    assert not (tested[0] / "settled").exists()


def test_a_model_without_operating_points_is_settled_on_validation_and_saved(trained, tmp_path):
    tiny_model(id2label={0: "NORMAL", 1: "PNEUMONIA"}).save_pretrained(tmp_path / "bare")
    PROCESSOR.save_pretrained(tmp_path / "bare")
    words = [
        "--model",
        tmp_path / "bare",
        "--data",
        SAMPLE,
        "--data.num_patients",
        40,
        "--output_dir",
        tmp_path / "out",
    ]
    process = evaluate(trained, *words, "--evaluation.report", "false")
    assert process.returncode == 0, process.stderr
    classify = pipeline("image-classification", str(tmp_path / "out/settled/bare"), trust_remote_code=False)
    temperature = classify.model.config.temperature
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "out/settled/bare"))
    name = "classifier.output_layer.weight"
    torch.testing.assert_close(after[name] * temperature, before[name])
    answer = classify(Image.fromarray(draw_phantom(1, opacity=True, image_size=75)), top_k=None)
    assert set(classify.model.config.decide(answer, "youden")) == {"PNEUMONIA"}
    assert not (tmp_path / "out/report.html").exists()


def test_what_can_not_be_tested_is_refused_in_one_sentence(trained, elsewhere, tmp_path):
    def refusal(*words):
        process = evaluate(trained, *words, "--output_dir", tmp_path / "out")
        assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("evaluate.py: "), process.stderr
        assert not (tmp_path / "out").exists()
        return process.stderr.splitlines()[-1]

    model = ["--model", trained.path / "fine_tuned"]
    data = ["--data", trained.path / "config.yaml"]
    assert "no config file missing.yaml" in refusal(*model, "--data", "missing.yaml")
    assert "did you mean 'resamples'?" in refusal(*model, *data, "--evaluation.resample", 10)
    other_labels = ["--data.source", elsewhere / "films.csv", "--data.label_columns", "reading"]
    message = refusal(*model, "--data", "recipes/configs/table.yaml", *other_labels)
    assert "has the labels clear, opaque (one class a film), and the model NORMAL, PNEUMONIA" in message
    tiny_model(id2label={0: "NORMAL", 1: "PNEUMONIA"}, image_size=80).save_pretrained(tmp_path / "larger")
    message = refusal(*model, *data, "--compare", tmp_path / "larger")
    assert "--compare takes images of 80 pixels, --model of 75" in message
    swapped = tiny_model(id2label={0: "PNEUMONIA", 1: "NORMAL"})
    swapped.save_pretrained(tmp_path / "swapped")
    assert "the model PNEUMONIA, NORMAL" in refusal(*model, *data, "--compare", tmp_path / "swapped")
    assert "--compare is the same as --model" in refusal(*model, *data, "--compare", trained.path / "fine_tuned/")
    assert str(tmp_path / "lost") in refusal("--model", tmp_path / "lost", *data)
