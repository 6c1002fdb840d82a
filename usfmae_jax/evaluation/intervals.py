"""Confidence intervals over patients for any metric, and results by fold, seed and label fraction.

Frames of one patient are not independent, so the bootstrap draws patients with replacement: the frames of a patient
drawn k times have weight k. A metric is therefore a function of frame weights, for all replicates at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from usfmae_jax.evaluation.predictions import Predictions

FORMAT = 1  # of results.json
SEED = 0  # of the bootstrap
_AT_ONCE = 1 << 19  # weights per chunk: fits into the cache, and bounds memory for any number of frames

Kind = TypeVar("Kind", bound=Predictions)
#: Maps predictions for N frames and R weightings `[R, N]` to arrays `[R, ...]` by name; NaN where undefined.
Score = Callable[[Kind, np.ndarray], dict[str, np.ndarray]]


def bootstrap_chunks(patients: np.ndarray, resamples: int, seed: int = SEED) -> Iterator[np.ndarray]:
    """How often each frame is drawn when patients are drawn with replacement: `[N]` -> int32 `[resamples, N]`.

    Yields the rows in chunks, so that memory does not grow with the number of frames.
    """
    names, member = np.unique(np.asarray(patients, str), return_inverse=True)
    rng = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // max(len(member), 1))
    for start in range(0, resamples, step):
        drawn = [
            np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
            for _ in range(min(step, resamples - start))
        ]
        yield np.stack(drawn).astype(np.int32)[:, member]


def seed_mean(predictions: Kind, score: Score[Kind], weights: np.ndarray) -> dict[str, np.ndarray]:
    """`score` of each seed under the same weightings `[R, N]`, averaged over seeds."""
    scores = []
    for one in np.unique(predictions.seed):
        rows = np.flatnonzero(predictions.seed == one)
        scores.append(score(predictions.select(rows), weights[:, rows]))
    return {name: np.mean([one[name] for one in scores], axis=0) for name in scores[0]}


def draw(
    predictions: Kind, score: Score[Kind], resamples: int, seed: int = SEED
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values of all metrics `[...]`, and their bootstrap replicates `[resamples, ...]`, {} for a single patient."""
    value = {name: one[0] for name, one in seed_mean(predictions, score, np.ones((1, len(predictions)))).items()}
    if not resamples or len(np.unique(predictions.patient_key)) < 2:
        return value, {}
    parts = [
        seed_mean(predictions, score, weights) for weights in bootstrap_chunks(predictions.patient_key, resamples, seed)
    ]
    return value, {name: np.concatenate([part[name] for part in parts]) for name in value}


def metric(value: Any, drawn: np.ndarray | None, centre: bool = False, floor: float = 0.0) -> dict[str, Any]:
    """A metric in the form used in results.json, with its 95% percentile interval.

    Args:
      value: on all frames.
      drawn: bootstrap replicates; None = none.
      centre: shift the replicates to have the value as their mean. For metrics that resampling biases upwards, such as
        a calibration error, whose interval could otherwise lie above its value.
      floor: lowest possible value of the metric.
    """
    interval = None
    usable = np.zeros(0) if drawn is None else drawn[np.isfinite(drawn)]
    if len(usable) and np.isfinite(value):
        shift = usable.mean() - value if centre else 0.0
        interval = [float(end) for end in np.percentile(usable - shift, [2.5, 97.5])]
        interval[0] = max(interval[0], floor)
    result = {"value": number(value), "ci95": interval}
    left_out = 0 if drawn is None else len(drawn) - len(usable)
    return result | {"left_out": left_out} if left_out else result


def number(value: Any) -> float | None:
    """A float for JSON; None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def by_fold(predictions: Kind, score: Score[Kind], names: Sequence[str]) -> dict[str, Any]:
    """Metrics of each fold with their mean and standard deviation over folds.

    Returns:
      `names` of the folds, and `metrics`, by name `{"mean", "std", "values"}`; the standard deviation is that of the
      sample (ddof 1), None for a single fold; a fold's value is the mean over seeds.
    """
    folds = list(dict.fromkeys(predictions.fold.tolist()))
    parts = [predictions.select(predictions.fold == name) for name in folds]
    scores = [seed_mean(part, score, np.ones((1, len(part)))) for part in parts]
    found = {}
    for name in (name for name in names if name in scores[0]):
        values = np.array([one[name][0] for one in scores])
        spread = number(values.std(ddof=1)) if len(values) > 1 else None
        found[name] = {"mean": number(values.mean()), "std": spread, "values": [number(one) for one in values]}
    return {"names": folds, "metrics": found}


def by_fraction(predictions: Kind) -> list[Kind]:
    """The predictions split by label fraction, ascending."""
    return [predictions.select(predictions.fraction == fraction) for fraction in np.unique(predictions.fraction)]


def assemble(
    predictions: Kind, score: Score[Kind], metrics: Sequence[Mapping[str, Any]], resamples: int
) -> dict[str, Any]:
    """The contents of results.json that all tasks share, see `evaluation.results`.

    Args:
      predictions: on the test parts of all members; at least one row.
      score: computes the metrics.
      metrics: for each part of `by_fraction`, by name, in the order of tables.
      resamples: number of bootstrap replicates used for `metrics`.

    Returns:
      `format`, `counts`, `fraction`, `bootstrap`, `metrics`, `folds`, `fractions` and `seeds`.
    """
    parts, names = by_fraction(predictions), [*metrics[-1]]
    main, seeds = parts[-1], []
    for seed in np.unique(main.seed):
        value, _ = draw(main.select(main.seed == seed), score, 0)
        seeds.append({"seed": int(seed), "metrics": {name: number(value[name]) for name in names}})
    return {
        "format": FORMAT,
        "counts": main.counts(),
        "fraction": float(main.fraction[0]),
        "bootstrap": {"resamples": resamples, "unit": "patient", "seed": SEED},
        "metrics": metrics[-1],
        "folds": by_fold(main, score, names),
        "fractions": [
            {"fraction": float(part.fraction[0]), "metrics": one} for part, one in zip(parts, metrics, strict=True)
        ],
        "seeds": seeds,
    }


def summarise(
    predictions: Kind,
    score: Score[Kind],
    names: Sequence[str],
    resamples: int = 1000,
    floor: float = 0.0,
    classes: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`assemble` for the metrics of `names` that `score` computes, and those by class from the same replicates.

    Args:
      predictions: see `assemble`.
      score: computes the metrics, and `class_NAME`, `[R, C]`, for each that is also reported by class.
      names: of the metrics, in the order of tables.
      resamples: number of bootstrap replicates.
      floor: lowest possible value of all metrics.
      classes: names of the C classes; () = none.
    """

    def measured(part: Kind) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        value, drawn = draw(part, score, resamples)
        every = {name: metric(value[name], drawn.get(name), floor=floor) for name in names if name in value}
        keys = {name: f"class_{name}" for name in every if f"class_{name}" in value}
        return every, {
            one: {
                name: metric(value[key][c], drawn[key][:, c] if drawn else None, floor=floor)
                for name, key in keys.items()
            }
            for c, one in enumerate(classes)
        }

    found = [measured(part) for part in by_fraction(predictions)]
    results = assemble(predictions, score, [every for every, _ in found], resamples)
    return results | without_copies(predictions, lambda part: measured(part)[0]), found[-1][1]


def without_copies(predictions: Kind, measure: Callable[[Kind], dict[str, Any]]) -> dict[str, Any]:
    """`without_copies` of results.json; {} if no tested frame has a copy in another part of the split.

    Args:
      predictions: of all members.
      measure: computes the metrics of predictions for one label fraction.
    """
    main = by_fraction(predictions)[-1]
    if not main.copied.any():
        return {}
    rest = main.select(~main.copied)
    counts = {unit: rest.counts()[unit] for unit in ("frames", "patients")}
    return {"without_copies": counts | {"metrics": measure(rest) if len(rest) else {}}}


def patient_mean(values: np.ndarray, patients: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over patients, equally weighted, of the mean over their frames: `[R]`; NaN if no value is defined.

    Args:
      values: float `[N]`, by frame; frames with NaN (undefined) are ignored.
      patients: str `[N]`.
      weights: `[R, N]`, equal for all frames of a patient.
    """
    there = np.isfinite(values)
    if not there.any():
        return np.full(len(weights), np.nan)
    _, member, frames = np.unique(patients[there], return_inverse=True, return_counts=True)
    share = weights[:, there] / frames[member]
    total = share.sum(axis=1)
    return np.divide(share @ values[there], total, out=np.full(len(weights), np.nan), where=total > 0)
