"""Charts of results: lines with bands, points, heat of a confusion matrix. SVG and HTML, nothing that runs.

Colours are classes `c0` to `c9` of page.html, so that they follow light and dark screens; a palette that people with
red-green or blue-yellow blindness can tell apart, helped by dashes and by the numbers beside every name.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from usfmae_jax.reporting import markup

COLOURS = 10  # of page.html
_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 10, 284, 214  # of the plotted area, in a picture of 340 x 268
_MOST = 400  # points of a line: more cannot be seen


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis: from the first tick to the last.

    Attributes:
      title: what is measured, with its unit.
      ticks: positions, rising, in the data's own scale.
      labels: what is written at the ticks.
    """

    title: str
    ticks: Sequence[float]
    labels: Sequence[str]

    def share(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Values as a share of the axis, held within it."""
        low, high = self.ticks[0], self.ticks[-1]
        return np.clip((np.asarray(values, np.float64) - low) / ((high - low) or 1), 0, 1)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      name: in the legend.
      x: float `[N]`.
      y: float `[N]`; where it is not finite there is nothing to draw.
      low: lower edge of the band, float `[N]`; none if empty.
      high: upper edge of the band.
      says: after the name in the legend, a number as a rule.
      colour: index of the colour.
      dots: whether the points are marked: where they are few, and measured each.
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray = ()
    high: Sequence[float] | np.ndarray = ()
    says: str = ""
    colour: int = 0
    dots: bool = False


def percent_axis(title: str) -> Axis:
    """An axis of shares, 0 to 1, written in percent."""
    return Axis(title, (0, 0.25, 0.5, 0.75, 1), ("0", "25", "50", "75", "100%"))


def value_axis(title: str, values: Sequence[float] | np.ndarray, *, low: float = 0.0, high: float = 1.0) -> Axis:
    """An axis for values within [low, high] that shows the part where they are, in round steps."""
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found)]
    first, last = (float(found.min()), float(found.max())) if len(found) else (low, high)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if last - first <= 4 * s or s == 0.25)
    bottom = max(np.floor(first / step + 1e-9) * step, low)
    count = max(int(np.ceil((last - bottom) / step - 1e-9)), 1)
    ticks = [round(float(bottom + i * step), 6) for i in range(count + 1)]
    ticks = [tick for tick in ticks if tick <= high + 1e-9]
    if len(ticks) < 2:
        ticks = [ticks[0] - step, ticks[0]]
    return Axis(title, ticks, [f"{tick:.2f}" for tick in ticks])


def lines(
    name: str,
    says: str,
    shown: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    guides: Sequence[tuple[Sequence[float], Sequence[float], str]] = (),
    counts: Sequence[float] = (),
    spot: tuple[float, float, str] | None = None,
) -> str:
    """A chart of lines.

    Args:
      name: heading.
      says: how to read it, and what it shows; also what a screen reader says.
      shown: lines; the first is drawn on top.
      x: axis across.
      y: axis up.
      guides: dotted lines for comparison: x, y and what they mean.
      counts: of equal bins across; drawn as faint bars at the foot.
      spot: one point to mark: x, y and what it means.
    """
    marks = _bars(counts) + _axes(x, y)
    for across, up, meaning in guides:
        marks += f'<path class="guide" d="{_path(x.share(across), y.share(up))}"><title>{_safe(meaning)}</title></path>'
    for line in reversed(shown):
        marks += _line(line, x, y)
    if spot:
        at = _place(x.share([spot[0]]), y.share([spot[1]]))[0]
        marks += (
            f'<circle class="spot" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5"><title>{_safe(spot[2])}</title></circle>'
        )
    keys = [(_key(line), line.name, line.says) for line in shown]
    keys += [('<path class="guide" d="M1 6h24"/>', meaning, "") for *_, meaning in guides if meaning]
    if len(counts):
        keys.append(('<path class="count" d="M5 12v-6h6v-4h6v10z"/>', "how many frames lie there", ""))
    if spot:
        keys.append(('<circle class="spot" cx="13" cy="6" r="4.5"/>', spot[2], ""))
    return _figure(name, says, marks, _legend(keys))


def points(name: str, says: str, at: np.ndarray, groups: Sequence[str], order: Sequence[str]) -> str:
    """A map of points in the unit square, one colour for each group.

    Args:
      name: heading.
      says: how to read it.
      at: float `[M, 2]`.
      groups: of each point.
      order: the groups in the order of their colours.
    """
    member = np.array([list(order).index(group) for group in groups], int)
    # Zero-length strokes with round ends: a few bytes a point. In twelve layers, so that no group covers all others.
    layer = np.arange(len(member)) % 12
    across, up = 8 + 324 * at[:, 0], 8 + 324 * (1 - at[:, 1])
    marks = ""
    for i in range(12):
        for group in range(len(order)):
            chosen = np.flatnonzero((layer == i) & (member == group))
            if len(chosen):
                path = "".join(f"M{across[j]:.1f} {up[j]:.1f}h0" for j in chosen)
                marks += f'<path class="dot {_colour(group)}" d="{path}"/>'
    sizes = np.bincount(member, minlength=len(order))
    keys = [
        (f'<path class="dot {_colour(i)}" d="M13 6h0"/>', group, f"{size:,}")
        for i, (group, size) in enumerate(zip(order, sizes, strict=True))
        if size
    ]
    return _figure(
        name, says, f'<rect class="frame" x=".5" y=".5" width="339" height="339"/>{marks}', _legend(keys), 340
    )


def matrix(name: str, says: str, classes: Sequence[str], counts: np.ndarray) -> str:
    """A confusion matrix `[C, C]`, true classes down, answers across; colour is the share of the row."""
    total = len(classes)
    longest = max(map(_wide, classes))
    left = min(longest + 32, 158.0) if total > 4 else min(longest + 12, 118.0)
    cell = (338 - left) / total
    tall = min(cell, 74.0)
    marks = f'<text x="{left + cell * total / 2:.1f}" y="12" text-anchor="middle">what the model said</text>'
    for row, truth in enumerate(classes):
        middle = 38 + tall * (row + 0.5)
        number = f"{row + 1} " if total > 4 else ""
        marks += _text(left - 7, middle + 4, _short(number + truth, left - 9), "end", title=truth)
        head = str(row + 1) if total > 4 else _short(truth, cell)
        marks += _text(left + cell * (row + 0.5), 30, head, "middle", title=truth)
        for column, answer in enumerate(classes):
            share = counts[row, column] / max(counts[row].sum(), 1e-12)
            shade = f'class="{"heat" if row == column else "heat wrong"}" fill-opacity="{0.06 + 0.94 * share:.2f}"'
            tip = f"{truth}, called {answer}: {_count(counts[row, column])} ({share:.0%})"
            box = f'x="{left + cell * column + 1:.1f}" y="{39 + tall * row:.1f}" rx="3" '
            box += f'width="{cell - 2:.1f}" height="{tall - 2:.1f}"'
            marks += f"<rect {shade} {box}><title>{_safe(tip)}</title></rect>"
            across, strong = left + cell * (column + 0.5), "strong" if row == column else "plain"
            if total <= 4:
                marks += _text(across, middle, _count(counts[row, column]), "middle", strong)
                marks += _text(across, middle + 15, f"{share:.0%}", "middle", "plain")
            elif total <= 14 and counts[row, column] >= 0.5:
                marks += _text(across, middle + 4, _count(counts[row, column]), "middle", f"{strong} small")
    return _figure(name, says, marks, "", 42 + tall * total)


def _figure(name: str, says: str, marks: str, legend: str, height: float = 268) -> str:
    label = _safe(f"{name}: {says}")
    return (
        f'<figure class="chart"><figcaption><b>{_safe(name)}</b>{_safe(says)}</figcaption>'
        f'<svg role="img" aria-label="{label}" viewBox="0 0 340 {height:.0f}">{marks}</svg>{legend}</figure>'
    )


def _axes(x: Axis, y: Axis) -> str:
    marks = ""
    for share, label in zip(y.share(y.ticks), y.labels, strict=True):
        up = _TOP + _HEIGHT * (1 - share)
        marks += f'<path class="axis" d="M{_LEFT} {up:.1f}h{_WIDTH}"/>' + _text(_LEFT - 6, up + 4, label, "end")
    for share, label in zip(x.share(x.ticks), x.labels, strict=True):
        anchor = "end" if share == 1 and len(label) > 3 else "middle"
        marks += _text(_LEFT + _WIDTH * share + 8 * (anchor == "end"), _TOP + _HEIGHT + 17, label, anchor)
    marks += _text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 38, x.title, "middle", "title")
    up = _TOP + _HEIGHT / 2
    turned = f'transform="translate(11 {up:g}) rotate(-90)" text-anchor="middle"'
    return f'{marks}<text class="title" {turned}>{_safe(y.title)}</text>'


def _bars(counts: Sequence[float]) -> str:
    marks, wide = "", _WIDTH / max(len(counts), 1)
    for i, count in enumerate(counts):
        high = 0.3 * _HEIGHT * count / max(max(counts), 1)
        box = (
            f'x="{_LEFT + wide * i + 1:.1f}" y="{_TOP + _HEIGHT - high:.1f}" width="{wide - 2:.1f}" height="{high:.1f}"'
        )
        marks += f'<rect class="count" {box}><title>{_count(count)} frames</title></rect>' if count else ""
    return marks


def _line(line: Line, x: Axis, y: Axis) -> str:
    across, up = x.share(line.x), np.where(np.isfinite(line.y), y.share(np.nan_to_num(line.y)), np.nan)
    keep = np.flatnonzero(np.isfinite(up))
    if not len(keep):
        return ""
    marks, colour = "", _colour(line.colour)
    if len(line.low) and not line.dots:
        low, high = y.share(line.low)[keep], y.share(line.high)[keep]
        edge = _path(np.concatenate([across[keep], across[keep][::-1]]), np.concatenate([low, high[::-1]]), most=800)
        marks += f'<path class="band {colour}" d="{edge}z"/>'
    elif len(line.low):
        for i in keep.tolist():
            ends = _place(across[[i, i]], y.share([line.low[i], line.high[i]]))
            marks += f'<path class="whisker {colour}" d="M{ends[0, 0]:.1f} {ends[0, 1]:.1f}V{ends[1, 1]:.1f}"/>'
    marks += f'<path class="line {colour}" d="{_path(across[keep], up[keep])}"/>'
    if line.dots:
        for i, (left, top) in zip(keep.tolist(), _place(across[keep], up[keep]), strict=True):
            tip = _safe(f"{line.name}: {line.y[i]:.3f}")
            marks += (
                f'<circle class="point {colour}" cx="{left:.1f}" cy="{top:.1f}" r="4"><title>{tip}</title></circle>'
            )
    return marks


def _place(across: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([_LEFT + _WIDTH * across, _TOP + _HEIGHT * (1 - up)], axis=1)


def _path(across: np.ndarray, up: np.ndarray, most: int = _MOST) -> str:
    at = _place(across, up)
    if len(at) > most:  # evenly along the line, so that steep parts keep their shape
        along = np.concatenate([[0], np.cumsum(np.abs(np.diff(at, axis=0)).sum(axis=1))])
        at = at[np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)))]
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in at)


def _key(line: Line) -> str:
    mark = f'<path class="line {_colour(line.colour)}" d="M1 6h24"/>'
    return mark + f'<circle class="point {_colour(line.colour)}" cx="13" cy="6" r="4"/>' * line.dots


def _legend(keys: Sequence[tuple[str, str, str]]) -> str:
    rows = "".join(
        f'<li><svg class="key" viewBox="0 0 26 12" aria-hidden="true">{mark}</svg>'
        f"<span>{_safe(name)}</span><span>{_safe(says)}</span></li>"
        for mark, name, says in keys
    )
    return f'<ul class="legend">{rows}</ul>' if rows else ""


def _text(x: float, y: float, text: str, anchor: str, kind: str = "", title: str = "") -> str:
    tip = f"<title>{_safe(title)}</title>" if title and title != text else ""
    chosen = f' class="{kind}"' if kind else ""
    return f'<text{chosen} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{tip}{_safe(text)}</text>'


def _short(text: str, most: float) -> str:
    """Text that is at most so wide."""
    shown = text
    while len(shown) > 1 and _wide(shown) > most:
        shown = shown[:-1]
    return text if shown == text else shown[:-1].rstrip() + "…"


def _wide(text: str) -> float:
    """About how wide text is at 12 pixels, rather too much than too little: fonts differ."""
    return sum(
        4.2 if one in "fijlrt.,:;'| ()-" else 11.5 if one in "mwMW@%<>=+" else 9 if one.isupper() else 7.4
        for one in text
    )


def _count(number: float) -> str:
    return f"{round(float(number)):,}"


def _colour(index: int) -> str:
    return f"c{index % COLOURS}" + " dashed" * (index // COLOURS % 2)


def _safe(text: str) -> str:
    return markup.escape(str(text))
