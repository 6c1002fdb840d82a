"""The pictures of a report: curves, confusion, calibration, label fractions, corruptions, feature map, errors."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from usfmae_jax.evaluation import classification
from usfmae_jax.evaluation.classification import NAMES
from usfmae_jax.evaluation.predictions import Predictions
from usfmae_jax.reporting import charts, markup

_ERRORS = 24  # that are shown
_FIRST = 8  # of them; the rest is folded away
_SIDE = 256  # pixels of the long side of their pictures


def threshold_curves(predictions: Predictions, results: Mapping[str, Any]) -> str:
    """ROC and precision-recall curves: of the positive class with bands, of more classes without."""
    classes = predictions.classes
    positive = (results.get("task") or {}).get("positive")
    shown = [classes.index(positive)] if len(classes) == 2 and positive in classes else range(len(classes))
    found = [one for one in shown if 0 < np.sum(predictions.label == one) < len(predictions)]
    if not found:
        return ""
    roc, recall = ([_curve(which, predictions, results, one, len(found) == 1) for one in found] for which in _CURVES)
    rates = results.get("confusion") if len(found) == 1 else None
    spot = prevalence = None
    if rates and np.shape(rates) == (2, 2) and np.sum(rates, axis=1).all():
        yes, no = found[0], 1 - found[0]
        spot = (rates[no][yes] / sum(rates[no]), rates[yes][yes] / sum(rates[yes]), "as the model decides now")
        prevalence = sum(rates[yes]) / np.sum(rates)
    of = f"{classes[found[0]]} frames" if len(found) == 1 else "frames of each class"
    band = " The band is the 95% interval over patients." if len(roc[0].low) else ""
    page = charts.lines(
        "ROC curve",
        f"The share of {of} that are found, against the false alarms that it costs. Nearer to the upper left is better."
        + band,
        roc,
        charts.percent_axis("false alarms (1 - specificity)"),
        charts.percent_axis("found (sensitivity)"),
        guides=[((0, 1), (0, 1), "guessing")],
        spot=spot,
    )
    guides = [((0, 1), (prevalence, prevalence), "guessing")] if prevalence else []
    return page + charts.lines(
        "Precision and recall",
        f"Of the frames that are called so, the share that is right, against the share of {of} that are found.",
        recall,
        charts.percent_axis("found (recall)"),
        charts.percent_axis("right when called (precision)"),
        guides=guides,
    )


_AREAS = {"auroc": "AUROC", "average_precision": "AP"}
_CURVES = {"auroc": classification.roc, "average_precision": classification.precision_recall}


def _curve(which: str, predictions: Predictions, results: Mapping[str, Any], index: int, band: bool) -> charts.Line:
    name = predictions.classes[index]
    curve = classification.with_band(
        _CURVES[which],
        predictions.label == index,
        predictions.probabilities[:, index],
        predictions.patient_key,
        predictions.seed,
        resamples=200 if band else 0,
    )
    metric = ((results.get("per_class") or {}).get(name) or {}).get(which) or {}
    value = metric.get("value")
    says = f"{_AREAS[which]} {value:.3f}" if value is not None else ""
    x, y, low, high = curve.x, curve.y, curve.low, curve.high
    if which == "auroc":  # a ROC curve starts in the corner
        x, y = np.append(0, x), np.append(0, y)
        low, high = (np.append(0, edge) if len(edge) else edge for edge in (low, high))
    return charts.Line(name, x, y, low, high, says, index)


def reliability(results: Mapping[str, Any]) -> str:
    """Stated probabilities against how often they were right."""
    bins = [one for one in results.get("reliability") or () if one.get("frames")]
    if not bins:
        return ""
    every = results["reliability"]
    confidence, accuracy = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
    return charts.lines(
        "Can its probabilities be believed?",
        "How often it is right, against how sure it says it is. On the dotted line both agree; below it the model is "
        "too sure.",
        [charts.Line("measured", confidence, accuracy, says=_says(results, "ece", "ECE"), dots=True)],
        charts.percent_axis("how sure it says it is"),
        charts.percent_axis("how often it is right"),
        guides=[((0, 1), (0, 1), "both agree")],
        counts=[one.get("frames") or 0 for one in every],
    )


def confusion(results: Mapping[str, Any]) -> str:
    """The confusion matrix."""
    counts = np.asarray(results.get("confusion") or [], np.float64)
    classes = [str(name) for name in (results.get("task") or {}).get("classes") or ()]
    if counts.shape != (len(classes), len(classes)) or not counts.size:
        return ""
    seeds = (results.get("counts") or {}).get("seeds") or 1
    mean = f" Mean of {seeds} seeds." if seeds > 1 else ""
    says = f"A row for each true class, a column for each answer; blue is right, red is wrong.{mean}"
    return charts.matrix("What is taken for what", says, classes, counts)


def learning_curve(results: Mapping[str, Any]) -> str:
    """Metrics against the share of training patients, where several were run."""
    steps = results.get("fractions") or ()
    if len(steps) < 2:
        return ""
    shares = [one["fraction"] for one in steps]
    names = ("auroc", "balanced_accuracy")
    shown = [
        _measured(NAMES[name], np.log(shares), [one["metrics"].get(name) or {} for one in steps], colour)
        for colour, name in enumerate(names)
    ]
    x = charts.Axis("training patients used", np.log(shares).tolist(), [f"{100 * share:g}%" for share in shares])
    edges = np.concatenate([np.concatenate([line.y, line.low, line.high]) for line in shown])
    return charts.lines(
        "By share of the training patients",
        "The same test frames, by models that were trained on a part of the patients. Whiskers are 95% intervals.",
        shown,
        x,
        charts.value_axis("", edges),
    )


def corruption_curves(robustness: Mapping[str, Any] | None) -> str:
    """Metrics against the severity of each corruption."""
    page = ""
    for name in ("auroc", "balanced_accuracy"):
        shown = []
        for colour, (corruption, found) in enumerate((robustness or {}).items()):
            values = np.array([_value(one) for one in found.get(name) or ()])
            if len(values):
                lost = f"{values[-1] - values[0]:+.3f}" if np.isfinite(values[[0, -1]]).all() else ""
                x, title = np.arange(len(values)), corruption.replace("_", " ")
                shown.append(charts.Line(title, x, values, says=lost, colour=colour, dots=True))
        every = np.concatenate([line.y for line in shown]) if shown else np.zeros(0)
        if not np.isfinite(every).any():
            continue
        most = max(len(line.y) for line in shown)
        page += charts.lines(
            NAMES[name],
            "Against the severity of what was done to the test frames. The numbers: what the severest costs.",
            sorted(shown, key=lambda line: float(line.y[-1])),
            charts.Axis("severity", range(most), ["clean", *map(str, range(1, most))]),
            charts.value_axis("", every),
        )
    return page


def feature_map(embedding: Mapping[str, Any] | None, classes: Sequence[str]) -> str:
    """The map of the features, by class and by dataset."""
    if embedding is None or not len(embedding["points"]):
        return ""
    at = np.asarray(embedding["points"], np.float64)
    low, high = at.min(axis=0), at.max(axis=0)
    at = (at - low) / np.maximum((high - low).max(), 1e-12)
    at += (1 - at.max(axis=0)) / 2
    page = ""
    for name, key, says in (
        ("By class", "label", "Clouds of one colour: frames of a class look alike to the encoder."),
        ("By dataset", "dataset", "Clouds of one colour: it tells where a frame comes from, not what is ill."),
    ):
        groups = [str(group) for group in embedding.get(key, ())]
        if len(groups) == len(at):
            known = [group for group in classes if group in groups] if key == "label" else []
            order = known + sorted(set(groups) - set(known))
            says = says if len(order) > 1 else "All are of one, so that there is nothing to tell apart."
            page += charts.points(name, says, at, groups, order)
    return page


def gallery(examples: Sequence[Mapping[str, Any]]) -> str:
    """Wrong answers with pictures and attention maps."""
    shown = [_example(one) for one in examples[:_ERRORS]]
    first, rest = ("".join(shown[:_FIRST]), "".join(shown[_FIRST:]))
    page = f'<div class="pairs">{first}</div>' if first else ""
    return page + (markup.folded(f"{len(shown) - _FIRST} more", f'<div class="pairs">{rest}</div>') if rest else "")


def _example(one: Mapping[str, Any]) -> str:
    image = np.atleast_3d(np.asarray(one["image"], np.uint8))
    image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    scale = _SIDE / max(image.shape[:2])
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    name = str(one.get("frame") or "without a name")
    content = _picture(shown, f"Ultrasound frame {name}")
    if one.get("map") is not None:
        content += _picture(_overlay(shown, np.asarray(one["map"])), f"Where the model looked in frame {name}")
    alone = ' class="one"' if one.get("map") is None else ""
    short = name if len(name) <= 44 else f"...{name[-41:]}"  # what tells files apart is at the end
    sure = f", {_percent(one['probability'])} sure" if one.get("probability") is not None else ""
    predicted, label = markup.escape(one["predicted"]), markup.escape(one["label"])
    caption = f"<span>Called <b>{predicted}</b>{sure}</span><span>It is <b>{label}</b></span>"
    caption += f"<small>{markup.escape(short)}</small>"
    return (
        f'<figure title="{markup.escape(name)}"><div{alone}>{content}</div><figcaption>{caption}</figcaption></figure>'
    )


def _overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The map in warm colours over the picture; what is not attended stays grey."""
    attention = np.nan_to_num(attention.astype(np.float32))
    attention = (attention - attention.min()) / max(float(np.ptp(attention)), 1e-9)
    smooth = cv2.resize(attention, image.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)[:, :, None]
    warm = cv2.applyColorMap((255 * smooth).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    # Brightness of the picture shows through, so that what was looked at can be recognised.
    return (image * (1 - 0.7 * smooth) + warm * 0.7 * smooth).clip(0, 255).astype(np.uint8)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share < 0.995 else "over 99%"


def _picture(pixels: np.ndarray, says: str) -> str:
    data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return (
        f'<img width="{pixels.shape[1]}" height="{pixels.shape[0]}" alt="{markup.escape(says)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
    )


def _measured(name: str, x: np.ndarray, metrics: Sequence[Mapping[str, Any]], colour: int) -> charts.Line:
    values = np.array([_value(one) for one in metrics])
    ends = np.array([one.get("ci95") or (value, value) for one, value in zip(metrics, values, strict=True)], float)
    says = f"{values[-1]:.3f}" if np.isfinite(values[-1]) else ""
    return charts.Line(name, x, values, ends[:, 0], ends[:, 1], says, colour, dots=True)


def _value(metric: Any) -> float:
    value = metric.get("value") if isinstance(metric, Mapping) else metric
    return float("nan") if value is None else float(value)


def _says(results: Mapping[str, Any], name: str, title: str) -> str:
    value = _value((results.get("metrics") or {}).get(name))
    return f"{title} {value:.3f}" if np.isfinite(value) else ""
