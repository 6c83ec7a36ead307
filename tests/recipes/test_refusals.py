"""What can't work is told in one sentence, before anything is trained."""

import csv
import importlib.util
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from narrow import write_published_weights
from PIL import Image
from running import ROOT
from safetensors.torch import load_file, save_file

from cxr_backbone.data.labels import label_names
from cxr_backbone.data.synthetic import draw_phantom


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("two_stage", ROOT / "recipes/two_stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def films(tmp_path):
    """Phantoms in Kaggle's layout: nothing wrong with them yet."""
    for split, first, last in (("train", 1, 12), ("test", 21, 22)):
        for label in ("NORMAL", "PNEUMONIA"):
            folder = tmp_path / "films" / split / label
            folder.mkdir(parents=True)
            for n in range(first, last + 1):
                name = f"IM-{n:04}-0001.png" if label == "NORMAL" else f"person{n}_virus_{n}.png"
                film = draw_phantom(n + 100 * (label != "NORMAL"), opacity=label != "NORMAL", image_size=75)
                Image.fromarray(film).save(folder / name)
    return tmp_path / "films"


@pytest.fixture
def weights(tmp_path):
    """Nothing wrong with them yet."""
    return write_published_weights(tmp_path / "inception.safetensors")


@pytest.fixture
def config(tmp_path, films, weights):
    (tmp_path / "config.yaml").write_text(
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
        f"data: {{source: {films}, format: kermany, num_folds: 4, cache_dir: {tmp_path / 'cache'}}}\n"
        f"model: {{init: {weights}, image_mean: [0.5], image_std: [0.5], image_size: 75, depth_multiplier: 0.1}}\n"
        "fine_tuning: {batch_size: 4, epochs: 1}\n"
    )
    return tmp_path / "config.yaml"


@pytest.fixture(autouse=True)
def keep_signals():
    """The recipe takes them for its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refusal(recipe, monkeypatch, *argv):
    """The one sentence that the recipe ends with."""
    monkeypatch.setattr(sys, "argv", ["recipes/two_stage.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ending:
        recipe.main()
    assert isinstance(ending.value.code, str)  # printed to stderr, exit status 1
    assert ending.value.code.startswith("two_stage.py: ") and "\n" not in ending.value.code.strip()
    return ending.value.code


def write_labels(folder, **changed):
    """Replace the layout of folders by a labels.csv; a keyword changes its first line."""
    rows = [
        {
            "path": path.relative_to(folder),
            "label": path.parent.name,
            "split": path.parts[-3],
            "patient_id": path.stem,
            "subtype": "normal" if path.parent.name == "NORMAL" else "virus",
        }
        for path in sorted(folder.glob("*/*/*"))
    ]
    rows[0] |= changed
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def no_folder(films, weights):
    films.rename(films.with_name("moved"))
    return [str(films)]


def empty_folder(films, weights):
    for path in films.iterdir():
        path.rename(films.with_name(f"moved-{path.name}"))
    return [str(films)]


def empty_class_folder(films, weights):
    for path in (films / "train/PNEUMONIA").iterdir():
        path.unlink()
    return [str(films / "train/PNEUMONIA")]


def unreadable_image(films, weights):
    (films / "train/NORMAL/IM-0007-0001.png").write_bytes(b"no image")
    return [str(films / "train/NORMAL/IM-0007-0001.png")]


def truncated_image(films, weights):
    path = films / "test/PNEUMONIA/person22_virus_22.png"
    path.write_bytes(path.read_bytes()[:400])
    return [str(path)]


def file_without_a_patient(films, weights):
    (films / "train/NORMAL/IM-0007-0001.png").rename(films / "train/NORMAL/scan7.png")
    return ["scan7.png"]


def unknown_label(films, weights):
    write_labels(films, label="COVID")
    return [str(films / "labels.csv"), "line 2", "COVID"]


def listed_file_is_missing(films, weights):
    write_labels(films, path="train/NORMAL/lost.png")
    return [str(films / "labels.csv"), "lost.png"]


def no_healthy_chest_to_test_on(films, weights):
    for path in (films / "test/NORMAL").iterdir():
        path.unlink()
    write_labels(films)
    return ["test", "NORMAL", str(films)]


def missing_tensor(films, weights):
    tensors = load_file(weights)
    del tensors["Mixed_7c.branch_pool.bn.running_var"]
    save_file(tensors, weights)
    return [str(weights), "Mixed_7c.branch_pool.bn.running_var"]


def misshapen_tensor(films, weights):
    tensors = load_file(weights)
    tensors["Mixed_5b.branch1x1.bn.bias"] = torch.zeros(3)
    save_file(tensors, weights)
    return [str(weights), "(3,)"]


def broken_weights(films, weights):
    weights.write_bytes(b"no weights")
    return [str(weights)]


def filled_run_directory(films, weights):
    (films.parent / "run").mkdir()
    (films.parent / "run/notes.txt").write_text("mine")
    return ["run.output_dir", str(films.parent / "run")]


def same_patient_in_test(films, weights):
    film = films / "test/PNEUMONIA/person22_virus_22.png"
    film.rename(film.with_name("person5_virus_22.png"))
    return ["1 patient", "person5", "recipes/audit.py", "--data.allow_leaks patients"]


def same_film_in_test(films, weights):
    shutil.copy(films / "train/NORMAL/IM-0007-0001.png", films / "test/NORMAL/IM-0023-0001.png")
    return ["IM-0007-0001.png", "IM-0023-0001.png", "--data.allow_leaks duplicates"]


FAULTS = [
    *(no_folder, empty_folder, empty_class_folder, unreadable_image, truncated_image, file_without_a_patient),
    *(unknown_label, listed_file_is_missing, no_healthy_chest_to_test_on),
    *(same_patient_in_test, same_film_in_test),
    *(missing_tensor, misshapen_tensor, broken_weights, filled_run_directory),
]


def test_without_a_fault_the_same_files_are_taken(recipe, config, tmp_path):
    _, run, films, _, _, model, _ = recipe.prepare([str(config)])
    assert {split: len(rows) for split, rows in films.splits.items()} == {"train": 18, "validation": 6, "test": 4}
    assert label_names(films.splits["train"].features) == ["NORMAL", "PNEUMONIA"] == list(model.config.label2id)
    assert not run.path.exists()


@pytest.mark.parametrize(("leak", "kind"), [(same_patient_in_test, "patients"), (same_film_in_test, "duplicates")])
def test_a_leak_passes_if_it_is_told_to(recipe, config, films, weights, capsys, leak, kind):
    leak(films, weights)
    recipe.prepare([str(config), "--data.allow_leaks", kind])
    assert "**LEAK**" in capsys.readouterr().out


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_files_that_cannot_work_are_named_before_anything_is_trained(
    recipe, config, films, weights, monkeypatch, tmp_path, fault
):
    culprits = fault(films, weights)
    before = sorted(tmp_path.glob("run/**/*"))
    message = refusal(recipe, monkeypatch, config)
    assert [word for word in culprits if word not in message] == []
    assert sorted(tmp_path.glob("run/**/*")) == before
    assert (tmp_path / "run").exists() == (fault is filled_run_directory)


SETTINGS = [
    (["--fine_tuning.learningrate", "1"], ["fine_tuning.learningrate", "learning_rate"]),
    (["--fine_tuning.epochs", "few"], ["epochs", "few"]),
    (["--fine_tuning.batch_size", "19"], ["fine_tuning.batch_size=19", "18 images"]),
    (["--fine_tuning.batch_size", "1"], ["fine_tuning.batch_size=1", "expected 2 or more"]),
    (["--fine_tuning.sync_batch_norm", "true"], ["fine_tuning.sync_batch_norm=True", "GPUs"]),
    (["--data.num_folds", "100"], ["100 folds", "100 patients"]),
    (["--data.fold", "4"], ["fold=4", "num_folds=4"]),
    (["--data.num_patients", "5"], ["data.num_patients", "data.format=kermany"]),
    (["--data.split_file", "/nowhere/split.csv"], ["/nowhere/split.csv"]),
    (["--model.init", "/nowhere/inception.safetensors"], ["/nowhere/inception.safetensors"]),
    (["--model.depth_multiplier", "0.5"], ["inception.safetensors", "depth_multiplier=0.5"]),
    (["--model.image_mean", "null"], ["inception.safetensors", "image_mean"]),
    (["--model.image_size", "50"], ["image_size=50"]),
    (["--model.dropout", "1"], ["dropout=1"]),
    (["--model.num_channels", "2"], ["num_channels=2"]),
    (["--run.push_to_hub", "true"], ["run.hub_model_id"]),
    (["--run.push_to_hub", "true", "--run.hub_model_id", "org/cxr"], ["org/cxr", "token", "hf auth login"]),
    (["--run.push_to_hub", "true", "--run.hub_model_id", "no name"], ["no name"]),
    (["--run.hub_model_id", "cxr"], ["'cxr'", "org/name"]),
]


@pytest.mark.parametrize(("overrides", "culprits"), SETTINGS, ids=[" ".join(words) for words, _ in SETTINGS])
def test_settings_that_cannot_work_are_named_before_anything_is_trained(
    recipe, config, monkeypatch, tmp_path, overrides, culprits
):
    message = refusal(recipe, monkeypatch, config, *overrides)
    assert [word for word in culprits if word not in message] == []
    assert not (tmp_path / "run").exists()


def test_a_config_that_does_not_exist_ends_the_process_with_one_line_and_status_1(tmp_path):
    process = subprocess.run(
        [sys.executable, "recipes/two_stage.py", str(tmp_path / "lost.yaml")], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.splitlines() == [f"two_stage.py: There is no config file {tmp_path / 'lost.yaml'}."]


def test_the_seed_decides_where_the_head_starts(recipe, config):
    def start(seed, torch_seed):
        torch.manual_seed(torch_seed)
        *_, model, _ = recipe.prepare([str(config), "--run.seed", str(seed)])
        return model.classifier.output_layer.weight

    assert torch.equal(start(seed=0, torch_seed=0), start(seed=0, torch_seed=1))
    assert not torch.equal(start(seed=0, torch_seed=0), start(seed=1, torch_seed=0))
