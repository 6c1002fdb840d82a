"""Splits as files: official tables beside the shards, a user's own, and those that every run writes."""

import collections
import csv
import dataclasses
import io
import os
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from usfmae_jax.data import cells
from usfmae_jax.data.records import matches
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError

COLUMNS = ("dataset", "patient", "video", "frame", "group", "label", "fold", "part")
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """One split of the rows of a table; int64 arrays, ascending, disjoint.

    Attributes:
      name: '1', '2', ... or the name in the file; letters, digits, '.', '_' and '-' only. 'single' for a single fold.
      train: rows to train on.
      validation: rows to select models on.
      test: rows to report results on.
      copied: test rows with the same image as a frame of another patient in train or validation of the original split.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    copied: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def parts(self) -> dict[str, np.ndarray]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def read_splits(path: os.PathLike[str] | str, frames: Table, spare: int = 0) -> list[Fold]:
    """Reads folds from one CSV file, or from all CSV files of a folder.

    Columns: `frame`, `part` (train, validation or test) and, for several folds, `fold`; `dataset` and `video` if
    `frame` alone is not unique; others are ignored. `frame` holds the records' `frame`, or else their `source`. Frames
    of the table that a fold does not name are in none of its parts.

    Args:
      path: the file or folder. Without the column `fold`, each file of a folder is one fold, named after the file.
      frames: the table that the rows refer to.
      spare: how many frames may be named that are not in the table, because they are known to be damaged or left out.

    Returns:
      the folds, sorted by number, then name; `validation` is empty if the file has none.

    Raises:
      InputError: there is no such file, columns are missing, frames or parts are unknown, or a frame is in two parts.
    """
    root = epath.Path(path)
    files = sorted(matches(root, "*.csv")) if root.is_dir() else [root]
    if not files:
        raise InputError(f"there is no .csv file in the folder of splits {os.fspath(path)!r}")
    folds: list[Fold] = []
    for file in files:
        prefix = file.stem if len(files) > 1 else ""
        folds += _read_table(file, frames, spare, prefix)
    return sorted(folds, key=lambda fold: (not fold.name.isdecimal(), fold.name.zfill(9)))


def write_splits(path: os.PathLike[str] | str, frames: Table, folds: Sequence[Fold], groups: np.ndarray) -> None:
    """Writes folds as one CSV file, from which `read_splits` reads the same folds; see `COLUMNS`.

    Args:
      path: path of the file.
      frames: the table that the rows refer to.
      folds: the folds to write.
      groups: int `[N]`, group of each row; written so that a reader can check that no group is on two sides.
    """
    lines = []
    for fold in folds:
        rows = np.concatenate(list(fold.parts().values()))
        parts = np.repeat(list(fold.parts()), [len(part) for part in fold.parts().values()])
        for at in np.argsort(rows, kind="stable"):
            row = rows[at]
            names = frames.dataset[row], frames.patient[row], frames.video[row], frames.frame_name[row]
            lines.append([*names, groups[row], frames.label_name[row], fold.name, parts[at]])
    write_csv(path, COLUMNS, lines)


def write_csv(path: os.PathLike[str] | str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a CSV file atomically."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    cells.write(text, header, rows)
    temporary = target.parent / f"{target.name}.{os.getpid()}"
    temporary.write_text(text.getvalue())
    temporary.replace(target)


def official_tables(frames: Table) -> list[epath.Path]:
    """The `splits/*.csv` that a build wrote beside the shards; [] if the shards are in several folders."""
    folders = {epath.Path(path).parent for path in frames.shards.paths}
    return sorted(matches(folders.pop() / "splits", "*.csv")) if len(folders) == 1 else []


def official(frames: Table, name: str = "") -> tuple[str, list[Fold]]:
    """The split that the authors of the dataset published.

    Args:
      frames: frames of one dataset.
      name: name of the table, such as '5-fold-cv'; "" = the one with the fewest folds.

    Returns:
      the table's name, and its folds from `read_splits`.

    Raises:
      InputError: there is none, or none of this name; or `read_splits` raised it.
    """
    tables = {table.stem: table for table in official_tables(frames)}
    if not tables:
        raise InputError(
            "there is no official split, no splits/*.csv beside one dataset's shards; use --config.split.kind=group"
        )
    if name and name not in tables:
        raise InputError(f"there is no official split {name!r}, only {', '.join(tables)}; set config.split.path")
    spare = frames.damaged + frames.left_out  # the split may name them although they have no row
    read = {one: read_splits(tables[one], frames, spare) for one in ([name] if name else tables)}
    chosen = min(read, key=lambda one: (len(read[one]), one))
    return chosen, read[chosen]


def _read_table(file: epath.Path, frames: Table, spare: int, prefix: str) -> list[Fold]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
        lines = cells.read(io.StringIO(text, newline=""))
        header = [name.strip().lower() for name in next(lines, [])]
        table = [
            dict.fromkeys(header, "") | dict(zip(header, map(str.strip, line), strict=False)) for line in lines if line
        ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the file of splits {os.fspath(file)!r} cannot be read: {error}; check its name") from error
    if not table or not {"frame", "part"} <= set(header):
        raise InputError(
            f"the file of splits {file.name} needs the columns frame and part and a row for each frame, not "
            f"{', '.join(header) or 'nothing'}"
        )
    rows = _find_rows(table, frames, file.name, spare)
    sides: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for line, row in zip(table, rows, strict=True):
        part = _PARTS.get(line["part"].lower())
        if part is None:
            raise InputError(
                f"the file of splits {file.name} has the part {line['part']!r}; write train, validation or test"
            )
        if row >= 0:
            sides[line.get("fold", "")][part].append(row)
    return [_fold(_name(prefix, fold, len(sides)), parts, frames) for fold, parts in sides.items()]


def _name(prefix: str, fold: str, count: int) -> str:
    name = "-".join(filter(None, (prefix, fold))) or ("single" if count == 1 else "none")
    if not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
        raise InputError(f"the fold {name!r} needs a name of letters, digits, '.', '_' and '-' only; rename it")
    return name


def _fold(name: str, parts: dict[str, list[int]], frames: Table) -> Fold:
    arrays = {part: np.unique(np.asarray(parts.get(part, ()), np.int64)) for part in ("train", "validation", "test")}
    values, counts = np.unique(np.concatenate(list(arrays.values())), return_counts=True)
    if (counts > 1).any():
        frame = str(frames.frame_key[values[counts > 1][0]])
        raise InputError(f"fold {name} has frame {frame!r} in two parts; name it once")
    return Fold(name, **arrays)


def _find_rows(table: list[dict[str, str]], frames: Table, where: str, spare: int) -> list[int]:
    """The row of every line, -1 if there is none; `frame` is matched with the key that finds the most."""
    best: tuple[int, list[int], list[str], list[str]] | None = None
    ids = [name for name in ("dataset", "video") if name in table[0]]
    for columns in ([*ids, "frame"], ["frame_key"], ["source"]):
        keys = list(zip(*(getattr(frames, column).tolist() for column in columns), strict=True))
        place = dict(zip(keys, range(len(frames)), strict=True))
        several = {key for key, count in collections.Counter(keys).items() if count > 1}
        wanted = [tuple(line.get(column, line["frame"]) for column in columns) for line in table]
        # Unique, in the order of the file.
        unknown = ["/".join(key) for key in dict.fromkeys(wanted) if key not in place]
        unclear = ["/".join(key) for key in dict.fromkeys(wanted) if key in several]
        if best is None or len(unknown) + len(unclear) < best[0]:
            best = len(unknown) + len(unclear), [place.get(key, -1) for key in wanted], unknown, unclear
    assert best is not None
    _, rows, unknown, unclear = best
    if len(unknown) > spare:
        raise InputError(
            f"the file of splits {where} names {len(unknown)} frames that are not in the data, first "
            f"{unknown[0]!r}; frames of the data are named like {str(frames.frame[0])!r}"
        )
    if unclear:
        raise InputError(
            f"the file of splits {where} names {unclear[0]!r}, as {len(unclear)} frames or more are called alike; add "
            "the columns dataset and video"
        )
    return rows
