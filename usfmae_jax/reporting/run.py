"""The results of a run of any task, for people and programs: `results.json`, `results.md` and `report.html`.

The page shows in this order: the results and how certain they are; where the model fails; what the results are based
on; how to repeat them. Each task names its metrics and adds its own sections, as `reporting.classification` does.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from markupsafe import Markup

from usfmae_jax import files
from usfmae_jax.evaluation import tables
from usfmae_jax.reporting import charts, pages
from usfmae_jax.reporting.pages import part

# An absolute path within a sentence; the slashes of "and/or" and of a URL do not start one.
_PATH = re.compile(r"(?<![\w.:/*~@%-])/(?:[^\s/'\"(),;:]+/)+([^\s/'\"(),;:]*)")


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a metric is presented.

    Attributes:
      title: its name.
      meaning: what it means, in a few words; metrics without it are collapsed.
      short: its name where space is short; "" = the title.
      bounded: whether it lies between 0 and 1, so that a bar can show it.
    """

    title: str
    meaning: str = ""
    short: str = ""
    bounded: bool = False

    @property
    def brief(self) -> str:
        """Its name where space is short."""
        return self.short or self.title


def finish(
    workdir: str,
    results: Mapping[str, Any],
    *,
    task: Mapping[str, Any],
    context: Mapping[str, Any],
    measures: Mapping[str, Measure],
    headline: Sequence[str],
    main: Sequence[str] = (),
    sections: Mapping[str, Markup] | None = None,
    text: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes results.json, results.md and report.html.

    Args:
      workdir: existing folder to write to.
      results: the task's scores: `format`, `counts`, `fraction`, `bootstrap`, `metrics`, `folds`, `fractions` and
        `seeds` as `evaluation.results` describes them, and keys of the task's own; `task` may hold what scoring knows
        about it.
      task: what was done.
      context: the origin of the results.
      measures: all metrics by name, in the order of tables.
      headline: metrics at the top of the page; the first is the one that sentences report.
      main: metrics of the tables by fold, label fraction and seed; () = the headline.
      sections: see `write_page`.
      text: sections of results.md that only this task has, by heading.

    Returns:
      the contents of results.json.
    """
    held = {
        **results,
        "task": public(task) | results.get("task", {}),
        "robustness": public(results.get("robustness")),
        "context": public(context),
    }
    written = json.dumps(held, indent=1, allow_nan=False, ensure_ascii=False)
    held = json.loads(written)
    names, root = {name: one.title for name, one in measures.items()}, epath.Path(workdir)
    files.write(root / "results.json", written + "\n")
    page = tables.page(held, names, headline[0], main or headline, text or {})
    files.write(root / "results.md", page)
    write_page(root / "report.html", held, measures, headline, main or headline, sections or {})
    return held


def write_page(
    path: pathlib.Path | epath.Path,
    results: Mapping[str, Any],
    measures: Mapping[str, Measure],
    headline: Sequence[str],
    main: Sequence[str],
    sections: Mapping[str, Markup],
) -> None:
    """Writes the page; any key of `results` may be missing.

    Args:
      path: path of the page.
      results: the contents of results.json.
      measures: all metrics by name, in the order of tables.
      headline: metrics at the top.
      main: metrics of the tables by fold and seed.
      sections: the task's sections by heading, in the order of the page; "" is the opening: the results in a few
        sentences. "All numbers", "Folds and seeds" and "Fewer labels" follow unless the task has its own. The basis of
        the results and how to repeat them always come last.
    """
    task, context, counts = (results.get(key) or {} for key in ("task", "context", "counts"))
    shown, notes, unknown = {}, {}, counts.get("patients_known") == 0
    for name in headline:
        metric = (results.get("metrics") or {}).get(name) or {}
        if metric.get("value") is not None:
            shown[measures[name].title] = f"{metric['value']:.3f}"
            if interval := metric.get("ci95"):
                notes[measures[name].title] = f"{interval[0]:.3f} to {interval[1]:.3f}"
    usual = {
        "All numbers": numbers(results, measures),
        "Folds and seeds": folds_and_seeds(results, measures, main),
        "Fewer labels": fewer_labels(results, measures, headline),
    }
    found = {**sections, **{name: content for name, content in usual.items() if name not in sections}}
    opening = found.pop("", None)
    if opening is None:
        said = tables.heading(results, {name: one.title for name, one in measures.items()}, headline[0])
        opening = part("sentences", [said[0].upper() + said[1:]])
    pages.write(
        path,
        "run.html",
        title=str(task.get("title") or "Results"),
        results=results,
        opening=opening,
        tested_on=tables.tested_on(counts),
        headline=shown
        | {name: counts[name] for name in ("frames", "patients")[: 1 if unknown else 2] if counts.get(name)},
        notes=notes,
        found=found,
        lineage=_lineage(context),
        data=[_dataset(one) for one in context.get("data") or ()],
        settings=_flat(context.get("config") or {}),
    )


def numbers(results: Mapping[str, Any], measures: Mapping[str, Measure]) -> Markup:
    """All metrics with their meaning and interval; those without a meaning are collapsed."""
    found = results.get("metrics") or {}
    names = sorted((name for name in measures if name in found), key=lambda name: not measures[name].meaning)
    bars = any(measures[name].bounded for name in names)
    rest = (results.get("without_copies") or {}).get("metrics", {})
    rows = []
    for name in names:
        one, value, interval = measures[name], found[name].get("value"), found[name].get("ci95")
        row = [part("hinted", one.title, one.meaning), measured(found[name])]
        row += [measured(rest.get(name))] if rest else []
        if bars:
            drawn = one.bounded and value is not None
            row.append(part("interval", value, *(interval or (value, value))) if drawn else part("empty_bar"))
        rows.append(row)
    resamples = (results.get("bootstrap") or {}).get("resamples")
    says = f"Value and 95% interval{f' over {resamples:,} draws of patients' if resamples else ''}"
    says += "; the bars run from 0 to 1." if bars else "."
    if rest:
        says += (
            f" Of {tables.copies(results)} the split has the same picture under another patient's name outside of the "
            "test part; the second column is without them."
        )
    most = sum(bool(measures[name].meaning) for name in names) or len(rows)
    heads = ["Measure", "Value", *(["Without copies"] if rest else []), *([""] if bars else [])]
    return part("led", says, pages.table(heads, rows, most=most))


def folds_and_seeds(results: Mapping[str, Any], measures: Mapping[str, Measure], main: Sequence[str]) -> Markup:
    """Tables of the main metrics by fold and by seed, if there are several."""
    folds, seeds = results.get("folds") or {}, results.get("seeds") or ()
    names, found = folds.get("names") or [], folds.get("metrics") or {}
    rows = [
        [measures[name].brief, part("spread", *(tables.number(found[name][key]) for key in ("mean", "std")))]
        + [tables.number(value) for value in found[name]["values"]]
        for name in main
        if name in found and len(names) > 1
    ]
    by_fold = pages.table(["Measure", "Mean ± deviation", *map(str, names)], rows, "By fold")
    rows = [
        [measures[name].brief, *(tables.number(one["metrics"].get(name)) for one in seeds)]
        for name in main
        if len(seeds) > 1 and any(name in one["metrics"] for one in seeds)
    ]
    by_seed = pages.table(["Measure", *(f"seed {one['seed']}" for one in seeds)], rows, "By seed")
    return part("beside", by_fold, by_seed)


def fewer_labels(results: Mapping[str, Any], measures: Mapping[str, Measure], names: Sequence[str]) -> Markup:
    """Metrics against the fraction of training patients, if several were run.

    The chart shows the first two, or only the first if either is not bounded by 0 and 1, since it would need its own
    axis.
    """
    steps = results.get("fractions") or ()
    if len(steps) < 2:
        return Markup()
    shares = [one["fraction"] for one in steps]
    drawn = names[:2] if all(measures[name].bounded for name in names[:2]) else names[:1]
    lines = []
    for colour, name in enumerate(drawn):
        found = [one["metrics"].get(name) or {} for one in steps]
        values = np.array([number(one) for one in found])
        ends = np.array([one.get("ci95") or (value, value) for one, value in zip(found, values, strict=True)], float)
        says = f"{values[-1]:.3f}" if np.isfinite(values[-1]) else ""
        title = measures[name].title
        lines.append(charts.Line(title, np.log(shares), values, ends[:, 0], ends[:, 1], says, colour, dots=True))
    edges = np.concatenate([np.concatenate([line.y, line.low, line.high]) for line in lines])
    limits = {} if measures[drawn[0]].bounded else {"low": -np.inf, "high": np.inf}
    labels = [f"{100 * share:g}%" for share in shares]
    chart = charts.lines(
        "By share of the training patients",
        "The same test frames, by models that were trained on a part of the patients. Whiskers are 95% intervals.",
        lines,
        charts.Axis("training patients used", np.log(shares).tolist(), labels),
        charts.value_axis("", edges, **limits),
    )
    keys = [name for name in names if any(name in one["metrics"] for one in steps)]
    rows = [
        [label, *(measured(one["metrics"].get(name)) for name in keys)]
        for label, one in zip(labels, steps, strict=True)
    ]
    heads = ["Patients", *(measures[name].brief for name in keys)]
    return part("beside", chart, pages.table(heads, rows, stack=True))


def measured(metric: Mapping[str, Any] | None) -> Markup:
    """A table cell: a metric of results.json with its interval."""
    value, _, interval = (tables.metric(metric) if metric else tables.NONE).partition(" ")
    return part("measured", value, interval)


def number(metric: Any) -> float:
    """A metric of results.json, or its bare value, as a float; NaN if undefined."""
    value = metric.get("value") if isinstance(metric, Mapping) else metric
    return float("nan") if value is None else float(value)


def _lineage(context: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the stages that the weights come from."""
    rows = []
    for one in context.get("lineage") or ():
        data = [_dataset(dataset) for dataset in one.get("data") or ()]
        what = "; ".join(f"{name} ({tables.counted(count, 'frame')}, {licence})" for name, count, licence, _ in data)
        step, code = one.get("step"), str(one.get("code", "")).replace(" ", "\u00a0")
        rows.append([str(one.get("job", "")), f"{step:,}" if isinstance(step, int) else "", code, what])
    return rows


def _dataset(data: Mapping[str, Any]) -> list[Any]:
    licence, citation = (str(data.get(key) or "not stated") for key in ("licence", "citation"))
    if len(licence) < 20:  # a short one stays on one line
        licence = licence.replace(" ", "\u00a0")
    return [str(data.get("dataset", "")), data.get("frames") or 0, licence, citation]


def _flat(config: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{parent}{name}.")
        else:
            found.append((f"{parent}{name}", value if isinstance(value, str) else json.dumps(value, default=str)))
    return found


def public(value: Any) -> Any:
    """A JSON value with absolute paths cut to their last part, since they reveal who ran where."""
    if hasattr(value, "items"):
        return {str(name): public(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [public(one) for one in value]
    if isinstance(value, np.generic):
        return public(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    names = [os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name for name in str(value).split(",")]
    return _PATH.sub(lambda found: found[1] or "...", ",".join(names))
