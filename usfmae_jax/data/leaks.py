"""What belongs together, and the refusal to start from folds that part it.

Frames of one patient are no independent evidence, and neither are two copies of a picture: what belongs together is a
group, and a group is on one side of a split.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from usfmae_jax.data.split_files import Fold
from usfmae_jax.data.table import Labelled
from usfmae_jax.errors import InputError

Excluded = dict[str, str]


def groups(frames: Labelled, pairs: np.ndarray | None = None) -> np.ndarray:
    """Numbers what belongs together: connected components over patients, videos and pairs of rows.

    Args:
      frames: N rows.
      pairs: int `[P, 2]`, rows that show the same picture; None = none.

    Returns:
      int64 `[N]`, counted in the order of the rows.
    """
    return _components([frames.patient_key, frames.video_key], pairs)


def _components(keys: Sequence[np.ndarray], pairs: np.ndarray | None) -> np.ndarray:
    """Rows that share a value of any key, or a pair, share a number."""
    count = len(keys[0])
    edges = [np.asarray(pairs if pairs is not None else (), np.int64).reshape(-1, 2)]
    for key in keys:
        _, first, codes = np.unique(key, return_index=True, return_inverse=True)
        edges.append(np.column_stack([np.arange(count), first[codes]]))
    one, other = np.concatenate(edges).T
    graph = coo_array((np.ones(len(one), bool), (one, other)), (count, count))
    _, first, codes = np.unique(connected_components(graph, directed=False)[1], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes]


def check(
    folds: Sequence[Fold], frames: Labelled, patient_groups: np.ndarray, pairs: np.ndarray | None = None
) -> tuple[list[Fold], list[Excluded]]:
    """Refuses folds that leak or cannot be learnt from, and takes copies of what is tested out of the rest.

    Where patients are connected by pictures that both have, they are one person under two names: then only the frames
    in test stay, or those in validation if none is in test. So official test parts stay as they were published.

    Args:
      folds: to check.
      frames: N rows.
      patient_groups: int `[N]`, `groups` without pairs.
      pairs: int `[P, 2]`, rows that show the same picture.

    Returns:
      The folds without copies; and what was taken out: `fold`, `part`, `dataset`, `patient`, `video`, `frame`, and in
      `of` and `reason` because of which frame of which part.

    Raises:
      InputError: a patient or video is on two sides, or a part lacks a class.
    """
    persons = _components([patient_groups], pairs)
    checked, excluded = [], []
    for fold in folds:
        sides = np.zeros(len(frames), np.int64)  # 0 = none
        for side, rows in enumerate(fold.parts().values(), start=1):
            sides[rows] = side
        _refuse_leaks(fold, frames, sides, patient_groups)
        highest = np.zeros(persons.max() + 1, np.int64)
        np.maximum.at(highest, persons, sides)
        copies = np.flatnonzero((sides > 0) & (sides < highest[persons]))
        excluded += [_reason(fold, frames, int(row), sides, persons, pairs) for row in copies]
        fold = Fold(fold.name, **{part: np.setdiff1d(rows, copies) for part, rows in fold.parts().items()})
        _refuse_missing_classes(fold, frames)
        checked.append(fold)
    return checked, excluded


def _refuse_leaks(fold: Fold, frames: Labelled, sides: np.ndarray, patient_groups: np.ndarray) -> None:
    used = np.flatnonzero(sides)
    parts = ["", *fold.parts()]
    keys = {"patient": frames.patient_key, "video": frames.video_key, "group": patient_groups}
    for kind, key in keys.items():
        names, codes = np.unique(key[used], return_inverse=True)
        low, high = np.full(len(names), len(parts)), np.zeros(len(names), np.int64)
        np.minimum.at(low, codes, sides[used])
        np.maximum.at(high, codes, sides[used])
        if len(split := np.flatnonzero(low < high)):
            one = split[0]
            raise InputError(
                f"fold {fold.name}: {kind} {names[one]} is in {parts[low[one]]} and in {parts[high[one]]}"
                f"{f', and so are {len(split) - 1} others' if len(split) > 1 else ''}; give all frames of a {kind} the "
                "same part, or use --config.split.kind=group"
            )


def _refuse_missing_classes(fold: Fold, frames: Labelled) -> None:
    for part, rows in fold.parts().items():
        counts = np.bincount(frames.label[rows], minlength=len(frames.class_names))
        if not counts.all():
            label = int(np.argmin(counts))
            patients = len(np.unique(frames.patient_key[frames.label == label]))
            raise InputError(
                f"fold {fold.name} has no frame of class {frames.class_names[label]!r} in {part} ({patients} patients "
                "have it in all); use fewer folds, or another split"
            )


def _reason(
    fold: Fold, frames: Labelled, row: int, sides: np.ndarray, persons: np.ndarray, pairs: np.ndarray | None
) -> Excluded:
    """Says because of which frame a row cannot stay: one that shows the same, or else one of a connected patient."""
    parts = ["", *fold.parts()]
    kept = np.flatnonzero((persons == persons[row]) & (sides == sides[persons == persons[row]].max()))
    edges = np.asarray(pairs if pairs is not None else (), np.int64).reshape(-1, 2)
    partners = np.concatenate([edges[edges[:, 0] == row, 1], edges[edges[:, 1] == row, 0]])
    direct = np.intersect1d(partners, kept)
    other = int(direct[0] if len(direct) else kept[0])
    what = "the same picture as" if len(direct) else "of a patient who has the same picture as the patient of"
    return {
        "fold": fold.name,
        "part": parts[sides[row]],
        **{name: str(getattr(frames, name)[row]) for name in ("dataset", "patient", "video", "frame")},
        "of": str(frames.frame_key[other]),
        "reason": f"{what} {frames.frame_key[other]} in {parts[sides[other]]}",
    }
