"""The types of the catalogue, and their parsing from TOML values; `data_prep.catalog` documents the keys."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from usfmae_jax.errors import InputError

ACCESS = ("open", "account", "request")
VERIFIED = ("real files", "layout fixture", "documented only")
MASK_KINDS = ("image", "binary", "outline", "polygons")
SPLITS = ("train", "validation", "test")
READER = {  # readers.Options
    "stride": int,
    "max_frames": int,
    "axis": int,
    "flip": str,
    "key": str,
    "patient_key": str,
}

_NAME = re.compile("[a-z][a-z0-9_]*")
_FIELD = re.compile(r"\{([^{}]*)\}")
_PLACES = {"name", "stem", "ext", "dir", "up"}
#: Lists of tables have a singular key in TOML.
_KEYS = {"downloads": "download", "layouts": "layout", "tables": "table"}


@dataclasses.dataclass(frozen=True)
class Download:
    """A file that can be fetched without an account; an empty checksum or zero size means not known."""

    url: str
    file: str
    sha256: str = ""
    md5: str = ""
    bytes: int = 0
    extract: bool | str = True


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with information about files."""

    file: tuple[str, ...]
    key: str
    match: str = "{stem}"
    columns: tuple[str, ...] = ()
    label: str = ""
    patient: str = ""
    video: str = ""
    split: str = ""
    spacing: str = ""


@dataclasses.dataclass(frozen=True)
class Folds:
    """A table of folds."""

    name: str
    file: tuple[str, ...]
    key: str
    fold: str
    match: str = "{stem}"
    pattern: str = ""
    part: str = ""
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of a dataset are arranged."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    optional: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    suffixes: tuple[str, ...] = ()
    content: str = ""
    pattern: str = ""
    patient: str = ""
    video: str = ""
    frame: str = ""
    split: str = ""
    label: str = ""
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mask: str = ""
    mask_kind: str = "image"
    reader: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    folds: tuple[Folds, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A dataset; `fingerprint` is the SHA-256 of its TOML file."""

    name: str
    title: str
    verified: str
    number: int = 0  # row of OpenUS-46; 0 for all others
    aliases: tuple[str, ...] = ()
    version: str = "1.0.0"
    anatomy: str = ""
    licence: str = "not known"
    citation: str = "not known"
    homepage: str = ""
    access: str = "open"
    access_note: str = ""
    verification: str = ""
    benchmark: bool = False
    private: bool = False
    generic: bool = False
    classes: tuple[str, ...] = ()
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    layouts: tuple[Layout, ...] = ()
    fingerprint: str = ""


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its fields filled in; empty if the value of any field is missing or empty."""
    if not all(values.get(field) for field in _FIELD.findall(template)):
        return ""
    return _FIELD.sub(lambda match: values[match[1]], template)


def glob_matcher(globs: Iterable[str]) -> Callable[[str], bool]:
    """Returns a function that tells whether a path with forward slashes matches one of the globs.

    `**/` is any number of folders, `**` anything, `*` anything without a slash, `?` one character that is not a slash,
    `[...]` a set of characters. Case-sensitive.
    """
    expression = re.compile("|".join(f"(?:{_translate(glob)})" for glob in globs) or r"(?!)", re.DOTALL)
    return lambda path: bool(expression.fullmatch(path))


def _translate(glob: str) -> str:
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^\]/]+\]|.", glob, re.DOTALL)
    known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    sets = {part: part.replace("[!", "[^").replace("\\", "\\\\") for part in parts if len(part) > 1 and part[0] == "["}
    return "".join(known.get(part) or sets.get(part) or re.escape(part) for part in parts)


def parse(values: Any, kind: Any, where: str) -> Any:
    """Converts parsed TOML values to the dataclass `kind`, guided by the types of its fields.

    Raises:
      InputError: a key is missing or unknown, or its value has the wrong type; the message begins with `where`.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a table of keys, not {values!r}")
    hints = typing.get_type_hints(kind)
    known = {_KEYS.get(name, name): name for name in hints}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise InputError(f"{where}: {field.name} is missing")
    return kind(**{known[key]: _convert(value, hints[known[key]], f"{where}: {key}") for key, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return parse(value, kind, where)
    if isinstance(kind, types.UnionType):
        kind = type(value) if type(value) in arguments else arguments[0]
    elif typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(one, arguments[0], f"{where} {number}") for number, one in enumerate(value, 1))
    elif arguments:  # a mapping
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a table of keys, not {value!r}")
        return {key: _convert(one, arguments[1], f"{where}.{key}") for key, one in value.items()}
    if type(value) is not kind:
        raise InputError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value


def check(entry: Entry, where: str) -> None:
    """Raises InputError if a value is not valid."""

    def need(fine: bool, what: str) -> None:
        if not fine:
            raise InputError(f"{where}: {what}")

    need(bool(_NAME.fullmatch(entry.name)), f"name {entry.name!r} must be lower case letters, digits and underscores")
    need(entry.access in ACCESS, f"access {entry.access!r} must be one of {', '.join(ACCESS)}")
    need(entry.verified in VERIFIED, f"verified {entry.verified!r} must be one of {', '.join(VERIFIED)}")
    need(bool(re.fullmatch(r"\d+\.\d+\.\d+", entry.version)), f"version {entry.version!r} must be like 1.0.0")
    need(len({name.casefold() for name in entry.classes}) == len(entry.classes), "classes has a name twice")
    for key in entry.expected:
        need(key in ("files", "frames", "patients", "videos", *entry.classes), f"expected.{key} is not counted")
    for download in entry.downloads:
        need(
            download.extract in (True, False, "nested"), f"extract of {download.file!r} must be true, false or 'nested'"
        )
    for number, layout in enumerate(entry.layouts, 1):
        for what, fine in _checks(layout, entry.classes):
            need(fine, f"layout {number}: {what}")


def _checks(layout: Layout, classes: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yields each requirement on a layout, as an error message, and whether it is met."""
    patterns = [layout.pattern, *(folds.pattern for folds in layout.folds)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"pattern {pattern!r} is no regular expression: {error}", False
    yield "include is empty", bool(layout.include)
    yield f"content {layout.content!r} must be 'dicom' or left out", layout.content in ("", "dicom")
    yield f"mask_kind {layout.mask_kind!r} must be one of {', '.join(MASK_KINDS)}", layout.mask_kind in MASK_KINDS
    templates = [layout.patient, layout.video, layout.frame, layout.split, layout.label, layout.mask]
    templates += [table.match for table in layout.tables] + [folds.match for folds in layout.folds]
    known = _PLACES | set(re.compile(layout.pattern).groupindex)
    for field in _FIELD.findall("".join(templates)):
        yield f"{{{field}}} is no group of the pattern and none of {', '.join(sorted(_PLACES))}", field in known
    for key, value in layout.splits.items():
        yield f"splits.{key} must be one of {', '.join(SPLITS)}, not {value!r}", value in SPLITS
    for key, value in layout.labels.items():
        yield f"labels.{key}: {value!r} is not in classes", value in classes
    for key, option in layout.reader.items():
        yield f"reader.{key} must be one of {', '.join(READER)}, of its type", type(option) is READER.get(key)
    for folds in layout.folds:
        yield f"folds {folds.name!r} needs either part or others", bool(folds.part) != bool(folds.others)
        for key, value in folds.parts.items():
            yield f"parts.{key} must be one of {', '.join(SPLITS)}, not {value!r}", value in SPLITS
        yield f"folds name {folds.name!r} must be that of a file", bool(re.fullmatch("[a-z0-9_-]+", folds.name))
