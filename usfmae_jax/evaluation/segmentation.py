"""Segmentation metrics by class and frame, averaged by patient, with confidence intervals over patients.

For each class in a frame, where A and B are the annotated and the predicted region:

    dice         2 |A and B| / (|A| + |B|)
    iou          |A and B| / |A or B|
    hd95         the larger of the two 95th percentiles of the distance from one boundary to the other (Huttenlocher et
                 al. 1993), in pixels of the frame; hd95_mm if the pixel size is known
    boundary_f1  F1 of the shares of each boundary within 0.75% of the frame's diagonal of the other (Csurka et al.
                 2013)

If a class is neither annotated nor predicted, its measures are NaN, and the frame is ignored for that class. If it is
only annotated or only predicted, shares are 0 and the distance is the frame's diagonal, so that missing a lesion is
never better than finding part of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from scipy.spatial import KDTree

from usfmae_jax.evaluation import intervals
from usfmae_jax.evaluation.predictions import Predictions

#: Display names of all metrics, in the order of tables.
NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "boundary_f1": "Boundary F1",
    "hd95": "HD95 (pixels)",
    "hd95_mm": "HD95 (mm)",
}
#: The metrics for which lower is better.
LOSSES = frozenset({"hd95", "hd95_mm"})
#: The measures stored for each class and frame.
MEASURES = (*NAMES, "drawn", "predicted")
TOLERANCE = 0.0075  # of the diagonal, for the boundary F1
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPredictions(Predictions):
    """Agreement of predicted with annotated masks; C classes without the background.

    Attributes:
      classes: names of the classes.
      pixel_area: float `[N]`, area of a pixel of the frame in mm2; NaN if unknown.
      dice, iou, boundary_f1, hd95, hd95_mm: float `[N, C]`, see the module.
      drawn, predicted: float `[N, C]`, number of annotated and predicted pixels of the class.
    """

    classes: tuple[str, ...]
    pixel_area: np.ndarray
    dice: np.ndarray
    iou: np.ndarray
    boundary_f1: np.ndarray
    hd95: np.ndarray
    hd95_mm: np.ndarray
    drawn: np.ndarray
    predicted: np.ndarray

    def __post_init__(self):
        super().__post_init__()
        for name in MEASURES:
            if getattr(self, name).shape != (len(self), len(self.classes)):
                raise ValueError(f"{name} is {getattr(self, name).shape}, not {(len(self), len(self.classes))}")

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """See `Predictions`."""
        return tuple(name for name in super().rows() if name != "classes")

    def columns(self) -> dict[str, Sequence[Any]]:
        """`pixel_area`, and `MEASURE:CLASS` for each measure and class."""
        found = {"pixel_area": self.pixel_area.tolist()}
        for name in MEASURES:
            values = getattr(self, name).T.tolist()
            found |= {f"{name}:{one}": values[c] for c, one in enumerate(self.classes)}
        return found

    @classmethod
    def from_columns(cls, ids: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[str]]) -> "MaskPredictions":
        """See `Predictions`."""
        classes = tuple(name.removeprefix("dice:") for name in columns if name.startswith("dice:"))
        if not classes:
            raise KeyError("a column dice:CLASS for each class")
        own = {
            name: np.array([columns[f"{name}:{one}"] for one in classes], np.float64).T.reshape(-1, len(classes))
            for name in MEASURES
        }
        return cls(**ids, classes=classes, pixel_area=np.array(columns["pixel_area"], np.float64), **own)

    def mean(self, name: str) -> np.ndarray:
        """A measure averaged over the classes for which it is defined, float `[N]`; NaN if there is none."""
        values = getattr(self, name)
        there = np.isfinite(values)
        total, count = np.where(there, values, 0).sum(axis=1), there.sum(axis=1)
        return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def measure(
    drawn: np.ndarray, predicted: np.ndarray, classes: int, spacing: tuple[float, float] = (0.0, 0.0)
) -> dict[str, np.ndarray]:
    """`MEASURES` of one frame, float64 `[C]` each.

    Args:
      drawn: annotated class of each pixel, uint8 `[H, W]`; 0 = background.
      predicted: predicted class of each pixel, likewise.
      classes: C, the number of classes.
      spacing: pixel spacing in mm, down and across; 0 = unknown.
    """
    if drawn.shape != predicted.shape:
        raise ValueError(f"masks of {drawn.shape} and {predicted.shape} cannot be compared")
    found = {name: np.full(classes, np.nan) for name in MEASURES}
    known, diagonal = min(spacing) > 0, float(np.hypot(*drawn.shape))
    sides = np.asarray(spacing if known else (np.nan, np.nan), np.float64)
    for c in range(classes):
        one, other = drawn == c + 1, predicted == c + 1
        a, b, both = int(one.sum()), int(other.sum()), int((one & other).sum())
        found["drawn"][c], found["predicted"][c] = a, b
        if not a + b:
            continue
        found["dice"][c], found["iou"][c] = 2 * both / (a + b), both / (a + b - both)
        if not (a and b):
            found["boundary_f1"][c] = 0.0
            found["hd95"][c], found["hd95_mm"][c] = diagonal, np.hypot(*(drawn.shape * sides))
            continue
        edges = boundary(one), boundary(other)
        there, back = distances(*edges)
        near = [float((side <= TOLERANCE * diagonal).mean()) for side in (there, back)]
        found["boundary_f1"][c] = 2 * near[0] * near[1] / sum(near) if sum(near) else 0.0
        found["hd95"][c] = max(np.percentile(there, 95), np.percentile(back, 95))
        if known:
            if not np.isclose(*sides):
                there, back = distances(*(edge * sides for edge in edges))
            else:
                there, back = there * sides[0], back * sides[0]
            found["hd95_mm"][c] = max(np.percentile(there, 95), np.percentile(back, 95))
    return found


def boundary(region: np.ndarray) -> np.ndarray:
    """Pixels (row, column) of a region `[H, W]` with a neighbour outside of it or of the image: int `[P, 2]`."""
    inside = cv2.erode(region.astype(np.uint8), _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.argwhere(region & (inside == 0))


def distances(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance from each of the points `[P, 2]` to the nearest of the others `[Q, 2]`, float `[P]`, and back, `[Q]`."""
    return KDTree(other).query(one)[0], KDTree(one).query(other)[0]


def score(predictions: MaskPredictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of one member's predictions for each of R weightings of the frames.

    Averaged over the frames of each patient, then over patients, then over classes, each with equal weights.

    Args:
      predictions: N rows.
      weights: `[R, N]`.

    Returns:
      float64 `[R]` by the names in `NAMES`, without `hd95_mm` if no pixel size is known, and `class_NAME` `[R, C]`.
      Classes without any value are left out of the mean over classes.
    """
    found, patients = {}, predictions.patient_key
    for name in NAMES:
        values = getattr(predictions, name)
        each = np.stack([intervals.patient_mean(column, patients, weights) for column in values.T], axis=1)
        tested = np.isfinite(values).any(axis=0)
        if tested.any():
            found[name] = each[:, tested].mean(axis=1)
        elif name != "hd95_mm":
            found[name] = np.full(len(weights), np.nan)
        found[f"class_{name}"] = each
    return found


def summarise(predictions: MaskPredictions, resamples: int = 1000) -> dict[str, Any]:
    """The contents of results.json for predicted masks, see `evaluation.results`, with `per_class`."""
    found, each = intervals.summarise(predictions, score, [*NAMES], resamples, classes=predictions.classes)
    main = intervals.by_fraction(predictions)[-1]
    per_class = {}
    for c, name in enumerate(main.classes):
        counts = main.select(main.drawn[:, c] > 0).counts()
        per_class[name] = {unit: counts[unit] for unit in ("frames", "patients")} | each[name]
        missed = (main.drawn[:, c] > 0) & (main.predicted[:, c] == 0)
        invented = (main.drawn[:, c] == 0) & (main.predicted[:, c] > 0)
        per_class[name] |= {"missed": int(missed.sum()), "invented": int(invented.sum())}
    return found | {"task": {"classes": list(main.classes)}, "per_class": per_class}
