"""Reads the pages that the project writes, and lays them out in a browser."""

import html
import html.parser
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

_MEASURE = """
    const measure = frame => {
      const page = frame.contentDocument
      for (const folded of page.querySelectorAll("details")) folded.open = true
      const missing = [...page.images].filter(image => !image.complete || !image.naturalWidth).length
      const charts = [...page.querySelectorAll("svg[role=img]")]
      const outside = charts.flatMap(chart => [...chart.querySelectorAll("text")].filter(text => {
        const box = text.getBoundingClientRect(), frame = chart.getBoundingClientRect()
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
      })).map(text => text.textContent)
      const small = charts.filter(chart => chart.getBoundingClientRect().width < 230).length
      const width = frame.clientWidth, scrolled = page.documentElement.scrollWidth, images = page.images.length
      return {width, scrolled, images, missing, outside, small}
    }
    onload = () => document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure))
"""


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and all text; fails where tags do not match."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, Any]]:
        """The attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]


def words(path: pathlib.Path) -> str:
    """All text of a page, with single spaces."""
    return " ".join(Reader(path).text.split())


def layout(paths: list[pathlib.Path], folder: pathlib.Path) -> list[dict[str, Any]]:
    """How pages come out on a phone (390 px) and a desk (1280 px), one after the other, with all details unfolded.

    Skips the test where there is no Chromium.

    Returns:
      `width`, `scrolled` (what there is to scroll to), `images`, those `missing`, labels `outside` of their chart, and
      how many charts are `small`.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for found in map(shutil.which, names) if found), None)
    if not browser:
        pytest.skip("needs chromium, to lay the pages out")
    frames = "".join(
        f'<iframe style="width:{width}px" srcdoc="{html.escape(path.read_text(encoding="utf-8"))}"></iframe>'
        for path in paths
        for width in (390, 1280)
    )
    wrapper = folder / "wrapper.html"
    head = f'<!doctype html><meta charset="utf-8"><script>{_MEASURE}</script>'
    wrapper.write_text(f"{head}<body>{frames}</body>", encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--dump-dom", wrapper.as_uri()]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<body>(\[.*\])</body>", dump.stdout, re.DOTALL)
    assert found, dump.stdout[-500:]
    measured = json.loads(html.unescape(found[1]))
    assert [one["width"] for one in measured] == [390, 1280] * len(paths)
    return measured
