"""Instance segmentation metrics: COCO's average precision by pycocotools, with confidence intervals over patients.

A detection is right at a threshold if its mask reaches that intersection over union with an annotated instance of its
class that is not yet matched to a detection of higher score. Average precision is the area under the precision-recall
curve of all detections ranked by score, at 101 recalls:

    map     mean over classes and the thresholds 0.50, 0.55, ..., 0.95
    map50   mean over classes at 0.50
    map75   mean over classes at 0.75

Frames without instances and detections have no effect; on a frame without instances, all detections are wrong.
Classes that no frame has are left out of the mean, whatever is detected; if nothing is annotated at all, metrics are
NaN. A class that is annotated but never detected scores 0.

pycocotools matches the detections of each frame once. For each bootstrap replicate, the matches are only summed again
with the weights of the frames, which gives the same result as pycocotools with repeated frames.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from usfmae_jax import files
from usfmae_jax.evaluation import intervals
from usfmae_jax.evaluation.predictions import Predictions

#: Display names of all metrics, in the order of tables.
NAMES = {"map": "mAP", "map50": "mAP@50", "map75": "mAP@75"}
#: The metrics for which lower is better.
LOSSES: frozenset[str] = frozenset()
#: Thresholds of the intersection over union at which a detection is right.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
#: Score at or above which an instance counts as found wherever a yes or no is needed: in counts and pictures.
FOUND = 0.5
#: Maximum number of detections per frame and class; those with the highest scores count.
MOST = 100
_RECALLS = np.linspace(0, 1, 101)

#: An annotated instance: `class`, from 0, and `mask`, in COCO's run-length encoding (`size`, `counts`). A detection
#: also has its `score`, and `right`, with a bit set for each of `THRESHOLDS` at which it is right (lowest bit first).
Instance = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstancePredictions(Predictions):
    """Annotated and detected instances; the masks are in a JSON file next to the CSV, with the same stem.

    Attributes:
      classes: names of the classes.
      drawn, found, matched: float `[N]`, numbers of annotated instances in the frame, of detections with a score of
        `FOUND` or more, and of those that are right at an intersection over union of 0.5.
      truth: lists of `Instance`, object `[N]`.
      detections: likewise, highest score first.
    """

    classes: tuple[str, ...]
    drawn: np.ndarray
    found: np.ndarray
    matched: np.ndarray
    truth: np.ndarray
    detections: np.ndarray

    def __post_init__(self):
        for name in ("truth", "detections"):
            object.__setattr__(self, name, lists(getattr(self, name)))
        super().__post_init__()

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """See `Predictions`."""
        return super().kinds() | {"truth": object, "detections": object}

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """See `Predictions`."""
        return tuple(name for name in super().rows() if name != "classes")

    def columns(self) -> dict[str, Sequence[Any]]:
        """Counts."""
        return {name: getattr(self, name).astype(int).tolist() for name in ("drawn", "found", "matched")}

    def write(self, path: str | epath.Path) -> None:
        """Writes the CSV, after the JSON file next to it."""
        path = epath.Path(path)
        beside = {"classes": self.classes, "truth": self.truth.tolist(), "detections": self.detections.tolist()}
        files.write(path.parent / (path.stem + ".json"), json.dumps(beside) + "\n")
        super().write(path)

    @classmethod
    def beside(cls, path: epath.Path) -> dict[str, Sequence[Any]]:
        """Reads the JSON file next to the CSV."""
        try:
            found = files.parse((path.parent / (path.stem + ".json")).read_bytes())
        except OSError as error:
            raise KeyError(f"the file {path.stem}.json beside it") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path.stem}.json beside it is no object")
        return found

    @classmethod
    def from_columns(cls, ids: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[Any]]) -> "InstancePredictions":
        """See `Predictions`."""
        counts = {name: np.array([float(one) for one in columns[name]]) for name in ("drawn", "found", "matched")}
        instances: dict[str, Any] = {name: columns[name] for name in ("truth", "detections")}
        return cls(**ids, classes=tuple(columns["classes"]), **counts, **instances)

    def f1(self) -> np.ndarray:
        """F1 of each frame, 2 matched / (drawn + found), float `[N]`; NaN if nothing is annotated or found."""
        every = self.drawn + self.found
        return np.divide(2 * self.matched, every, out=np.full(len(self), np.nan), where=every > 0)


def lists(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """An object array `[N]` of lists, whatever their lengths."""
    found = np.empty(len(values), object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def match(truth: Sequence[Sequence[Instance]], detections: Sequence[Sequence[Instance]], classes: int) -> np.ndarray:
    """The detections of each frame with `right` added, highest score first: object `[N]`; at most `MOST` per class."""
    drawn, said = (
        [{**one, "frame": n} for n, some in enumerate(frames) for one in some] for frames in (truth, detections)
    )
    judge = coco(drawn, said, len(truth), classes)
    found: list[list[Instance]] = [[] for _ in truth]
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
    for one in filter(None, judge.evalImgs):
        bits = (one["dtMatches"] > 0).T @ (1 << np.arange(len(THRESHOLDS)))
        for number, right in zip(one["dtIds"], bits.tolist(), strict=True):
            chosen = said[number - 1]
            found[chosen["frame"]].append(
                {name: chosen[name] for name in ("class", "score", "mask")} | {"right": right}
            )
    return lists([sorted(some, key=lambda one: -one["score"]) for some in found])


def coco(drawn: Sequence[Instance], detections: Sequence[Instance], frames: int, classes: int) -> COCOeval:
    """The evaluator of pycocotools, for instances with their `frame`, from 0, added; instances of all sizes count."""
    sides = []
    for instances in (drawn, detections):
        side = COCO()
        side.dataset = {
            "images": [{"id": n, "height": 0, "width": 0} for n in range(frames)],
            "categories": [{"id": c, "name": str(c)} for c in range(classes)],
            "annotations": [
                {
                    "id": number,
                    "image_id": one["frame"],
                    "category_id": one["class"],
                    "segmentation": dict(one["mask"]),
                    "area": 1.0,
                    "iscrowd": 0,
                    "score": one.get("score", 1.0),
                }
                for number, one in enumerate(instances, 1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            side.createIndex()
        sides.append(side)
    judge = COCOeval(*sides, "segm")
    judge.params.imgIds, judge.params.catIds = list(range(frames)), list(range(classes))
    judge.params.iouThrs = THRESHOLDS
    judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [[0, 1e10]], ["all"], [1, 10, MOST]
    return judge


def average_precision(
    frame: np.ndarray, score: np.ndarray, right: np.ndarray, drawn: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Average precision of one class at T thresholds for each of R weightings of the frames.

    Args:
      frame: int `[D]`, frame of each detection.
      score: float `[D]`, score of each detection.
      right: bool `[D, T]`, whether it is right at each threshold.
      drawn: `[N]`, number of annotated instances of the class in each frame.
      weights: `[R, N]`.

    Returns:
      float64 `[R, T]`; NaN if no frame of positive weight has the class.
    """
    order = np.argsort(-score, kind="stable")
    frame, right = frame[order], right[order]
    there = weights.astype(np.float64) @ drawn
    found = np.full((len(weights), right.shape[1]), np.nan)
    for r in np.flatnonzero(there > 0):
        weight = weights[r, frame].astype(np.float64)
        every = np.cumsum(weight)
        for t in range(right.shape[1]):
            hits = np.cumsum(weight * right[:, t])
            precision = hits / (every + np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(hits / there[r], _RECALLS, side="left")
            found[r, t] = precision[at[at < len(precision)]].sum() / len(_RECALLS)
    return found


def score(predictions: InstancePredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of one member's predictions for each of R weightings of the frames.

    Args:
      predictions: N rows.
      weights: `[R, N]`.

    Returns:
      float64 `[R]` by the names in `NAMES`, and `class_NAME` `[R, C]`; NaN where there are no annotated instances.
    """
    frame = np.repeat(np.arange(len(predictions)), [len(some) for some in predictions.detections])
    every = [one for some in predictions.detections for one in some]
    kind, bits = (np.array([one[name] for one in every], int) for name in ("class", "right"))
    scores = np.array([one["score"] for one in every], np.float64)
    right = bits[:, None] >> np.arange(len(THRESHOLDS)) & 1 > 0
    found = []
    for c in range(len(predictions.classes)):
        mine = kind == c
        found.append(average_precision(frame[mine], scores[mine], right[mine], drawn_of(predictions, c), weights))
    at = np.stack(found, axis=1)  # [R, C, T]
    each = {"map": at.mean(axis=2), "map50": at[:, :, 0], "map75": at[:, :, 5]}
    there = np.isfinite(at[:, :, 0])
    count = there.sum(axis=1)
    return {f"class_{name}": one for name, one in each.items()} | {
        name: np.divide(np.where(there, one, 0).sum(axis=1), count, out=np.full(len(weights), np.nan), where=count > 0)
        for name, one in each.items()
    }


def counts(truth: np.ndarray, detections: np.ndarray) -> dict[str, np.ndarray]:
    """`drawn`, `found` and `matched` of `InstancePredictions`."""
    return {
        "drawn": np.array([len(some) for some in truth]),
        "found": np.array([count(some) for some in detections]),
        "matched": np.array([count(some, matched=True) for some in detections]),
    }


def drawn_of(predictions: InstancePredictions, c: int) -> np.ndarray:
    """Number of annotated instances of a class in each frame, int `[N]`."""
    return np.array([sum(one["class"] == c for one in some) for some in predictions.truth], int)


def found_of(predictions: InstancePredictions, c: int, matched: bool = False) -> np.ndarray:
    """Number of detections of a class in each frame that count as found; see `count`: int `[N]`."""
    return np.array([count(some, c, matched) for some in predictions.detections], int)


def count(detections: Sequence[Instance], c: int | None = None, matched: bool = False) -> int:
    """Number of detections that count as found, of a class (None = all); with `matched`, only those right at 0.5."""
    return sum(
        one["score"] >= FOUND and (c is None or one["class"] == c) and (not matched or one["right"] & 1)
        for one in detections
    )


def summarise(predictions: InstancePredictions, resamples: int = 1000) -> dict[str, Any]:
    """The contents of results.json for predicted instances, see `evaluation.results`, with `per_class`."""
    found, each = intervals.summarise(predictions, score, [*NAMES], resamples, classes=predictions.classes)
    main = intervals.by_fraction(predictions)[-1]
    per_class = {}
    for c, name in enumerate(main.classes):
        there, said, right = drawn_of(main, c), found_of(main, c), found_of(main, c, matched=True)
        counts = main.select(there > 0).counts()
        per_class[name] = {unit: counts[unit] for unit in ("frames", "patients")} | each[name]
        per_class[name] |= {"drawn": int(there.sum()), "found": int(said.sum()), "matched": int(right.sum())}
    return found | {"task": {"classes": list(main.classes), "found": FOUND}, "per_class": per_class}
