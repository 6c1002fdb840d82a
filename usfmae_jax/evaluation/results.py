"""The results of a classification run: results.json from predictions, and the sections of results.md on classes.

`reporting.classification.finish` writes `results.json`, `results.md`, `predictions.csv` and `report.html`.

results.json, format 1. A METRIC is `{"value": float | null, "ci95": [low, high] | null}`; null = undefined on these
data. It also has `"left_out": int` if in some bootstrap replicates it was undefined because a class had no frames or
was never predicted. Values are fractions of 1, not percentages.

    format       1
    task         what was done, as stated by the loop:
                   title      "Fine-tuned tiny ViT on bus_bra"
                   protocol   "finetune" | "logistic" | "linear" | "knn" | "attentive" | ...
                   datasets   [name, ...]
                   split      "official 5-fold-cv" | ..., a phrase on the origin of the split
                 and added by `finish`:
                   classes    [name, ...] in the order of all lists below
                   positive   name of the positive class of a binary task, "" for more classes
    counts       frames, patients, videos, folds, seeds: int, of the rows tested at `fraction`; `patients_known`: 0
                 if no patient is known, and each frame or clip counts as one
    fraction     share of the training patients that the results are for: the largest that was run
    bootstrap    {"resamples": int, "unit": "patient", "seed": int}
    metrics      {NAME: METRIC}; names and order as in `classification.NAMES`. Pooled over the folds, averaged over
                 seeds
                   all        accuracy, balanced_accuracy, precision_macro, recall_macro, f1_macro, precision_weighted,
                              recall_weighted, f1_weighted, auroc, average_precision, ece, brier, log_loss
                   binary     sensitivity, specificity, ppv, npv, f1: of the positive class, as are auroc and
                              average_precision; with more classes these are one-vs-rest macro averages
                   more       specificity_macro
    per_class    {CLASS: {"precision", "recall", "f1", "specificity", "auroc", "average_precision": METRIC,
                          "frames": int, "patients": int}}
    confusion    [[number, ...], ...] row = label, column = predicted; averaged over seeds (then not integers)
    reliability  [{"low", "high", "frames": int, "confidence", "accuracy": float | null}, ...] 15 bins of the
                 probability of the predicted class, over all seeds
    calibrated   null, or metrics after temperature scaling, fitted on the validation parts, never on the test parts:
                   {"temperature": {"min", "mean", "max"}, "ece": METRIC, "brier": METRIC, "log_loss": METRIC}
    folds        {"names": [...], "metrics": {NAME: {"mean", "std": float | null, "values": [float | null, ...]}}}
                 std with ddof 1, null for one fold; each fold's value is the mean over seeds
    fractions    [{"fraction": float, "metrics": {NAME: METRIC}}, ...] ascending; one entry if one fraction was run
    seeds        [{"seed": int, "metrics": {NAME: float | null}}, ...]
    without_copies  only if some tested images are also in another part of the split under another patient's name:
                 {"frames", "patients": int, "metrics": {NAME: METRIC}} for the other tested frames
    robustness   null, or {CORRUPTION: {NAME: [value at severity 0 (clean), 1, ..., 5]}}
    context      provided by the loop, with absolute paths reduced to their last part:
                   config          dict
                   weights         {"source": str, "fingerprint": str, "kind": str}
                   lineage         [stage, ...] from interop.model.read_lineage
                   data            [dataset, ...] from data.provenance.describe_data
                   fingerprint     str or [str], of the data
                   warnings        [sentence, ...]; `finish` adds its own
                   excluded        [{"dataset", "patient", "video", "frame", "fold", "reason"}, ...] near-duplicates
                   command         str, how to repeat it
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from usfmae_jax.evaluation import calibration, classification, intervals, tables
from usfmae_jax.evaluation.predictions import ClassPredictions, concatenate

_FEW = 10  # patients of a class below which its intervals are usually too narrow


def summarise(
    predictions: ClassPredictions, positive: str = "", validation: ClassPredictions | None = None, resamples: int = 1000
) -> dict[str, Any]:
    """The contents of results.json that follow from predictions: all but `robustness`, `context` and most of `task`.

    Args:
      predictions: on the test parts of all members; at least one row.
      positive: name of the positive class of a binary task; "" = the last. Ignored with more classes.
      validation: predictions of the same members on their validation parts; if given, calibration is also reported
        after temperature scaling.
      resamples: number of bootstrap replicates; 0 = no intervals.

    Raises:
      InputError: `positive` is not one of the classes.
    """
    parts = intervals.by_fraction(predictions)
    numbers = [classification.summarise(part, positive, resamples) for part in parts]
    main, found = parts[-1], numbers[-1]
    index = classification.positive_class(main.classes, positive)
    every = intervals.assemble(
        predictions, classification.scored(index), [one["metrics"] for one in numbers], resamples
    )
    per_class = {}
    for c, name in enumerate(main.classes):
        counts = main.select(main.label == c).counts()
        per_class[name] = found["per_class"][name] | {unit: counts[unit] for unit in ("frames", "patients")}
    own = {
        "task": {"classes": list(main.classes), "positive": "" if index is None else main.classes[index]},
        "per_class": per_class,
        "confusion": (classification.confusion(main.label, main.probabilities)[0] / len(every["seeds"])).tolist(),
        "reliability": calibration.reliability(main.label, main.probabilities),
        "calibrated": None if validation is None else _calibrated(main, validation, positive, resamples),
    }
    first, last = ("counts", "fraction", "bootstrap", "metrics"), ("folds", "fractions", "seeds")
    own |= intervals.without_copies(
        predictions, lambda part: classification.summarise(part, positive, resamples)["metrics"]
    )
    ordered = ["format", "task", *first, "per_class", "confusion", "reliability", "calibrated", *last]
    return {name: (every | own)[name] for name in ordered} | {
        name: one for name, one in own.items() if name not in ordered
    }


def _calibrated(
    test: ClassPredictions, validation: ClassPredictions, positive: str, resamples: int
) -> dict[str, Any] | None:
    """Calibration after scaling each member's probabilities as fitted on its validation part; None if one has none."""
    scaled, temperatures = [], []
    for seed, fold in sorted({*zip(test.seed.tolist(), test.fold.tolist(), strict=True)}):
        rows, fit = (
            part.select((part.seed == seed) & (part.fold == fold) & (part.fraction == test.fraction[0]))
            for part in (test, validation)
        )
        if not len(fit):
            return None
        temperatures.append(calibration.fit_temperature(fit.label, fit.probabilities))
        scaled.append(dataclasses.replace(rows, probabilities=calibration.scale(rows.probabilities, temperatures[-1])))
    metrics = classification.summarise(concatenate(scaled), positive, resamples)["metrics"]
    spread = {"min": min(temperatures), "mean": float(np.mean(temperatures)), "max": max(temperatures)}
    return {"temperature": spread} | {name: metrics[name] for name in ("ece", "brier", "log_loss")}


def warnings(results: Mapping[str, Any], predictions: ClassPredictions) -> list[str]:
    """Warnings for readers of these numbers."""
    found = []
    few = {name: one["patients"] for name, one in results["per_class"].items() if one["patients"] < _FEW}
    if few:
        found.append(
            f"Few patients are tested of {', '.join(f'{name} ({count})' for name, count in few.items())}: such numbers "
            "may be far off, and intervals over so few are too narrow."
        )
    main = predictions.select(predictions.fraction == results["fraction"])
    repeated = len(main) - len({*zip(main.seed.tolist(), main.frame_key, strict=True)})
    if repeated:
        found.append(f"{repeated:,} predictions are of frames that other folds test too: such frames count repeatedly.")
    return found


def lead(results: Mapping[str, Any]) -> str:
    """The headline metric: AUROC, or accuracy if that is undefined."""
    return "auroc" if results["metrics"]["auroc"]["value"] is not None else "accuracy"


def table(results: Mapping[str, Any]) -> str:
    """The results as text for a terminal."""
    return tables.overview(results, classification.NAMES, lead(results))


def text(results: Mapping[str, Any]) -> dict[str, str]:
    """The sections of results.md specific to classification, by heading."""
    return {
        "By class": _per_class(results),
        "Confusion matrix": _confusion(results),
        "Calibration": _after_scaling(results),
    }


def _per_class(results: Mapping[str, Any]) -> str:
    names = {"precision": "Precision", "recall": "Recall", "f1": "F1", "specificity": "Specificity"}
    names |= {name: classification.NAMES[name] for name in ("auroc", "average_precision")}
    rows = [
        [label, f"{one['frames']:,}", f"{one['patients']:,}", *(tables.metric(one[name]) for name in names)]
        for label, one in results["per_class"].items()
    ]
    return tables.markdown(["Class", "Frames", "Patients", *names.values()], rows)


def _confusion(results: Mapping[str, Any]) -> str:
    classes, counts = results["task"]["classes"], results["confusion"]
    rows = [
        [label, *(f"{one:,.1f}".removesuffix(".0") for one in row)] for label, row in zip(classes, counts, strict=True)
    ]
    return "Rows are labels, columns predictions.\n\n" + tables.markdown(["", *classes], rows)


def _after_scaling(results: Mapping[str, Any]) -> str:
    after = results["calibrated"]
    if not after:
        return ""
    degrees = after["temperature"]
    rows = [
        [title, tables.metric(results["metrics"][name]), tables.metric(after[name])]
        for name, title in classification.NAMES.items()
        if name in after
    ]
    scaled = f"Temperature {degrees['mean']:.2f} on average, {degrees['min']:.2f} to {degrees['max']:.2f}, fitted on "
    return scaled + "the validation parts.\n\n" + tables.markdown(["Metric", "As predicted", "After scaling"], rows)
