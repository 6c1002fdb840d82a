"""Self-contained pages from the templates beside this file: they load nothing and run no scripts.

Templates escape whatever they show, unless it is `Markup`; Python produces HTML only through their macros.
"""

import base64
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import jinja2
import numpy as np
from etils import epath
from markupsafe import Markup

from usfmae_jax import files
from usfmae_jax.errors import visible

_LONG = 24  # words of at least so many characters may be broken anywhere
_NAME = 44  # characters of a file name that are shown


def write(path: pathlib.Path | epath.Path, template: str, **values: Any) -> None:
    """Writes a page from a template, atomically; invisible characters in its contents become codes."""
    page = visible(_ENVIRONMENT.get_template(template).render(values))
    files.write(path, page.encode("utf-8", "xmlcharrefreplace"))


def part(name: str, *values: Any, template: str = "macros.html", **options: Any) -> Markup:
    """Renders values with a macro: a table, a bar, a box; empty if it shows nothing."""
    return Markup(getattr(_ENVIRONMENT.get_template(template).module, name)(*values, **options).strip())


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", **options: Any) -> Markup:
    """A table, or nothing without rows; the first column is the row header. Options are those of the macro."""
    return part("table", heads, rows, caption, **options)


def jpeg(pixels: np.ndarray) -> str:
    """An RGB image, uint8 `[H, W, 3]`, as a data URL."""
    data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def ranked(numbers: Mapping[str, int] | None) -> list[tuple[str, int]]:
    """Names and numbers in descending order, ties by name."""
    return sorted((numbers or {}).items(), key=lambda one: (-one[1], one[0]))


def _shown(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int | float) else value


def _within(share: float) -> float:
    return min(max(float(share), 0.0), 1.0)


def _ending(name: str) -> str:
    """A file name shortened to fit under an image; the end is kept, since it tells files apart."""
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _kinds(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The CSS class of each column of a table: bars, numbers, or text with words so long that they must break."""

    def kind(column: Sequence[Any]) -> str:
        if isinstance(column[0], Markup) and column[0].startswith("<div"):
            return "bar"
        if isinstance(column[0], int | float):
            return "n"
        return "long" if max(len(word) for cell in column for word in [*str(cell).split(), ""]) > _LONG else ""

    return [kind(column) for column in zip(*rows, strict=True)]


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.ChainableUndefined,  # keys that manifests and results of older versions lack show nothing
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "anchor": lambda name: re.sub("[^a-z0-9]+", "-", name.lower()),
    "columns": lambda rows, *keys: [[str(one.get(key, "")) for key in keys] for one in rows or ()],
    "ending": _ending,
    "kinds": _kinds,
    "percent": lambda share: f"{100 * _within(share):.1f}%",
    "ranked": ranked,
    "shown": _shown,
    "stated": lambda facts: [[name, str(value)] for name, value in facts.items() if value],
    "within": _within,
}
