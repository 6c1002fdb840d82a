"""What members said about the frames that they were tested on, in the forms that results and reports want."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from usfmae_jax.data.table import Table
from usfmae_jax.evaluation.predictions import Predictions, concatenate
from usfmae_jax.interop.model import Model

#: uint8 `[n, H, W, C]` to maps float32 `[n, gh, gw]`.
Attention = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """One member's probabilities; rows are those of the table of frames.

    Attributes:
      fold, seed, fraction: which member; see `evaluation.predictions.Predictions`.
      rows: int `[N]` that it was tested on.
      probabilities: float `[N, C]`.
      validation_rows: int `[V]` that its settings were chosen by.
      validation_probabilities: float `[V, C]`.
      settings: what was chosen; JSON.
    """

    fold: str
    seed: int
    fraction: float
    rows: np.ndarray
    probabilities: np.ndarray
    validation_rows: np.ndarray
    validation_probabilities: np.ndarray
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """All that an evaluation found.

    Attributes:
      tested: one entry for each member.
      excluded: near-duplicates taken out of training parts.
      split: where the folds come from, a few words.
      rows: int `[M]` of the frames in the embedding.
      points: float `[M, 2]`.
      space: what was embedded, a few words.
      attention: rollout of the model behind `tested[i]`; None where it has none.
      robustness: see `evaluation.results`.
      image_format: ((height, width), channels) of the models' input.
      warnings: sentences.
    """

    tested: list[Tested]
    excluded: list[dict[str, Any]]
    split: str
    rows: np.ndarray
    points: np.ndarray
    space: str
    attention: dict[int, Attention | None]
    robustness: dict[str, Any] | None
    image_format: tuple[tuple[int, int], int]
    warnings: tuple[str, ...] = ()


def foremost(tested: Sequence[Tested]) -> list[int]:
    """Which entries errors and corruptions are shown of: of the largest label fraction, those of the first seed."""
    fraction = max(t.fraction for t in tested)
    seed = next(t.seed for t in tested if t.fraction == fraction)
    return [number for number, t in enumerate(tested) if t.fraction == fraction and t.seed == seed]


def parted(features: np.ndarray, tested: Sequence[Tested], chosen: Sequence[int]) -> list[np.ndarray]:
    """Features of the chosen entries' rows, one after the other, cut into those of each."""
    return np.split(features, np.cumsum([len(tested[number].rows) for number in chosen])[:-1])


def predictions(frames: Table, tested: Sequence[Tested]) -> Predictions:
    """Of the test rows."""
    return concatenate([of_rows(frames, t, t.rows, t.probabilities) for t in tested])


def validation(frames: Table, tested: Sequence[Tested]) -> Predictions | None:
    """Of the validation rows; None if there are none."""
    parts = [
        of_rows(frames, t, t.validation_rows, t.validation_probabilities) for t in tested if len(t.validation_rows)
    ]
    return concatenate(parts) if len(parts) == len(tested) else None


def of_rows(frames: Table, member: Tested, rows: np.ndarray, probabilities: np.ndarray) -> Predictions:
    """A member's predictions of some rows."""
    ids = {name: getattr(frames, name)[rows] for name in ("dataset", "patient", "video")}
    return Predictions(
        classes=frames.label_names,
        **ids,
        frame=frames.frame_name[rows],
        fold=np.full(len(rows), member.fold, object),
        label=frames.label[rows],
        probabilities=probabilities,
        seed=np.full(len(rows), member.seed),
        fraction=np.full(len(rows), member.fraction),
    )


def embedding(frames: Table, outcome: Outcome) -> dict[str, Any] | None:
    """The map of features for the report; None without points."""
    if not len(outcome.rows):
        return None
    return {
        "points": outcome.points,
        "label": frames.label_name[outcome.rows],
        "dataset": frames.dataset[outcome.rows],
        "frame": frames.frame_key[outcome.rows],
        "space": outcome.space,
    }


def cautions(frames: Table) -> list[str]:
    """What a reader of any result on these frames has to know of them."""
    found = []
    # Without an id, a build writes the path of the file.
    unknown = int(((frames.patient == "") | (frames.patient == frames.source)).sum())
    if unknown:
        found.append(f"{unknown} of {len(frames)} frames have no patient id and count as patients of their own")
    if frames.damaged:
        found.append(f"{frames.damaged} damaged records were left out")
    return found


def title(protocol: str, weights: Model | None, datasets: Sequence[str]) -> str:
    """What was done, as a heading."""
    heads = {
        "logistic": "Logistic regression",
        "knn": "Nearest neighbours",
        "linear": "Linear probe",
        "attentive": "Attentive probe",
    }
    on = " and ".join(datasets)
    if weights is None:
        return f"{heads[protocol]} on raw pixels of {on}"
    if protocol == "finetuned":
        model = "ResNet-50" if weights.description["model"] == "resnet50" else "ViT"
        return f"Fine-tuned {model} on {on}"
    return f"{heads[protocol]} on a frozen encoder, {on}"
