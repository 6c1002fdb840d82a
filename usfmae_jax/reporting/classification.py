"""Results of a classification run, and the sections of its page about classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from markupsafe import Markup
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

from usfmae_jax.evaluation import classification, tables
from usfmae_jax.evaluation import results as scoring
from usfmae_jax.evaluation.classification import LOSSES, MAIN, NAMES
from usfmae_jax.evaluation.predictions import ClassPredictions
from usfmae_jax.reporting import charts, pages, run
from usfmae_jax.reporting.pages import part

MOST_POINTS = 3000  # of an embedding: more make t-SNE slow and the plot no clearer
_ERRORS = 24  # how many are shown
_FIRST = 8  # how many of them are visible; the rest is collapsed
_SIDE = 256  # long side of their images, in pixels
_GUESSING = 0.5  # AUROC of guessing

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
_DRAWN = ("auroc", "balanced_accuracy")  # plotted against the severity of corruptions
_BY_LABELS = (*_DRAWN, "f1_macro")
_CURVES = {"auroc": (classification.roc, "AUROC"), "average_precision": (classification.precision_recall, "AP")}


def finish(
    workdir: str,
    predictions: ClassPredictions,
    *,
    about: Mapping[str, Any],
    positive: str,
    context: Mapping[str, Any],
    validation: ClassPredictions | None = None,
    robustness: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    **shown: Any,
) -> dict[str, Any]:
    """Computes the results of a run and writes them: results.json, results.md, predictions.csv, report.html.

    Args:
      workdir: existing folder to write to.
      predictions: predictions for the test parts of all members; at least one row.
      about: what was done, see `task` in `evaluation.results`.
      positive: name of the positive class of a binary task; "" = the last. Ignored with more classes.
      context: the origin of the results, see `evaluation.results`.
      validation: see `evaluation.results.summarise`.
      robustness: metrics under corruption, see `evaluation.results`.
      resamples: number of bootstrap resamples; 0 = no intervals.
      **shown: `embedding` and `examples`, see `described`.

    Returns:
      the contents of results.json.

    Raises:
      InputError: `positive` is not a class.
    """
    results = scoring.summarise(predictions, positive, validation, resamples) | {"robustness": robustness}
    warnings = [*context.get("warnings", []), *scoring.warnings(results, predictions)]
    predictions.write(epath.Path(workdir) / "predictions.csv")
    return run.finish(
        workdir,
        results,
        task=about,
        context={**context, "warnings": warnings},
        text=scoring.text(results),
        **described(results, predictions, **shown),
    )


def described(
    results: Mapping[str, Any],
    predictions: ClassPredictions,
    embedding: Mapping[str, Any] | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What `reporting.run` needs for a classifier's results: the measures, and the sections of the page.

    Args:
      results: as `evaluation.results` describes them; any key may be missing.
      predictions: the predictions that the results were computed from.
      embedding: `points` float `[M, 2]` (see `embedding_points`), `label` str `[M]` (class names) and `dataset`
        str `[M]`.
      examples: the most confident errors, in descending order: dicts of `image` uint8 `[H, W, C]` (C is 1 or 3),
        `map` float `[gh, gw]` in [0, 1] or None (attention rollout), `label` and `predicted` (class names),
        `probability` (of the predicted class) and `frame`.
    """
    nothing: dict[str, Any] = {key: {} for key in ("task", "counts", "metrics", "per_class", "calibrated")}
    nothing |= {key: [] for key in ("confusion", "reliability")}
    results = nothing | {key: value for key, value in results.items() if value is not None}
    fractions = np.unique(predictions.fraction)
    if len(fractions) > 1:  # the fraction that the results are for
        predictions = predictions.select(predictions.fraction == results.get("fraction", fractions[-1]))
    measures = _measures(results)
    binary = len(results["task"].get("classes", ())) == 2
    lead = scoring.lead(results) if "auroc" in results["metrics"] else "auroc"
    drawn = [*_threshold_curves(predictions, results), *_reliability(results)]
    sections = {
        "": part("sentences", verdict(results), doubt(results)),
        "Right and wrong": _right_and_wrong(results),
        "Curves and calibration": part("charts", drawn),
        "All numbers": run.numbers(results, measures) + _calibrated(results) + _per_class(results),
        "Confident errors": confident_errors(examples),
        "Folds and seeds": run.folds_and_seeds(results, measures, MAIN),
        "Fewer labels": run.fewer_labels(results, measures, _BY_LABELS),
        "Robustness": part("charts", _corruption_curves(results.get("robustness") or {})),
        "Map of the features": _feature_map(embedding, predictions.classes),
    }
    others = ("sensitivity", "specificity") if binary else ("balanced_accuracy", "f1_macro")
    return {"measures": measures, "headline": (lead, *others), "main": MAIN, "sections": sections}


def embedding_points(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A map of features: t-SNE of their first 50 principal components (van der Maaten & Hinton 2008).

    Args:
      features: float `[N, D]`; rows with non-finite values are left out.
      seed: seed of the map; equal features and seeds give equal maps.

    Returns:
      rows int `[M]`, ascending, at most `MOST_POINTS` evenly drawn from N, and their points float `[M, 2]` in [0, 1].
      Both are empty if there is nothing to show: fewer than five rows, or all of them equal.
    """
    rows = np.flatnonzero(np.isfinite(features).all(axis=1))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_POINTS)).round().astype(int))]
    chosen = np.asarray(features)[rows].astype(np.float64)
    chosen = (chosen - chosen.mean(axis=0)) if len(rows) else chosen
    if len(rows) < 5 or np.abs(chosen).max() < 1e-9:
        return np.zeros(0, int), np.zeros((0, 2))
    perplexity = min(30.0, (len(rows) - 1) / 3)
    # One thread: several would wait for each other at every step, which takes minutes on shared cores.
    with threadpool_limits(1):
        reduced = PCA(min(50, *chosen.shape), random_state=seed).fit_transform(chosen)
        points = TSNE(2, perplexity=perplexity, init="random", max_iter=600, random_state=seed).fit_transform(reduced)
    low, high = points.min(axis=0), points.max(axis=0)
    return rows, (points - low) / np.maximum((high - low).max(), 1e-12)


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Two plain sentences: on which data, how good, how certain; [] if the results lack the numbers.

    Args:
      results: as `evaluation.results` describes them; any key may be missing.
    """
    task = results.get("task") or {}
    classes, positive = [str(name) for name in task.get("classes") or ()], task.get("positive")
    auroc = _value(results, "auroc")
    if not classes or not auroc:
        return []
    where = f"{tables.tested_on(results.get('counts') or {}) or 'frames'} whose labels it was not trained on"
    if len(classes) != 2 or positive not in classes:
        accuracy, balanced = _value(results, "accuracy"), _value(results, "balanced_accuracy")
        found = [
            f"On {where}, the model names the right one of {len(classes)} classes for {accuracy:.0%} of the frames, "
            f"and for {balanced:.0%} when all classes count alike (balanced accuracy {balanced:.3f}"
            f"{_interval(results, 'balanced_accuracy')}; guessing gives {1 / len(classes):.3g})."
        ]
        if recalls := {name: one["recall"]["value"] for name, one in (results.get("per_class") or {}).items()}:
            best, worst = max(recalls, key=recalls.__getitem__), min(recalls, key=recalls.__getitem__)
            frames = f"({recalls[best]:.0%} of these frames) and {worst} least ({recalls[worst]:.0%})"
            found.append(_always(results, classes) or f"It recognises {best} best {frames}.")
        return found
    yes, names = classes.index(positive), (positive, _other(classes, positive))
    shown, other = (f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}" for name in names)
    found = [
        f"Shown {shown} and {other} frame, the model gives the {positive} one the higher probability of being "
        f"{positive} {100 * auroc:.0f} times of 100 (AUROC {auroc:.3f}{_interval(results, 'auroc')}; guessing gives "
        f"50). It was tested on {where}."
    ]
    counts = np.asarray(results.get("confusion") or [], np.float64)
    if counts.shape == (2, 2) and counts.sum(axis=1).all():
        (right, wrong), (all_yes, all_no) = counts[[yes, 1 - yes], yes], counts.sum(axis=1)[[yes, 1 - yes]]
        found.append(
            f"Naming the more probable class, it finds {right:,.0f} of {all_yes:,.0f} {positive} frames "
            f"({right / all_yes:.0%}) and calls {wrong:,.0f} of {all_no:,.0f} {names[1]} frames {positive} by mistake "
            f"({wrong / all_no:.0%})."
        )
    return [*found, *filter(None, [_always(results, classes)])]


def _always(results: Mapping[str, Any], classes: Sequence[str]) -> str:
    """A sentence if the model calls every frame the same; else ""."""
    called = np.atleast_2d(results.get("confusion") or [])
    names = [name for name, number in zip(classes, called.sum(axis=0), strict=False) if number]
    return f"It calls every frame {names[0]}, and has not learnt to tell the classes apart." if len(names) == 1 else ""


def doubt(results: Mapping[str, Any]) -> str:
    """A sentence on why the verdict should not be trusted; "" if there is no such reason."""
    if _value(results, "auroc") is None:
        return ""
    if not results["metrics"]["auroc"].get("ci95"):
        return "There is no interval: it is not known how sure these numbers are."
    low, high = results["metrics"]["auroc"]["ci95"]
    if low <= _GUESSING:
        return "That is not clearly better than guessing: the interval of the AUROC includes 0.5."
    if high - low > 0.15:
        return "The interval is wide: more patients are needed to know how good the model is."
    return ""


def _other(classes: Sequence[str], positive: str) -> str:
    return next((str(name) for name in classes if name != positive), "other")


def _value(results: Mapping[str, Any], name: str) -> Any:
    return ((results.get("metrics") or {}).get(name) or {}).get("value")


def _interval(results: Mapping[str, Any], name: str) -> str:
    found = results["metrics"][name].get("ci95")
    return f", 95% interval {found[0]:.3f} to {found[1]:.3f}" if found else ""


def _measures(results: Mapping[str, Any]) -> dict[str, run.Measure]:
    """All metrics, with class names and, if it is a fixed number, the value that guessing gives."""
    task, per_class = results["task"], results["per_class"]
    classes, positive = task.get("classes", ()), task.get("positive", "")
    guesses = {"auroc": _GUESSING, "balanced_accuracy": 1 / len(classes) if classes else 0}
    frames = {name: one.get("frames") or 0 for name, one in per_class.items()}
    if total := sum(frames.values()):
        guesses["average_precision"] = frames.get(positive, total / len(frames)) / total
    measures = {}
    for name, title in NAMES.items():
        meaning = _MEANS.get(name, "").format(positive=positive, negative=_other(classes, positive))
        meaning += f"; guessing gives {guesses[name]:.3g}" if guesses.get(name) else ""
        if name in ("ppv", "npv") and name in results["metrics"] and _value(results, name) is None:
            meaning += "; not defined, as none was called so"
        measures[name] = run.Measure(title, meaning, _SHORT.get(name, ""), bounded=name != "log_loss")
    return measures


def _right_and_wrong(results: Mapping[str, Any]) -> Markup:
    """A bar for each class, and the confusion matrix."""
    counts = np.asarray(results["confusion"], np.float64)
    classes = [str(name) for name in results["task"].get("classes", ())]
    if counts.shape != (len(classes), len(classes)) or not counts.any():
        return Markup()
    rows = []
    for name, right, total in zip(classes, np.diag(counts), counts.sum(axis=1), strict=True):
        if total:
            says = part("hinted", f"{right / total:.0%}", f"{right:,.0f} of {total:,.0f}", nowrap=True)
            rows.append([name, says, part("share_bar", right / total)])
    seeds = results["counts"].get("seeds", 1)
    mean = f" Mean of {seeds} seeds." if seeds > 1 else ""
    reads = f"A row for each true class, a column for each answer; blue is right, red is wrong.{mean}"
    bars = pages.table(["It is", "Called so", ""], rows, most=len(rows))
    return part("beside", bars, charts.matrix("What is taken for what", reads, classes, counts))


def _threshold_curves(predictions: ClassPredictions, results: Mapping[str, Any]) -> list[Markup]:
    """ROC and precision-recall curves: with bands for the positive class, without for several classes."""
    classes, positive = predictions.classes, results["task"].get("positive")
    shown = [classes.index(positive)] if len(classes) == 2 and positive in classes else range(len(classes))
    found = [one for one in shown if 0 < np.sum(predictions.label == one) < len(predictions)]
    if not found:
        return []
    roc, recall = ([_curve(which, predictions, results, one, len(found) == 1) for one in found] for which in _CURVES)
    counts = np.asarray(results["confusion"], np.float64)
    spot, guides = None, []
    if len(found) == 1 and counts.shape == (2, 2) and counts.sum(axis=1).all():
        yes, no = found[0], 1 - found[0]
        spot = (counts[no, yes] / counts[no].sum(), counts[yes, yes] / counts[yes].sum(), "as the model decides now")
        prevalence = counts[yes].sum() / counts.sum()
        guides = [((0, 1), (prevalence, prevalence), "guessing")]
    of = f"{classes[found[0]]} frames" if len(found) == 1 else "frames of each class"
    band = " The band is the 95% interval over patients." if len(roc[0].low) else ""
    return [
        charts.lines(
            "ROC curve",
            f"The share of {of} that are found, against the false alarms that it costs. Nearer to the upper left is "
            f"better.{band}",
            roc,
            charts.percent_axis("false alarms (1 - specificity)"),
            charts.percent_axis("found (sensitivity)"),
            guides=[((0, 1), (0, 1), "guessing")],
            spot=spot,
        ),
        charts.lines(
            "Precision and recall",
            f"Of the frames that are called so, the share that is right, against the share of {of} that are found.",
            recall,
            charts.percent_axis("found (recall)"),
            charts.percent_axis("right when called (precision)"),
            guides=guides,
        ),
    ]


def _curve(
    which: str, predictions: ClassPredictions, results: Mapping[str, Any], index: int, band: bool
) -> charts.Line:
    function, title = _CURVES[which]
    name = predictions.classes[index]
    curve = classification.with_band(
        function,
        predictions.label == index,
        predictions.probabilities[:, index],
        predictions.patient_key,
        predictions.seed,
        resamples=200 if band else 0,
    )
    value = run.number(results["per_class"].get(name, {}).get(which))
    x, y, low, high = curve.x, curve.y, curve.low, curve.high
    if which == "auroc":  # a ROC curve starts in the corner
        x, y = np.append(0, x), np.append(0, y)
        low, high = (np.append(0, edge) if len(edge) else edge for edge in (low, high))
    return charts.Line(name, x, y, low, high, f"{title} {value:.3f}" if np.isfinite(value) else "", index)


def _reliability(results: Mapping[str, Any]) -> list[Markup]:
    """Reliability diagram: predicted probabilities against observed frequencies."""
    bins = [one for one in results["reliability"] if one.get("frames")]
    if not bins:
        return []
    confidence, accuracy = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
    error = _value(results, "ece")
    says = "" if error is None else f"ECE {error:.3f}"
    return [
        charts.lines(
            "Can its probabilities be believed?",
            "How often it is right, against how sure it says it is. On the dotted line both agree; below it the model "
            "is too sure.",
            [charts.Line("measured", confidence, accuracy, says=says, dots=True)],
            charts.percent_axis("how sure it says it is"),
            charts.percent_axis("how often it is right"),
            guides=[((0, 1), (0, 1), "both agree")],
            counts=[one.get("frames") or 0 for one in results["reliability"]],
        )
    ]


def _calibrated(results: Mapping[str, Any]) -> Markup:
    found = results["calibrated"]
    rows = [[title, run.measured(found[name])] for name, title in NAMES.items() if name in LOSSES and found.get(name)]
    mean = (found.get("temperature") or {}).get("mean")
    fitted = f" (temperature {mean:.2f})" if mean is not None else ""
    return pages.table(["Measure", "Value"], rows, f"After temperature scaling on the validation parts{fitted}")


def _per_class(results: Mapping[str, Any]) -> Markup:
    heads = ["Class", "Frames", "Patients", "Recall", "Precision", "F1", "AUROC", "Average precision"]
    keys = ("recall", "precision", "f1", "auroc", "average_precision")
    rows = [
        [name, one.get("frames") or 0, one.get("patients") or 0, *(run.measured(one.get(key)) for key in keys)]
        for name, one in results["per_class"].items()
    ]
    return pages.table(heads, rows, "Each class against the others", stack=True)


def _corruption_curves(robustness: Mapping[str, Any]) -> list[Markup]:
    """Metrics against the severity of each corruption."""
    figures = []
    for name in _DRAWN:
        shown = []
        for colour, (corruption, found) in enumerate(robustness.items()):
            values = np.array([run.number(one) for one in found.get(name) or ()])
            if len(values):
                lost = f"{values[-1] - values[0]:+.3f}" if np.isfinite(values[[0, -1]]).all() else ""
                x, title = np.arange(len(values)), corruption.replace("_", " ")
                shown.append(charts.Line(title, x, values, says=lost, colour=colour, dots=True))
        every = np.concatenate([np.zeros(0), *(line.y for line in shown)])
        if not np.isfinite(every).any():
            continue
        most = max(len(line.y) for line in shown)
        figures.append(
            charts.lines(
                NAMES[name],
                "Against the severity of what was done to the test frames. The numbers: what the severest costs.",
                sorted(shown, key=lambda line: float(line.y[-1])),
                charts.Axis("severity", range(most), ["clean", *map(str, range(1, most))]),
                charts.value_axis("", every),
            )
        )
    return figures


def _feature_map(embedding: Mapping[str, Any] | None, classes: Sequence[str]) -> Markup:
    """The map of the features, by class and by dataset."""
    if embedding is None or not len(embedding["points"]):
        return Markup()
    at = np.asarray(embedding["points"], np.float64)
    low, high = at.min(axis=0), at.max(axis=0)
    at = (at - low) / np.maximum((high - low).max(), 1e-12)
    at += (1 - at.max(axis=0)) / 2
    figures = []
    for name, key, says in (
        ("By class", "label", "Clouds of one colour: frames of a class look alike to the encoder."),
        ("By dataset", "dataset", "Clouds of one colour: it tells where a frame comes from, not what is ill."),
    ):
        groups = [str(group) for group in embedding.get(key, ())]
        if len(groups) == len(at):
            known = [group for group in classes if group in groups] if key == "label" else []
            order = known + sorted(set(groups) - set(known))
            if len(order) > 1:  # with only one group there is nothing to tell apart
                figures.append(charts.points(name, says, at, groups, order))
    if not figures:
        return Markup()
    says = "Each point is a frame; near points look alike to the encoder (t-SNE)."
    return part("led", says, part("charts", figures))


def confident_errors(examples: Sequence[Mapping[str, Any]]) -> Markup:
    """Confident errors, with images and attention maps."""
    shown = []
    for one in examples[:_ERRORS]:
        sure = one.get("probability")
        found = pictured(one) | {name: one[name] for name in ("label", "predicted")}
        found["sure"] = "" if sure is None else f", {f'{sure:.0%}' if sure < 0.995 else 'over 99%'} sure"
        shown.append(found)
    return part("gallery", shown, _FIRST, template="classification.html")


def pictured(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example's `image` and `map` as image URLs, their `width` and `height`, and its `frame`."""
    image = np.atleast_3d(np.asarray(example["image"], np.uint8))
    image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    scale = _SIDE / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    pixels = cv2.resize(image, (width, height), interpolation=how)
    found = {"width": width, "height": height, "frame": str(example.get("frame") or "without a name")}
    found |= {"image": pages.jpeg(pixels), "map": ""}
    if example.get("map") is not None:
        found["map"] = pages.jpeg(_overlay(pixels, np.asarray(example["map"])))
    return found


def _overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The map in warm colours over the image; areas without attention stay grey."""
    attention = np.nan_to_num(attention.astype(np.float32))
    attention = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-9)
    smooth = cv2.resize(attention, image.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)[:, :, None]
    warm = cv2.applyColorMap((255 * smooth).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    # The image shows through, so that the attended structures can be recognised.
    return (image * (1 - 0.7 * smooth) + warm * 0.7 * smooth).clip(0, 255).astype(np.uint8)
