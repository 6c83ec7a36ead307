"""Results as text."""

from typing import Any

PHASES = ("frozen", "fine_tuned")
SPLITS = ("train", "validation", "test")


def comparison_table(metrics: dict[str, Any]) -> str:
    """Frozen beside fine-tuned, as Markdown, from the content of a run's metrics.json."""
    columns = [(phase, split) for phase in PHASES for split in SPLITS]
    names = [name for name in metrics[PHASES[0]][SPLITS[0]] if name != "images"]
    rows = [
        [name.replace("_", " "), *[_four_digits(metrics[phase][split][name]) for phase, split in columns]]
        for name in names
    ]
    rows.append(["images", *[str(metrics[phase][split]["images"]) for phase, split in columns]])
    rows.append(
        [
            "seconds to train",
            *[f"{metrics[phase]['seconds']:.0f}" if split == "train" else "" for phase, split in columns],
        ]
    )
    return markdown_table(["", *[f"{phase.replace('_', '-')} {split}" for phase, split in columns]], rows)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _four_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
