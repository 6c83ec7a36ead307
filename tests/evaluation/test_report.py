"""Results are printed as a table that lines up and leaves nothing out."""

import re

import pytest

from cxr_backbone.evaluation.metrics import METRICS
from cxr_backbone.evaluation.report import PHASES, SPLITS, comparison_table, markdown_table


def value(phase, split, name):
    """A different figure in every place."""
    return PHASES.index(phase) / 2 + SPLITS.index(split) / 10 + METRICS.index(name) / 100 + 0.0012


@pytest.fixture
def metrics():
    return {
        phase: {
            **{
                split: {name: value(phase, split, name) for name in METRICS} | {"images": 100 + SPLITS.index(split)}
                for split in SPLITS
            },
            "seconds": 41.6 + PHASES.index(phase),
        }
        for phase in PHASES
    }


@pytest.fixture
def cells(metrics):
    """Row by name; in each row, cell by column."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in comparison_table(metrics).splitlines()
    ]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_both_phases_stand_beside_each_other_on_each_split(cells):
    for row in cells.values():
        assert list(row) == [
            *("frozen train", "frozen validation", "frozen test"),
            *("fine-tuned train", "fine-tuned validation", "fine-tuned test"),
        ]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_in_its_place(cells, name):
    for phase in PHASES:
        for split in SPLITS:
            shown = cells[name.replace("_", " ")][f"{phase.replace('_', '-')} {split}"]
            assert shown == f"{value(phase, split, name):.4f}"


def test_images_and_seconds_are_told(cells):
    assert list(cells["images"].values()) == ["100", "101", "102"] * 2
    assert list(cells["seconds to train"].values()) == ["42", "", "", "43", "", ""]


def test_a_figure_that_is_missing_is_not_passed_over(metrics):
    del metrics["fine_tuned"]["test"]["auroc"]
    with pytest.raises(KeyError, match="auroc"):
        comparison_table(metrics)


def test_findings_have_a_row_each_and_what_is_not_defined_a_dash():
    figures = {"loss": 0.5, "mean_auroc": 0.75, "auroc Mass": 0.75, "auroc Hernia": None, "images": 9}
    table = comparison_table({phase: {**dict.fromkeys(SPLITS, figures), "seconds": 1.0} for phase in PHASES})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert ["auroc Mass", *["0.7500"] * 6] in rows and ["auroc Hernia", *["–"] * 6] in rows


def test_the_table_is_markdown_with_aligned_columns():
    lines = markdown_table(["", "long heading"], [["a", "1"], ["bb", ""]]).splitlines()
    assert lines == [
        "|    | long heading |",
        "|----|--------------|",
        "| a  | 1            |",
        "| bb |              |",
    ]


def test_the_comparison_lines_up(metrics):
    lines = comparison_table(metrics).splitlines()
    assert {tuple(match.start() for match in re.finditer(r"\|", line)) for line in lines} == {
        tuple(match.start() for match in re.finditer(r"\|", lines[0]))
    }
