"""Numbers as people read them: Markdown tables that are legible on a terminal too."""

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "-"  # what is not defined


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns, the first to the left."""
    lines = [[_cell(one) for one in row] for row in (heads, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(one.rjust(width) for one, width in zip(row[1:], widths[1:], strict=True))]
        for row in (lines[0], marks, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def number(value: float | None) -> str:
    """Three decimals."""
    return NONE if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Three decimals, a plus too."""
    return NONE if value is None else f"{value:+.3f}"


def metric(one: Mapping[str, Any]) -> str:
    """A metric of results.json: value [low, high]."""
    if not one["ci95"]:
        return number(one["value"])
    low, high = one["ci95"]
    return f"{one['value']:.3f} [{low:.3f}, {high:.3f}]"


def p_value(value: float | None) -> str:
    """Three decimals, or that it is less than they show."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
