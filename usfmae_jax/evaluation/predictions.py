"""Predictions of a run, one row for each frame and member, and the CSV that holds them."""

import csv
import dataclasses
import functools
import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from usfmae_jax.errors import InputError

_COLUMNS = ("dataset", "patient", "video", "frame", "fold", "seed", "fraction", "label", "predicted")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What models said about frames that they were not fitted on; N rows, C classes.

    A frame has one row for each member that was tested on it: k-fold cross-validation tests it once, several seeds or
    label fractions test it several times.

    Attributes:
      classes: names, in the order of the columns of `probabilities`.
      dataset, patient, video, frame: str `[N]`, ids as records have them; (dataset, video, frame) names a frame.
      fold: str `[N]`, name of the fold whose test part the row belongs to.
      label: int `[N]`, in [0, C).
      probabilities: float64 `[N, C]`, in [0, 1].
      seed: int `[N]`, of the member.
      fraction: float64 `[N]`, share of the training patients that the member was fitted on, in (0, 1].
    """

    classes: tuple[str, ...]
    dataset: np.ndarray
    patient: np.ndarray
    video: np.ndarray
    frame: np.ndarray
    fold: np.ndarray
    label: np.ndarray
    probabilities: np.ndarray
    seed: np.ndarray
    fraction: np.ndarray

    def __post_init__(self):
        count = len(self.label)
        for name in ("dataset", "patient", "video", "frame", "fold"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=object))
        for name, dtype in (("label", int), ("probabilities", np.float64), ("seed", int), ("fraction", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        for field in dataclasses.fields(self):
            if field.name != "classes" and len(getattr(self, field.name)) != count:
                raise ValueError(f"{field.name} has {len(getattr(self, field.name))} rows, label has {count}")
        if self.probabilities.shape != (count, len(self.classes)):
            raise ValueError(f"probabilities are {self.probabilities.shape}, not {(count, len(self.classes))}")
        if count and not (self.label.min() >= 0 and self.label.max() < len(self.classes)):
            raise ValueError(f"labels must lie in [0, {len(self.classes)})")
        if not ((self.probabilities >= 0) & (self.probabilities <= 1 + 1e-6)).all():
            raise ValueError("probabilities must lie in [0, 1]")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class, the first of equal ones: int `[N]`."""
        return self.probabilities.argmax(axis=1)

    @functools.cached_property
    def frame_key(self) -> np.ndarray:
        """What names a frame in every run, dataset/video/frame: str `[N]`."""
        return _join(self.dataset, self.video, self.frame)

    @functools.cached_property
    def patient_key(self) -> np.ndarray:
        """What names a patient in every run: str `[N]`; an unknown one is its video's, or the frame's."""
        known = _join(self.dataset, np.where(self.patient != "", self.patient, self.video))
        return np.where((self.patient != "") | (self.video != ""), known, self.frame_key)

    def select(self, rows: np.ndarray) -> "Predictions":
        """The rows of a bool mask or of indices."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "classes"]
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in names})

    def write(self, path: str | epath.Path) -> None:
        """Writes a CSV that `read` gives back exactly; the file appears whole or not at all."""
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*_COLUMNS, *(f"p_{name}" for name in self.classes)])
        predicted = self.predicted.tolist()
        # repr, which csv uses for floats, is the shortest text that reads back as the same number.
        for i, (seed, fraction, label, probabilities) in enumerate(
            zip(
                self.seed.tolist(),
                self.fraction.tolist(),
                self.label.tolist(),
                self.probabilities.tolist(),
                strict=True,
            )
        ):
            names = self.dataset[i], self.patient[i], self.video[i], self.frame[i], self.fold[i]
            table.writerow([*names, seed, fraction, self.classes[label], self.classes[predicted[i]], *probabilities])
        path = epath.Path(path)
        partial = path.parent / (path.name + ".partial")
        partial.write_bytes(text.getvalue().encode())
        partial.replace(path)


def read(path: str | epath.Path) -> Predictions:
    """Reads `predictions.csv`, or the one in a workdir.

    Raises:
      InputError: there is none, or the file is something else; says what it lacks.
    """
    file = epath.Path(path)
    if file.is_dir():
        file = file / "predictions.csv"
    try:
        rows = list(csv.reader(io.StringIO(file.read_bytes().decode(), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: no predictions there ({reason}); name a workdir of finetune or evaluate, or its predictions.csv"
        ) from error
    head, body = (rows[0] if rows else []), rows[1:]
    missing = [name for name in _COLUMNS if name not in head and name != "predicted"]
    classes = tuple(name[2:] for name in head if name.startswith("p_"))
    if missing or len(classes) < 2 or len(set(head)) < len(head):
        what = f"column {missing[0]!r}" if missing else "a probability column p_CLASS for each of two or more classes"
        raise InputError(f"{path} is no predictions.csv of finetune or evaluate: it needs {what}")
    numbers = {name: i for i, name in enumerate(classes)}
    try:
        columns = dict(zip(head, zip(*body, strict=True), strict=True)) if body else dict.fromkeys(head, ())
        return Predictions(
            classes=classes,
            **{name: np.array(columns[name], object) for name in _COLUMNS[:5]},
            label=np.array([numbers[name] for name in columns["label"]], int),
            probabilities=np.array([columns[f"p_{name}"] for name in classes], np.float64).T,
            seed=np.array([int(value) for value in columns["seed"]], int),
            fraction=np.array([float(value) for value in columns["fraction"]], np.float64),
        )
    except KeyError as error:
        raise InputError(f"{path}: label {error} is none of its classes {', '.join(classes)}") from error
    except ValueError as error:
        raise InputError(f"{path} is a damaged predictions.csv: {error}") from error


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """All rows of several predictions of the same classes, in order."""
    if len({part.classes for part in parts}) != 1:
        raise ValueError("only predictions of the same classes can be concatenated")
    names = [field.name for field in dataclasses.fields(Predictions) if field.name != "classes"]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Predictions(classes=parts[0].classes, **columns)


def _join(*columns: np.ndarray) -> np.ndarray:
    return np.array(["/".join(map(str, names)) for names in zip(*columns, strict=True)], str)
