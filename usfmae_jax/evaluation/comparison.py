"""Whether one run is better than another on the same frames: paired bootstrap over patients, and McNemar's test."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import classification, intervals, tables
from usfmae_jax.evaluation.predictions import ClassPredictions

_FEW = 25  # discordant frames below which McNemar's test is exact


def compare(
    a: ClassPredictions, b: ClassPredictions, positive: str = "", resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compares two runs on the frames that both were tested on.

    Frames are joined by (dataset, video, frame). Of several label fractions each run's largest counts; of several
    seeds the mean of each metric. Both runs are seen under the same resampled patients, so that what makes a patient
    hard for both is no noise. McNemar's test looks at the predicted classes, of several seeds at those of the mean
    probability; it takes frames for independent, which several of one patient are not: trust the bootstrap then.

    Args:
      a: predictions of one run.
      b: predictions of another.
      positive: name of the positive class of two; "" = the last of `a`.
      resamples: bootstrap replicates.
      seed: of the bootstrap.

    Returns:
      `frames`, `patients`: shared; `only_a`, `only_b`: frames that one run alone was tested on; `classes`, `positive`;
      `metrics`, by name `{"a", "b", "difference", "ci95", "p"}`, where the difference is a - b, its interval is 95%
      and p is two-sided (and `"left_out"` replicates that lacked a class); `mcnemar`: `{"both_right", "only_a_right",
      "only_b_right", "both_wrong", "test", "statistic", "p"}`, where test is "exact" or "chi-square".

    Raises:
      InputError: no frame is shared, the classes differ, or a frame has two labels.
    """
    a, b = _largest_fraction(a), _same_classes(_largest_fraction(b), a.classes)
    index = classification.positive_class(a.classes, positive)
    shared = np.intersect1d(a.frame_key, b.frame_key)
    if not len(shared):
        raise InputError(
            f"the runs share no frame ({len(np.unique(a.frame_key))} and {len(np.unique(b.frame_key))} were tested, "
            f"the first are {a.frame_key[0]} and {b.frame_key[0]}); compare runs on the same data"
        )
    only = [len(np.setdiff1d(run.frame_key, shared)) for run in (a, b)]
    a, b = (run.select(np.isin(run.frame_key, shared)) for run in (a, b))
    _check_labels(a, b)

    patient_of = dict(zip(a.frame_key, a.patient_key, strict=True))
    patients = np.array([patient_of[key] for run in (a, b) for key in run.frame_key])  # those of a, for both
    value = _both(a, b, index, np.ones((1, len(patients))))
    parts = []
    if len(set(patients)) > 1:
        parts = [_both(a, b, index, weights) for weights in intervals.bootstrap_chunks(patients, resamples, seed)]
    drawn = {name: np.concatenate([np.zeros(0), *(part[name][0] - part[name][1] for part in parts)]) for name in value}
    return {
        "frames": len(shared),
        "patients": len(set(patients)),
        "only_a": only[0],
        "only_b": only[1],
        "classes": list(a.classes),
        "positive": "" if index is None else a.classes[index],
        "metrics": {name: _difference(value[name][0, 0], value[name][1, 0], drawn[name]) for name in value},
        "mcnemar": mcnemar(*_right(a, b)),
    }


def mcnemar(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """McNemar's test of which of two is right more often on the same frames.

    Args:
      a: bool `[N]`, where the one is right.
      b: bool `[N]`, where the other is.

    Returns:
      see `compare`; exact binomial with fewer than 25 frames on which they disagree, else chi-square with continuity
      correction.
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
    """The comparison as a Markdown table with what it rests on, for runs of these names."""
    heads = ["", a, b, f"{a} - {b}", "95% interval", "p"]
    rows = [
        [
            classification.NAMES[name],
            *(tables.number(one[key]) for key in ("a", "b")),
            tables.signed(one["difference"]),
            f"[{tables.signed(one['ci95'][0])}, {tables.signed(one['ci95'][1])}]" if one["ci95"] else tables.NONE,
            tables.p_value(one["p"]),
        ]
        for name, one in comparison["metrics"].items()
    ]
    test = comparison["mcnemar"]
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
        "",
        f"McNemar ({test['test']}): {a} alone is right on {test['only_a_right']:,} frames, {b} alone on "
        f"{test['only_b_right']:,}; p = {tables.p_value(test['p'])}.",
    ]
    if comparison["frames"] > comparison["patients"]:
        lines[-1] += " It takes frames of one patient for independent; the intervals above, over patients, do not."
    return "\n".join(lines)


def _largest_fraction(predictions: ClassPredictions) -> ClassPredictions:
    if not len(predictions):
        raise InputError("a run without predictions cannot be compared; let it finish first")
    return predictions.select(predictions.fraction == predictions.fraction.max())


def _same_classes(predictions: ClassPredictions, classes: Sequence[str]) -> ClassPredictions:
    """The predictions with their classes in this order."""
    if sorted(predictions.classes) != sorted(classes):
        raise InputError(
            f"the runs have different classes: {', '.join(classes)} and {', '.join(predictions.classes)}; compare runs "
            "of the same task"
        )
    order = [predictions.classes.index(name) for name in classes]
    return dataclasses.replace(
        predictions,
        classes=tuple(classes),
        label=np.argsort(order)[predictions.label],
        probabilities=predictions.probabilities[:, order],
    )


def _check_labels(a: ClassPredictions, b: ClassPredictions) -> None:
    labels: dict[str, int] = {}
    for key, label in zip((*a.frame_key, *b.frame_key), (*a.label, *b.label), strict=True):
        if labels.setdefault(key, label) != label:
            raise InputError(
                f"frame {key} is {a.classes[labels[key]]} in one run and {a.classes[label]} in the other; "
                "compare runs on the same labels"
            )


def _both(a: ClassPredictions, b: ClassPredictions, positive: int | None, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of both runs, `[2, R]`, for weights of the rows of a, then of b."""
    one, other = (
        intervals.seed_mean(run, classification.scored(positive), part)
        for run, part in zip((a, b), np.split(weights, [len(a)], axis=1), strict=True)
    )
    return {name: np.stack([one[name], other[name]]) for name in classification.NAMES if name in one}


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
        # How often the sign of the difference turns; one more of each, since none of 2,000 is not never.
        tails = min((usable <= 0).sum(), (usable >= 0).sum()) + 1
        found["p"] = float(min(1.0, 2 * tails / (len(usable) + 1)))
    if len(usable) < len(drawn):
        found["left_out"] = len(drawn) - len(usable)
    return found


def _right(a: ClassPredictions, b: ClassPredictions) -> tuple[np.ndarray, np.ndarray]:
    """Where the mean probability of each run predicts the label: bool `[N]` over their frames in one order."""
    found = []
    for run in (a, b):
        _, first, frame = np.unique(run.frame_key, return_index=True, return_inverse=True)
        mean = np.zeros((len(first), len(run.classes)))
        np.add.at(mean, frame, run.probabilities)
        found.append(mean.argmax(axis=1) == run.label[first])
    return found[0], found[1]
