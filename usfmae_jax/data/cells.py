"""CSV files whose cells a spreadsheet displays and does not execute.

Spreadsheets treat a cell that begins with = + - @ or a tab as a formula, and it may come from a file name that somebody
else chose. Such text is written with a leading apostrophe, which marks it as text for spreadsheets and which `read`
removes. Numbers, also as text, are not changed.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MOST = 1 << 26  # characters in a cell; the default limit of `csv` is too low for some files
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)")


def quoted(value: Any) -> Any:
    """A value as it is written: text that a spreadsheet would execute gets a leading apostrophe."""
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return "'" + value


def unquoted(cell: str) -> str:
    """The inverse of `quoted`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def write(file: Any, header: Iterable[str], rows: Iterable[Iterable[Any]], **how: Any) -> None:
    """Writes a table to an open text file; `how` is passed to `csv.writer`."""
    writer = csv.writer(file, **({"lineterminator": "\n"} | how))
    writer.writerow([quoted(name) for name in header])
    writer.writerows([quoted(value) for value in row] for row in rows)


def read(lines: Iterable[str], **how: Any) -> Iterator[list[str]]:
    """Yields the rows that `write` wrote, the header first; `how` is passed to `csv.reader`. Raises csv.Error."""
    csv.field_size_limit(max(csv.field_size_limit(), _MOST))
    return ([unquoted(cell) for cell in row] for row in csv.reader(lines, **how))


def read_dicts(lines: Iterable[str]) -> Iterator[Mapping[str, str]]:
    """Yields the rows that `write` wrote as dicts by header; columns that a row lacks are empty."""
    rows = read(lines)
    header = next(rows, [])
    return (dict.fromkeys(header, "") | dict(zip(header, row, strict=False)) for row in rows if row)
