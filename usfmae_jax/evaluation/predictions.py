"""Predictions of a run, one row per frame and member, and the CSV file that stores them."""

import csv
import dataclasses
import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np
from etils import epath

from usfmae_jax import files
from usfmae_jax.data import cells
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError

_TEXTS = ("dataset", "patient", "video", "frame", "fold")
_IDS = (*_TEXTS, "seed", "fraction")
_COMMON = (*_IDS, "copied")  # of all tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of models on frames that they were not trained on; N rows.

    A frame has one row for each member that was tested on it: one in k-fold cross-validation, several with several
    seeds or label fractions. A task adds its predictions as further fields, float `[N]`, which become CSV columns of
    the same names; for anything else it overrides `columns` and `from_columns`.

    Attributes:
      dataset, patient, video, frame: str `[N]`, ids as in records; (dataset, video, frame) identifies a frame.
      fold: str `[N]`, name of the fold whose test part the row belongs to.
      seed: int `[N]`, of the member.
      fraction: float64 `[N]`, share of the training patients that the member was trained on, in (0, 1].
      copied: bool `[N]`, whether the same image is also in another part of the split under another patient's name;
        empty = none. Every metric is also reported without such frames.
    """

    dataset: np.ndarray
    patient: np.ndarray
    video: np.ndarray
    frame: np.ndarray
    fold: np.ndarray
    seed: np.ndarray
    fraction: np.ndarray
    copied: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self):
        kinds = self.kinds()
        object.__setattr__(self, "copied", self.copied if len(self.copied) else np.zeros(len(self.dataset), bool))
        for name in self.rows():
            object.__setattr__(self, name, np.asarray(getattr(self, name), kinds.get(name, np.float64)))
            if len(getattr(self, name)) != len(self.dataset):
                raise ValueError(f"{name} has {len(getattr(self, name))} rows, dataset has {len(self.dataset)}")

    def __len__(self) -> int:
        return len(self.dataset)

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """Names of the fields with one row per prediction."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """Dtypes of the fields with one row per prediction, where they are not float64."""
        return dict.fromkeys(_TEXTS, object) | {"seed": int, "fraction": np.float64, "copied": bool}

    @functools.cached_property
    def frame_key(self) -> np.ndarray:
        """Identifier of a frame across runs, dataset/video/frame: str `[N]`."""
        return _join(self.dataset, self.video, self.frame)

    @functools.cached_property
    def patient_key(self) -> np.ndarray:
        """Identifier of a patient across runs: str `[N]`; if unknown, that of the video, or else of the frame."""
        known = _join(self.dataset, np.where(self.patient != "", self.patient, self.video))
        return np.where((self.patient != "") | (self.video != ""), known, self.frame_key)

    def counts(self) -> dict[str, int]:
        """Numbers of distinct frames, patients, videos, folds and seeds.

        Includes `patients_known`: 0 if no patient is known and each frame or clip counts as its own patient.
        """
        file = np.array([name.partition("#")[0] for name in self.frame], object)
        unknown = (self.patient == "") | (self.patient == self.video) & (self.patient == file)
        return ({"patients_known": 0} if len(self) and unknown.all() else {}) | {
            "frames": len(set(self.frame_key)),
            "patients": len(set(self.patient_key)),
            "videos": len({*zip(self.dataset, self.video, strict=True)}),
            "folds": len(set(self.fold)),
            "seeds": len(set(self.seed.tolist())),
        }

    def select(self, rows: np.ndarray) -> Self:
        """The rows selected by a bool mask or indices."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in self.rows()})

    def columns(self) -> dict[str, Sequence[Any]]:
        """The columns of the CSV other than the ids: N values each."""
        own = {name: getattr(self, name) for name in self.rows() if name not in _COMMON}
        for name, values in own.items():
            if values.ndim != 1:  # fail now rather than when reading
                raise ValueError(f"{name} is {values.shape}, and a column is [N]: give it a field for each column")
        return {name: values.tolist() for name, values in own.items()}

    @classmethod
    def from_columns(cls, ids: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[str]]) -> Self:
        """The inverse of `columns`.

        Raises:
          KeyError, ValueError: a column is missing or has invalid values.
        """
        own = {name: np.array([float(value) for value in columns[name]]) for name in cls.rows() if name not in _COMMON}
        return cls(**ids, **own)

    @classmethod
    def beside(cls, path: epath.Path) -> dict[str, Sequence[Any]]:
        """Reads further columns for `from_columns` from a file next to the CSV at `path`; KeyError if it is missing."""
        return {}

    def write(self, path: str | epath.Path) -> None:
        """Writes a CSV that `read` restores exactly; the file is written atomically."""
        text = io.StringIO(newline="")
        columns = {name: getattr(self, name).tolist() for name in _IDS}
        columns |= {"copied": self.copied.astype(int).tolist()} if np.any(self.copied) else {}
        columns |= self.columns()
        # csv writes floats with repr, the shortest text that reads back as the same number.
        cells.write(text, columns, zip(*columns.values(), strict=True))
        files.write(path, text.getvalue())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassPredictions(Predictions):
    """Predictions of C classes.

    Attributes:
      classes: names, in the order of the columns of `probabilities`.
      label: int `[N]`, in [0, C).
      probabilities: float64 `[N, C]`, in [0, 1].
    """

    classes: tuple[str, ...]
    label: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self):
        super().__post_init__()
        count = len(self)
        object.__setattr__(self, "label", self.label.astype(int))
        if self.probabilities.shape != (count, len(self.classes)):
            raise ValueError(f"probabilities are {self.probabilities.shape}, not {(count, len(self.classes))}")
        if count and not (self.label.min() >= 0 and self.label.max() < len(self.classes)):
            raise ValueError(f"labels must lie in [0, {len(self.classes)})")
        if not ((self.probabilities >= 0) & (self.probabilities <= 1 + 1e-6)).all():
            raise ValueError("probabilities must lie in [0, 1]")

    @classmethod
    def rows(cls) -> tuple[str, ...]:
        """See `Predictions`."""
        return tuple(name for name in super().rows() if name != "classes")

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class, the first one if tied: int `[N]`."""
        return self.probabilities.argmax(axis=1)

    def columns(self) -> dict[str, Sequence[Any]]:
        """Names of the true and the predicted class, and a probability `p_CLASS` for each class."""
        said = {"label": self.label, "predicted": self.predicted}
        names = {column: [self.classes[one] for one in numbers.tolist()] for column, numbers in said.items()}
        probabilities = self.probabilities.T.tolist()
        return names | {f"p_{name}": probabilities[i] for i, name in enumerate(self.classes)}

    @classmethod
    def from_columns(cls, ids: Mapping[str, np.ndarray], columns: Mapping[str, Sequence[str]]) -> Self:
        """See `Predictions`."""
        classes = tuple(name[2:] for name in columns if name.startswith("p_"))
        if "label" not in columns or len(classes) < 2:
            lacks = "a probability column p_CLASS for each of two or more classes"
            raise KeyError("column 'label'" if "label" not in columns else lacks)
        numbers = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in columns["label"] if name not in numbers]
        if unknown:
            raise InputError(f"label {unknown[0]!r} is none of its classes {', '.join(classes)}")
        return cls(
            **ids,
            classes=classes,
            label=np.array([numbers[name] for name in columns["label"]], int),
            probabilities=np.array([columns[f"p_{name}"] for name in classes], np.float64).T,
        )


Kind = TypeVar("Kind", bound=Predictions)


def columns(path: str | epath.Path) -> list[str]:
    """Column names of a `predictions.csv`, or of the one in a workdir; raises InputError if there is none."""
    return _rows(path, 1)[1][0]


def _rows(path: str | epath.Path, most: int | None = None) -> tuple[epath.Path, list[list[str]]]:
    """The file and its rows, the header first; at most `most` rows."""
    file = epath.Path(path)
    if file.is_dir():
        file = file / "predictions.csv"
    try:
        lines = cells.read(io.StringIO(file.read_bytes().decode(), newline=""))
        return file, list(itertools.islice(lines, most)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: no predictions there ({reason}); name a workdir of finetune or evaluate, or its predictions.csv"
        ) from error


def read(path: str | epath.Path, kind: type[Kind]) -> Kind:
    """Reads a `predictions.csv`, or the one in a workdir.

    Args:
      path: of the file or the workdir.
      kind: the task's type of predictions.

    Raises:
      InputError: there is none, or the file is not of this type (the message states what is missing).
    """
    file, (head, *body) = _rows(path)
    missing = [f"column {name!r}" for name in _IDS if name not in head]
    try:
        if missing or len(set(head)) < len(head):
            raise KeyError(missing[0] if missing else "columns of different names")
        columns = dict(zip(head, zip(*body, strict=True), strict=True)) if body else dict.fromkeys(head, ())
        ids = {name: np.array(columns.pop(name), object) for name in _TEXTS}
        ids["seed"] = np.array([int(value) for value in columns.pop("seed")], int)
        ids["fraction"] = np.array([float(value) for value in columns.pop("fraction")], np.float64)
        ids["copied"] = np.array([value == "1" for value in columns.pop("copied", ())], bool)
        return kind.from_columns(ids, columns | kind.beside(file))
    except KeyError as error:
        raise InputError(f"{path} is no predictions.csv of finetune or evaluate: it needs {error.args[0]}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except ValueError as error:
        raise InputError(f"{path} is a damaged predictions.csv: {error}") from error


def concatenate(parts: Sequence[Kind]) -> Kind:
    """Concatenates predictions of the same classes, in order."""
    if len({getattr(part, "classes", None) for part in parts}) != 1:
        raise ValueError("only predictions of the same classes can be concatenated")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].rows()}
    return dataclasses.replace(parts[0], **columns)


def identify(
    table: Table, rows: np.ndarray, fold: str, seed: int, fraction: float, copied: Sequence[int] | np.ndarray = ()
) -> dict[str, np.ndarray]:
    """The id fields of a member's predictions for rows of a table; `copied` are those rows that have copies."""
    ids = {name: getattr(table, name)[rows] for name in ("dataset", "patient", "video")}
    return ids | {
        "frame": table.frame_name[rows],
        "fold": np.full(len(rows), fold, object),
        "seed": np.full(len(rows), seed),
        "fraction": np.full(len(rows), fraction),
        "copied": np.isin(rows, copied),
    }


def _join(*columns: np.ndarray) -> np.ndarray:
    return np.array(["/".join(map(str, names)) for names in zip(*columns, strict=True)], str)
