"""Charts: lines with bands, maps of points, confusion matrices, histograms, sizes. SVG without scripts.

Colours are the CSS classes `c0` to `c9` of page.html, so that they adapt to light and dark mode. People with red-green
or blue-yellow colour blindness can tell them apart, helped by dashes and by the number beside each name.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from usfmae_jax.reporting.pages import part

COLOURS = 10  # number of colours in page.html
_LEFT, _TOP, _WIDTH, _HEIGHT = 56, 10, 272, 214  # plotted area, in an image of 340 x 268
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, *(n * 10.0**e for e in range(9) for n in (1, 2, 5)))
_APART = 6  # offset between the whiskers of lines with equal x
_MOST = 400  # maximum number of points per line: more cannot be seen


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis: from the first tick to the last.

    Attributes:
      title: the measured quantity, with its unit.
      ticks: ascending positions in data coordinates.
      labels: labels of the ticks.
    """

    title: str
    ticks: Sequence[float]
    labels: Sequence[str]

    def share(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Values as fractions of the axis, clipped to it."""
        low, high = self.ticks[0], self.ticks[-1]
        return np.clip((np.asarray(values, np.float64) - low) / ((high - low) or 1), 0, 1)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      name: its name in the legend.
      x: float `[N]`.
      y: float `[N]`; values that are not finite are not drawn.
      low: lower edge of the band, float `[N]`; empty = no band.
      high: upper edge of the band.
      says: text after the name in the legend, usually a number.
      colour: index of the colour.
      dots: whether to mark the points, for a few measured ones.
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray = ()
    high: Sequence[float] | np.ndarray = ()
    says: str = ""
    colour: int = 0
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Dots:
    """One group of points of a chart.

    Attributes:
      name: its name in the legend.
      x: float `[N]`.
      y: float `[N]`.
      says: text after the name in the legend.
      colour: index of the colour.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    says: str = ""
    colour: int = 0


def percent_axis(title: str) -> Axis:
    """An axis from 0 to 1, labelled in percent."""
    return Axis(title, (0, 0.25, 0.5, 0.75, 1), ("0", "25", "50", "75", "100%"))


def value_axis(title: str, values: Sequence[float] | np.ndarray, *, low: float = 0.0, high: float = 1.0) -> Axis:
    """An axis for values within [low, high], limited to the range where they lie, with round steps."""
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found)]
    first, last = (float(found.min()), float(found.max())) if len(found) else (max(low, 0.0), min(high, 1.0))
    step = next((s for s in _STEPS if last - first <= 4 * s), last - first)
    bottom = max(np.floor(first / step + 1e-9) * step, low)
    count = max(int(np.ceil((last - bottom) / step - 1e-9)), 1)
    ticks = [round(float(bottom + i * step), 6) for i in range(count + 1)]
    ticks = [tick for tick in ticks if tick <= high + 1e-9]
    if len(ticks) < 2:
        ticks = [ticks[0] - step, ticks[0]]
    return Axis(title, ticks, [f"{tick:.2f}" if step < 1 else f"{tick:,.0f}" for tick in ticks])


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
) -> Markup:
    """A chart of lines.

    Args:
      name: heading.
      says: how to read the chart and what it shows; also the text for screen readers.
      shown: the lines; the first is drawn on top.
      x: horizontal axis.
      y: vertical axis.
      guides: dotted reference lines: x, y and their meaning.
      counts: counts in equal bins along x; drawn as faint bars at the bottom.
      spot: a point to mark: x, y and its meaning.
    """
    marks = [*_bars(counts), *_axes(x, y)]
    marks += [_mark("path", "guide", meaning, d=_path(x.share(across), y.share(up))) for across, up, meaning in guides]
    whiskers = [line for line in shown if line.dots and len(line.low)]
    aside = {id(line): _APART * (i - (len(whiskers) - 1) / 2) / _WIDTH for i, line in enumerate(whiskers)}
    marks += [mark for line in reversed(shown) for mark in _line(line, x, y, aside.get(id(line), 0.0))]
    keys = [(_key(line), line.name, line.says) for line in shown]
    keys += [(_mark("path", "guide", d="M1 6h24"), meaning, "") for *_, meaning in guides if meaning]
    if len(counts):
        keys.append((_mark("path", "count", d="M5 12v-6h6v-4h6v10z"), "how many frames lie there", ""))
    if spot:
        (left, top), meaning = _place(x.share([spot[0]]), y.share([spot[1]]))[0], spot[2]
        marks.append(_mark("circle", "spot", meaning, cx=left, cy=top, r=5))
        keys.append((_mark("circle", "spot", cx=13, cy=6, r=4.5), meaning, ""))
    return _figure(name, says, marks, keys)


def points(name: str, says: str, at: np.ndarray, groups: Sequence[str], order: Sequence[str]) -> Markup:
    """A map of points in the unit square, one colour for each group.

    Args:
      name: heading.
      says: how to read the chart.
      at: positions, float `[M, 2]`.
      groups: group of each point.
      order: the groups in the order of their colours.
    """
    member = np.array([list(order).index(group) for group in groups], int)
    # Zero-length strokes with round ends take few bytes per point. Twelve layers, so that no group hides all others.
    layer = np.arange(len(member)) % 12
    across, up = 8 + 324 * at[:, 0], 8 + 324 * (1 - at[:, 1])
    marks = [_mark("rect", "frame", x=0.5, y=0.5, width=339, height=339)]
    for i in range(12):
        for group in range(len(order)):
            chosen = np.flatnonzero((layer == i) & (member == group))
            if len(chosen):
                path = "".join(f"M{across[j]:.1f} {up[j]:.1f}h0" for j in chosen)
                marks.append(_mark("path", f"dot {_colour(group)}", d=path))
    members = np.bincount(member, minlength=len(order))
    keys = [
        (_mark("path", f"dot {_colour(i)}", d="M13 6h0"), group, f"{size:,}")
        for i, (group, size) in enumerate(zip(order, members, strict=True))
        if size
    ]
    return _figure(name, says, marks, keys, 340)


def scatter(
    name: str,
    says: str,
    shown: Sequence[Dots],
    x: Axis,
    y: Axis,
    *,
    guides: Sequence[tuple[Sequence[float], Sequence[float], str]] = (),
) -> Markup:
    """A chart of points on axes; arguments as for `lines`. Points beyond an axis are drawn at its edge."""
    marks = [*_axes(x, y)]
    marks += [_mark("path", "guide", meaning, d=_path(x.share(across), y.share(up))) for across, up, meaning in guides]
    keys = []
    for group in shown:
        there = np.isfinite(group.x) & np.isfinite(group.y)
        at = _place(x.share(group.x[there]), y.share(group.y[there]))
        path = "".join(f"M{left:.1f} {top:.1f}h0" for left, top in at)
        marks.append(_mark("path", f"dot {_colour(group.colour)}", d=path))
        keys.append((_mark("path", f"dot {_colour(group.colour)}", d="M13 6h0"), group.name, group.says))
    keys += [(_mark("path", "guide", d="M1 6h24"), meaning, "") for *_, meaning in guides if meaning]
    return _figure(name, says, marks, keys)


def matrix(name: str, says: str, classes: Sequence[str], counts: np.ndarray) -> Markup:
    """A confusion matrix `[C, C]`, rows true, columns predicted; the colour is the fraction of the row."""
    total = len(classes)
    longest = max(map(_wide, classes))
    left = min(longest + 32, 158.0) if total > 4 else min(longest + 12, 118.0)
    cell = (338 - left) / total
    tall = min(cell, 74.0)
    marks = [_text(left + cell * total / 2, 12, "what the model said")]
    for row, truth in enumerate(classes):
        middle = 38 + tall * (row + 0.5)
        number = f"{row + 1} " if total > 4 else ""
        marks.append(_text(left - 7, middle + 4, _short(number + truth, left - 9), "end", tip=truth))
        head = str(row + 1) if total > 4 else _short(truth, cell)
        marks.append(_text(left + cell * (row + 0.5), 30, head, tip=truth))
        for column, answer in enumerate(classes):
            count, share = counts[row, column], counts[row, column] / max(counts[row].sum(), 1e-12)
            tip = f"{truth}, called {answer}: {_count(count)} ({share:.0%})"
            place: dict[str, Any] = dict(
                x=left + cell * column + 1, y=39 + tall * row, width=cell - 2, height=tall - 2, rx=3
            )
            shade = "heat" if row == column else "heat wrong"
            marks.append(_mark("rect", shade, tip, fill_opacity=f"{0.06 + 0.94 * share:.2f}", **place))
            across, strong = left + cell * (column + 0.5), "strong" if row == column else "plain"
            if total <= 4:
                marks.append(_text(across, middle, _count(count), kind=strong))
                marks.append(_text(across, middle + 15, f"{share:.0%}", kind="plain"))
            elif total <= 14 and count >= 0.5:
                marks.append(_text(across, middle + 4, _count(count), kind=f"{strong} small"))
    return _figure(name, says, marks, height=42 + tall * total)


def histogram(name: str, what: str, values: Sequence[float], top: int) -> Markup:
    """A chart of 25 bins from 0 to `top`."""
    counts, edges = np.histogram(values, 25, (0, top))
    marks = [_mark("path", "axis", d="M18 136.5h310"), _text(330, 10, f"tallest: {counts.max():,}", "end")]
    for i, (count, low, high) in enumerate(zip(counts, edges, edges[1:], strict=False)):
        height = 120 * count / counts.max()
        tip = f"{low:.0f} to {high:.0f}: {_frames(count)}"
        marks.append(_mark("rect", "mark", tip, x=18 + 12.4 * i, y=136 - height, width=11.4, height=height))
    marks += [_text(18 + 310 * share, 154, f"{top * share:.0f}") for share in (0, 0.25, 0.5, 0.75, 1)]
    low, middle, high = np.percentile(values, (25, 50, 75))
    between = f"lie between {low:.0f} and {high:.0f}, the middle is {middle:.0f}"
    says = between if round(low) < round(high) else f"or more are at {middle:.0f}"
    return _figure(name, f"{what}. Half of the frames {says}.", marks, height=160)


def sizes(shown: Sequence[tuple[int, int]]) -> Markup:
    """A chart of widths and heights, with dot areas in proportion to their frequency."""
    ranked = sorted(collections.Counter(shown).items(), key=lambda one: (-one[1], one[0]))
    step = next(s for s in (n * 10**e for e in range(9) for n in (1, 2, 5)) if max(map(max, shown)) <= 4 * s)
    marks = []
    for tick in range(5):
        marks.append(_mark("path", "axis", d=f"M38 {136.5 - 30 * tick}h286"))
        marks.append(_text(32, 140 - 30 * tick, f"{tick * step}", "end"))
        marks.append(_text(38 + 70 * tick, 154, f"{tick * step}"))
    for (width, height), count in ranked[:400]:
        place: dict[str, Any] = dict(
            cx=38 + 70 * width / step, cy=136 - 30 * height / step, r=2.5 + 10 * np.sqrt(count / len(shown))
        )
        marks.append(_mark("circle", "mark", f"{width} x {height} pixels: {_frames(count)}", **place))
    common = ", ".join(f"{width} x {height} ({count / len(shown):.0%})" for (width, height), count in ranked[:3])
    more = f", and {len(ranked) - 3:,} others" if len(ranked) > 3 else ""
    says = f"Width (across) and height (up) in pixels. Most often {common}{more}."
    return _figure("Size", says, marks, height=160)


def _frames(count: float) -> str:
    shown = _count(count)
    return f"{shown} frame" if shown == "1" else f"{shown} frames"


def _figure(name: str, says: str, marks: Sequence[Markup], legend: Sequence[Any] = (), height: float = 268) -> Markup:
    return part("figure", name, says, Markup("").join(marks), legend, round(height))


def _mark(tag: str, kind: str = "", tip: str = "", text: str = "", **at: Any) -> Markup:
    """An SVG element; all text in it is escaped."""
    named = {"class": kind} | {name.replace("_", "-"): value for name, value in at.items()}
    pairs = [(name, f"{value:.1f}" if isinstance(value, float) else value) for name, value in named.items()]
    shown = Markup("").join(Markup(' {}="{}"').format(name, value) for name, value in pairs if value != "")
    inside = (Markup("<title>{}</title>").format(tip) if tip else "") + escape(text)
    return Markup("<{0}{1}>{2}</{0}>" if inside else "<{0}{1}/>").format(tag, shown, inside)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "", tip: str = "") -> Markup:
    return _mark("text", kind, tip if tip != text else "", text, x=float(x), y=float(y), text_anchor=anchor)


def _axes(x: Axis, y: Axis) -> Iterator[Markup]:
    for share, label in zip(y.share(y.ticks), y.labels, strict=True):
        up = _TOP + _HEIGHT * (1 - share)
        yield _mark("path", "axis", d=f"M{_LEFT} {up:.1f}h{_WIDTH}")
        yield _text(_LEFT - 6, up + 4, label, "end")
    for share, label in zip(x.share(x.ticks), x.labels, strict=True):
        anchor = "end" if share == 1 and len(label) > 3 else "middle"
        yield _text(_LEFT + _WIDTH * share + 8 * (anchor == "end"), _TOP + _HEIGHT + 17, label, anchor)
    yield _text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 38, x.title, kind="title")
    turned = f"translate(11 {_TOP + _HEIGHT / 2:g}) rotate(-90)"
    yield _mark("text", "title", text=y.title, transform=turned, text_anchor="middle")


def _bars(counts: Sequence[float]) -> Iterator[Markup]:
    wide = _WIDTH / max(len(counts), 1)
    for i, count in enumerate(counts):
        high = 0.3 * _HEIGHT * count / max(max(counts), 1)
        place: dict[str, Any] = dict(x=_LEFT + wide * i + 1, y=_TOP + _HEIGHT - high, width=wide - 2, height=high)
        if count:
            yield _mark("rect", "count", _frames(count), **place)


def _line(line: Line, x: Axis, y: Axis, aside: float) -> Iterator[Markup]:
    across, up = x.share(line.x) + aside, np.where(np.isfinite(line.y), y.share(np.nan_to_num(line.y)), np.nan)
    keep = np.flatnonzero(np.isfinite(up))
    if not len(keep):
        return
    colour = _colour(line.colour)
    if len(line.low) and not line.dots:
        low, high = y.share(line.low)[keep], y.share(line.high)[keep]
        edge = _path(np.concatenate([across[keep], across[keep][::-1]]), np.concatenate([low, high[::-1]]), most=800)
        yield _mark("path", f"band {colour}", d=f"{edge}z")
    elif len(line.low):
        for i in keep.tolist():
            ends = _place(across[[i, i]], y.share([line.low[i], line.high[i]]))
            yield _mark("path", f"whisker {colour}", d=f"M{ends[0, 0]:.1f} {ends[0, 1]:.1f}V{ends[1, 1]:.1f}")
    yield _mark("path", f"line {colour}", d=_path(across[keep], up[keep]))
    if line.dots:
        for i, (left, top) in zip(keep.tolist(), _place(across[keep], up[keep]), strict=True):
            yield _mark("circle", f"point {colour}", f"{line.name}: {line.y[i]:.3f}", cx=left, cy=top, r=4)


def _place(across: np.ndarray, up: np.ndarray) -> np.ndarray:
    return np.stack([_LEFT + _WIDTH * across, _TOP + _HEIGHT * (1 - up)], axis=1)


def _path(across: np.ndarray, up: np.ndarray, most: int = _MOST) -> str:
    at = _place(across, up)
    if len(at) > most:  # spaced evenly along the line, so that steep parts keep their shape
        along = np.concatenate([[0], np.cumsum(np.abs(np.diff(at, axis=0)).sum(axis=1))])
        at = at[np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)))]
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in at)


def _key(line: Line) -> Markup:
    colour = _colour(line.colour)
    dot = _mark("circle", f"point {colour}", cx=13, cy=6, r=4) if line.dots else ""
    return _mark("path", f"line {colour}", d="M1 6h24") + dot


def _short(text: str, most: float) -> str:
    """Text shortened to a maximum width."""
    shown = text
    while len(shown) > 1 and _wide(shown) > most:
        shown = shown[:-1]
    return text if shown == text else shown[:-1].rstrip() + "…"


def _wide(text: str) -> float:
    """Approximate width of text at 12 pixels, rather over- than underestimated, since fonts differ."""
    return sum(
        4.2 if one in "fijlrt.,:;'| ()-" else 11.5 if one in "mwMW@%<>=+" else 9 if one.isupper() else 7.4
        for one in text
    )


def _count(number: float) -> str:
    return f"{round(float(number)):,}"


def _colour(index: int) -> str:
    return f"c{index % COLOURS}" + " dashed" * (index // COLOURS % 2)
