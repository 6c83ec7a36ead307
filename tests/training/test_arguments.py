"""A run is told what to do by a YAML file and a command line; what makes no sense is refused by name."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from cxr_backbone.training.arguments import Arguments, FineTuningArguments, FrozenArguments, parse_arguments

FOLDER = Path(__file__).parents[2] / "recipes/configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")  # of the launcher
MINIMAL = "run: {output_dir: runs/test}\ndata: {format: kermany, source: films}\n"


@pytest.fixture
def parse(tmp_path):
    def parse(text: str = "", *argv: str) -> Arguments:
        """The minimal file with `text` after it, and a command line."""
        path = tmp_path / "config.yaml"
        path.write_text(MINIMAL + text)
        return parse_arguments([str(path), *argv])

    return parse


def test_there_are_committed_configs():
    assert {"pneumonia.yaml", "sample.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_committed_config_parses_to_what_it_says(path):
    written = yaml.safe_load(path.read_text())
    argv = [] if "run" in written else ["--run.output_dir", "runs/test"]  # a data section alone: an external set
    arguments = asdict(parse_arguments([str(path), *argv]))
    for section, settings in written.items():
        for name, value in settings.items():
            # YAML 1.1 reads 3e-4, without a dot, as a string.
            expected = float(value) if isinstance(arguments[section][name], float) else value
            assert arguments[section][name] == expected


@pytest.mark.parametrize("path", sorted((FOLDER / "protocols").glob("*.yaml")), ids=lambda path: path.name)
def test_each_protocol_is_trained_by_the_recipe_of_the_kermany_set(path):
    ours, theirs = (asdict(parse_arguments([str(config)])) for config in (FOLDER / "pneumonia.yaml", path))
    assert theirs["data"]["protocol"] == (path.stem if path.stem != "pneumoniamnist" else None)
    assert theirs["fine_tuning"] == ours["fine_tuning"]
    size = {"image_size": 112} if path.stem == "pneumoniamnist" else {}
    assert theirs["model"] == ours["model"] | size
    assert (theirs["frozen"], theirs["evaluation"]) == (ours["frozen"], ours["evaluation"])


def test_a_section_or_field_that_is_not_given_has_its_default(parse):
    arguments = parse("fine_tuning: {epochs: 7}")
    assert arguments.fine_tuning == FineTuningArguments(epochs=7)
    assert arguments.frozen == FrozenArguments()
    assert (arguments.run.output_dir, arguments.run.seed) == ("runs/test", 0)


@pytest.mark.parametrize(
    "written, value", [("1e-4", 1e-4), ("3.0e-4", 3e-4), ("'0.5'", 0.5), ("1", 1.0), (".25", 0.25)]
)
def test_a_number_is_read_however_it_is_written(parse, written, value):
    rate = parse(f"fine_tuning: {{learning_rate: {written}}}").fine_tuning.learning_rate
    assert isinstance(rate, float) and rate == value


@pytest.mark.parametrize(
    "text, argv, section, name, value",
    [
        ("frozen: {l2_strengths: [1e-4, 1e-2]}", [], "frozen", "l2_strengths", [1e-4, 1e-2]),
        ("frozen: {l2_strengths: 1e-3}", [], "frozen", "l2_strengths", [1e-3]),
        ("", ["--frozen.l2_strengths", "0.1", "1e-3"], "frozen", "l2_strengths", [0.1, 1e-3]),
        ("model: {head_hidden_sizes: [64, 32]}", [], "model", "head_hidden_sizes", [64, 32]),
        ("model: {head_hidden_sizes: []}", [], "model", "head_hidden_sizes", []),
        ("model: {image_mean: [0.485, 0.456, 0.406]}", [], "model", "image_mean", [0.485, 0.456, 0.406]),
        ("", ["--model.image_mean", "0.0"], "model", "image_mean", [0.0]),
        ("model: {avg_pool_count_include_pad: false}", [], "model", "avg_pool_count_include_pad", False),
        ("", ["--fine_tuning.gradient_checkpointing", "true"], "fine_tuning", "gradient_checkpointing", True),
        ("", ["--data.source=my films"], "data", "source", "my films"),
        ("", ["--data.label_columns", "Edema", "Lung Opacity"], "data", "label_columns", ["Edema", "Lung Opacity"]),
        ("", ["--data.label_values", "0=A", "Lung Opacity=B"], "data", "label_values", ["0=A", "Lung Opacity=B"]),
        ("", ["--data.subgroup_columns=sex"], "data", "subgroup_columns", ["sex"]),
        ("", ["--data.permute_labels", "true"], "data", "permute_labels", True),
        ("", ["--data.patient_pattern", r"patient(\d+)"], "data", "patient_pattern", r"patient(\d+)"),
        ("", ["--run.cpu_threads", "3"], "run", "cpu_threads", 3),
    ],
)
def test_lists_switches_and_names_are_read(parse, text, argv, section, name, value):
    assert getattr(getattr(parse(text, *argv), section), name) == value


def test_the_command_line_wins_over_the_file_field_by_field(parse):
    arguments = parse("fine_tuning: {epochs: 7, batch_size: 5}", "--fine_tuning.epochs", "2", "--model.dropout=0")
    assert (arguments.fine_tuning.epochs, arguments.fine_tuning.batch_size) == (2, 5)
    assert arguments.model.dropout == 0


@pytest.mark.parametrize(
    "text, argv", [("fine_tuning: {epochs: null}", []), ("fine_tuning: {epochs: 9}", ["--fine_tuning.epochs", "null"])]
)
def test_null_means_the_default(parse, text, argv):
    assert parse(text, *argv).fine_tuning.epochs == FineTuningArguments.epochs


def test_what_is_written_out_is_read_back_the_same(parse, tmp_path):
    arguments = parse("model: {image_std: [0.25]}\nrun: {output_dir: runs/a, seed: 3, mixed_precision: 'no'}")
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(asdict(arguments)))
    assert parse_arguments([str(tmp_path / "resolved.yaml")]) == arguments


@pytest.mark.parametrize(
    "text, argv, message",
    [
        ("fine_tunning: {epochs: 1}", [], "no section 'fine_tunning'; did you mean 'fine_tuning'"),
        ("", ["--fozen.batch_size", "2"], "no section 'fozen'; did you mean 'frozen'"),
        ("xyz: {a: 1}", [], "no section 'xyz'; known are data, evaluation, fine_tuning, frozen, joint, model, run"),
        ("fine_tuning: {learning_rat: 1}", [], "no field fine_tuning.learning_rat; did you mean 'learning_rate'"),
        ("", ["--run.sed", "1"], "no field run.sed; did you mean 'seed'"),
        ("", ["--data.zzz", "1"], "no field data.zzz; known are allow_leaks, cache_dir"),
        ("", ["--seed", "1"], "--seed is not known; fields are given as --section.field"),
        ("", ["stray"], "'stray' does not belong to any"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_guess(parse, text, argv, message):
    with pytest.raises(ValueError, match=message):
        parse(text, *argv)


@pytest.mark.parametrize(
    "text, named",
    [
        ("fine_tuning: {epochs: many}", ["fine_tuning", "epochs", "many"]),
        ("fine_tuning: {epochs: 1.5}", ["fine_tuning", "epochs", "1.5"]),
        ("fine_tuning: {learning_rate: fast}", ["fine_tuning", "learning_rate", "fast"]),
        ("fine_tuning: {gradient_checkpointing: maybe}", ["fine_tuning", "gradient_checkpointing", "maybe"]),
        ("frozen: {l2_strengths: [1e-4, strong]}", ["frozen", "l2_strengths", "strong"]),
        ("model: {image_size: {height: 75}}", ["model.image_size", "one value"]),
        ("frozen: {l2_strengths: [[1e-4], 1e-3]}", ["frozen.l2_strengths", "a list of values"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(parse, text, named):
    with pytest.raises(ValueError) as refusal:
        parse(text)
    assert all(word in str(refusal.value) for word in named)


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("run", "mixed_precision", "fp8"),
        ("data", "format", "folder"),
        ("data", "decoding", "fast"),
        ("data", "unreadable", "ignore"),
        ("data", "allow_leaks", ["patients", "all"]),
        ("data", "num_workers", -1),
        ("frozen", "l2_strengths", [-0.1, 1]),
        ("fine_tuning", "epochs", 0),
        ("fine_tuning", "batch_size", 0),
        ("fine_tuning", "batch_size", 1),
        ("fine_tuning", "nonfinite", "ignore"),
        ("fine_tuning", "gradient_accumulation_steps", 0),
        ("fine_tuning", "evaluations_per_epoch", 0),
        ("evaluation", "perturbed_views", -1),
        ("evaluation", "resamples", 99),
        ("evaluation", "external_source", "films.csv"),
        ("joint", "films_source", "films.csv"),
        ("joint", "batch_size", 0),
        ("joint", "weight", -0.1),
        ("fine_tuning", "patience", 0),
        ("fine_tuning", "augmentation", 1.5),
        ("fine_tuning", "ema_decay", -0.1),
        ("fine_tuning", "warmup_ratio", 2),
        ("fine_tuning", "start_scale", 0),
        ("fine_tuning", "start_scale", 1.5),
        ("run", "cpu_threads", 0),
        ("run", "save_minutes", -0.5),
        ("frozen", "batch_size", 0),
        ("fine_tuning", "learning_rate", -1),
        ("fine_tuning", "weight_decay", -1),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_expected(parse, section, name, value):
    values = value if isinstance(value, list) else [value]
    with pytest.raises(ValueError, match=rf"{section}\.{name}=.* is not allowed; expected "):
        parse("", f"--{section}.{name}", *map(str, values))


@pytest.mark.parametrize("name", ["run.push_to_hub", "run.seed", "frozen.l2_strengths"])
def test_a_field_without_a_value_is_not_passed_over(parse, name):
    with pytest.raises(ValueError, match=name):
        parse("", f"--{name}")


def test_no_is_a_word_here_though_yaml_reads_it_as_false(parse):
    assert parse("run: {output_dir: a, mixed_precision: no}").run.mixed_precision == "no"


def test_a_section_with_nothing_under_it_has_its_defaults(parse):
    assert parse("frozen:\n").frozen == FrozenArguments()


def test_two_values_for_one_are_refused_by_name(parse):
    with pytest.raises(ValueError, match="seed"):
        parse("", "--run.seed", "1", "2")


@pytest.mark.parametrize(
    "missing, text", [("output_dir", "data: {format: synthetic}"), ("format", "run: {output_dir: a}")]
)
def test_where_the_data_are_and_where_results_go_must_be_said(tmp_path, missing, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"required: --{missing}"):
        parse_arguments([str(tmp_path / "config.yaml")])


def test_a_source_is_named_where_there_is_one_and_only_there(parse):
    assert parse("", "--data.format", "synthetic", "--data.source", "null").data.source is None
    for argv in (["--data.format", "synthetic"], ["--data.source", "null"]):
        with pytest.raises(ValueError, match=r"data\.source=.* is not allowed; expected a folder, a file or a Hub id"):
            parse("", *argv)


def test_a_fold_beside_a_split_on_file_is_refused(parse):
    with pytest.raises(ValueError, match=r"data\.fold=1 is not allowed; expected nothing beside data\.split_file"):
        parse("", "--data.fold", "1", "--data.split_file", "split.csv")


def test_noise_for_the_labels_of_a_stream_is_refused(parse):
    stream = ["--data.format", "table", "--data.streaming", "true"]
    with pytest.raises(ValueError, match=r"data\.permute_labels=True is not allowed; expected false, for data\.stre"):
        parse("", *stream, "--data.permute_labels", "true")


@pytest.mark.parametrize("text", ["run: [", "run: {a: b", "a: b: c"])
def test_broken_yaml_is_refused_and_the_file_named(tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
        parse_arguments([str(tmp_path / "broken.yaml")])


@pytest.mark.parametrize("text", ["epochs: 3", "[1, 2]", "just words"])
def test_a_field_without_a_section_is_refused(tmp_path, text):
    (tmp_path / "flat.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"flat\.yaml: expected sections \(run, data, model, …\)"):
        parse_arguments([str(tmp_path / "flat.yaml")])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config file .*nowhere\.yaml"):
        parse_arguments([str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize("argv", [[], ["--run.seed", "1"]])
def test_the_file_comes_first(argv):
    with pytest.raises(ValueError, match="first argument must be a YAML file"):
        parse_arguments(argv)


def test_every_field_has_a_sentence_of_help():
    described = [item for section in fields(Arguments) for item in fields(section.type)]
    assert [item.name for item in described if not item.metadata.get("help")] == []
