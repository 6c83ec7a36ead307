"""Results as text: Markdown tables from the content of metrics.json."""

from typing import Any

NOT_DEFINED = "not defined"
RATES = ("sensitivity", "specificity")
FIGURE_NAMES = {
    "loss": "loss (nats)",
    "nll": "negative log-likelihood (nats)",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "auroc_macro": "AUROC, mean of the findings",
    "auroc_micro": "AUROC, all findings as one",
    "auprc_macro": "AUPRC, mean of the findings",
    "auprc_micro": "AUPRC, all findings as one",
    "f1": "F1",
    "mcc": "MCC",
    "ece": "ECE",
    "brier": "Brier score",
    "ppv": "PPV",
    "npv": "NPV",
}


def comparison_table(metrics: dict[str, Any], split: str = "test") -> str:
    """The figures of a split with 95 % intervals, a column a model, and the difference if there are two models."""
    models = metrics["models"]
    header = ["", *(name.replace("_", "-") for name in models)]
    columns = [model["splits"][split]["figures"] for model in models.values()]
    differences = metrics["comparison"][split]["figures"] if "comparison" in metrics else None
    rows = []
    for figure in columns[0]:
        shown = [figure_text(column[figure]) for column in columns]
        if differences is not None:
            shown.append(figure_text(differences[figure], signed=True))
        rows.append([figure.replace("_", " "), *shown])
    return markdown_table(header if differences is None else [*header, "difference"], rows)


def operating_points_table(metrics: dict[str, Any], split: str = "test") -> str:
    """The operating points of the last model: what they reached on validation, which chose them, and on a split."""
    *_, model = metrics["models"].values()
    rows = []
    for target, result in model["splits"][split]["targets"].items():
        for point, figures in result["operating_points"].items():
            chosen = model["operating_points"][target][point]
            # A point that somebody set by hand has no figures that chose it.
            at_choice = [f"{chosen[name]:.3f}" if name in chosen else "–" for name in ("sensitivity", "specificity")]
            shown = [figure_text(figures[name]) for name in ("sensitivity", "specificity", "ppv", "npv")]
            rows.append([target, point, f"{chosen['threshold']:.3f}", " / ".join(at_choice), *shown])
    header = ["", "point", "threshold", "validation sensitivity / specificity"]
    return markdown_table([*header, "sensitivity", "specificity", "PPV", "NPV"], rows)


def findings_table(targets: dict[str, Any]) -> str:
    """A row for each target with how many films are known and positive, AUROC and AUPRC.

    Args:
        targets: of a split in metrics.json.
    """
    rows = []
    for target, its in targets.items():
        shown = [figure_text(its["figures"][name]) for name in ("auroc", "auprc")]
        rows.append([target, f"{its['films']:,}", f"{its['positives']:,}", *shown])
    return markdown_table(["", "films", "positive", "AUROC", "AUPRC"], rows)


def subgroups_table(targets: dict[str, Any]) -> str:
    """A row for each subgroup of each target, with sensitivity and specificity at its first operating point; empty if
    there are no subgroups.

    Args:
        targets: of a split in metrics.json.
    """
    rows = []
    for target, result in targets.items():
        for column, groups in result["subgroups"].items():
            for group, its in groups.items():
                at_point: dict[str, Any] = next(iter(its["operating_points"].values()), {})
                rates = [figure_text(at_point[name]) if name in at_point else "–" for name in RATES]
                name = f"{column}: {group}" + (f", with {its['compared_with']}" if its["compared_with"] else "")
                auroc = figure_text(its["figures"]["auroc"])
                rows.append([target, name, f"{its['films']:,}", f"{its['positives']:,}", auroc, *rates])
    first = 0 if len(targets) > 1 else 1  # a single target needs no column
    header = ["label", "subgroup", "films", "positive", "AUROC", *RATES]
    return markdown_table(header[first:], [row[first:] for row in rows]) if rows else ""


def calibration_table(calibration: dict[str, Any]) -> str:
    """Before the temperature, if one was fitted, and as the model is.

    Args:
        calibration: of a split in metrics.json.
    """
    stages = {
        name: calibration[stage]
        for stage, name in (("before", "before the temperature"), ("after", "as published"))
        if calibration[stage] is not None
    }
    rows = [
        [name, *(figure_text(figures[key]) for figures in stages.values())]
        for key, name in (("nll", "negative log-likelihood (nats)"), ("ece", "ECE"), ("brier", "Brier score"))
    ]
    return markdown_table(["", *stages], rows)


def figure_text(figure: dict[str, Any], *, signed: bool = False) -> str:
    """`0.945 (0.926 to 0.961)`; without an interval `0.945 (interval not defined)`."""
    if figure["value"] is None:
        return NOT_DEFINED
    sign = "+" if signed else ""
    value = f"{figure['value']:{sign}.3f}"
    if figure["low"] is None:
        return f"{value} (interval {NOT_DEFINED})"
    return f"{value} ({figure['low']:{sign}.3f} to {figure['high']:{sign}.3f})"


def figure_name(name: str) -> str:
    """A figure of metrics.json as people call it, in the middle of a sentence."""
    return FIGURE_NAMES.get(name, name.replace("_", " "))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
