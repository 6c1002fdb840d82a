"""Results of a regression run, and the sections of its page about the quantity."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from markupsafe import Markup

from usfmae_jax.evaluation import intervals, tables
from usfmae_jax.evaluation import regression as scoring
from usfmae_jax.evaluation.regression import NAMES, QuantityPredictions
from usfmae_jax.reporting import charts, run
from usfmae_jax.reporting.classification import pictured
from usfmae_jax.reporting.pages import part

_FEW = 10  # with fewer patients, intervals are usually too narrow
_MEANS = {
    "mae": "how far off a prediction is",
    "rmse": "the same, with large errors weighing more",
    "r2": "share of the differences between frames that is explained; 0 is no better than naming the mean of all",
    "pearson": "whether larger ones are predicted larger, whatever the scale; 1 is best",
    "bias": "by how much predictions are too large on the whole; 0 is best",
    "limits_low": "2.5% of the predictions are lower than the truth by more than that",
    "limits_high": "2.5% of the predictions are higher than the truth by more than that",
}
_GROUPS = {"far": "Farthest off", "near": "Nearest"}


def finish(
    workdir: str,
    predictions: QuantityPredictions,
    *,
    name: str,
    unit: str,
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
      name: name of the quantity.
      unit: its unit; "" = none.
      about: what was done, see `task` in `evaluation.results`.
      context: the origin of the results, see `evaluation.results`.
      resamples: number of bootstrap resamples; 0 = no intervals.
      examples: dicts of `image` uint8 `[H, W, C]`, `map` float `[gh, gw]` or None (attention rollout), `group` ("far"
        or "near"), `truth`, `value` and `frame`.
      embedding: a map of features; not shown, since it tells little about a quantity.

    Returns:
      the contents of results.json.
    """
    results = scoring.summarise(predictions, name, unit, resamples)
    warnings = list(context.get("warnings", []))
    if results["counts"]["patients"] < _FEW:
        warnings.append(
            f"Only {tables.counted(results['counts']['patients'], 'patient')} tested: such numbers may be far off, and "
            "intervals over so few are too narrow."
        )
    predictions.write(epath.Path(workdir) / "predictions.csv")
    main, titles = intervals.by_fraction(predictions)[-1], scoring.titles(unit)
    measured = f"{name}, {unit}" if unit else name
    return run.finish(
        workdir,
        results,
        task=about,
        context={**context, "warnings": warnings},
        measures={
            key: run.Measure(titles[key], _MEANS[key], NAMES[key] if key in scoring.BARE else "") for key in NAMES
        },
        headline=("mae", "r2", "bias"),
        main=("mae", "rmse", "r2", "bias"),
        sections={
            "": part("sentences", verdict(results), doubt(results)),
            "Predicted and true": part("charts", [_against(main, measured), _bland_altman(main, results, measured)]),
            "Best and worst frames": _gallery(examples, unit),
        },
    )


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Two plain sentences: on which data, how far off, how certain, and in which direction."""
    task, metrics = results["task"], results["metrics"]
    unit, one = f" {task['unit']}" if task["unit"] else "", metrics["mae"]
    low_high = f", 95% interval {one['ci95'][0]:.3g} to {one['ci95'][1]:.3g}" if one["ci95"] else ""
    found = [
        f"On {tables.tested_on(results['counts'])} that it was not trained on, the predicted {task['quantity']} is "
        f"{one['value']:.3g}{unit} off on average{low_high}."
    ]
    bias, low, high = (metrics[name]["value"] for name in ("bias", "limits_low", "limits_high"))
    if low is not None:
        side = "large" if bias > 0 else "small"
        found.append(
            f"Predictions are {abs(bias):.3g}{unit} too {side} on the whole, and 95% of them "
            f"lie between {low:+.3g} and {high:+.3g}{unit} of the truth."
        )
    return found


def doubt(results: Mapping[str, Any]) -> str:
    """A sentence on why the verdict should not be trusted; "" if there is no such reason."""
    r2 = results["metrics"]["r2"]
    if r2["value"] is None:
        return "All true values are the same, so that it is not known whether anything was learnt."
    if (r2["ci95"] or [r2["value"]])[0] <= 0:
        return "That is not clearly better than naming the mean of all: the interval of R² includes 0."
    return "" if r2["ci95"] else "There is no interval: it is not known how sure these numbers are."


def _against(predictions: QuantityPredictions, measured: str) -> Markup:
    """Predicted against true values."""
    every = np.concatenate([predictions.truth, predictions.value])
    axes = [charts.value_axis(f"{what} {measured}", every, low=-np.inf, high=np.inf) for what in ("true", "predicted")]
    ends = (axes[0].ticks[0], axes[0].ticks[-1])
    return charts.scatter(
        "Predicted against true",
        "Each point is a frame; on the dotted line both are the same.",
        [charts.Dots("frames", predictions.truth, predictions.value, says=f"{len(predictions):,}")],
        *axes,
        guides=[(ends, ends, "predicted as it is")],
    )


def _bland_altman(predictions: QuantityPredictions, results: Mapping[str, Any], measured: str) -> Markup:
    """Errors against the mean of predicted and true values (Bland & Altman 1986)."""
    middle = (predictions.truth + predictions.value) / 2
    lines = {
        words: results["metrics"][name]["value"]
        for name, words in (("bias", "bias"), ("limits_high", "95% of the errors"), ("limits_low", ""))
    }
    found = {words: value for words, value in lines.items() if value is not None}
    x = charts.value_axis(f"mean of both, {measured}", middle, low=-np.inf, high=np.inf)
    shown = np.concatenate([predictions.error, list(found.values())])
    y = charts.value_axis("predicted - true", shown, low=-np.inf, high=np.inf)
    ends = (x.ticks[0], x.ticks[-1])
    return charts.scatter(
        "Do they agree? (Bland-Altman)",
        "The error of each frame. A cloud that leans: large ones are predicted too small, or the other way round.",
        [charts.Dots("frames", middle, predictions.error, says=f"{len(predictions):,}")],
        x,
        y,
        guides=[(ends, (value, value), words) for words, value in found.items()],
    )


def _gallery(examples: Sequence[Mapping[str, Any]], unit: str) -> Markup:
    """The frames with the largest and the smallest errors."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in examples:
        found = pictured(one) | {name: f"{one[name]:.4g} {unit}".strip() for name in ("truth", "value")}
        groups.setdefault(_GROUPS[one["group"]], []).append(found)
    return part("gallery", [*groups.items()], template="regression.html")
