"""HTML that needs nothing but itself: tables, bars, charts and the page around them. All text is escaped."""

import collections
import html
import math
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROWS = 12  # of a table; the rest is folded away
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Markup; other text is escaped."""

    __slots__ = ()


def write(path: pathlib.Path, title: str, body: str) -> pathlib.Path:
    """Writes a page from page.html; returns its path."""
    template = string.Template(pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(title), body=body)
    path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return path


def escape(value: Any) -> str:
    """Text as HTML shows it; `Html` stays as it is."""
    if isinstance(value, Html):
        return value
    # Characters that turn the direction of writing could make a name look like another.
    shown = _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))
    return html.escape(shown)


def tiles(numbers: Mapping[str, int | str], notes: Mapping[str, str] | None = None) -> str:
    """The large numbers at the top of a page, by what they count, with a note in small print under some."""
    boxes = ""
    for name, number in numbers.items():
        shown = f"{number:,}" if isinstance(number, int) else escape(number)
        note = f"<small>{escape(notes[name])}</small>" if notes and name in notes else ""
        boxes += f'<div class="tile"><b>{shown}</b><span>{escape(name)}</span>{note}</div>'
    return f'<div class="tiles">{boxes}</div>'


def sections(found: Mapping[str, str]) -> str:
    """The sections of a page by their headings, with links to them; empty ones are left out."""
    shown = {name: content for name, content in found.items() if content}
    anchors = {name: re.sub("[^a-z0-9]+", "-", name.lower()) for name in shown}
    links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in shown)
    boxes = (f'<section id="{anchors[name]}"><h2>{name}</h2>{content}</section>' for name, content in shown.items())
    return f"<nav>{links}</nav>{''.join(boxes)}"


def notice(name: str, lines: Sequence[str]) -> str:
    """A box that asks for attention, or nothing without lines."""
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="notice"><b>{name}</b><ul>{listed}</ul></div>' if lines else ""


def folded(summary: str, content: str) -> str:
    """Content that opens on request, or nothing without any."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def bars(head: str, numbers: Mapping[str, int], caption: str = "") -> str:
    """A table of frame counts with a bar for each, the largest first."""
    top = max(numbers.values(), default=0)
    return table([head, "Frames", ""], [[*one, bar(one[1], top)] for one in ranked(numbers)], caption)


def bar(number: int, top: int) -> Html:
    """A cell for `table`: a bar for a number, full at `top`."""
    return Html(f'<div style="width:{100 * number / max(top, 1):.1f}%"></div>')


def interval(value: float, low: float, high: float) -> Html:
    """A cell for `table`: a value between 0 and 1 with its interval on a line from 0 to 1."""
    value, low, high = (100 * float(np.clip(number, 0, 1)) for number in (value, low, high))
    span = f'<i style="left:{low:.1f}%;width:{max(high - low, 0):.1f}%"></i>'
    return Html(f'<div class="interval">{span}<b style="left:{value:.1f}%"></b></div>')


def share_bar(share: float) -> Html:
    """A cell for `table`: a full bar of which a share is right and the rest wrong."""
    return Html(f'<div class="share"><i style="width:{100 * float(np.clip(share, 0, 1)):.1f}%"></i></div>')


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", *, stack: bool = False, most: int = ROWS
) -> str:
    """A table, or nothing without rows; the first column names its row; rows after the first `most` are folded."""
    if not rows:
        return ""
    classes = [_class(column) for column in zip(*rows, strict=True)]
    head = "".join(
        f'<th scope="col" class="{one}">{escape(name)}</th>' for name, one in zip(heads, classes, strict=True)
    )
    lines = []
    for row in rows:
        cells = [f'<th scope="row" class="{classes[0]}">{escape(row[0])}</th>']
        for name, one, cell in zip(heads[1:], classes[1:], row[1:], strict=True):
            shown = f"{cell:,}" if isinstance(cell, int | float) else escape(cell)
            cells.append(f'<td class="{one}" data-head="{escape(name)}">{shown}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = "stack" if stack else "wide" if "bar" in classes else ""
    start = f'<div class="scroll"><table class="{kind}">'
    top = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    page = f"{start}{title}{top}<tbody>{''.join(lines[:most])}</tbody></table></div>"
    if lines[most:]:
        rest = f"{start}{top}<tbody>{''.join(lines[most:])}</tbody></table></div>"
        page += f"<details><summary>{len(lines) - most:,} more</summary>{rest}</details>"
    return page


def _class(column: Sequence[Any]) -> str:
    if isinstance(column[0], Html) and column[0].startswith("<div"):
        return "bar"
    if isinstance(column[0], int | float):
        return "n"
    return "long" if max(len(word) for cell in column for word in [*str(cell).split(), ""]) > 24 else ""


def histogram(name: str, what: str, values: Sequence[float], top: int) -> str:
    """A chart of 25 bins from 0 to `top`."""
    counts, edges = np.histogram(values, 25, (0, top))
    marks = '<path class="axis" d="M18 136.5h310"/>'
    marks += f'<text x="330" y="10" text-anchor="end">tallest: {counts.max():,}</text>'
    for i, (count, low, high) in enumerate(zip(counts, edges, edges[1:], strict=False)):
        height = 120 * count / counts.max()
        says = f"{low:.0f} to {high:.0f}: {count:,} frames"
        box = f'x="{18 + 12.4 * i:.1f}" y="{136 - height:.1f}" width="11.4" height="{height:.1f}"'
        marks += f'<rect class="mark" {box}><title>{says}</title></rect>'
    for part in (0, 0.25, 0.5, 0.75, 1):
        marks += f'<text x="{18 + 310 * part:g}" y="154" text-anchor="middle">{top * part:.0f}</text>'
    low, middle, high = np.percentile(values, (25, 50, 75))
    between = f"lie between {low:.0f} and {high:.0f}, the middle is {middle:.0f}"
    says = between if round(low) < round(high) else f"or more are at {middle:.0f}"
    return _chart(name, f"{what}. Half of the frames {says}.", marks)


def scatter(sizes: Sequence[tuple[int, int]]) -> str:
    """A chart of (width, height), with areas by how often they occur."""
    ranked = sorted(collections.Counter(sizes).items(), key=lambda one: (-one[1], one[0]))
    step = next(s for s in (n * 10**e for e in range(9) for n in (1, 2, 5)) if max(map(max, sizes)) <= 4 * s)
    marks = ""
    for tick in range(5):
        marks += f'<path class="axis" d="M38 {136.5 - 30 * tick}h286"/>'
        marks += f'<text x="32" y="{140 - 30 * tick}" text-anchor="end">{tick * step}</text>'
        marks += f'<text x="{38 + 70 * tick}" y="154" text-anchor="middle">{tick * step}</text>'
    for (width, height), count in ranked[:400]:
        x, y, radius = 38 + 70 * width / step, 136 - 30 * height / step, 2.5 + 10 * math.sqrt(count / len(sizes))
        says = f"{width} x {height} pixels: {count:,} frames"
        marks += f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{says}</title></circle>'
    common = ", ".join(f"{width} x {height} ({count / len(sizes):.0%})" for (width, height), count in ranked[:3])
    more = f", and {len(ranked) - 3:,} others" if len(ranked) > 3 else ""
    return _chart("Size", f"Width (across) and height (up) in pixels. Most often {common}{more}.", marks)


def _chart(name: str, says: str, marks: str) -> str:
    return (
        f'<figure><svg role="img" aria-label="{escape(f"{name}: {says}")}" viewBox="0 0 340 160">{marks}</svg>'
        f"<figcaption><b>{name}</b>{escape(says)}</figcaption></figure>"
    )


def ranked(numbers: Mapping[str, int]) -> list[tuple[str, int]]:
    """Names and numbers, the largest first, equal ones by name."""
    return sorted(numbers.items(), key=lambda one: (-one[1], one[0]))
