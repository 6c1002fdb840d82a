"""Results of any task as text: for a terminal, and as results.md. For the schema see `evaluation.results`."""

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "-"  # for undefined values


def overview(results: Mapping[str, Any], names: Mapping[str, str], lead: str) -> str:
    """The results for a terminal: what was tested, and a line for each metric with its interval and folds.

    Args:
      results: contents of results.json.
      names: display names of the metrics.
      lead: the headline metric, shown in the first line.
    """
    notices = [f"warning: {one}" for one in results["context"].get("warnings", [])]
    first = f"{_title(results)}: {heading(results, names, lead)}"
    lines = [first, "", _metrics(results, names), *([""] if notices else []), *notices]
    return "\n".join(lines)


def page(
    results: Mapping[str, Any], names: Mapping[str, str], lead: str, main: Sequence[str], own: Mapping[str, str]
) -> str:
    """The complete results as a Markdown page.

    Args:
      results: contents of results.json.
      names: display names of the metrics.
      lead: the headline metric, shown in the first line.
      main: the metrics in the tables by label fraction and seed.
      own: sections specific to the task, by heading; they follow the metrics.
    """
    context = results["context"]
    sections = {
        "Metrics": _metrics(results, names),
        **own,
        "By label fraction": _by(results, names, main, "fraction", "Share of the training patients"),
        "By seed": _by(results, names, main, "seed", "Seed"),
        "Under corruption": _robustness(results, names),
        "Weights": _lineage(context),
        "Data": _data(context),
        "Repeat it": f"    {context['command']}" if context.get("command") else "",
    }
    title, first = _title(results), heading(results, names, lead)
    warnings = "\n>\n".join(f"> **Warning.** {one}" for one in context.get("warnings", []))
    parts = [f"# {title}", f"{title}: {first}", *([warnings] if warnings else [])]
    parts += [f"## {head}\n\n{text}" for head, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns, the first left-aligned."""
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
    """A number with three decimals."""
    return NONE if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A number with three decimals and its sign."""
    return NONE if value is None else f"{value:+.3f}"


def metric(one: Mapping[str, Any]) -> str:
    """A metric of results.json as "value [low, high]"."""
    if not one["ci95"]:
        return number(one["value"])
    low, high = one["ci95"]
    return f"{one['value']:.3f} [{low:.3f}, {high:.3f}]"


def p_value(value: float | None) -> str:
    """A p-value with three decimals, or "< 0.001"."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def counted(count: float, what: str) -> str:
    """A number and what it counts: "1 fold", "2,000 frames", "2 processes"."""
    shown = round(count)
    return f"{shown:,} {what}" + ("" if shown == 1 else "es" if what.endswith("s") else "s")


def tested_on(counts: Mapping[str, int]) -> str:
    """How much was tested, in words: "1,875 frames of 1,064 patients"; "" if unknown."""
    if not counts.get("frames"):
        return ""
    if counts.get("patients_known") == 0:
        return f"{counted(counts['frames'], 'frame')} (patients unknown)"
    of = f" of {counted(counts['patients'], 'patient')}" if counts.get("patients") else ""
    return counted(counts["frames"], "frame") + of


def heading(results: Mapping[str, Any], names: Mapping[str, str], lead: str) -> str:
    """What was tested on how many patients, the headline metric, and the split; arguments as for `overview`."""
    task, counts, one = results["task"], results["counts"], results["metrics"][lead]
    what = f"tested on {tested_on(counts)}"
    if counts["folds"] > 1:
        what += f" in {counts['folds']} folds"
    if counts["seeds"] > 1:
        what += f", the mean of {counts['seeds']} seeds"
    value = f"{names[lead]} {number(one['value'])}"
    if one["ci95"]:
        over = "frames" if counts.get("patients_known") == 0 else "patients"
        value += f", 95% interval over {over} {one['ci95'][0]:.3f} to {one['ci95'][1]:.3f}"
    positive = f"; positive: {task['positive']}" if task.get("positive") else ""
    split = f" Split: {task['split']}." if task.get("split") else ""
    return f"{what}; {value}{positive}.{split}"


def copies(results: Mapping[str, Any]) -> str:
    """The number of tested frames left out of `without_copies` of results.json: "3 copied frames"."""
    return counted(results["counts"]["frames"] - results["without_copies"]["frames"], "copied frame")


def _title(results: Mapping[str, Any]) -> str:
    return results["task"].get("title") or "Results"


def _metrics(results: Mapping[str, Any], names: Mapping[str, str]) -> str:
    folds = (results.get("folds") or {}).get("metrics", {}) if results["counts"]["folds"] > 1 else {}
    rest = (results.get("without_copies") or {}).get("metrics", {})
    heads = ["Metric", "Value [95% interval]", *(["Fold mean ± deviation"] if folds else [])]
    heads += [f"Without {copies(results)}"] if rest else []
    rows = []
    for name, one in results["metrics"].items():
        row = [names[name], metric(one)]
        if folds:
            row.append(f"{number(folds[name]['mean'])} ± {number(folds[name]['std'])}")
        if rest:
            row.append(metric(rest[name]) if name in rest else NONE)
        rows.append(row)
    return markdown(heads, rows)


def _by(results: Mapping[str, Any], names: Mapping[str, str], main: Sequence[str], key: str, head: str) -> str:
    """A table with a row for each fraction or seed, if there are several."""
    entries = results.get(f"{key}s") or []
    if len(entries) < 2:
        return ""
    chosen = [name for name in main if name in entries[0]["metrics"]]
    rows = []
    for entry in entries:
        shown = f"{entry[key]:.0%}" if key == "fraction" and entry[key] >= 0.01 else str(entry[key])
        cells = (entry["metrics"][name] for name in chosen)
        rows.append([shown, *(metric(one) if isinstance(one, dict) else number(one) for one in cells)])
    return markdown([head, *(names[name] for name in chosen)], rows)


def _robustness(results: Mapping[str, Any], names: Mapping[str, str]) -> str:
    found = results.get("robustness") or {}
    parts = []
    for name in dict.fromkeys(name for one in found.values() for name in one):
        rows = [[corruption, *map(number, one[name])] for corruption, one in found.items() if name in one]
        severities = range(max(len(row) for row in rows) - 1)
        heads = [names.get(name, name), *(f"severity {i}" if i else "clean" for i in severities)]
        parts.append(markdown(heads, rows))
    return "\n\n".join(parts)


def _lineage(context: Mapping[str, Any]) -> str:
    weights = context.get("weights") or {}
    lines = []
    if weights:
        lines = [f"{weights.get('source') or 'None'} (fingerprint {weights.get('fingerprint') or 'none'})", ""]
    for stage in context.get("lineage") or []:
        data = "; ".join(
            f"{one['dataset']} ({one.get('frames', 0):,} frames, licence {one.get('licence') or 'not known'})"
            for one in stage.get("data", [])
        )
        lines.append(f"- {stage.get('job', 'a stage')}: {data or 'data not known'}")
    return "\n".join(lines)


def _data(context: Mapping[str, Any]) -> str:
    lines = []
    for one in context.get("data") or []:
        lines.append(f"- {one['dataset']}: {one['frames']:,} frames, licence {one.get('licence') or 'not known'}")
    fingerprint = context.get("fingerprint")
    if fingerprint:
        shown = fingerprint if isinstance(fingerprint, str) else ", ".join(map(str, fingerprint))
        lines.append(f"- fingerprint {shown}")
    names = {tuple(one.get(key) for key in ("dataset", "video", "frame")) for one in context.get("excluded") or []}
    if names:
        lines.append(f"- left out as near-duplicates: {counted(len(names), 'frame')}, see results.json")
    return "\n".join(lines)
