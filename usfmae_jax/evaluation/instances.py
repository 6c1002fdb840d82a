"""How well instances are found: COCO's average precision by pycocotools, with intervals over patients.

A detection is right at a threshold if its mask has that much in common with a drawn instance of its class (intersection
over union) that no better-scored detection of the frame has taken. Average precision is the area below the curve of
precision over recall of all detections by their score, at 101 recalls:

    map     the mean over classes and the thresholds 0.50, 0.55, ..., 0.95
    map50   the mean over classes at 0.50
    map75   the mean over classes at 0.75

Frames without instances and without detections change nothing; on a frame without instances all detections are wrong.
A class that no frame has is no part of the mean, whatever is detected of it; where nothing is drawn at all there is
nothing to measure, NaN. A class that is drawn and never detected has 0.

pycocotools matches the detections of each frame once. For every resample of the patients the matches are only added up
again, with the weights of the frames, which gives what pycocotools would give if frames were repeated.
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

#: All metrics in the order of tables, with what people call them.
NAMES = {"map": "mAP", "map50": "mAP@50", "map75": "mAP@75"}
#: Those of them of which less is better.
LOSSES: frozenset[str] = frozenset()
#: Intersection over union from which on a detection is right.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
#: Score from which on an instance counts as found where there have to be yes and no: in counts and pictures.
FOUND = 0.5
#: Detections of a frame and class that count, those of the highest scores.
MOST = 100
_RECALLS = np.linspace(0, 1, 101)

#: A drawn instance: `class`, from 0, and `mask`, COCO's run-length encoding (`size`, `counts`). A detection has its
#: `score` too, and in `right` a bit for each of `THRESHOLDS` at which it is right, the lowest bit for the lowest.
Instance = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstancePredictions(Predictions):
    """Drawn and detected instances; the masks lie in a JSON file beside the CSV, under its name.

    Attributes:
      classes: names.
      drawn, found, matched: float `[N]`, instances of the frame, detections of a score of `FOUND` or more, and those of
        them that are right at an intersection over union of 0.5.
      truth: list of `Instance` `[N]`, object.
      detections: likewise, from the highest score down.
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
        """Writes the CSV, after the JSON file beside it."""
        path = epath.Path(path)
        beside = {"classes": self.classes, "truth": self.truth.tolist(), "detections": self.detections.tolist()}
        files.write(path.parent / (path.stem + ".json"), json.dumps(beside) + "\n")
        super().write(path)

    @classmethod
    def beside(cls, path: epath.Path) -> dict[str, Sequence[Any]]:
        """What lies beside the CSV."""
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
        """Of each frame 2 matched / (drawn + found), float `[N]`; NaN where nothing is drawn and nothing found."""
        every = self.drawn + self.found
        return np.divide(2 * self.matched, every, out=np.full(len(self), np.nan), where=every > 0)


def lists(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Lists as an array of them, object `[N]`, however long they are."""
    found = np.empty(len(values), object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def match(truth: Sequence[Sequence[Instance]], detections: Sequence[Sequence[Instance]], classes: int) -> np.ndarray:
    """The detections of each frame, from the highest score down, with `right`: object `[N]`; at most `MOST` a class."""
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
    """The judge of pycocotools, of instances that also say their `frame`, from 0; instances of all sizes count."""
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
    """Average precision of one class at T thresholds under each of R weightings of the frames: float64 `[R, T]`.

    Args:
      frame: int `[D]`, of each detection.
      score: float `[D]`.
      right: bool `[D, T]`.
      drawn: `[N]`, instances of the class in each frame.
      weights: `[R, N]`.

    Returns:
      NaN where no frame of weight has the class.
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
    """All metrics of one member's predictions under each of R weightings of the frames.

    Args:
      predictions: N rows.
      weights: `[R, N]`.

    Returns:
      float64 `[R]` by the names in `NAMES`, and `class_NAME` `[R, C]`; NaN where nothing is drawn.
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
    """Drawn instances of a class in each frame, int `[N]`."""
    return np.array([sum(one["class"] == c for one in some) for some in predictions.truth], int)


def found_of(predictions: InstancePredictions, c: int, matched: bool = False) -> np.ndarray:
    """Detections of a class in each frame that count as found, or those of them that are right: int `[N]`."""
    return np.array([count(some, c, matched) for some in predictions.detections], int)


def count(detections: Sequence[Instance], c: int | None = None, matched: bool = False) -> int:
    """Detections of a frame that count as found, of a class (None = all), or those that are right at 0.5 of them."""
    return sum(
        one["score"] >= FOUND and (c is None or one["class"] == c) and (not matched or one["right"] & 1)
        for one in detections
    )


def summarise(predictions: InstancePredictions, resamples: int = 1000) -> dict[str, Any]:
    """What results.json says of predicted instances, see `evaluation.results`; of each class, `per_class`."""
    found, each = intervals.summarise(predictions, score, [*NAMES], resamples, classes=predictions.classes)
    main = intervals.by_fraction(predictions)[-1]
    per_class = {}
    for c, name in enumerate(main.classes):
        there, said, right = drawn_of(main, c), found_of(main, c), found_of(main, c, matched=True)
        counts = main.select(there > 0).counts()
        per_class[name] = {unit: counts[unit] for unit in ("frames", "patients")} | each[name]
        per_class[name] |= {"drawn": int(there.sum()), "found": int(said.sum()), "matched": int(right.sum())}
    return found | {"task": {"classes": list(main.classes), "found": FOUND}, "per_class": per_class}
