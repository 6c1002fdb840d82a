"""Results of a multi-label run, and the sections of its page about labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from markupsafe import Markup

from usfmae_jax.evaluation import classification, intervals, tables
from usfmae_jax.evaluation import multilabel as scoring
from usfmae_jax.evaluation.multilabel import NAMES, LabelPredictions
from usfmae_jax.reporting import charts, pages, run
from usfmae_jax.reporting.classification import confident_errors
from usfmae_jax.reporting.pages import part

_FEW = 10  # with fewer patients of a label, its intervals are usually too narrow
_MEANS = {
    "auroc": "how often a frame with the label gets a higher probability than one without; guessing gives 0.5",
    "average_precision": "area under the precision-recall curve",
    "f1": "harmonic mean of sensitivity and precision, a label being named from 50% on",
    "sensitivity": "of frames with the label, the share that is named so",
    "specificity": "of frames without it, the share that is not",
    "brier": "mean squared error of the probabilities; 0 is best",
}
_SHORT = {name: title.removesuffix(" (macro)") for name, title in NAMES.items()} | {"average_precision": "AP"}


def finish(
    workdir: str,
    predictions: LabelPredictions,
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
      examples: the most confident errors, see `reporting.classification.described`.
      embedding: a map of features; not shown, since a point's colour cannot show several labels.

    Returns:
      the contents of results.json.
    """
    results = scoring.summarise(predictions, resamples)
    predictions.write(epath.Path(workdir) / "predictions.csv")
    main = intervals.by_fraction(predictions)[-1]
    return run.finish(
        workdir,
        results,
        task=about,
        context={**context, "warnings": [*context.get("warnings", []), *_warnings(results, main)]},
        measures={name: run.Measure(title, _MEANS[name], _SHORT[name], bounded=True) for name, title in NAMES.items()},
        headline=("auroc", "average_precision", "f1"),
        main=("auroc", "average_precision", "f1", "brier"),
        sections={
            "": part("sentences", verdict(results)),
            "By label": _per_label(results) + part("charts", _curves(main, results)),
            "Confident errors": confident_errors(examples),
        },
        text={"By label": _text(results)},
    )


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Two plain sentences: on which data, how good, how certain, and for which labels best and worst."""
    auroc = results["metrics"]["auroc"]
    if auroc["value"] is None:
        return []
    low_high = f", 95% interval {auroc['ci95'][0]:.3f} to {auroc['ci95'][1]:.3f}" if auroc["ci95"] else ""
    found = [
        f"On {tables.tested_on(results['counts'])} whose labels it was not trained on, a frame with a label gets the "
        f"higher probability of it than one without {100 * auroc['value']:.0f} times of 100, on average over the "
        f"labels (AUROC {auroc['value']:.3f}{low_high}; guessing gives 50)."
    ]
    each = {name: one["auroc"]["value"] for name, one in results["per_class"].items() if one["auroc"]["value"]}
    if len(each) > 1:
        best, worst = max(each, key=each.__getitem__), min(each, key=each.__getitem__)
        found.append(f"It tells {best} best ({each[best]:.3f}) and {worst} least ({each[worst]:.3f}).")
    return found


def _curves(predictions: LabelPredictions, results: Mapping[str, Any]) -> list[Markup]:
    """The ROC curve of each label."""
    lines = []
    for c, name in enumerate(predictions.classes):
        known = predictions.select(np.isfinite(predictions.truth[:, c]))
        auroc = results["per_class"][name]["auroc"]["value"]
        if auroc is None:
            continue
        truth, chance = known.truth[:, c] == 1, known.probabilities[:, c]
        curve = classification.with_band(classification.roc, truth, chance, known.patient_key, known.seed, resamples=0)
        x, y = np.append(0, curve.x), np.append(0, curve.y)
        lines.append(charts.Line(name, x, y, says=f"AUROC {auroc:.3f}", colour=c))
    if not lines:
        return []
    return [
        charts.lines(
            "ROC curves",
            "The share of frames with the label that are found, against the false alarms that it costs.",
            lines,
            charts.percent_axis("false alarms (1 - specificity)"),
            charts.percent_axis("found (sensitivity)"),
            guides=[((0, 1), (0, 1), "guessing")],
        )
    ]


def _per_label(results: Mapping[str, Any]) -> Markup:
    rows = [
        [name, one["frames"], one["with_it"], one["patients"], *(run.measured(one[key]) for key in NAMES)]
        for name, one in results["per_class"].items()
    ]
    return pages.table(["Label", "Frames", "With it", "Patients", *_SHORT.values()], rows, stack=True)


def _text(results: Mapping[str, Any]) -> str:
    rows = [
        [name, *(f"{one[key]:,}" for key in ("frames", "with_it", "patients"))]
        + [tables.metric(one[key]) for key in NAMES]
        for name, one in results["per_class"].items()
    ]
    return tables.markdown(["Label", "Frames", "With it", "Patients", *_SHORT.values()], rows)


def _warnings(results: Mapping[str, Any], predictions: LabelPredictions) -> list[str]:
    """Caveats that a reader of these numbers should know."""
    found = []
    told = dict(zip(predictions.classes, predictions.both().tolist(), strict=True))
    if untold := [name for name, both in told.items() if not both]:
        found.append(f"Not in the means, since all tested frames have it or none has: {', '.join(untold)}.")
    few = {name: one["patients"] for name, one in results["per_class"].items() if one["patients"] < _FEW}
    if few:
        found.append(
            f"Few patients are tested who have {', '.join(f'{name} ({count})' for name, count in few.items())}: such "
            "numbers may be far off, and intervals over so few are too narrow."
        )
    return found
