"""CSV files whose cells a spreadsheet shows and does not run.

Spreadsheets take a cell that begins with = + - @ or a tab for a formula, and it may have come from a stranger's file
name. Such text is written behind an apostrophe, which spreadsheets take for "this is text" and `read` takes away again.
Numbers, also as text, stay as they are.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MOST = 1 << 26  # letters in a cell; the module's own limit is less than what file formats hold
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)")


def quoted(value: Any) -> Any:
    """A value as it is written: text that a spreadsheet would run gets an apostrophe in front."""
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return "'" + value


def unquoted(cell: str) -> str:
    """The inverse of `quoted`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write(file: Any, header: Iterable[str], rows: Iterable[Iterable[Any]], **how: Any) -> None:
    """Writes a table into an open text file; `how` is for `csv.writer`."""
    writer = csv.writer(file, **({"lineterminator": "\n"} | how))
    writer.writerow([quoted(name) for name in header])
    writer.writerows([quoted(value) for value in row] for row in rows)


def read(lines: Iterable[str], **how: Any) -> Iterator[list[str]]:
    """Yields the rows of what `write` wrote, the header first; `how` is for `csv.reader`. Raises csv.Error."""
    csv.field_size_limit(max(csv.field_size_limit(), _MOST))
    return ([unquoted(cell) for cell in row] for row in csv.reader(lines, **how))


def read_dicts(lines: Iterable[str]) -> Iterator[Mapping[str, str]]:
    """Yields the rows of what `write` wrote, by the names of the header; columns that a row lacks are empty."""
    rows = read(lines)
    header = next(rows, [])
    return (dict.fromkeys(header, "") | dict(zip(header, row, strict=False)) for row in rows if row)
