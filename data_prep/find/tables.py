"""Reads labels, patients, splits and folds of files from tables: CSV, XLSX, XML, text and COCO JSON.

Every kind of table becomes rows of text by column name. The catalogue defines what the columns mean; for a user's own
table, `COLUMNS` does.
"""

import codecs
import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from data_prep.catalog.schema import Folds, Table, fill, glob_matcher
from data_prep.find.files import (
    SPLITS,
    Collection,
    Item,
    Rejected,
    check_file,
    check_splits,
    existing,
    known_patient,
    label_names,
    one_line,
    printable,
    searching,
    spacing_of,
    stated,
)
from usfmae_jax.errors import InputError, install, some

COLUMNS = ("file", "label", "patient", "video", "split", "mask", "spacing")  # of a user's own table
MAX_BYTES = 64 << 20
_MAX_CELL = 100_000  # characters; a longer cell means an unclosed quotation mark, with the rest of the file in the cell
_MAX_COLUMNS = 16_384  # the limit of spreadsheets
_MAX_ROWS = 1 << 21
_MAX_CELLS = 8_000_000  # of up to 100 bytes each
_MAX_ELEMENTS = 3_000_000  # of XML in a spreadsheet; a cell is two, and openpyxl holds up to 400 bytes for each
_MAX_DENSITY = 8  # such elements per byte of the file; real files have less than one
_MAX_REPEATED = 64  # characters per byte of a file that stores a text once and refers to it often
_EXCEL = ".xlsx", ".xlsm"
_NAMED = 12  # columns in a message
_FOLD_VALUES = {"1": "train", "0": "validation"}

Row = dict[str, str]


class MissingLibraryError(Exception):
    """Reading a table requires an optional library that is missing; the message names it."""


@dataclasses.dataclass
class Known:
    """Values for files, collected from tables.

    Attributes:
      values: key -> field -> value.
      conflicts: (key, field) for which rows disagree; such a field is left out.
    """

    values: dict[str, Row] = dataclasses.field(default_factory=lambda: collections.defaultdict(dict))
    conflicts: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def add(self, key: str, field: str, value: str) -> None:
        """Records one value, unless it or the key is empty."""
        if not (key and value) or (key, field) in self.conflicts:
            return
        if self.values[key].setdefault(field, value) != value:
            self.conflicts.add((key, field))
            del self.values[key][field]


def read_table(path: pathlib.Path, columns: tuple[str, ...] = (), kind: str = "") -> list[Row]:
    """Reads a table as text; detects the encoding, strips white space, and empties cells such as "NA".

    Args:
      path: a .json file is read as COCO object detection: one row per annotation, and one per image without any, with
        the columns file_name (its last part) and category; .xlsx is the first sheet; .xml is one row, the text of
        the elements directly below the root; .txt is split at white space unless its first line has commas; anything
        else is CSV, separated by commas, semicolons or tabs, whichever is most frequent in the first line.
      columns: column names, for a file without a header.
      kind: suffix to read the file as, instead of its own.

    Raises:
      InputError: the file is not such a table, or larger than `MAX_BYTES`.
      MissingLibraryError: openpyxl is needed but not installed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"table {path.name} is larger than {MAX_BYTES >> 20} MiB: is it the right file?")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"table {path.name} cannot be read: {error.strerror}") from error
    try:
        kind = kind or path.suffix.lower()
        if kind == ".json":
            return _coco_rows(json.loads(data), _most_letters(data))
        if kind == ".xml":
            return [{child.tag: stated(child.text or "") for child in parse_xml(data) if not len(child)}]
        lines = _xlsx_lines(data) if kind in _EXCEL else _text_lines(_decode(data), kind)
        return _rows(lines, columns)
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error, RecursionError) as error:
        raise InputError(f"table {path.name} is damaged or of another kind: {error}") from error


def _decode(data: bytes) -> str:
    """Decodes text as saved by editors and spreadsheets: UTF-8 or UTF-16, with or without BOM, or Windows-1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if zeros := data[:1000].count(0):
        return data.decode("utf-16-le" if data[1:1000:2].count(0) > zeros / 2 else "utf-16-be")
    for encoding in ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")


def _text_lines(text: str, kind: str) -> Iterable[list[str]]:
    first = text.lstrip().split("\n", 1)[0]
    if kind == ".txt" and "," not in first:
        return (line.split(None, _MAX_COLUMNS) for line in io.StringIO(text, newline=None))
    separator = max(",;\t", key=first.count)
    return csv.reader(_narrow(io.StringIO(text, newline=""), separator), delimiter=separator)


def _narrow(lines: Iterable[str], separator: str) -> Iterator[str]:
    """Yields the lines; refuses one with far too many separators before it is split."""
    for line in lines:
        if line.count(separator) > _MAX_COLUMNS + 10 * _MAX_CELL:
            raise ValueError(f"more than {_MAX_COLUMNS:,} columns")
        yield line


def _refuse_doctype(*_: Any) -> None:
    raise ValueError("it declares entities, which could fill the memory")


class _PlainBuilder(ElementTree.TreeBuilder):
    def doctype(self, *_: Any) -> None:
        _refuse_doctype()


def parse_xml(data: bytes) -> ElementTree.Element:
    """The root of an XML document.

    Raises:
      ValueError: it is not XML, or has a document type declaration.
    """
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_PlainBuilder()))
    except ElementTree.ParseError as error:
        raise ValueError(error) from error


def _xlsx_lines(data: bytes) -> Iterator[list[str]]:
    try:
        import openpyxl
    except ImportError as error:
        raise MissingLibraryError(f"XLSX tables need openpyxl: {install('prep')}") from error
    cells, letters, most = 0, 0, _most_letters(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_parts(archive, min(_MAX_ELEMENTS, 100_000 + _MAX_DENSITY * len(data)))
        sheet = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets[0]
        sheet.reset_dimensions()  # else rows are padded to the declared size
        for row in sheet.iter_rows(values_only=True):
            line = ["" if cell is None else str(cell) for cell in row]
            cells, letters = cells + len(line), letters + sum(map(len, line))
            if cells > _MAX_CELLS or cells + letters > most:
                raise ValueError(f"more than {_MAX_CELLS:,} cells, or one text in very many of them: save it as CSV")
            yield line
    except Exception as error:  # three parsers raise what they like for damaged XML or archives
        raise ValueError(str(error).partition("\n")[0]) from error


def _check_parts(archive: zipfile.ZipFile, most: int) -> None:
    """Raises ValueError if the XML of a spreadsheet needs more memory than any table: openpyxl has no limits."""
    if sum(member.file_size for member in archive.infolist()) > 4 * MAX_BYTES:
        raise ValueError("unpacks to more than it can hold")
    elements = itertools.count(1)

    def count(*_: Any) -> None:
        if next(elements) > most:
            raise ValueError(f"more than {most:,} elements of XML: save it as CSV")

    for member in archive.infolist():
        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.StartDoctypeDeclHandler = count, _refuse_doctype
        with archive.open(member) as part, contextlib.suppress(expat.ExpatError):  # a picture, or refused later
            while block := part.read(1 << 16):
                parser.Parse(block)


def _most_letters(data: bytes) -> int:
    return min(MAX_BYTES, (1 << 20) + _MAX_REPEATED * len(data))


def _rows(lines: Iterable[list[str]], columns: tuple[str, ...]) -> list[Row]:
    stripped = ([stated(cell) for cell in line] for line in _checked(lines))
    filled = (line for line in stripped if any(line))
    header, rows, cells = list(columns) or next(filled, []), [], 0
    for line in filled:
        cells += len(line)
        if cells > _MAX_CELLS:
            raise ValueError(f"more than {_MAX_CELLS:,} cells")
        rows.append(dict(zip(header, line, strict=False)))
    return rows


def _checked(lines: Iterable[list[str]]) -> Iterator[list[str]]:
    for number, line in enumerate(lines):
        if number >= _MAX_ROWS or len(line) > _MAX_COLUMNS:
            raise ValueError(f"more than {_MAX_ROWS:,} rows or {_MAX_COLUMNS:,} columns")
        # The csv module's own limit is global to the process, and other libraries raise it.
        if any(len(cell) > _MAX_CELL for cell in line):
            raise ValueError(f"a cell has more than {_MAX_CELL:,} letters: is a quotation mark left open?")
        yield line


def _coco_rows(data: Any, most: int) -> list[Row]:
    names = {category["id"]: str(category["name"]) for category in data["categories"]}
    found = collections.defaultdict(list)
    for annotation in data["annotations"]:
        found[annotation["image_id"]].append(names[annotation["category_id"]])
    rows: list[Row] = []
    images = {image["id"]: image for image in data["images"]}
    if len(images) < len(data["images"]):  # their annotations would be repeated for each of them
        raise ValueError("two images have one id")
    for number, image in images.items():
        categories = found.get(number, [""])
        name = os.path.basename(image["file_name"])
        most -= sum(map(len, categories)) + len(name) * len(categories)
        if most < 0:
            raise ValueError("it has one text for very many annotations")
        rows += [{"file_name": name, "category": category} for category in categories]
    return rows


def read_labels(root: pathlib.Path, labels: str, masks: str) -> tuple[Collection, dict[str, tuple[int, int]]]:
    """Reads a user's own table, with the column `file` and optionally others of `COLUMNS`.

    Args:
      root: the folder with the files.
      labels: path of the table: CSV, whatever its suffix, or XLSX.
      masks: "auto", "required" or "off"; with "auto" a frame is kept even if its mask cannot be used.

    Returns:
      The collection that the table describes, and (size, mtime_ns) of the files and masks it lists, by path.

    Raises:
      InputError: the table does not fit the files, or puts a patient into two splits.
    """
    rows, unused = _label_rows(root, labels)
    names = label_names((row["label"] for row in rows), f"in {labels}")
    numbers = {name: number for number, name in enumerate(names)}
    items: dict[str, Item] = {}
    stats: dict[str, tuple[int, int]] = {}
    problems: dict[str, list[Rejected]] = {"file": [], "mask": []}
    missing: dict[str, list[str]] = {"file": [], "mask": []}
    for row in rows:
        if row["split"] not in SPLITS:
            raise InputError(
                f"--labels={labels}: split {row['split']!r} of {printable(row['file'])!r} is none of train, val, test"
            )
        paths = {"file": _relative(root, labels, row["file"])}
        if row["mask"] and masks != "off":
            paths["mask"] = _relative(root, labels, row["mask"])
        source = printable(paths["file"])
        if paths["file"] in items:
            raise InputError(f"--labels={labels} lists {source!r} more than once")
        wrong = {}
        for column, path in paths.items():
            if not os.path.lexists(root / path):
                missing[column].append(printable(path))
                wrong[column] = "is missing"
                continue
            found = check_file(root, path)
            stats[path] = (0, 0) if isinstance(found, str) else found
            if isinstance(found, str):
                wrong[column] = found
        items[paths["file"]] = Item(
            path=paths["file"],
            masks=() if "mask" in wrong or "mask" not in paths else (paths["mask"],),
            split=SPLITS[row["split"]],
            label=numbers.get(row["label"], -1),
            patient=known_patient(row["patient"]),
            video=row["video"],
            spacing=_spacing(labels, row),
        )
        for column, reason in wrong.items():
            reason = reason if column == "file" else f"mask: {reason}"
            problems[column if masks == "auto" else "file"].append(Rejected(source, reason))
    all_masks = missing["mask"] if masks == "required" or not any(item.masks for item in items.values()) else []
    if gone := missing["file"] + all_masks:
        count = "a file that is" if len(gone) == 1 else f"{len(gone):,} files that are"
        first = gone[0] if len(gone) == 1 else f"first {gone[0]}"
        raise InputError(f"--labels={labels} names {count} not below --input={root}: {printable(first)}")
    rejected = {one.source for one in problems["file"]}
    kept = [item for item in items.values() if item.source not in rejected]
    check_splits(kept, "give all frames of a patient the same split")
    unmasked = [one for one in problems["mask"] if one.source not in rejected]
    warnings = [f"--labels={labels} has columns that are not used: {_few(unused)}"] if unused else []
    return Collection(kept, names, problems["file"], unmasked=unmasked, warnings=warnings), stats


def _label_rows(root: pathlib.Path, labels: str) -> tuple[list[Row], list[str]]:
    """The rows of a user's own table, with `COLUMNS` as keys, and the names of its other columns."""
    path = pathlib.Path(labels)
    if not path.is_file():
        inside = root / labels
        found = f", but {inside} is one: --labels={inside}" if inside.is_file() else f"; has {root} one? Give its path"
        raise InputError(f"--labels={labels} is neither 'parent' nor a file, as seen from the current folder{found}")
    try:
        rows = read_table(path, kind=path.suffix.lower() if path.suffix.lower() in _EXCEL else ".csv")
    except MissingLibraryError as error:
        raise InputError(f"--labels={labels}: {error}") from error
    if not rows:
        raise InputError(f"--labels={labels} lists no files")
    if "file" not in rows[0]:
        raise InputError(
            f"--labels={labels} has no column 'file', only {_few([*rows[0]])}; it may have {', '.join(COLUMNS)}"
        )
    unused = _unused(labels, rows)
    rows = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
    return [row | {"label": one_line(row["label"])} for row in rows], unused


def _unused(labels: str, rows: list[Row]) -> list[str]:
    """Columns that are not used; raises InputError if one of them may well be the labels."""
    there = list(dict.fromkeys(name for row in rows for name in row if name))
    unused = [name for name in there if name not in COLUMNS]
    if not unused or {"label", "mask"} & {*there}:
        return unused
    # Classes repeat; values that differ from row to row are remarks, dates or other names of the file.
    classes = [name for name in unused if len({row.get(name, "") for row in rows}) <= len(rows) / 2]
    if classes or len(there) == len(unused) + 1:
        raise InputError(
            f"--labels={labels} has no column 'label'; it has {_few(there)}: call the one with the classes 'label', "
            "or add an empty column 'label' if there are none"
        )
    return unused


def _few(names: Sequence[str]) -> str:
    return some([*map(printable, names)], _NAMED)


def _spacing(labels: str, row: Row) -> tuple[float, float]:
    try:
        return spacing_of(row["spacing"])
    except ValueError as error:
        raise InputError(
            f"--labels={labels}: the spacing {row['spacing']!r} of {printable(row['file'])!r} is not the size of a "
            "pixel in mm: one number, or two for down and across"
        ) from error


def _relative(root: pathlib.Path, labels: str, path: str) -> str:
    if "\\" in path and not os.path.lexists(root / path):  # from Windows
        path = path.replace("\\", "/")
    if os.path.isabs(path) and pathlib.Path(path).is_relative_to(root):
        path = os.path.relpath(path, root)
    normal = os.path.normpath(path) if path else ""
    if not normal or os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        raise InputError(f"--labels={labels}: {printable(path)!r} is not a path below --input")
    return existing(root, normal)


def plain_key(template: str, values: Mapping[str, str]) -> str:
    """Key that matches rows to files: a filled template without file suffix, or a number without leading zeros."""
    key = re.sub(r"\.[A-Za-z][A-Za-z0-9]{1,4}$", "", fill(template, values))
    return key.lstrip("0") or "0" if key.isdecimal() else unicodedata.normalize("NFC", key)


def apply(
    root: pathlib.Path,
    layout: Sequence[Table],
    files: Iterable[str],
    known: Mapping[str, Row],
    values: Mapping[str, Row],
    warnings: list[str],
) -> set[str]:
    """Overrides values from paths with values from tables.

    Args:
      root: the folder.
      layout: the tables of its layout.
      files: all paths below `root`.
      known: template variables by path of an image.
      values: fields by path of an image; updated in place.
      warnings: sentences are appended.

    Returns:
      The paths of the tables that were read.
    """
    used: set[str] = set()
    given: dict[str, set[str]] = collections.defaultdict(set)
    for table in layout:
        fields = [field for field in ("patient", "video", "split", "label", "spacing") if getattr(table, field)]
        said = Known()
        for path, rows in _read_all(root, table.file, table.columns, files, warnings):
            used.add(path)
            folder, name = posixpath.split(path)
            places = {"folder": posixpath.basename(folder), "table": posixpath.splitext(name)[0]}
            for row in rows:
                for field in fields:
                    said.add(plain_key(table.key, row | places), field, fill(getattr(table, field), row | places))
        keys = {path: plain_key(table.match, variables) for path, variables in known.items()}
        for path, key in keys.items():
            values[path].update(said.values.get(key, {}))
        for field in fields:
            given[field].update(path for path, key in keys.items() if field in said.values.get(key, {}))
        warnings += _doubts(table.file, said, set(keys.values()))
    for field, found in given.items():
        missing = [path for path in known if path not in found and not values[path].get(field)]
        if missing:
            looked = ", ".join(glob for table in layout if getattr(table, field) for glob in table.file)
            warnings.append(f"{len(missing):,} files have no {field} in {looked}, first {printable(missing[0])!r}")
    return used


def _read_all(
    root: pathlib.Path, globs: tuple[str, ...], columns: tuple[str, ...], files: Iterable[str], warnings: list[str]
) -> Iterator[tuple[str, list[Row]]]:
    for path in sorted(filter(glob_matcher(globs), files), key=printable):
        try:
            yield path, read_table(root / path, columns)
        except MissingLibraryError as error:
            warnings.append(f"table {printable(path)} was left out: {error}")


def _doubts(globs: tuple[str, ...], said: Known, keys: set[str]) -> list[str]:
    unknown, warnings = sorted(said.values.keys() - keys), []
    if unknown:
        warnings.append(f"{len(unknown):,} entries of {globs[0]} name no file that is there, first {unknown[0]!r}")
    if said.conflicts:
        key, field = min(said.conflicts)
        warnings.append(
            f"rows of {globs[0]} disagree about {len(said.conflicts):,} files, first the {field} of {key!r}"
        )
    return warnings


def read_folds(
    root: pathlib.Path, folds: Folds, files: Iterable[str], found: Mapping[str, Item], warnings: list[str]
) -> tuple[list[tuple[str, str, str]], set[str]]:
    """Reads an official table of folds.

    Args:
      root: the folder.
      folds: where the table is and what its columns mean.
      files: all paths below `root`.
      found: items by their `plain_key` in the table.
      warnings: sentences are appended.

    Returns:
      Sorted rows (frame, fold, part), part being train, validation or test, and the paths of the tables read.

    Raises:
      InputError: the table is damaged, or a part has an unknown name.
    """
    rows: set[tuple[str, str, str]] = set()
    used: set[str] = set()
    patients: dict[tuple[str, str], set[bool]] = collections.defaultdict(set)
    for path, table in _read_all(root, folds.file, (), files, warnings):
        used.add(path)
        for key, fold, part in _fold_rows(path, table, folds):
            if item := found.get(key):
                rows.add((item.frame or item.source, fold, part))
                patients[fold, item.patient or key].add(part == "test")
    if not rows:
        warnings.append(f"there is no table of folds {folds.name}, which was expected at {folds.file[0]}")
    crossing = {patient for (_, patient), sides in patients.items() if len(sides) > 1}
    if crossing:
        warnings.append(f"{len(crossing):,} patients are trained on and tested in the same fold of {folds.name}")
    return sorted(rows, key=lambda row: (int(row[1]) if row[1].isdecimal() else 0, *row)), used


def _fold_rows(path: str, rows: list[Row], folds: Folds) -> Iterator[tuple[str, str, str]]:
    """Yields (key, fold, part)."""
    with searching(folds.pattern) as search:
        found = search(path)
    groups = {name: value for name, value in found.groupdict().items() if value} if found else {}
    rows = [row | groups for row in rows]
    numbers = sorted({fill(folds.fold, row) for row in rows} - {""})
    for row in rows:
        key, fold = plain_key(folds.key, row), fill(folds.fold, row)
        if not (key and fold):
            continue
        if folds.part:
            part = fill(folds.part, row)
            if part not in folds.parts and part not in SPLITS:
                raise InputError(f"table {os.path.basename(path)}: {part!r} is none of train, val, test")
            yield key, fold, folds.parts.get(part) or SPLITS[part]
            continue
        for number in numbers:
            value = row.get(folds.others.replace("{fold}", number), "")
            part = "test" if number == fold else _FOLD_VALUES.get(value.removesuffix(".0"), "")
            if part:
                yield key, number, part
