"""Comparison of two runs on the same frames: paired bootstrap over patients, and McNemar's test."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import (
    classification,
    instances,
    intervals,
    multilabel,
    predictions,
    regression,
    segmentation,
    tables,
)
from usfmae_jax.evaluation.instances import InstancePredictions
from usfmae_jax.evaluation.intervals import Kind, Score
from usfmae_jax.evaluation.multilabel import LabelPredictions
from usfmae_jax.evaluation.predictions import ClassPredictions, Predictions
from usfmae_jax.evaluation.regression import QuantityPredictions
from usfmae_jax.evaluation.segmentation import MaskPredictions

_FEW = 25  # discordant frames below which McNemar's test is exact


class _Task(NamedTuple):
    """How runs of a task are recognised and compared: a column unique to its predictions, its metrics and ground truth.

    Two runs must agree on the ground truth of each frame.
    """

    column: re.Pattern[str]
    names: Mapping[str, str]
    score: Score[Any]
    truth: Callable[[Any], np.ndarray]


_TASKS: dict[type[Predictions], _Task] = {
    MaskPredictions: _Task(re.compile("dice:.*"), segmentation.NAMES, segmentation.score, lambda run: run.drawn),
    QuantityPredictions: _Task(re.compile("value"), regression.NAMES, regression.score, lambda run: run.truth),
    LabelPredictions: _Task(re.compile("p:.*"), multilabel.NAMES, multilabel.score, lambda run: run.truth),
    InstancePredictions: _Task(re.compile("matched"), instances.NAMES, instances.score, lambda run: run.drawn),
}


def read(path: str) -> Predictions:
    """Reads a `predictions.csv`, or the one in a workdir, of any task whose runs can be compared.

    Raises:
      InputError: there is none.
    """
    columns = predictions.columns(path)
    kinds = (kind for kind, task in _TASKS.items() if any(map(task.column.fullmatch, columns)))
    return predictions.read(path, next(kinds, ClassPredictions))


def compare(
    a: Predictions,
    b: Predictions,
    positive: str = "",
    resamples: int = 2000,
    seed: int = intervals.SEED,
    unit: str = "",
) -> dict[str, Any]:
    """Compares two runs on the frames that both were tested on.

    Frames are matched by (dataset, video, frame). If a run has several label fractions, its largest is used; for
    several seeds, each metric is averaged. Both runs are evaluated on the same resampled patients, so that patients who
    are hard for both add no noise. McNemar's test (classifiers only) compares the predicted classes, for several seeds
    those of the mean probability. It assumes that frames are independent, which frames of one patient are not: with
    several frames per patient, trust the bootstrap.

    Args:
      a: predictions of one run.
      b: predictions of another.
      positive: name of the positive class of two; "" = the last of `a`.
      resamples: number of bootstrap replicates.
      seed: of the bootstrap.
      unit: of the quantity, for regression.

    Returns:
      `frames`, `patients`: numbers shared; `only_a`, `only_b`: numbers of frames tested in one run only; `classes`,
      `positive`; `names`, the display names of the metrics; `metrics`, by name `{"a", "b", "difference", "ci95", "p"}`:
      the difference a - b, its 95% interval and two-sided p-value (and `"left_out"`, the number of replicates in which
      it was undefined); for classifiers `mcnemar`: `{"both_right", "only_a_right", "only_b_right", "both_wrong",
      "test", "statistic", "p"}`, where test is "exact" or "chi-square".

    Raises:
      InputError: the runs are of different tasks, share no frame or differ in their classes, or a frame has different
        ground truth in the two runs.
    """
    a, b = _largest_fraction(a), _largest_fraction(b)
    if isinstance(a, ClassPredictions) and isinstance(b, ClassPredictions):
        return _compare_classes(a, b, positive, resamples, seed)
    if type(a) is type(b) and type(a) in _TASKS:
        found = _compare_others(a, b, resamples, seed)
        return found | ({"names": regression.titles(unit)} if type(a) is QuantityPredictions else {})
    raise InputError("the runs are of two tasks; compare runs of the same task")


def _compare_classes(
    a: ClassPredictions, b: ClassPredictions, positive: str, resamples: int, seed: int
) -> dict[str, Any]:
    b = _same_classes(b, a.classes)
    index = classification.positive_class(a.classes, positive)
    a, b, found = _joined(a, b)
    _check_labels(a, b)
    return found | {
        "classes": list(a.classes),
        "positive": "" if index is None else a.classes[index],
        "names": dict(classification.NAMES),
        "metrics": paired(a, b, classification.scored(index), [*classification.NAMES], resamples, seed),
        "mcnemar": mcnemar(*_right(a, b)),
    }


def _compare_others(a: Kind, b: Kind, resamples: int, seed: int) -> dict[str, Any]:
    classes, others = (getattr(run, "classes", ()) for run in (a, b))
    if classes != others:
        raise _other_classes(classes, others)
    task = _TASKS[type(a)]
    a, b, found = _joined(a, b)
    names, first = np.unique(a.frame_key, return_index=True)
    one, other = task.truth(a)[first], task.truth(b)[np.unique(b.frame_key, return_index=True)[1]]
    differ = ((one != other) & ~(np.isnan(one) & np.isnan(other))).reshape(len(names), -1).any(axis=1)
    if differ.any():
        raise InputError(
            f"something else is true of frame {names[differ][0]} in the two runs; compare runs on the same masks, "
            "labels or numbers"
        )
    metrics = paired(a, b, task.score, [*task.names], resamples, seed)
    return found | {"classes": list(classes), "positive": "", "names": dict(task.names), "metrics": metrics}


def _joined(a: Kind, b: Kind) -> tuple[Kind, Kind, dict[str, Any]]:
    """The rows of the shared frames in each run, and the counts for `compare`."""
    shared = np.intersect1d(a.frame_key, b.frame_key)
    if not len(shared):
        raise InputError(
            f"the runs share no frame ({len(np.unique(a.frame_key))} and {len(np.unique(b.frame_key))} were tested, "
            f"the first are {a.frame_key[0]} and {b.frame_key[0]}); compare runs on the same data"
        )
    only = [len(np.setdiff1d(run.frame_key, shared)) for run in (a, b)]
    a, b = (run.select(np.isin(run.frame_key, shared)) for run in (a, b))
    counts = {"frames": len(shared), "patients": len(set(a.patient_key.tolist()))}
    return a, b, counts | {"only_a": only[0], "only_b": only[1]}


def paired(
    a: Kind, b: Kind, score: Score[Kind], names: Sequence[str], resamples: int, seed: int = intervals.SEED
) -> dict[str, Any]:
    """Differences between the metrics of two runs on the same frames, under the same resampled patients.

    Args:
      a: predictions of one run.
      b: predictions of another.
      score: computes the metrics.
      names: of the metrics, in order; those not computed for both runs are left out.
      resamples: number of bootstrap replicates.
      seed: of the bootstrap.
    """
    patient_of = dict(zip(a.frame_key, a.patient_key, strict=True))
    patients = np.array([patient_of[key] for run in (a, b) for key in run.frame_key])  # as in a, for both

    def both(weights: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics of both runs, `[2, R]`, for weights of the rows of a, followed by those of b."""
        one, other = (
            intervals.seed_mean(run, score, part)
            for run, part in zip((a, b), np.split(weights, [len(a)], axis=1), strict=True)
        )
        return {name: np.stack([one[name], other[name]]) for name in names if name in one and name in other}

    value = both(np.ones((1, len(patients))))
    parts = []
    if len(set(patients)) > 1:
        parts = [both(weights) for weights in intervals.bootstrap_chunks(patients, resamples, seed)]
    drawn = {name: np.concatenate([np.zeros(0), *(part[name][0] - part[name][1] for part in parts)]) for name in value}
    return {name: _difference(value[name][0, 0], value[name][1, 0], drawn[name]) for name in value}


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """McNemar's test of whether two classifiers are right equally often on the same frames.

    Args:
      a: bool `[N]`, where the first is right.
      b: bool `[N]`, where the second is right.

    Returns:
      see `compare`; exact binomial for fewer than 25 discordant frames, else chi-square with continuity correction.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    counts = {
        "both_right": int((a & b).sum()),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_wrong": int((~a & ~b).sum()),
    }
    if only_a + only_b < _FEW:
        p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        return counts | {"test": "exact", "statistic": None, "p": float(p)}
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / (only_a + only_b)
    return counts | {"test": "chi-square", "statistic": statistic, "p": float(stats.chi2.sf(statistic, 1))}


def table(comparison: dict[str, Any], a: str = "A", b: str = "B") -> str:
    """The comparison as a Markdown table, with the number of frames and patients, for runs named `a` and `b`."""
    heads = ["", a, b, f"{a} - {b}", "95% interval", "p"]
    rows = [
        [
            comparison["names"][name],
            *(tables.number(one[key]) for key in ("a", "b")),
            tables.signed(one["difference"]),
            f"[{tables.signed(one['ci95'][0])}, {tables.signed(one['ci95'][1])}]" if one["ci95"] else tables.NONE,
            tables.p_value(one["p"]),
        ]
        for name, one in comparison["metrics"].items()
    ]
    lines = [
        f"{comparison['frames']:,} shared frames of {comparison['patients']:,} patients"
        + (f"; positive: {comparison['positive']}" if comparison["positive"] else "")
        + "".join(
            f"; {comparison[key]:,} frames of {name} alone are left out"
            for key, name in (("only_a", a), ("only_b", b))
            if comparison[key]
        )
        + ".",
        "",
        tables.markdown(heads, rows),
    ]
    if test := comparison.get("mcnemar"):
        lines += [
            "",
            f"McNemar ({test['test']}): {a} alone is right on {test['only_a_right']:,} frames, {b} alone on "
            f"{test['only_b_right']:,}; p {'' if test['p'] < 0.001 else '= '}{tables.p_value(test['p'])}.",
        ]
        if comparison["frames"] > comparison["patients"]:
            lines[-1] += " It takes frames of one patient for independent; the intervals above, over patients, do not."
    return "\n".join(lines)


def _largest_fraction(run: Predictions) -> Predictions:
    if not len(run):
        raise InputError("a run without predictions cannot be compared; let it finish first")
    return run.select(run.fraction == run.fraction.max())


def _same_classes(run: ClassPredictions, classes: Sequence[str]) -> ClassPredictions:
    """The predictions with their classes in the given order."""
    if sorted(run.classes) != sorted(classes):
        raise _other_classes(classes, run.classes)
    order = [run.classes.index(name) for name in classes]
    return dataclasses.replace(
        run,
        classes=tuple(classes),
        label=np.argsort(order)[run.label],
        probabilities=run.probabilities[:, order],
    )


def _other_classes(one: Sequence[str], other: Sequence[str]) -> InputError:
    return InputError(
        f"the runs have different classes: {', '.join(one)} and {', '.join(other)}; compare runs of the same task"
    )


def _check_labels(a: ClassPredictions, b: ClassPredictions) -> None:
    labels: dict[str, int] = {}
    for key, label in zip((*a.frame_key, *b.frame_key), (*a.label, *b.label), strict=True):
        if labels.setdefault(key, label) != label:
            raise InputError(
                f"frame {key} is {a.classes[labels[key]]} in one run and {a.classes[label]} in the other; "
                "compare runs on the same labels"
            )


def _difference(a: float, b: float, drawn: np.ndarray) -> dict[str, Any]:
    usable = drawn[np.isfinite(drawn)]
    found: dict[str, Any] = {
        "a": intervals.number(a),
        "b": intervals.number(b),
        "difference": intervals.number(a - b),
        "ci95": None,
        "p": None,
    }
    if len(usable) and np.isfinite(a - b):
        found["ci95"] = [float(end) for end in np.percentile(usable, [2.5, 97.5])]
        # How often the difference changes sign; plus one, since 0 of 2,000 does not mean p = 0.
        tails = min((usable <= 0).sum(), (usable >= 0).sum()) + 1
        found["p"] = float(min(1.0, 2 * tails / (len(usable) + 1)))
    if len(usable) < len(drawn):
        found["left_out"] = len(drawn) - len(usable)
    return found


def _right(a: ClassPredictions, b: ClassPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Where each run's mean probability predicts the label: bool `[N]` over their frames, in the same order."""
    found = []
    for run in (a, b):
        _, first, frame = np.unique(run.frame_key, return_index=True, return_inverse=True)
        mean = np.zeros((len(first), len(run.classes)))
        np.add.at(mean, frame, run.probabilities)
        found.append(mean.argmax(axis=1) == run.label[first])
    return found[0], found[1]
