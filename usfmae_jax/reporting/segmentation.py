"""Results of a segmentation run, and the sections of its page about outlines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from markupsafe import Markup

from usfmae_jax.evaluation import intervals, tables
from usfmae_jax.evaluation import segmentation as scoring
from usfmae_jax.evaluation.segmentation import NAMES, MaskPredictions
from usfmae_jax.reporting import charts, pages, run
from usfmae_jax.reporting.pages import part

_SIDE = 320  # long side of images, in pixels
_FEW = 10  # with fewer patients of a class, its intervals are usually too narrow
#: Colours of the classes' outlines, RGB: visible on grey, and distinct for people with colour blindness too.
COLOURS = ((255, 176, 0), (86, 180, 233), (0, 200, 140), (240, 96, 160), (240, 228, 66), (170, 120, 255))
_GROUPS = {"worst": "The worst", "middle": "In the middle", "best": "The best", "none": "Nothing was predicted"}
_MEANS = {
    "dice": "share of the outlined areas that drawn and predicted have in common; 1 is best",
    "iou": "the same by intersection over union",
    "boundary_f1": "share of the outlines that lie where the other is, to 0.75% of the frame's diagonal",
    "hd95": "how far outlines lie apart where they are far, leaving out 5%; the frame's diagonal where nothing was "
    "predicted; 0 is best",
    "hd95_mm": "the same where the size of a pixel is known",
}
_NOTHING = "Nothing was predicted on {}: Dice is 0, and HD95 the frame's diagonal, the penalty for that."
_SHORT = {"boundary_f1": "Boundary F1", "hd95": "HD95", "hd95_mm": "HD95 mm"}


def finish(
    workdir: str,
    predictions: MaskPredictions,
    *,
    about: Mapping[str, Any],
    context: Mapping[str, Any],
    resamples: int = 1000,
    examples: Sequence[Mapping[str, Any]] = (),
    embedding: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Computes the results of a run and writes them: results.json, results.md, predictions.csv, report.html.

    Args:
      workdir: existing folder to write to.
      predictions: predictions for the test parts of all members; at least one row.
      about: what was done, see `task` in `evaluation.results`.
      context: the origin of the results, see `evaluation.results`.
      resamples: number of bootstrap resamples; 0 = no intervals.
      examples: dicts of `whole` uint8 `[H, W, 3]`, `drawn` uint8 `[H, W]` and `map` uint8 `[h, w]` (annotated and
        predicted class of each pixel), `group` ("worst", "middle" or "best"), `dice` and `frame`.
      embedding: a map of features; not shown, since it tells little about pixels.

    Returns:
      the contents of results.json.
    """
    results = scoring.summarise(predictions, resamples)
    warnings = [*context.get("warnings", []), *_warnings(results, predictions)]
    predictions.write(epath.Path(workdir) / "predictions.csv")
    main = intervals.by_fraction(predictions)[-1]
    several, nothing = len(main.classes) > 1, not main.predicted.any()
    if nothing:  # no frame is better than another
        examples = [{**one, "group": "none"} for one in examples]
    sections = {
        "": part("sentences", [_NOTHING.format(tables.tested_on(results["counts"]))] if nothing else verdict(results)),
        "Outlines": gallery(examples, main.classes, _outlined_example),
        "By patient and by size": part("charts", [] if nothing else [_by_patient(main), *_areas(main)]),
        "By class": _per_class(results) if several else Markup() if nothing else _missed(results),
    }
    return run.finish(
        workdir,
        results,
        task=about,
        context={**context, "warnings": warnings},
        measures={
            name: run.Measure(title, _MEANS[name], _SHORT.get(name, ""), bounded=name not in scoring.LOSSES)
            for name, title in NAMES.items()
            if name in results["metrics"]
        },
        headline=("dice", "iou", "hd95_mm" if "hd95_mm" in results["metrics"] else "hd95"),
        main=("dice", "iou", "boundary_f1", "hd95"),
        sections=sections,
        text={"By class": _text(results)},
    )


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Two plain sentences: on which data, how good, how certain."""
    dice = results["metrics"]["dice"]
    if dice["value"] is None:
        return []
    low_high = f", 95% interval {dice['ci95'][0]:.3f} to {dice['ci95'][1]:.3f}" if dice["ci95"] else ""
    found = [
        f"On {tables.tested_on(results['counts'])} whose masks it was not trained on, drawn and predicted areas have "
        f"{dice['value']:.0%} in common (Dice {dice['value']:.3f}{low_high}; 1 is the same outline)."
    ]
    missed = {name: one["missed"] for name, one in results["per_class"].items() if one["missed"]}
    if missed:
        said = " and ".join(f"{tables.counted(count, 'frame')} with {name}" for name, count in missed.items())
        found.append(f"It finds nothing at all on {said}.")
    return found


def outlined(picture: np.ndarray, drawn: np.ndarray | None, predicted: np.ndarray | None, thick: int = 1) -> np.ndarray:
    """Draws outlines over an image: solid for annotated, dotted for predicted ones.

    Args:
      picture: RGB, uint8 `[H, W, 3]`.
      drawn: annotated class of each pixel, uint8 `[h, w]`, any size; None = none.
      predicted: likewise, predicted.
      thick: line width in pixels.
    """
    shown = np.ascontiguousarray(picture)
    size = picture.shape[1::-1]
    for classes, dotted in ((drawn, False), (predicted, True)):
        if classes is None:
            continue
        classes = cv2.resize(classes, size, interpolation=cv2.INTER_NEAREST_EXACT)
        for c in range(1, int(classes.max()) + 1):
            colour = COLOURS[(c - 1) % len(COLOURS)]
            lines, _ = cv2.findContours((classes == c).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            for line in lines:
                if not dotted:
                    cv2.polylines(shown, [line], True, colour, thick, cv2.LINE_AA)
                    continue
                for start in range(0, len(line), 7 * thick):  # white on colour, visible where both overlap
                    cv2.circle(shown, tuple(map(int, line[start, 0])), thick, (255, 255, 255), -1)
    return shown


def gallery(
    examples: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    draw: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray],
    measure: str = "Dice",
    key: str = "dice",
    says: str = "full as drawn, dotted as predicted",
) -> Markup:
    """Frames with their outlines, in groups.

    Args:
      examples: dicts of `whole` uint8 `[H, W, 3]`, `group`, `frame`, the measure, and what `draw` needs.
      classes: class names.
      draw: `(image uint8 [h, w, 3], example)` -> the image with outlines.
      measure: name of the metric shown for each frame.
      key: key of the examples that holds it.
      says: explanation of the outlines.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in examples:
        whole = np.asarray(one["whole"], np.uint8)
        scale = _SIDE / max(whole.shape[:2])
        width, height = (max(1, round(side * scale)) for side in whole.shape[1::-1])
        picture = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        found = {"width": width, "height": height, "image": pages.jpeg(picture)}
        found |= {"frame": str(one.get("frame") or "without a name"), "measure": measure, "value": f"{one[key]:.3f}"}
        found["outlined"] = pages.jpeg(draw(picture, one))
        groups.setdefault(_GROUPS[one["group"]], []).append(found)
    colours = [(name, f"#{bytes(COLOURS[c % len(COLOURS)]).hex()}") for c, name in enumerate(classes)]
    return part("gallery", [*groups.items()], colours, says, template="segmentation.html")


def _outlined_example(picture: np.ndarray, example: Mapping[str, Any]) -> np.ndarray:
    return outlined(picture, example["drawn"], example["map"], thick=2)


def _by_patient(predictions: MaskPredictions) -> Markup:
    """Dice by patient, from the worst to the best."""
    lines, patients = [], predictions.patient_key
    for c, name in enumerate(predictions.classes):
        values, names = predictions.dice[:, c], patients
        there = np.isfinite(values)
        if not there.any():
            continue
        _, member = np.unique(names[there], return_inverse=True)
        means = np.sort(np.bincount(member, values[there]) / np.bincount(member))
        at = (np.arange(len(means)) + 0.5) / len(means)
        middle = f"half are above {np.median(means):.3f}" if means.any() else "nothing was found"
        lines.append(charts.Line(name, at, means, says=middle, colour=c))
    return charts.lines(
        "Patients from the worst to the best",
        "The mean Dice of each patient's frames. A curve that starts low: some patients are not outlined at all.",
        lines,
        charts.percent_axis("patients"),
        charts.Axis("Dice", (0, 0.25, 0.5, 0.75, 1), ("0", "0.25", "0.5", "0.75", "1")),
    )


def _areas(predictions: MaskPredictions) -> list[Markup]:
    """Predicted against annotated areas, in mm2 if the size of all pixels is known."""
    known = np.isfinite(predictions.pixel_area).all()
    factor = predictions.pixel_area[:, None] / 100 if known else 1e-3
    drawn, predicted = predictions.drawn * factor, predictions.predicted * factor
    if not (drawn > 0).any():
        return []
    unit, most = "cm²" if known else "thousand pixels", float(np.percentile(np.maximum(drawn, predicted), 99.5))
    groups = [
        charts.Dots(
            name, drawn[there, c], predicted[there, c], says=_bias(drawn[there, c], predicted[there, c]), colour=c
        )
        for c, name in enumerate(predictions.classes)
        for there in ((drawn[:, c] > 0) | (predicted[:, c] > 0),)
        if there.any()
    ]
    axes = [charts.value_axis(f"{what}, {unit}", (0, most), high=np.inf) for what in ("drawn area", "predicted area")]
    says = "Each point is a frame; on the dotted line both areas are the same."
    end = min(axes[0].ticks[-1], axes[1].ticks[-1])
    return [charts.scatter("Do the areas agree?", says, groups, *axes, guides=[((0, end), (0, end), "the same area")])]


def _bias(drawn: np.ndarray, predicted: np.ndarray) -> str:
    if not predicted.any():
        return "nothing was predicted"
    return f"predicted {100 * (predicted.sum() / max(drawn.sum(), 1e-12) - 1):+.0f}% on the whole"


def _per_class(results: Mapping[str, Any]) -> Markup:
    keys = [name for name in NAMES if name in results["metrics"]]
    heads = ["Class", "Frames", "Patients", *(_SHORT.get(key, NAMES[key]) for key in keys), "Missed", "Invented"]
    rows = [
        [
            name,
            one["frames"],
            one["patients"],
            *(run.measured(one[key]) for key in keys),
            one["missed"],
            one["invented"],
        ]
        for name, one in results["per_class"].items()
    ]
    says = "Missed: frames that have the class and on which none of it is predicted. Invented: the other way round."
    return part("led", says, pages.table(heads, rows, stack=True))


def _missed(results: Mapping[str, Any]) -> Markup:
    """For a single class, whose other numbers are those of the run: only misses and false alarms, in frames."""
    ((name, one),) = results["per_class"].items()
    said = f"Of {tables.counted(one['frames'], 'frame')} with {name}, nothing of it is predicted on {one['missed']}"
    return part("sentences", [f"{said}; something is predicted on {one['invented']} without."])


def _text(results: Mapping[str, Any]) -> str:
    keys = [name for name in NAMES if name in results["metrics"]]
    rows = [
        [name, f"{one['frames']:,}", f"{one['patients']:,}", *(tables.metric(one[key]) for key in keys), one["missed"]]
        for name, one in results["per_class"].items()
    ]
    return tables.markdown(["Class", "Frames", "Patients", *(NAMES[key] for key in keys), "Missed"], rows)


def _warnings(results: Mapping[str, Any], predictions: MaskPredictions) -> list[str]:
    """Caveats that a reader of these numbers should know."""
    found = []
    few = {name: one["patients"] for name, one in results["per_class"].items() if one["patients"] < _FEW}
    if few:
        found.append(
            f"Few patients are tested who have {', '.join(f'{name} ({count})' for name, count in few.items())}: such "
            "numbers may be far off, and intervals over so few are too narrow."
        )
    return found
