"""The predictions of each kind of model: one entry of `KINDS` per kind.

A new kind needs two functions here, one for the devices and one for the host, and an entry under the `task` in the
description of its models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from pycocotools import mask as coding

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.instances import FOUND
from usfmae_jax.interop.model import Model, output_names
from usfmae_jax.reporting.masks import areas
from usfmae_jax.tasks import classification, instances, multilabel, regression, segmentation

#: Descriptions of the members of a run, see `interop.model.Model`.
Members = Sequence[Mapping[str, Any]]


class Answer(NamedTuple):
    """The prediction for one frame.

    Attributes:
      cells: cells of its row in predictions.csv, by column; all answers of a kind have the same columns.
      mask: class of each pixel at the frame's own size, uint8 `[H, W]`, 0 = background; None = no mask.
      found: the instances, see `evaluation.instances.Instance`.
    """

    cells: dict[str, Any]
    mask: np.ndarray | None = None
    found: Sequence[Mapping[str, Any]] = ()


class Kind(NamedTuple):
    """A kind of model.

    Attributes:
      apply: `(network, normalised images [B, H, W, C])` -> arrays `[B, ...]` by name, for one member.
      answer: `(descriptions of the M members, their arrays [M, ...] for one frame, (height, width) of the frame,
        (height, width) of its pixels in mm or (0, 0))` -> the prediction for it.
      mirror: converts the result of `apply` for mirrored images to that for the original ones; None = not possible.
    """

    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]
    answer: Callable[[Members, Mapping[str, np.ndarray], tuple[int, int], tuple[float, float]], Answer]
    mirror: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None = lambda said: said


def classified(
    models: Members, said: Mapping[str, np.ndarray], size: tuple[int, int], spacing: tuple[float, float]
) -> Answer:
    """`predicted`, a probability `p_CLASS` for each class, and `uncertainty`, the deviation between members."""
    members, names = said["probabilities"].astype(np.float64), output_names(models[0])
    mean = members.mean(axis=0)
    first = int(mean.argmax())
    cells: dict[str, Any] = {"predicted": names[first]}
    cells |= {f"p_{name}": round(float(p), 6) for name, p in zip(names, mean, strict=True)}
    return Answer(cells | _uncertain(members, members[:, first].std()))


def segmented(
    models: Members, said: Mapping[str, np.ndarray], size: tuple[int, int], spacing: tuple[float, float]
) -> Answer:
    """`area_pixels:CLASS` and `area_cm2:CLASS`, and `uncertainty`, the mean deviation of the pixels inside outlines."""
    members, names = said["probabilities"], output_names(models[0])
    mean = members[0] if len(members) == 1 else members.mean(axis=0, dtype=np.float32)
    mask = segmentation.classes_of(mean, size)
    pixels = np.bincount(mask.ravel(), minlength=1 + len(names))[1:].tolist()
    cells = _areas(names, pixels, spacing)
    first = mean.argmax(axis=-1)
    inside = first > 0
    shares = np.take_along_axis(members[:, inside], first[inside][None, :, None], axis=-1) / 255
    spread = shares.std(axis=0).mean() if inside.any() else None
    return Answer(cells | _uncertain(members, spread), mask, areas(mask, len(names)))


def detected(
    models: Members, said: Mapping[str, np.ndarray], size: tuple[int, int], spacing: tuple[float, float]
) -> Answer:
    """`count:CLASS`, `area_pixels:CLASS` and `area_cm2:CLASS` of the instances with a score of at least 0.5.

    `uncertainty` is the largest deviation of an instance's score between members.
    """
    members, names = said["classes"], output_names(models[0])
    every = instances.merged(members, said["masks"], size)
    found = [one for one in every if one["score"] >= FOUND]
    # Pixels of overlapping instances are counted once.
    together = [coding.merge([one["mask"] for one in found if one["class"] == c]) for c in range(len(names))]
    pixels = [int(coding.area(one)) if one["counts"] else 0 for one in together]
    cells: dict[str, Any] = {
        f"count:{name}": sum(one["class"] == c for one in found) for c, name in enumerate(names)
    } | _areas(names, pixels, spacing)
    spread = max((one["spread"] for one in found), default=None)
    kept = [{name: one[name] for name in ("class", "score", "mask")} for one in every]
    return Answer(cells | _uncertain(members, spread), instances.painted(every, size), kept)


def _areas(names: Sequence[str], pixels: Sequence[int], spacing: tuple[float, float]) -> dict[str, Any]:
    """Columns for the areas of classes; in cm2 if the size of a pixel is known."""
    cm2 = spacing[0] * spacing[1] / 100 if min(spacing) > 0 else 0.0
    cells: dict[str, Any] = {f"area_pixels:{name}": count for name, count in zip(names, pixels, strict=True)}
    return cells | {
        f"area_cm2:{name}": round(count * cm2, 5) if cm2 else "" for name, count in zip(names, pixels, strict=True)
    }


def labelled(
    models: Members, said: Mapping[str, np.ndarray], size: tuple[int, int], spacing: tuple[float, float]
) -> Answer:
    """A probability `p_LABEL` for each of several labels, and `uncertainty`, the largest deviation between members."""
    members, names = said["probabilities"].astype(np.float64), output_names(models[0])
    cells: dict[str, Any] = {
        f"p_{name}": round(float(p), 6) for name, p in zip(names, members.mean(axis=0), strict=True)
    }
    return Answer(cells | _uncertain(members, members.std(axis=0).max()))


def measured(
    models: Members, said: Mapping[str, np.ndarray], size: tuple[int, int], spacing: tuple[float, float]
) -> Answer:
    """The quantity in its unit, and `uncertainty`, the deviation between members; empty if a pixel size is missing."""
    scale = models[0]["scale"]
    (name,), unit = output_names(models[0]), scale["unit"][0]
    column = f"{name} [{unit}]" if unit else name
    mean, deviation = (np.array([one["scale"][key][0] for one in models]) for key in ("mean", "deviation"))
    values = said["value"].astype(np.float64) * deviation + mean
    if scale["of_frame"][0]:
        if not min(spacing) > 0:
            return Answer({column: ""} | _uncertain(values, None))
        values *= regression.extent(size, spacing)
    return Answer({column: float(f"{values.mean():.6g}")} | _uncertain(values, values.std()))


def _uncertain(members: np.ndarray, spread: float | None) -> dict[str, Any]:
    """The column `uncertainty`, for several members only; its cell is empty where it is not defined."""
    return {"uncertainty": "" if spread is None else round(float(spread), 6)} if len(members) > 1 else {}


#: Kinds by the `task` in a model's description.
KINDS: dict[str, Kind] = {
    "classification": Kind(classification.probabilities, classified),
    "segmentation": Kind(segmentation.probabilities, segmented, segmentation.mirror),
    "instances": Kind(instances.answers, detected, mirror=None),
    "regression": Kind(regression.standardised, measured),
    "multilabel": Kind(multilabel.probabilities, labelled),
}


def kind_of(model: Model, path: str) -> tuple[str, Kind]:
    """The name of a model's kind, and the kind.

    Raises:
      InputError: it has no head, or one of an unknown kind.
    """
    if model.kind not in ("classifier", "model"):
        raise InputError(
            f"--checkpoint={path} holds an encoder without a head: python -m usfmae_jax.finetune teaches it to predict"
            ", python -m usfmae_jax.embed writes its features"
        )
    if model.task not in KINDS:
        what = repr(model.task[:40]) if model.task else "a task that it does not name"
        raise InputError(f"--checkpoint={path} is a model for {what}; predicted are {', '.join(KINDS)}")
    return model.task, KINDS[model.task]
