"""A page that shows the progress of a run: `index.html` in its workdir, updated during training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from markupsafe import Markup

from usfmae_jax.evaluation import tables
from usfmae_jax.reporting import charts, pages

#: Seconds after which a browser reloads the page.
AGAIN = 15
_TRAINED = {"loss", "images_per_second", "input_wait"}  # keys that only lines of training steps have
_PROBES = {"logistic": "Logistic regression", "knn": "Nearest neighbours"}


def write(
    workdir: str,
    lines: Sequence[Mapping[str, Any]],
    *,
    total: int,
    seconds_left: float | None,
    warnings: Sequence[str] = (),
    picture: np.ndarray | None = None,
) -> None:
    """Writes the page atomically.

    Args:
      workdir: existing folder to write to.
      lines: lines of metrics.jsonl, each with its `step`.
      total: number of steps of the whole run.
      seconds_left: estimate at the current speed; None if the run has ended or was stopped.
      warnings: sentences.
      picture: uint8 RGB `[H, W, 3]`, the latest picture of the model's predictions.
    """
    trained = [line for line in lines if line.keys() >= _TRAINED]
    last = trained[-1] if trained else {}
    step, done = int(last.get("step", 0)), bool(trained) and last["step"] >= total
    headline = {"steps": f"{step:,} of {total:,}"}
    if trained:
        headline |= {"loss": f"{last['loss']:.4f}", "images/s": f"{last['images_per_second']:,.0f}"}
    if seconds_left is not None and not done:
        headline["to go"] = duration(seconds_left)
    probed = [line for line in lines if "probe/logistic_auroc" in line]
    if probed:
        headline["probe AUROC"] = f"{probed[-1]['probe/logistic_auroc']:.3f}"
    path = epath.Path(workdir) / "index.html"
    pages.write(
        path,
        "progress.html",
        title=f"{epath.Path(workdir).name}: {'Done' if done else 'Stopped' if seconds_left is None else 'In training'}",
        again=0 if seconds_left is None else AGAIN,
        headline=headline,
        warnings=list(warnings),
        charts=[_loss(trained), _probe(probed)],
        picture=pages.jpeg(picture) if picture is not None else "",
        speed=_speed(last),
    )


def duration(seconds: float) -> str:
    """A duration in words: "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _speed(last: Mapping[str, Any]) -> str:
    if not last:
        return ""
    said = f"{last['input_wait']:.0%} of the time is spent waiting for images"
    return f"{said}; {last['mfu']:.0%} of the device's peak" if "mfu" in last else said


def _steps(lines: Sequence[Mapping[str, Any]]) -> charts.Axis:
    return charts.value_axis("step", [0, *(line["step"] for line in lines)], low=0, high=np.inf)


def _loss(lines: Sequence[Mapping[str, Any]]) -> Markup:
    if len(lines) < 2:
        return Markup()
    steps, losses = ([line[name] for line in lines] for name in ("step", "loss"))
    shown = charts.Line("loss", steps, losses, [], [], f"{losses[-1]:.3f}", 0)
    axis = charts.value_axis("", losses, high=np.inf)
    return charts.lines("Loss", "Loss of single batches; small changes are noise.", [shown],
                        _steps(lines), axis)  # fmt: skip


def _probe(lines: Sequence[Mapping[str, Any]]) -> Markup:
    if not lines:
        return Markup()
    shown, steps = [], [line["step"] for line in lines]
    for colour, (name, title) in enumerate(_PROBES.items()):
        value, low, high = (
            np.array([line.get(f"probe/{name}_auroc{end}", np.nan) for line in lines], float)
            for end in ("", "_low", "_high")
        )
        shown.append(charts.Line(title, steps, value, low, high, tables.number(float(value[-1])), colour, dots=True))
    edges = np.concatenate([np.concatenate([line.low, line.high, line.y]) for line in shown])
    says = "AUROC of frozen features on labelled frames, with 95% intervals over patients."
    return charts.lines("Probe", says, shown, _steps(lines), charts.value_axis("AUROC", edges))
