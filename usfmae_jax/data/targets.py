"""Targets from CSV tables: one or several columns, joined to the frames that the rows name."""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import posixpath
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from usfmae_jax.data import cells
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError, visible

#: Columns that identify the frame of a row; the first that exists is used.
KEYS = ("frame", "source", "file", "filename", "file_name")
#: Columns that distinguish frames of equal names.
IDS = ("dataset", "patient", "video")
_NOTHING = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"}  # missing values of spreadsheets, R and pandas
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_UNIT = re.compile(r"(?P<name>.*\S)\s*(?:\[(?P<square>[^\[\]]*)\]|\((?P<round>[^()]*)\))")
_PSEUDONYM = re.compile(r"f[0-9a-f]{16}")


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """Targets for the rows of a `Table`.

    Attributes:
      names: names of the K columns, without their units.
      units: units of the columns; "" = not given.
      values: float64 `[N, K]`; NaN where a frame has no value.
      notes: sentences for the user on rows that could not be used.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    values: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change with names, units and values."""
        about = json.dumps([self.names, self.units]).encode()
        return hashlib.sha256(about + np.ascontiguousarray(self.values, "<f8").tobytes()).hexdigest()[:12]

    def take(self, rows: np.ndarray) -> "Targets":
        """The targets of some rows, int `[M]`."""
        return dataclasses.replace(self, values=self.values[rows])


def known(table: Table, targets: Targets) -> tuple[Table, Targets]:
    """The rows of a table that have a target, and their targets, with a note on how many lack one.

    Raises:
      InputError: no frame has one.
    """
    rows, what = np.flatnonzero(np.isfinite(targets.values).any(axis=1)), ", ".join(targets.names)
    if not len(rows):
        raise InputError(f"config.targets: no frame of the data has a value of {what}")
    missing = len(table) - len(rows)
    note = [f"{missing} of {len(table)} frames have no value of {what} in config.targets and are left out"]
    return table.take(rows), dataclasses.replace(targets.take(rows), notes=(*targets.notes, *(note if missing else [])))


class _File(NamedTuple):
    name: str
    key: str  # the column that identifies frames
    columns: dict[str, tuple[str, str]]  # name and unit by header
    lines: list[dict[str, str]]  # cells by header, ids by their names in lower case


def read_targets(paths: str, table: Table, names: Sequence[str] = (), *, labels: bool = False) -> Targets:
    """Reads columns of one or several CSV files and joins them to the rows of a table.

    A row belongs to the frame, the source or the file, with or without folder and suffix, that its column `frame`,
    `source`, `file`, `filename` or `file_name` names; for a clip, to all of its frames. The columns `dataset`,
    `patient` and `video` narrow it down. A header is `name`, `name [unit]` or `name (unit)`.

    Args:
      paths: the files, separated by commas; their cells may be separated by commas, semicolons or tabs.
      table: table of the frames.
      names: names of the columns; () = all that contain only numbers.
      labels: whether the columns are labels: without `names`, all that contain only 0 and 1 are used; with `names`,
        other values are refused.

    Raises:
      InputError: a file cannot be read, has no such column, or names no frame of the table; a cell has text or an
        infinite number instead of a number; or files have a column in different units.
    """
    files = [_read(path.strip()) for path in paths.split(",") if path.strip()]
    if not files:
        raise InputError("config.targets names no table; give a CSV file with the columns frame and name [unit]")
    chosen = [_match(file, names) if names else _numeric(file, labels) for file in files]
    units: dict[str, str] = {}
    for file, headers in zip(files, chosen, strict=True):
        for header in headers:
            name, unit = file.columns[header]
            if units.setdefault(name, unit) != unit:
                raise InputError(
                    f"config.targets: {name!r} is in {unit or 'no unit'!r} in {file.name} and in "
                    f"{units[name] or 'no unit'!r} elsewhere; give all of it the same unit"
                )
    _check_there(files, names, units, labels)
    order = tuple(dict.fromkeys(_own(name, units) for name in names) if names else units)
    values = np.full((len(table), len(order)), np.nan)
    contradicted = np.zeros(values.shape, bool)
    notes: list[str] = []
    places = _Places(table)
    for file, headers in zip(files, chosen, strict=True):
        found = _join(file, places, notes)
        for header in headers:
            column = order.index(file.columns[header][0])
            for number, (line, rows) in enumerate(zip(file.lines, found, strict=True), 2):
                value = _parse(line[header], f"{file.name}, line {number}, column {header!r}", labels)
                if not np.isnan(value):
                    before = values[rows, column]
                    contradicted[rows, column] |= np.isfinite(before) & (before != value)
                    values[rows, column] = value
    if contradicted.any():
        values[contradicted] = np.nan
        first = table.frame_key[np.flatnonzero(contradicted.any(axis=1))[0]]
        frames = int(contradicted.any(axis=1).sum())
        notes.append(f"{frames} frames have two values that differ in config.targets, and none is taken, first {first}")
    return Targets(order, tuple(units[name] for name in order), values, tuple(notes))


def _read(path: str) -> _File:
    name = path.rstrip("/").rpartition("/")[2]
    try:
        data = epath.Path(path).read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("cp1252", "replace")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        header, *lines = [
            [cell.strip() for cell in line] for line in cells.read(io.StringIO(text), delimiter=separator)
        ]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is no table"
        raise InputError(f"config.targets={path} cannot be read: {reason}") from error
    low = [name.casefold() for name in header]
    if len(set(low)) < len(low):
        twice = next(one for one in low if low.count(one) > 1)
        raise InputError(f"config.targets: {name} has the column {twice!r} twice")
    key = next((one for one in KEYS if one in low), "")
    if not key:
        raise InputError(
            f"config.targets: {name} has no column that names frames, {', '.join(KEYS)}; its columns are "
            f"{', '.join(map(repr, header))}"
        )
    known = {one: one.casefold() for one in header if one.casefold() in (*KEYS, *IDS)}
    columns = {one: _unit(one) for one in header if one and one not in known}
    heads = [known.get(one, one) for one in header]
    filled = [dict.fromkeys(heads, "") | dict(zip(heads, line, strict=False)) for line in lines if any(line)]
    return _File(name, key, columns, filled)


def _unit(header: str) -> tuple[str, str]:
    found = _UNIT.fullmatch(header)
    return (found["name"], (found["square"] or found["round"] or "").strip()) if found else (header, "")


def _same(one: str, other: str) -> bool:
    return " ".join(one.casefold().split()) == " ".join(other.casefold().split())


def _match(file: _File, names: Sequence[str]) -> list[str]:
    """The headers of the requested columns, by name with or without the unit."""
    return [
        header
        for header, (own, _) in file.columns.items()
        if any(_same(name, own) or _same(name, header) for name in names)
    ]


def _own(asked: str, units: dict[str, str]) -> str:
    return next(name for name in units if _same(asked, name) or _same(_unit(asked)[0], name))


def _numeric(file: _File, labels: bool) -> list[str]:
    """The headers of columns that contain only numbers; for labels, only 0 and 1."""
    found = []
    for header in file.columns:
        said = {line[header] for line in file.lines if line[header].casefold() not in _NOTHING}
        if said and all(_NUMBER.fullmatch(one) and (not labels or float(one) in (0, 1)) for one in said):
            found.append(header)
    return found


def _check_there(files: Sequence[_File], names: Sequence[str], units: dict[str, str], labels: bool) -> None:
    there = list(dict.fromkeys(name for file in files for name, _ in file.columns.values()))
    said = ", ".join(map(repr, there)) or "none"
    for name in names:
        if not any(_same(name, own) or _same(_unit(name)[0], own) for own in units):
            shown, where = visible(name, one_line=True), ", ".join(file.name for file in files)
            raise InputError(f"config.target={shown!r} is no column of {where}; there are {said}")
    if not units:
        what = "nothing but 0 and 1" if labels else "nothing but numbers"
        raise InputError(f"config.targets has no column of {what}; there are {said}{_text_among_numbers(files)}")


def _text_among_numbers(files: Sequence[_File]) -> str:
    """A phrase on the first cell without a number in a column that has numbers; "" = none."""
    for file in files:
        for header in file.columns:
            column = [(number, line[header]) for number, line in enumerate(file.lines, 2)]
            said = [(number, cell) for number, cell in column if cell.casefold() not in _NOTHING]
            texts = [(number, cell) for number, cell in said if not _NUMBER.fullmatch(cell)]
            if 0 < len(texts) < len(said):
                number, cell = texts[0]
                shown = visible(cell, one_line=True)
                return f": {shown!r} stands in line {number} of {file.name}, column {header!r}"
    return ""


def _parse(cell: str, where: str, label: bool) -> float:
    """The number in a cell; NaN if it is empty."""
    if cell.casefold() in _NOTHING:
        return np.nan
    shown = visible(cell, one_line=True)
    if not _NUMBER.fullmatch(cell):
        comma = "; write a point for the comma" if "," in cell else ""
        raise InputError(f"config.targets: {where}: {shown!r} is no number{comma}")
    value = float(cell)
    if not np.isfinite(value):
        raise InputError(f"config.targets: {where}: {shown!r} is not a finite number")
    if label and value not in (0, 1):
        raise InputError(f"config.targets: {where}: {shown!r} is neither 0 nor 1")
    return value


class _Places:
    """Finds the rows of a table by names of frames, sources and files."""

    def __init__(self, table: Table):
        self.table = table
        self.files = np.char.add(np.char.add(table.dataset, "/"), table.source)
        self.by: list[dict[str, list[int]]] = [collections.defaultdict(list) for _ in range(4)]
        for row, (frame, source) in enumerate(zip(table.frame.tolist(), table.source.tolist(), strict=True)):
            name = posixpath.basename(source)
            for names, key in zip(self.by, (frame, source, name, _stem(name)), strict=True):
                if key:
                    names[key].append(row)

    def find(self, line: dict[str, str], key: str) -> tuple[np.ndarray, bool]:
        """The rows that a line refers to, and whether it is ambiguous: rows of several files match."""
        asked = posixpath.normpath(line[key].replace("\\", "/")) if line[key] else ""
        unclear = False
        # The first frame of a clip has the name of its file, which stands for all of its frames.
        for number in (0, 1, 2, 3) if key == "frame" else (1, 2, 3, 0):
            rows = np.asarray(self.by[number].get(asked if number < 3 else _stem(asked), ()), np.int64)
            for name in IDS:
                if line.get(name):
                    rows = rows[getattr(self.table, name)[rows] == line[name]]
            if len(rows) and len(np.unique(self.files[rows])) == 1:
                return rows, False
            unclear |= len(rows) > 0
        return np.zeros(0, np.int64), unclear


def _stem(name: str) -> str:
    return re.sub(r"(\.nii)?\.[A-Za-z][A-Za-z0-9]{1,4}$", "", name)


def _join(file: _File, places: _Places, notes: list[str]) -> list[np.ndarray]:
    """The rows of a table that each line refers to; lines that cannot be used are added to the notes.

    Raises:
      InputError: no line can be used.
    """
    found = [places.find(line, file.key) for line in file.lines]
    called = [line[file.key] for line in file.lines]
    lost = [name for name, (rows, unclear) in zip(called, found, strict=True) if not (len(rows) or unclear)]
    several = [name for name, (_, unclear) in zip(called, found, strict=True) if unclear]
    if len(lost) + len(several) == len(found):
        frames = places.table.frame.tolist()
        if all(_PSEUDONYM.match(frame) for frame in frames):
            raise InputError(
                f"config.targets: {file.name} names no frame of the data, whose frames have pseudonyms: put these into "
                "its column frame; the linkage table that data_prep.build wrote with --linkage says which is which"
            )
        like = f", {called[0]!r} and so on," if called else ""
        clear = f"; {len(several)} rows fit several files" if several else ""
        raise InputError(
            f"config.targets: {file.name}{like} names no frame of the data, which are called like {frames[0]!r}{clear}"
        )
    for rows, what in (
        (lost, "name no frame of the data"),
        (several, "fit several files and are left out; give their paths in a column source, or the column dataset"),
    ):
        if rows:
            notes.append(f"{len(rows)} of {len(found)} rows of {file.name} {what}, first {rows[0]!r}")
    return [rows for rows, _ in found]
