"""A card says what its run has on file, to people and to the Hub, and nothing that is nobody's business."""

import ast
import re
import shlex

import pytest
import yaml
from evaluation.drawn_predictions import FINDINGS, findings, several_classes
from finished_run import INSIDE, REPO, TEMPLATE, FinishedRun
from huggingface_hub.repocard_data import model_index_to_eval_results

from cxr_backbone.card import write_card
from cxr_backbone.evaluation.report import comparison_table, figure_text, operating_points_table

OUTSIDE = (*INSIDE, "external clinic")
SHA256 = "c0ffee" * 10 + "c0de"


@pytest.fixture
def run(tmp_path):
    return FinishedRun(tmp_path)


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, flags=re.MULTILINE | re.DOTALL)[1]


def command_of(card):
    (block,) = re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)
    return shlex.split(block.replace("\\\n", ""))  # which a shell takes for nothing


def test_every_figure_of_the_test_split_is_that_of_the_metrics_file(run):
    card = run.finish().card()
    metrics = run.read("metrics.json")
    assert comparison_table(metrics) in card and operating_points_table(metrics) in card
    auroc = metrics["models"]["fine_tuned"]["splits"]["test"]["figures"]["auroc"]
    auroc |= {"value": 0.12346, "low": 0.11111, "high": 0.13131}
    run.write("metrics.json", metrics)
    changed = run.card()
    assert "0.123 (0.111 to 0.131)" in section(changed, "Results")
    assert "value: 0.1235" in changed and "value: 0.1235" not in card


def test_the_hub_reads_the_results_with_split_and_interval(run):
    data = run.finish(splits=OUTSIDE).metadata()
    figures = run.read("metrics.json")["models"]["fine_tuned"]["splits"]["test"]["figures"]
    results = {result.metric_type: result for result in data.eval_results if result.dataset_split == "test"}
    assert set(results) == {
        *("loss", "accuracy", "balanced_accuracy", "f1", "matthews_correlation"),
        *("roc_auc", "auprc", "ece", "brier_score"),
    }
    auroc, figure = results["roc_auc"], figures["auroc"]
    assert auroc.metric_value == round(figure["value"], 4)
    assert auroc.metric_name == f"AUROC (95 % interval {figure['low']:.3f} to {figure['high']:.3f})"
    assert (auroc.task_type, auroc.dataset_type) == ("image-classification", "hf-vision/chest-xray-pneumonia")
    name, parsed = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == REPO and parsed == data.eval_results


def test_an_external_set_has_entries_of_its_own(run):
    data = run.finish(splits=OUTSIDE).metadata()
    splits = run.read("metrics.json")["models"]["fine_tuned"]["splits"]
    (outside,) = [
        result for result in data.eval_results if (result.dataset_name, result.metric_type) == ("clinic", "roc_auc")
    ]
    assert outside.dataset_split == "external"
    assert outside.metric_value == round(splits["external clinic"]["figures"]["auroc"]["value"], 4)
    assert len(data.eval_results) == 2 * len(splits["test"]["figures"])


def test_the_metadata_name_what_the_model_comes_from(run):
    data = run.finish().metadata().to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "transformers")
    assert data["pipeline_tag"] == "image-classification" and "chest-x-ray" in data["tags"]
    assert data["datasets"] == ["hf-vision/chest-xray-pneumonia"]
    assert data["base_model"] == "timm/inception_v3.tv_in1k"


def test_the_metadata_name_no_hub_id_where_there_is_none(run):
    options = ("--data.source", "../films.csv", "--data.label_columns", "label", "--model.init", "weights/mine.pth")
    data = run.finish(*options, config="table", sha256=SHA256).metadata().to_dict()
    assert "datasets" not in data and "base_model" not in data
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "films.csv"


def test_a_table_on_the_hub_is_named_by_its_id(run):
    data = run.finish("--data.source", "org/films", "--data.label_columns", "label", config="table").metadata()
    assert data.datasets == ["org/films"]


def test_a_figure_that_is_not_defined_is_said_to_be_and_is_no_result(run):
    run.finish()
    metrics = run.read("metrics.json")
    figures = metrics["models"]["fine_tuned"]["splits"]["test"]["figures"]
    figures["mcc"] = {"value": None, "low": None, "high": None, "undefined": "a class does not occur"}
    figures["f1"] |= {"low": None, "high": None, "undefined": "too few"}
    run.write("metrics.json", metrics)
    names = {result.metric_type: result.metric_name for result in run.metadata().eval_results}
    assert "matthews_correlation" not in names and names["f1"] == "F1 (interval not defined)"
    assert re.search(r"\| mcc .*\| not defined", run.card())


@pytest.mark.parametrize("name", ["metrics.json", "environment.json", "config.yaml", "audit.json", "hub/config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["missing", "cut short", "of another kind"])
def test_a_card_without_one_of_its_files_is_refused(run, name, content):
    file = run.finish().path / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(file))}.*Finish the run first"):
        run.card()
    assert not (run.hub / "README.md").exists()


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (["resamples"], "resamples"),
        (["models", "fine_tuned"], "models.fine_tuned"),
        (["models", "fine_tuned", "splits", "test"], "models.fine_tuned.splits.test"),
        (["models", "fine_tuned", "seconds"], "models.fine_tuned.seconds"),
    ],
)
def test_a_card_of_metrics_that_lack_the_model_or_its_test_is_refused(run, path, named):
    metrics = run.finish().read("metrics.json")
    node = metrics
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    run.write("metrics.json", metrics)
    with pytest.raises(ValueError, match=rf"metrics\.json lacks {re.escape(named)}"):
        run.card()


@pytest.mark.parametrize(
    ("option", "warning"),
    [
        (("--data.permute_labels", "true"), "its model knows nothing"),
        (("--data.protocol", "selected_on_test"), "these are no test figures"),
    ],
)
def test_a_control_run_warns_on_top_and_tells_leaderboards_nothing(run, option, warning):
    card = run.finish(*option).card()
    assert warning in card.split("## ")[0]
    assert "model-index" not in card and "org/cxr-inception" in card
    assert warning not in run.finish().card()


def test_a_card_gives_away_no_folder_and_no_patient(run):
    card = run.finish(
        *("--data.source", "/home/alice/secret/chest_xray", "--model.init", "~/secret/weights.pth"),
        *("--run.output_dir=/scratch/secret/run7", "--data.cache_dir", "../../secret/cache"),
        *("--evaluation.external", "/home/alice/secret/clinic.yaml"),
        *("--evaluation.external_source", "C:\\Users\\alice\\secret\\clinic.csv"),
        sha256=SHA256,
        splits=OUTSIDE,
    ).card()
    assert not re.search(r"secret|alice|home/|Users|\.\./|~|/scratch", card)
    assert str(run.path.parent) not in card
    assert not re.search(r"patient\d|film\d|phantom\d", card)
    assert run.audit_report["patients_across_splits"]["listed"]  # there are some to be given away
    assert command_of(card)[4:] == [
        *("--data.source", "chest_xray", "--model.init", "weights.pth", "--run.output_dir=run7"),
        *("--data.cache_dir", "cache", "--evaluation.external", "clinic.yaml"),
        *("--evaluation.external_source", "clinic.csv"),
    ]


def test_the_command_is_the_one_that_was_given(run):
    options = ["--data.source", "data/my films", "--model.init", "timm/inception_v3.tf_in1k", "--run.seed", "7"]
    options += ["--data.patient_pattern", r"\d+_(p\d+)", "--data.format", "imagefolder"]
    card = run.finish(*options, "--data.allow_leaks", "patients", "duplicates").card()
    expected = ["accelerate", "launch", "recipes/two_stage.py", "recipes/configs/pneumonia.yaml", *options]
    assert command_of(card) == [*expected, "--data.allow_leaks", "patients", "duplicates"]


def test_a_card_does_not_depend_on_where_it_is_written(run, tmp_path, monkeypatch):
    options = ("--data.source", "org/films", "--data.label_columns", "label", "--model.init", "org/weights")
    before = run.finish(*options, config="table").card()
    for folder in ("org/films", "org/weights", "recipes/configs"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run.card() == before


def test_settings_and_versions_are_those_of_the_run(run):
    procedure = section(run.finish("--fine_tuning.augmentation", "0").card(), "Training procedure")
    (settings,) = re.findall(r"```yaml\n(.*?)```", procedure, flags=re.DOTALL)
    settings = yaml.safe_load(settings)
    resolved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert settings["fine_tuning"] == resolved["fine_tuning"] and settings["fine_tuning"]["augmentation"] == 0
    assert settings["frozen"] == resolved["frozen"]
    assert "Python 3.11.7, cxr-backbone 0.1.0, torch 2.13.0." in procedure


def test_the_weights_that_were_kept_are_told_with_the_gap_to_validation(run):
    metrics = run.finish().read("metrics.json")
    curve = [{"after_steps": steps, "epoch": 0.5, "train": 0.2, "validation": 0.3, "test": 0.4} for steps in (0, 9)]
    run.write("metrics.json", metrics | {"overfitting": {"curve": curve, "chosen": 0, "gap": 0.0987}})
    procedure = " ".join(section(run.card(), "Training procedure").split())
    assert "The weights after 0 of 9 steps" in procedure and "0.099 below that on validation" in procedure
    assert "**The second phase is not in this model.**" in section(run.card(), "Results")
    run.write("metrics.json", metrics | {"overfitting": {"curve": curve, "chosen": 9, "gap": 0.0987}})
    assert "This repository holds the fine-tuned model" in section(run.card(), "Results")


def test_only_pictures_that_are_there_are_shown(run):
    assert "![" not in run.finish().card()
    card = run.draw("roc.png", "confusion.png", "unknown.png", "roc_of_something.png").card()
    assert re.findall(r"!\[.*?\]\((.*?)\)", card) == ["figures/roc.png", "figures/confusion.png"]


def test_pictures_of_several_targets_say_which(run):
    run.finish(draw=findings).draw("roc-2-cardiomegaly.png", "roc-13-pleural_thickening.png", "learning_curves.png")
    card = run.card()
    first, second = card.index("roc-2-cardiomegaly.png"), card.index("roc-13-pleural_thickening.png")
    assert first < second
    assert "![ROC and precision-recall curves: Cardiomegaly](figures/roc-2-cardiomegaly.png)" in card
    assert f"curves: {FINDINGS[12]}]" in card and "2 pictures</summary>" in card


@pytest.mark.parametrize(
    ("init", "sha256", "expected"),
    [
        ([], None, "Random"),
        (["timm/inception_v3.tv_in1k"], None, "(https://huggingface.co/timm/inception_v3.tv_in1k)"),
        (
            ["weights/mine.pth"],
            SHA256,
            f"The file `mine.pth`, SHA-256 `{SHA256}`.\nWhoever published this model did not",
        ),
        (
            ["runs/first/fine_tuned"],
            SHA256,
            f"The checkpoint `fine_tuned`, SHA-256 of its weights `{SHA256}`.\nWhoever",
        ),
    ],
    ids=["random", "hub", "file", "checkpoint"],
)
def test_the_initial_weights_are_named(run, init, sha256, expected):
    options = ["--model.init", *init] if init else []
    config = "pneumonia" if init else "sample"
    assert expected in section(run.finish(*options, config=config, sha256=sha256).card(), "Initial weights")


def test_what_the_publisher_says_of_the_weights_stands_in_the_card(run):
    options = ("--model.init", "mine.pth", "--model.init_provenance", "Ours,\n CC0")
    weights = section(run.finish(*options, sha256=SHA256).card(), "Initial weights")
    assert "says of them: Ours, CC0.\n" in weights and "did not say" not in weights


def test_time_and_hardware_are_those_that_were_measured(run):
    cost = section(run.finish().card(), "Environmental cost")
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", cost, flags=re.MULTILINE))
    assert rows.pop("frozen phase") == "1,234 s" and rows.pop("fine-tuning phase") == "1,236 s"
    assert rows == {
        "hardware": "NVIDIA Test",
        "processes": "2",
        "threads a process": "3",
        "mixed precision": "bf16",
    }
    assert "Energy was not measured" in cost


def test_the_bias_of_the_kermany_set_is_told(run):
    card = run.finish().card()
    data = section(card, "Training data and its bias")
    assert "one to five years old" in data and "Guangzhou" in data and "CC BY 4.0" in data
    assert "Adults were never tested" in data
    assert ".95" in section(card, "Limits") and ".54" in section(card, "Limits")
    assert "Adults were never tested" not in run.finish(splits=OUTSIDE).card()


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ("chestxray14", (), "NIH Clinical Center"),
        ("sample", (), "knows nothing about patients"),
        ("table", ("--data.label_columns", "label"), "ask whoever published this model"),
        ("table", ("--data.format", "imagefolder", "--data.source", "films"), "ask whoever published this model"),
        ("table", ("--data.format", "pneumoniamnist", "--data.source", "a.npz"), "MedMNIST"),
    ],
)
def test_each_kind_of_data_is_told_in_its_own_words(run, config, options, expected):
    card = run.finish(*options, config=config).card()
    assert expected in section(card, "Training data and its bias")
    assert ("Xin, Li & Yi" in card) == ("pneumoniamnist" in options)
    assert "kermany2018" in card if "pneumoniamnist" in options else "kermany2018" not in card


def test_what_the_audit_found_is_told(run):
    report = run.audit_report
    report["metadata_baseline"] = {
        "facts": {
            "file_bytes": {"auroc": 0.8973, "p": 0.0, "label": "PNEUMONIA"},
            "mean": {"auroc": 0.5219, "p": 0.1, "label": "PNEUMONIA"},
            "combined": {"auroc": 0.9111, "p": 0.0, "label": "PNEUMONIA"},
        },
        "alarm": ["file_bytes", "combined"],
    }
    report["unreadable"] = {"/home/alice/broken.png": "cut short"}
    card = run.finish().card()
    data = section(card, "Training data and its bias")
    assert "10 patient numbers stand in more than one" in data and "2 groups of duplicate films stand in more" in data
    assert "0.90 for PNEUMONIA from file bytes alone" in data and "0.91 for PNEUMONIA from height" in data
    assert "0.52" not in data and "could not be read: 1 file." in data and "broken" not in card
    assert "give the label away" in section(card, "Limits")
    report["patients_across_splits"] |= {"films_without_patient": 5}
    assert "the patients of 5 films are not known" in run.finish().card()


def test_films_of_joint_training_are_named_as_training_data(run):
    card = run.finish("--joint.films", "/home/alice/adults.yaml").card()
    assert "learnt what is known of 2 films of another source" in card
    assert "Whoever published this model says of them: Adults of a clinic; CC0." in card
    assert "films: adults.yaml" in card and "alice" not in card
    assert "joint" not in run.finish().card()


def test_an_external_set_stands_beside_the_test_split(run):
    card = run.finish(splits=OUTSIDE).card()
    metrics = run.read("metrics.json")
    assert comparison_table(metrics, "external clinic") in card
    assert operating_points_table(metrics, "external clinic") in card
    auroc = metrics["models"]["fine_tuned"]["splits"]["external clinic"]["figures"]["auroc"]
    assert f"clinic: AUROC {figure_text(auroc)}, against" in section(card, "Limits")
    assert "not tested on films of any other source" in run.finish().card()


def test_subgroups_have_a_table_where_there_are_any(run):
    card = run.finish().card()
    metrics = run.read("metrics.json")
    group = metrics["models"]["fine_tuned"]["splits"]["test"]["targets"]["PNEUMONIA"]["subgroups"]["sex"]["F"]
    row = re.search(r"\| sex: F +\|.*", card)[0]
    assert figure_text(group["figures"]["auroc"]) in row
    assert figure_text(group["operating_points"]["youden"]["sensitivity"]) in row
    assert "### Subgroups" not in run.finish(draw=several_classes).card()


def test_a_model_without_operating_points_or_temperature_says_so(run):
    card = run.finish(with_points=False, temperature=None).card()
    assert "no operating points" in section(card, "Decisions") and "```" not in section(card, "Decisions")
    assert "No temperature was fitted" in section(card, "Calibration")


VARIANTS = {
    "two classes": {},
    "with another source": {"splits": OUTSIDE},
    "several classes": {"draw": several_classes, "splits": OUTSIDE},
    "findings": {"draw": findings, "splits": OUTSIDE, "config": "chestxray14", "temperature": "one each"},
    "one model": {"models": ("fine_tuned",), "config": "sample"},
    "without points": {"with_points": False, "temperature": None},
}


@pytest.mark.parametrize("pictures", [(), ("roc.png", "scores.png", "reliability.png")], ids=["plain", "pictures"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_makes_a_tidy_card(run, variant, pictures):
    card = run.finish(**VARIANTS[variant]).draw(*pictures).card()
    assert "\n\n\n" not in card and card.endswith("```\n")
    assert not re.search(r"{%|%}|{{ |(?<!top_k=)\bNone\b|Undefined|nan\b|More Information Needed", card)
    assert not re.search(r"[^\S\n]\n", card)
    lines = card.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("## ", "### ", "![", "<details", "</details")):
            assert lines[number - 1] == "" == lines[number + 1], line
            assert not lines[number + 2].startswith("## ") or not line.startswith("#"), f"nothing under {line}"
        if line.startswith("|-"):  # a table has a head above, a row below, and nothing else around it
            assert lines[number - 1].startswith("|") and lines[number + 1].startswith("|")
            assert not lines[number - 2].strip()
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        ast.parse(block)
    assert card.count("```") % 2 == 0 and card.count("<details>") == card.count("</details>")


def test_the_sections_people_look_for_are_there_and_the_warning_comes_first(run):
    card = run.finish().card()
    assert re.findall(r"^## (.+)", card, flags=re.MULTILINE) == [
        "Use",
        "What it is for, and what it is not for",
        "Results",
        "Decisions",
        "Calibration",
        "Limits",
        "Training data and its bias",
        "Training procedure",
        "Initial weights",
        "Licence",
        "Environmental cost",
        "Citation",
    ]
    assert "not a medical device" in card.split("## ")[0]
    assert "revision=" in section(card, "Use")
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)", card, re.M)}
    assert set(re.findall(r"\]\(#(.+?)\)", card)) <= anchors


def test_no_figure_is_typed_by_hand():
    text = re.sub(r"```.*?```|{%.*?%}|{{.*?}}|{#.*?#}|\]\(.*?\)|^\d\. ", "", TEMPLATE.read_text(), flags=re.S | re.M)
    names = r"Inception V3|Apache-2\.0|ChestX-ray14|MedMNIST v2|SHA-256|16-bit|F1|CC BY 4\.0"
    literature = r"Kermany et al\. 2018|Xin, Li & Yi 2021|Wang et al\. 2017|Yang et al\. 2023|AUROC of \.95|of \.54"
    assert re.findall(r"\S*\d\S*", re.sub(rf"{names}|{literature}|95 % intervals", "", text)) == []


def test_a_copy_of_a_data_set_is_not_taken_for_the_one_on_the_hub(run):
    run.finish("--data.source", "/mnt/films/chest_xray_small")
    assert "Chest X-Ray Images (Pneumonia), from a copy called `chest_xray_small`:" in run.card()
    data = run.metadata()
    assert data.datasets is None and {result.dataset_type for result in data.eval_results} == {"kermany"}


def test_the_size_of_the_films_on_file_is_told(run):
    run.audit_report["sizes"] = {
        "most_frequent": {"height": 224, "width": 225, "films": 1234},
        "height": [223, 2048],
        "width": [225, 225],
    }
    told = section(run.finish().card(), "Training data and its bias")
    assert "- On file, 1,234 films are 224 pixels high and 225 wide; heights go from 223 to 2048.\n" in told


def test_what_the_publisher_says_of_films_stands_in_the_card(run):
    card = run.finish("--data.provenance", "Ours, with consent", config="table", splits=OUTSIDE).card()
    assert "says of them: Ours, with consent.\n" in section(card, "Training data and its bias")
    assert "knows nothing of where" not in card
    assert "says of them: A clinic's films; CC0.\n" in section(card, "Results")


def test_an_address_is_shown_without_its_key(run):
    address = "https://alice:secret@clinic.org/films.csv?token=abc"
    card = run.finish("--data.source", address, config="table").card()
    assert "https://clinic.org/films.csv" in card and not re.search("alice|secret|token=", card)


def test_each_finding_has_its_figures(run):
    card = run.finish(draw=findings).card()
    targets = run.read("metrics.json")["models"]["fine_tuned"]["splits"]["test"]["targets"]
    rows = {line.split("|")[1].strip(): line for line in section(card, "Results").splitlines() if line.startswith("|")}
    for finding in FINDINGS:
        assert figure_text(targets[finding]["figures"]["auroc"]) in rows[finding]


def test_a_test_loss_that_was_lower_before_is_told(run):
    run.finish()
    metrics = run.read("metrics.json")
    curve = [{"after_steps": 10, "train": 0.2, "validation": 0.2, "test": 0.31}]
    curve += [{"after_steps": 20, "train": 0.1, "validation": 0.1, "test": 0.42}]
    run.write("metrics.json", metrics | {"overfitting": {"curve": curve, "chosen": 20, "gap": 0.0}})
    procedure = " ".join(section(run.card(), "Training procedure").split())
    assert "lowest after 10 steps (0.310); with the weights that were kept it is 0.420, both before the" in procedure


@pytest.mark.parametrize("mistake", ["{{ settings.nothing }}", "{% if %}"])
def test_a_mistake_in_the_template_is_told_by_its_name(run, mistake, tmp_path):
    (tmp_path / "my_card.md").write_text(mistake)
    with pytest.raises(ValueError, match=r"my_card\.md, line"):
        write_card(run.finish().path, run.hub, tmp_path / "my_card.md", REPO)
