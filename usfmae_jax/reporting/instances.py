"""Results of an instance segmentation run, and the sections of its page about instances."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from markupsafe import Markup
from pycocotools import mask as coding

from usfmae_jax.evaluation import instances as scoring
from usfmae_jax.evaluation import tables
from usfmae_jax.evaluation.instances import FOUND, NAMES, Instance, InstancePredictions
from usfmae_jax.reporting import pages, run
from usfmae_jax.reporting.pages import part
from usfmae_jax.reporting.segmentation import COLOURS, gallery

_FEW = 10  # with fewer patients of a class, its intervals are usually too narrow
_MEANS = {
    "map": "area below precision over recall, the mean over classes and over thresholds of agreement from 50 to 95%",
    "map50": "the same where drawn and predicted need 50% of their union in common",
    "map75": "the same where they need 75%",
}


def finish(
    workdir: str,
    predictions: InstancePredictions,
    *,
    about: Mapping[str, Any],
    context: Mapping[str, Any],
    resamples: int = 1000,
    examples: Sequence[Mapping[str, Any]] = (),
    embedding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Computes the results of a run and writes them: results.json, results.md, predictions.csv and .json, report.html.

    Args:
      workdir: existing folder to write to.
      predictions: predictions for the test parts of all members; at least one row.
      about: what was done, see `task` in `evaluation.results`.
      context: the origin of the results, see `evaluation.results`.
      resamples: number of bootstrap resamples; 0 = no intervals.
      examples: dicts of `whole` uint8 `[H, W, 3]`, `drawn` and `detections` (lists of `Instance`), `group` ("worst",
        "middle" or "best"), `f1` and `frame`.
      embedding: a map of features; not shown, since it tells little about instances.

    Returns:
      the contents of results.json.
    """
    results = scoring.summarise(predictions, resamples)
    warnings = [*context.get("warnings", []), *_warnings(results)]
    predictions.write(epath.Path(workdir) / "predictions.csv")
    says = f"full as drawn, dotted as predicted with their scores, from {FOUND:g} on"
    sections = {
        "": part("sentences", verdict(results)),
        "Outlines": gallery(examples, predictions.classes, outlined, "F1", "f1", says),
        "By class": _per_class(results),
    }
    return run.finish(
        workdir,
        results,
        task=about,
        context={**context, "warnings": warnings},
        measures={name: run.Measure(title, _MEANS[name], bounded=True) for name, title in NAMES.items()},
        headline=tuple(NAMES),
        sections=sections,
        text={"By class": _text(results)},
    )


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Two plain sentences: how good and how certain; and what that means in counts."""
    value, interval = (results["metrics"]["map50"][name] for name in ("value", "ci95"))
    if value is None:
        return ["Nothing is drawn on the tested frames, so that there is nothing to measure."]
    sure = f", 95% interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
    drawn, found, right = (
        sum(one[name] for one in results["per_class"].values()) for name in ("drawn", "found", "matched")
    )
    return [
        f"On {tables.tested_on(results['counts'])} that it was not trained on, instances are found with an mAP@50 of "
        f"{value:.3f}{sure}; 1 is all of them and nothing else.",
        f"Of {drawn:,} drawn instances it finds {right:,} with a score of {FOUND:g} or more, their class right and "
        f"half of the union in common; {found - right:,} more detections are wrong.",
    ]


def outlined(picture: np.ndarray, example: Mapping[str, Any]) -> np.ndarray:
    """Draws outlines over an image: solid for annotated, dotted for predicted ones, with their scores.

    Args:
      picture: RGB, uint8 `[h, w, 3]`.
      example: dict with `drawn` and `detections` of the frame, at any size.
    """
    shown = np.ascontiguousarray(picture)
    for one in example["drawn"]:
        for line in _lines(one, shown.shape):
            cv2.polylines(shown, [line], True, _colour(one), 2, cv2.LINE_AA)
    for one in example["detections"]:
        if one["score"] < FOUND:
            continue
        lines = _lines(one, shown.shape)
        for line in lines:
            for start in range(0, len(line), 7):  # white on colour, visible where both overlap
                cv2.circle(shown, tuple(map(int, line[start, 0])), 1, (255, 255, 255), -1)
        if lines:
            left, top = (int(side) for side in max(lines, key=len)[:, 0].min(axis=0))
            said, font = f"{one['score']:.2f}", cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(shown, said, (left, max(top - 3, 9)), font, 0.35, _colour(one), 1, cv2.LINE_AA)
    return shown


def _lines(one: Instance, shape: Sequence[int]) -> Sequence[np.ndarray]:
    """The outline of an instance on an image `[h, w, ...]`."""
    mask = cv2.resize(coding.decode(one["mask"]), (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]


def _colour(one: Instance) -> tuple[int, int, int]:
    return COLOURS[one["class"] % len(COLOURS)]


def _per_class(results: Mapping[str, Any]) -> Markup:
    heads = ["Class", "Frames", "Patients", *NAMES.values(), "Drawn", "Found", "Right"]
    rows = [
        [
            name,
            one["frames"],
            one["patients"],
            *(run.measured(one[key]) for key in NAMES),
            *(one[key] for key in ("drawn", "found", "matched")),
        ]
        for name, one in results["per_class"].items()
    ]
    says = f"Found: detections of a score of {FOUND:g} or more. Right: those that half agree with a drawn instance."
    return part("led", says, pages.table(heads, rows, stack=True))


def _text(results: Mapping[str, Any]) -> str:
    counts = ("drawn", "found", "matched")
    rows = [
        [
            name,
            *(f"{one[unit]:,}" for unit in ("frames", "patients")),
            *(tables.metric(one[key]) for key in NAMES),
            *(f"{one[key]:,}" for key in counts),
        ]
        for name, one in results["per_class"].items()
    ]
    return tables.markdown(["Class", "Frames", "Patients", *NAMES.values(), "Drawn", "Found", "Right"], rows)


def _warnings(results: Mapping[str, Any]) -> list[str]:
    """Caveats that a reader of these numbers should know."""
    few = {name: one["patients"] for name, one in results["per_class"].items() if one["patients"] < _FEW}
    if not few:
        return []
    named = ", ".join(f"{name} ({count})" for name, count in few.items())
    return [
        f"Few patients are tested who have {named}: such numbers may be far off, and intervals over so few are too "
        "narrow."
    ]
