"""Results are printed as tables that line up and leave nothing out."""

import re

import pytest
from evaluation.drawn_predictions import drawn_run, findings, two_classes

from cxr_backbone.evaluation.report import (
    calibration_table,
    comparison_table,
    figure_name,
    figure_text,
    findings_table,
    markdown_table,
    operating_points_table,
    subgroups_table,
)


@pytest.fixture(scope="module")
def metrics():
    return drawn_run(two_classes)[0]


def cells_of(table):
    """Row by its first cells; in each row, cell by column."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return header, rows


def test_models_stand_beside_each_other_with_their_difference(metrics):
    header, rows = cells_of(comparison_table(metrics))
    assert header == ["", "frozen", "fine-tuned", "difference"]
    shown = {name: cells for name, *cells in rows}
    for name, figure in metrics["models"]["frozen"]["splits"]["test"]["figures"].items():
        frozen, tuned, difference = shown[name.replace("_", " ")]
        assert frozen.startswith(f"{figure['value']:.3f} ({figure['low']:.3f} to ")
        other = metrics["models"]["fine_tuned"]["splits"]["test"]["figures"][name]
        assert tuned == figure_text(other)
        assert difference.startswith(f"{other['value'] - figure['value']:+.3f} (")


def test_one_model_has_no_difference():
    header, _ = cells_of(comparison_table(drawn_run(two_classes, models=("fine_tuned",))[0]))
    assert header == ["", "fine-tuned"]


def test_another_split_can_be_shown(metrics):
    assert comparison_table(metrics, "validation") != comparison_table(metrics)


def test_a_figure_that_is_missing_is_not_passed_over(metrics):
    broken = {**metrics, "comparison": {"test": {"figures": {}}}}
    with pytest.raises(KeyError, match="loss"):
        comparison_table(broken)


def test_operating_points_stand_with_the_validation_figures_that_chose_them(metrics):
    header, rows = cells_of(operating_points_table(metrics))
    assert header[-4:] == ["sensitivity", "specificity", "PPV", "NPV"]
    shown = {(target, point): cells for target, point, *cells in rows}
    chosen = metrics["models"]["fine_tuned"]["operating_points"]["PNEUMONIA"]
    assert {point for _, point in shown} == set(chosen)
    for name, point in chosen.items():
        threshold, on_validation, sensitivity, *_ = shown["PNEUMONIA", name]
        assert threshold == f"{point['threshold']:.3f}"
        assert on_validation == f"{point['sensitivity']:.3f} / {point['specificity']:.3f}"
        measured = metrics["models"]["fine_tuned"]["splits"]["test"]["targets"]["PNEUMONIA"]["operating_points"][name]
        assert sensitivity == figure_text(measured["sensitivity"])


def test_a_finding_without_operating_points_has_no_row():
    _, rows = cells_of(operating_points_table(drawn_run(findings)[0]))
    assert "Hernia" not in {target for target, *_ in rows} and "Mass" in {target for target, *_ in rows}


def test_what_is_not_defined_says_so():
    assert figure_text({"value": None, "low": None, "high": None, "undefined": "why"}) == "not defined"
    assert figure_text({"value": 0.5, "low": None, "high": None, "undefined": "why"}) == "0.500 (interval not defined)"
    assert figure_text({"value": 0.5, "low": -0.1, "high": 1.0}, signed=True) == "+0.500 (-0.100 to +1.000)"


def test_the_table_is_markdown_with_aligned_columns():
    lines = markdown_table(["", "long heading"], [["a", "1"], ["bb", ""]]).splitlines()
    assert lines == [
        "|    | long heading |",
        "|----|--------------|",
        "| a  | 1            |",
        "| bb |              |",
    ]


def test_the_tables_line_up(metrics):
    for table in (comparison_table(metrics), operating_points_table(metrics)):
        lines = table.splitlines()
        assert {tuple(match.start() for match in re.finditer(r"\|", line)) for line in lines} == {
            tuple(match.start() for match in re.finditer(r"\|", lines[0]))
        }


def test_each_finding_stands_with_its_films_and_areas():
    targets = drawn_run(findings)[0]["models"]["fine_tuned"]["splits"]["test"]["targets"]
    _, rows = cells_of(findings_table(targets))
    assert [row[0] for row in rows] == list(targets)
    for name, films, positive, auroc, auprc in rows:
        its = targets[name]
        assert (films, positive) == (f"{its['films']:,}", f"{its['positives']:,}")
        assert (auroc, auprc) == tuple(figure_text(its["figures"][area]) for area in ("auroc", "auprc"))


def test_subgroups_have_a_row_each_and_no_table_where_there_are_none(metrics):
    targets = metrics["models"]["fine_tuned"]["splits"]["test"]["targets"]
    groups = [f"{column}: {group}" for column, its in targets["PNEUMONIA"]["subgroups"].items() for group in its]
    _, rows = cells_of(subgroups_table(targets))
    assert groups and all(row[0].startswith(group) for row, group in zip(rows, groups, strict=True))
    assert subgroups_table({"PNEUMONIA": targets["PNEUMONIA"] | {"subgroups": {}}}) == ""


def test_calibration_stands_before_and_after_the_temperature(metrics):
    calibration = metrics["models"]["fine_tuned"]["splits"]["test"]["calibration"]
    header, rows = cells_of(calibration_table(calibration))
    assert header == ["", "before the temperature", "as published"]
    assert rows[1] == ["ECE", *(figure_text(calibration[when]["ece"]) for when in ("before", "after"))]
    assert cells_of(calibration_table(calibration | {"before": None}))[0] == ["", "as published"]


def test_figures_are_called_as_people_call_them():
    names = [figure_name(name) for name in ("auroc", "balanced_accuracy", "auprc_macro")]
    assert names == ["AUROC", "balanced accuracy", "AUPRC, mean of the findings"]
