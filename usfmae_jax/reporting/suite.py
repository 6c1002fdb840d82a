"""Results of a suite of evaluations: suite.json, suite.md and report.html, a table of encoders by datasets."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from markupsafe import Markup

from usfmae_jax import files
from usfmae_jax.evaluation import classification, regression, segmentation, tables
from usfmae_jax.reporting import pages, run
from usfmae_jax.reporting.pages import part

NAMES = classification.NAMES | segmentation.NAMES | regression.NAMES
_KINDS = {"classes": "Classes of frames", "masks": "Outlines", "numbers": "Numbers"}


def write(workdir: str, found: Mapping[str, Any]) -> None:
    """Writes the three files.

    Args:
      workdir: existing folder to write to.
      found: the result of `probing.suite.run`.
    """
    root = epath.Path(workdir)
    files.write(root / "suite.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    files.write(root / "suite.md", text(found) + "\n")
    columns = found["columns"]
    tests = {}
    for kind, rows in _by_kind(found).items():
        lines: list[Sequence[Any]] = [
            [
                part("hinted", row["dataset"], f"{tables.counted(row['patients'], 'patient')}, {NAMES[row['lead']]}"),
                *(_cell(row, column, columns[0]) for column in columns),
            ]
            for row in rows
        ]
        if len(rows) > 1:
            lines.append(["Mean", *(tables.number(found["means"][kind][column]) for column in columns)])
        tests[_KINDS[kind]] = pages.table(["Dataset", *map(_head, columns)], lines, stack=True, most=len(lines))
    pages.write(
        root / "report.html",
        "suite.html",
        title=f"{tables.counted(len(columns), 'encoder')} on {tables.counted(len(found['rows']), 'test')}",
        says=verdict(found),
        tests=tests,
        warnings=_warnings(found),
        left_out=[[one["dataset"], _KINDS[one["kind"]], one["why"]] for one in found["left_out"]],
        command=found["command"],
    )


def verdict(found: Mapping[str, Any]) -> list[str]:
    """One sentence per other encoder: how often the first encoder is better."""
    first, *others = found["columns"]
    said = []
    for column in others:
        signs = [_sign(row["differences"][column], row["lead"]) for row in found["rows"]]
        better, worse = signs.count(1), signs.count(-1)
        said.append(
            f"{first} is better than {column} in {better} of {tables.counted(len(signs), 'test')}, worse in {worse}; "
            f"in {len(signs) - better - worse} the interval of the difference includes 0."
        )
    return said


def _sign(difference: Mapping[str, Any], lead: str) -> int:
    """Whether the first encoder is significantly better (1), worse (-1), or neither (0)."""
    if not difference["ci95"]:
        return 0
    low, high = difference["ci95"]
    sign = 1 if low > 0 else -1 if high < 0 else 0
    return -sign if lead in classification.LOSSES | segmentation.LOSSES | regression.LOSSES else sign


def text(found: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    columns, parts = found["columns"], []
    for kind, rows in _by_kind(found).items():
        lines = [
            [
                f"{row['dataset']} ({NAMES[row['lead']]})",
                f"{row['patients']:,}",
                *(tables.metric(row["metrics"][column][row["lead"]]) for column in columns),
                *(_difference(row["differences"][column]) for column in columns[1:]),
            ]
            for row in rows
        ]
        if len(rows) > 1:
            means = [tables.number(found["means"][kind][column]) for column in columns]
            lines.append(["Mean", "", *means, *("" for _ in columns[1:])])
        heads = ["Dataset", "Patients", *columns, *(f"{columns[0]} - {column}" for column in columns[1:])]
        parts.append(f"## {_KINDS[kind]}\n\n{tables.markdown(heads, lines)}")
    if found["left_out"]:
        lines = [[one["dataset"], _KINDS[one["kind"]], one["why"]] for one in found["left_out"]]
        parts.append("## Left out\n\n" + tables.markdown(["Dataset", "What", "Why"], lines))
    if warnings := _warnings(found):
        parts.append("## Please note\n\n" + "\n".join(f"- {warning}" for warning in warnings))
    return "\n\n".join(parts)


def _warnings(found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(warning for row in found["rows"] for warning in row["warnings"]))


def _by_kind(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    return {kind: rows for kind in _KINDS if (rows := [row for row in found["rows"] if row["kind"] == kind])}


def _head(column: str) -> str:
    return "random (untrained, size tiny)" if column == "random" else column


def _cell(row: Mapping[str, Any], column: str, first: str) -> Markup:
    value = run.measured(row["metrics"][column][row["lead"]])
    hints = ["nothing was predicted"] if column in row["nothing_predicted"] else []
    hints += [] if column == first else [f"{first} - this: {_difference(row['differences'][column])}"]
    report = f"{row['dataset']}-{row['kind']}/{column}/report.html"
    return part("hinted", part("link", report, value), "; ".join(hints))


def _difference(one: Mapping[str, Any]) -> str:
    if not one["ci95"]:
        return tables.signed(one["difference"])
    return f"{tables.signed(one['difference'])} [{tables.signed(one['ci95'][0])}, {tables.signed(one['ci95'][1])}]"
