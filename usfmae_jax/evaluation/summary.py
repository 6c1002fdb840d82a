"""Results in words and tables: for a terminal, and as results.md. The schema is that of `evaluation.results`."""

from typing import Any

from usfmae_jax.evaluation import classification, tables
from usfmae_jax.reporting.verdict import counted, tested_on

_NAMES = classification.NAMES


def table(results: dict[str, Any]) -> str:
    """The results for a terminal: what was tested, and a line for each metric with its interval and its folds."""
    notices = [f"warning: {one}" for one in results["context"].get("warnings", [])]
    return "\n".join([headline(results), "", _metrics(results), *([""] if notices else []), *notices])


def headline(results: dict[str, Any]) -> str:
    """What was tested on whom, how well it did, and how the frames were split."""
    task, counts = results["task"], results["counts"]
    title = task.get("title") or "Results"
    what = f"{title}: tested on {tested_on(results)}"
    if counts["folds"] > 1:
        what += f" in {counts['folds']} folds"
    if counts["seeds"] > 1:
        what += f", the mean of {counts['seeds']} seeds"
    name = "auroc" if results["metrics"]["auroc"]["value"] is not None else "accuracy"
    one = results["metrics"][name]
    value = f"{_NAMES[name]} {tables.number(one['value'])}"
    if one["ci95"]:
        value += f", 95% interval over patients {one['ci95'][0]:.3f} to {one['ci95'][1]:.3f}"
    split = f" Split: {task['split']}." if task.get("split") else ""
    return f"{what}; {value}{'; positive: ' + task['positive'] if task['positive'] else ''}.{split}"


def markdown(results: dict[str, Any]) -> str:
    """All of the results as a Markdown page."""
    context = results["context"]
    sections = [
        ("", headline(results)),
        ("", "\n>\n".join(f"> **Warning.** {one}" for one in context.get("warnings", []))),
        ("Metrics", _metrics(results)),
        ("By class", _per_class(results)),
        ("Confusion matrix", _confusion(results)),
        ("Calibration", _calibrated(results)),
        ("By label fraction", _by(results, "fraction", "fractions", "Share of the training patients")),
        ("By seed", _by(results, "seed", "seeds", "Seed")),
        ("Under corruption", _robustness(results)),
        ("Weights", _lineage(context)),
        ("Data", _data(context)),
        ("Repeat it", f"    {context['command']}" if context.get("command") else ""),
    ]
    title = results["task"].get("title") or "Results"
    parts = [f"# {title}", *(f"## {head}\n\n{text}" if head else text for head, text in sections if text)]
    return "\n\n".join(parts) + "\n"


def _metrics(results: dict[str, Any]) -> str:
    folds = results["folds"]["metrics"] if results["counts"]["folds"] > 1 else {}
    heads = ["Metric", "Value [95% interval]", *(["Fold mean ± deviation"] if folds else [])]
    rows = []
    for name, one in results["metrics"].items():
        row = [_NAMES[name], tables.metric(one)]
        if folds:
            row.append(f"{tables.number(folds[name]['mean'])} ± {tables.number(folds[name]['std'])}")
        rows.append(row)
    return tables.markdown(heads, rows)


def _per_class(results: dict[str, Any]) -> str:
    names = {"precision": "Precision", "recall": "Recall", "f1": "F1", "specificity": "Specificity"} | {
        name: _NAMES[name] for name in ("auroc", "average_precision")
    }
    rows = [
        [label, f"{one['frames']:,}", f"{one['patients']:,}", *(tables.metric(one[name]) for name in names)]
        for label, one in results["per_class"].items()
    ]
    return tables.markdown(["Class", "Frames", "Patients", *names.values()], rows)


def _confusion(results: dict[str, Any]) -> str:
    classes, counts = results["task"]["classes"], results["confusion"]
    rows = [
        [label, *(f"{one:,.1f}".removesuffix(".0") for one in row)] for label, row in zip(classes, counts, strict=True)
    ]
    return "Rows are labels, columns predictions.\n\n" + tables.markdown(["", *classes], rows)


def _calibrated(results: dict[str, Any]) -> str:
    after = results["calibrated"]
    if not after:
        return ""
    degrees = after["temperature"]
    rows = [
        [_NAMES[name], tables.metric(results["metrics"][name]), tables.metric(after[name])]
        for name in _NAMES
        if name in after
    ]
    scaled = f"Temperature {degrees['mean']:.2f} on average, {degrees['min']:.2f} to {degrees['max']:.2f}, fitted on "
    return scaled + "the validation parts.\n\n" + tables.markdown(["Metric", "As predicted", "After scaling"], rows)


def _by(results: dict[str, Any], key: str, group: str, head: str) -> str:
    """A row for each fraction or seed, if there are several."""
    entries = results[group]
    if len(entries) < 2:
        return ""
    names = [name for name in classification.MAIN if name in entries[0]["metrics"]]
    rows = []
    for entry in entries:
        shown = f"{entry[key]:.0%}" if key == "fraction" and entry[key] >= 0.01 else str(entry[key])
        cells = (entry["metrics"][name] for name in names)
        rows.append([shown, *(tables.metric(one) if isinstance(one, dict) else tables.number(one) for one in cells)])
    return tables.markdown([head, *(_NAMES[name] for name in names)], rows)


def _robustness(results: dict[str, Any]) -> str:
    found = results["robustness"]
    if not found:
        return ""
    metrics = list(dict.fromkeys(name for one in found.values() for name in one))
    parts = []
    for metric in metrics:
        rows = [[name, *map(tables.number, one[metric])] for name, one in found.items() if metric in one]
        severities = range(max(len(row) for row in rows) - 1)
        heads = [_NAMES.get(metric, metric), *(f"severity {i}" if i else "clean" for i in severities)]
        parts.append(tables.markdown(heads, rows))
    return "\n\n".join(parts)


def _lineage(context: dict[str, Any]) -> str:
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


def _data(context: dict[str, Any]) -> str:
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
