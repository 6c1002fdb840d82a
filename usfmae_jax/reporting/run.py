"""`report.html`: everything that a run's numbers rest on, on one page that needs nothing but itself.

The page answers in this order: what was found and how sure that is; where it goes wrong; what it rests on; how to
repeat it. Nothing is loaded and nothing runs. Names come from strangers' files, so all text is escaped.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # which scikit-learn needs itself

from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.classification import LOSSES, MAIN, NAMES
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.reporting import markup
from usfmae_jax.reporting import run_charts as pictures
from usfmae_jax.reporting import run_sources as sources
from usfmae_jax.reporting.verdict import doubt, guess, tested_on, verdict

MOST_POINTS = 3000  # of an embedding: more make t-SNE slow and the picture no clearer

_MEANS = {
    "auroc": "how often a frame of the class gets a higher probability than another frame",
    "average_precision": "area under the precision-recall curve",
    "balanced_accuracy": "frames called right, all classes counting alike",
    "accuracy": "frames called right",
    "sensitivity": "of {positive} frames, the share called {positive}",
    "specificity": "of {negative} frames, the share called {negative}",
    "ppv": "of frames called {positive}, the share that is",
    "npv": "of frames called {negative}, the share that is",
    "f1": "harmonic mean of sensitivity and positive predictive value",
    "f1_macro": "mean of the classes' F1",
    "ece": "how far stated probabilities are from how often they are right; 0 is best",
    "brier": "mean squared error of the probabilities; 0 is best",
    "log_loss": "0 is best",
}
_SHORT = {"average_precision": "AP", "balanced_accuracy": "Balanced acc.", "ece": "ECE"}


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    predictions: Predictions,
    *,
    embedding: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    robustness: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page.

    Args:
      path: of the page; its folder exists.
      results: what `results.json` holds (see `evaluation.results`); any key may be missing.
      predictions: of the held-out frames that the results were computed from.
      embedding: `points` float `[M, 2]` (see `embedding_points`), `label` str `[M]` (class names) and `dataset`
        str `[M]`.
      examples: the most confident errors, most confident first: dicts of `image` uint8 `[H, W, C]` (C is 1 or 3),
        `map` float `[gh, gw]` in [0, 1] or None (attention rollout), `label` and `predicted` (class names),
        `probability` (of the predicted class) and `frame`.
      robustness: for each corruption, for each metric, its values at severity 0 (clean), 1, 2, ..., 5:
        `{"speckle": {"auroc": [0.9, 0.89, ...], "balanced_accuracy": [...]}, ...}`; None takes that of `results`.
    """
    fractions = np.unique(predictions.fraction)
    if len(fractions) > 1:  # what the results are of
        predictions = predictions.select(predictions.fraction == results.get("fraction", fractions[-1]))
    title = str((results.get("task") or {}).get("title") or "Results")
    mapped = pictures.feature_map(embedding, predictions.classes)
    damage = pictures.corruption_curves(robustness or results.get("robustness"))
    curves = pictures.threshold_curves(predictions, results) + pictures.reliability(results)
    found = {
        "Right and wrong": _right_and_wrong(results),
        "Curves and calibration": _charts(curves),
        "All numbers": _numbers(results) + _per_class(results),
        "Confident errors": _errors(examples),
        "Folds and seeds": _beside(_folds(results), _seeds(results)),
        "Fewer labels": _beside(pictures.learning_curve(results), _fractions(results)),
        "Robustness": _charts(damage),
        "Map of the features": _charts(mapped, "Each point is a frame; near points look alike to the encoder (t-SNE)."),
        "What it rests on": sources.provenance(results),
        "How to repeat it": sources.repeat(results),
    }
    body = _header(title, results) + markup.tiles(*_headline(results)) + _notices(results) + markup.sections(found)
    body += "<footer>Written by usfmae_jax. For research: not a medical device, and not tested as one.</footer>"
    markup.write(pathlib.Path(path), title, body)


def embedding_points(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A map of features: t-SNE of their first 50 principal components (van der Maaten & Hinton 2008).

    Args:
      features: float `[N, D]`; rows that are not finite are left out.
      seed: of the map; equal features and seeds give equal maps.

    Returns:
      rows int `[M]`, ascending, at most `MOST_POINTS` evenly drawn from N, and their points float `[M, 2]` in [0, 1].
      Both are empty where there is nothing to see: fewer than five features, or all of them alike.
    """
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_POINTS)).round().astype(int))]
    chosen = np.asarray(features)[rows].astype(np.float64)
    chosen = (chosen - chosen.mean(axis=0)) if len(rows) else chosen
    if len(rows) < 5 or np.abs(chosen).max() < 1e-9:
        return np.zeros(0, int), np.zeros((0, 2))
    perplexity = min(30.0, (len(rows) - 1) / 3)
    # One thread: several wait for each other at every step, which takes minutes where cores are shared.
    with threadpool_limits(1):
        reduced = PCA(min(50, *chosen.shape), random_state=seed).fit_transform(chosen)
        points = TSNE(2, perplexity=perplexity, init="random", max_iter=600, random_state=seed).fit_transform(reduced)
    low, high = points.min(axis=0), points.max(axis=0)
    return rows, (points - low) / np.maximum((high - low).max(), 1e-12)


def _header(title: str, results: Mapping[str, Any]) -> str:
    task = results.get("task") or {}
    sentences = "".join(f"<p>{markup.escape(one)}</p>" for one in verdict(results))
    if doubtful := doubt(results):
        sentences += f'<p class="differs">{markup.escape(doubtful)}</p>'
    weights = (results.get("context") or {}).get("weights") or {}
    terms = {
        "Tested on": ", ".join(filter(None, [", ".join(map(str, task.get("datasets") or ())), tested_on(results)])),
        "Classes": ", ".join(map(str, task.get("classes") or ())),
        "Split": task.get("split"),
        "Weights": weights.get("source"),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{markup.escape(value)}</dd>" for name, value in terms.items() if value)
    return (
        f'<p class="kicker">Ultrasound model report</p><h1>{markup.escape(title)}</h1>'
        f'<div class="verdict">{sentences}</div><dl class="terms">{listed}</dl>'
    )


def _headline(results: Mapping[str, Any]) -> tuple[dict[str, int | str], dict[str, str]]:
    """The numbers at the top and the intervals beneath."""
    binary = len((results.get("task") or {}).get("classes") or ()) == 2
    names = ("auroc", "sensitivity", "specificity") if binary else ("auroc", "balanced_accuracy", "f1_macro")
    shown: dict[str, int | str] = {}
    notes = {}
    for name in names:
        metric = (results.get("metrics") or {}).get(name) or {}
        if metric.get("value") is not None:
            shown[NAMES[name]] = f"{metric['value']:.3f}"
            if interval := metric.get("ci95"):
                notes[NAMES[name]] = f"{interval[0]:.3f} to {interval[1]:.3f}"
    counts = results.get("counts") or {}
    return shown | {name: counts[name] for name in ("frames", "patients") if counts.get(name)}, notes


def _notices(results: Mapping[str, Any]) -> str:
    context = results.get("context") or {}
    return markup.notice("Please check", [str(one) for one in context.get("warnings") or ()])


def _charts(inside: str, says: str = "") -> str:
    lead = f'<p class="soft">{markup.escape(says)}</p>' if says else ""
    return f'{lead}<div class="charts">{inside}</div>' if inside else ""


def _beside(left: str, right: str) -> str:
    return f'<div class="beside">{left}{right}</div>' if left or right else ""


def _right_and_wrong(results: Mapping[str, Any]) -> str:
    counts = np.asarray(results.get("confusion") or [], np.float64)
    classes = [str(name) for name in (results.get("task") or {}).get("classes") or ()]
    rows = []
    for index, name in enumerate(classes if counts.shape == (len(classes), len(classes)) else []):
        total, right = counts[index].sum(), counts[index, index]
        if total:
            says = f'{right / total:.0%}<span class="hint nowrap">{right:,.0f} of {total:,.0f}</span>'
            rows.append([name, markup.Html(says), markup.share_bar(right / total)])
    bars = markup.table(["It is", "Called so", ""], rows, most=len(rows))
    return _beside(bars, pictures.confusion(results)) if rows else ""


def _numbers(results: Mapping[str, Any]) -> str:
    task = results.get("task") or {}
    positive = task.get("positive") or ""
    negative = next((str(name) for name in task.get("classes") or () if name != positive), "other")
    found = results.get("metrics") or {}
    rows: list[list[Any]] = []
    names = [name for name in NAMES if name in found]
    known = [name for name in names if name in _MEANS]
    for name in [*known, *(name for name in names if name not in known)]:
        value, interval = found[name].get("value"), found[name].get("ci95")
        hint = _MEANS.get(name, "").format(positive=positive, negative=negative)
        chance = guess(name, results)
        hint += f"; guessing gives {chance:.3g}" if chance else ""
        hint = f'<span class="hint">{markup.escape(hint)}</span>' if hint else ""
        bar: Any = markup.Html("<div hidden></div>")
        if value is not None and name != "log_loss":
            bar = markup.interval(value, *(interval or (value, value)))
        rows.append([markup.Html(f"{markup.escape(NAMES[name])}{hint}"), _measured(found[name]), bar])
    bootstrap = results.get("bootstrap") or {}
    says = "Value and 95% interval; the bars run from 0 to 1."
    if bootstrap.get("resamples"):
        says = f"Value and 95% interval over {bootstrap['resamples']:,} draws of patients; the bars run from 0 to 1."
    page = markup.table(["Measure", "Value", ""], rows, most=len(known) or len(rows))
    return f'<p class="soft">{says}</p>{page}{_calibrated(results)}' if page else ""


def _calibrated(results: Mapping[str, Any]) -> str:
    found = results.get("calibrated") or {}
    rows = [[NAMES[name], _measured(found[name])] for name in NAMES if name in LOSSES and found.get(name)]
    mean = (found.get("temperature") or {}).get("mean")
    fitted = f" (temperature {mean:.2f})" if mean is not None else ""
    caption = f"After temperature scaling on the validation parts{fitted}"
    return markup.table(["Measure", "Value"], rows, caption)


def _per_class(results: Mapping[str, Any]) -> str:
    heads = ["Class", "Frames", "Patients", "Recall", "Precision", "F1", "AUROC", "Average precision"]
    keys = ("recall", "precision", "f1", "auroc", "average_precision")
    rows = [
        [name, *(one.get(key) or 0 for key in ("frames", "patients")), *(_measured(one.get(key)) for key in keys)]
        for name, one in (results.get("per_class") or {}).items()
    ]
    return markup.table(heads, rows, "Each class against the others", stack=True)


def _errors(examples: Sequence[Mapping[str, Any]]) -> str:
    says = "Wrong answers of which the model was most sure, on frames that it was not trained on."
    if any(one.get("map") is not None for one in examples):
        says += " Beside each frame where it looked (attention rollout): bright is much, grey is little."
    shown = pictures.gallery(examples)
    return f'<p class="soft">{says}</p>{shown}' if shown else ""


def _folds(results: Mapping[str, Any]) -> str:
    folds = results.get("folds") or {}
    names, found = folds.get("names") or [], folds.get("metrics") or {}
    keys = [key for key in MAIN if key in found]
    if len(names) < 2 or not keys:
        return ""
    rows = [[_short(key), _spread(found[key]), *map(tables.number, found[key]["values"])] for key in keys]
    return markup.table(["Measure", "Mean ± deviation", *map(str, names)], rows, "By fold")


def _spread(metric: Mapping[str, Any]) -> markup.Html:
    mean, deviation = (tables.number(metric.get(key)) for key in ("mean", "std"))
    return markup.Html(f'<span class="nowrap"><b>{mean}</b> <span class="soft">± {deviation}</span></span>')


def _seeds(results: Mapping[str, Any]) -> str:
    seeds = results.get("seeds") or ()
    keys = [key for key in MAIN if any(key in one["metrics"] for one in seeds)]
    rows = [[_short(key), *(tables.number(one["metrics"].get(key)) for one in seeds)] for key in keys]
    return (
        markup.table(["Measure", *(f"seed {one['seed']}" for one in seeds)], rows, "By seed") if len(seeds) > 1 else ""
    )


def _fractions(results: Mapping[str, Any]) -> str:
    steps = results.get("fractions") or ()
    names = ("auroc", "balanced_accuracy", "f1_macro")
    keys = [key for key in names if any(key in one["metrics"] for one in steps)]
    rows = [[f"{100 * one['fraction']:g}%", *(_measured(one["metrics"].get(key)) for key in keys)] for one in steps]
    return markup.table(["Patients", *map(_short, keys)], rows, stack=True) if len(rows) > 1 else ""


def _measured(metric: Mapping[str, Any] | None) -> markup.Html:
    value, _, interval = (tables.metric(metric) if metric else tables.NONE).partition(" ")
    shown = f' <span class="nowrap soft">{interval}</span>' if interval else ""
    return markup.Html(f"<span>{value}{shown}</span>")


def _short(name: str) -> str:
    return _SHORT.get(name, NAMES[name])
