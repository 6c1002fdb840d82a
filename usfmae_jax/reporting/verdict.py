"""What a run's results say, in sentences: for people who do not read tables of metrics."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_GUESSING = 0.5  # AUROC


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Two or three plain sentences: on what, how good, how sure; [] where the results lack the numbers.

    Args:
      results: as `evaluation.results` describes them; any key may be missing.
    """
    task = results.get("task") or {}
    classes = [str(name) for name in task.get("classes") or ()]
    if not classes or not _metric(results, "auroc"):
        return []
    if len(classes) == 2 and task.get("positive") in classes:
        return [_ranking(results, classes, task["positive"]), *_found(results, classes, task["positive"])]
    return [_naming(results, len(classes)), *_best_and_worst(results)]


def doubt(results: Mapping[str, Any]) -> str:
    """Why the verdict is not to be trusted, in a sentence; "" where there is no such reason."""
    metric = (results.get("metrics") or {}).get("auroc") or {}
    if metric.get("value") is None:
        return ""
    if not metric.get("ci95"):
        return "There is no interval: it is not known how sure these numbers are."
    low, high = metric["ci95"]
    if low <= _GUESSING:
        return "That is not clearly better than guessing: the interval of the AUROC includes 0.5."
    if high - low > 0.15:
        return "The interval is wide: more patients are needed to know how good the model is."
    return ""


def tested_on(results: Mapping[str, Any]) -> str:
    """How much was tested, in words: "1,875 frames of 1,064 patients"; "" if that is not known."""
    counts = results.get("counts") or {}
    if not counts.get("frames"):
        return ""
    of = f" of {counted(counts['patients'], 'patient')}" if counts.get("patients") else ""
    return counted(counts["frames"], "frame") + of


def counted(number: float, what: str) -> str:
    """A number and what it counts: "1 fold", "2,000 frames"."""
    shown = round(number)
    return f"{shown:,} {what}{'s' * (shown != 1)}"


def guess(name: str, results: Mapping[str, Any]) -> float | None:
    """What guessing gives for a metric; None where that is not a fixed number."""
    task = results.get("task") or {}
    if name == "auroc":
        return _GUESSING
    if name == "balanced_accuracy" and task.get("classes"):
        return 1 / len(task["classes"])
    found = results.get("per_class") or {}
    frames = np.array([one.get("frames") or 0 for one in found.values()], np.float64)
    if name == "average_precision" and frames.sum():
        shares = dict(zip(found, frames / frames.sum(), strict=True))
        return float(shares.get(str(task.get("positive")), np.mean(list(shares.values()))))
    return None


def _ranking(results: Mapping[str, Any], classes: list[str], positive: str) -> str:
    value, interval = _metric(results, "auroc"), _interval(results, "auroc")
    other = next(name for name in classes if name != positive)
    return (
        f"Shown {_article(positive)} and {_article(other)} frame, the model gives the {positive} one the higher "
        f"probability of being {positive} {100 * value:.0f} times of 100 (AUROC {value:.3f}{interval}; guessing gives "
        f"50). It was tested on {tested_on(results) or 'frames'} whose labels it was not trained on."
    )


def _found(results: Mapping[str, Any], classes: list[str], positive: str) -> list[str]:
    counts = np.asarray(results.get("confusion") or [], np.float64)
    if counts.shape != (2, 2) or not counts.sum(axis=1).all():
        return []
    yes = classes.index(positive)
    other = classes[1 - yes]
    found, missed = counts[yes, yes], counts[1 - yes, yes]
    return [
        f"Naming the more probable class, it finds {found:,.0f} of {counts[yes].sum():,.0f} {positive} frames "
        f"({found / counts[yes].sum():.0%}) and calls {missed:,.0f} of {counts[1 - yes].sum():,.0f} "
        f"{other} frames {positive} by mistake ({missed / counts[1 - yes].sum():.0%})."
    ]


def _naming(results: Mapping[str, Any], classes: int) -> str:
    accuracy, balanced = _metric(results, "accuracy"), _metric(results, "balanced_accuracy")
    text = f"On {tested_on(results) or 'frames'} whose labels it was not trained on, the model "
    if accuracy is not None:
        text += f"names the right one of {classes} classes for {accuracy:.0%} of the frames"
    if balanced is not None:
        value = f"{balanced:.3f}{_interval(results, 'balanced_accuracy')}; guessing gives {1 / classes:.3g}"
        text += ", and " if accuracy is not None else "names the right class "
        text += f"for {balanced:.0%} when all classes count alike (balanced accuracy {value})"
    if accuracy is None and balanced is None:
        text += f"reaches an AUROC of {_metric(results, 'auroc'):.3f}{_interval(results, 'auroc')}"
    return f"{text}."


def _best_and_worst(results: Mapping[str, Any]) -> list[str]:
    recalls = {
        name: one["recall"]["value"]
        for name, one in (results.get("per_class") or {}).items()
        if (one.get("recall") or {}).get("value") is not None
    }
    if len(recalls) < 2:
        return []
    best, worst = max(recalls, key=recalls.__getitem__), min(recalls, key=recalls.__getitem__)
    return [
        f"It recognises {best} best ({recalls[best]:.0%} of these frames) and {worst} least ({recalls[worst]:.0%})."
    ]


def _article(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"


def _metric(results: Mapping[str, Any], name: str) -> Any:
    return ((results.get("metrics") or {}).get(name) or {}).get("value")


def _interval(results: Mapping[str, Any], name: str) -> str:
    found = results["metrics"][name].get("ci95")
    return f", 95% interval {found[0]:.3f} to {found[1]:.3f}" if found else ""
