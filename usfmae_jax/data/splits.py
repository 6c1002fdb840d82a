"""Who is trained on and who is tested: folds that keep patients, videos and near-duplicates on one side.

`plan` decides which folds a run has, wherever they come from, and lets none pass that `leaks.check` refuses.
"""

import os
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from usfmae_jax.data import split_files
from usfmae_jax.data.leaks import Excluded
from usfmae_jax.data.leaks import check as check
from usfmae_jax.data.leaks import groups as groups
from usfmae_jax.data.split_files import Fold as Fold
from usfmae_jax.data.split_files import official as official
from usfmae_jax.data.split_files import read_splits as read_splits
from usfmae_jax.data.split_files import write_splits as write_splits
from usfmae_jax.data.table import Labelled
from usfmae_jax.errors import InputError

KINDS = ("auto", "official", "shards", "group", "single")


def group_folds(frames: Labelled, groups: np.ndarray, count: int, validation: float, seed: int) -> list[Fold]:
    """Cross-validation: every group is tested in one of `count` folds, with classes as even as groups allow.

    Args:
      frames: N rows.
      groups: int `[N]`.
      count: of folds, at least 2.
      validation: share of the groups that are not tested, in (0, 1), by which a fold chooses.
      seed: of the draw.

    Raises:
      InputError: a class has fewer groups than there are folds.
    """
    _check_share("validation", validation)
    per_class = [len(np.unique(groups[frames.label == label])) for label in range(len(frames.class_names))]
    fewest = int(np.argmin(per_class))
    if not 2 <= count <= per_class[fewest]:
        raise InputError(
            f"config.split.folds={count} needs 2 folds or more and not more than groups: class "
            f"{frames.class_names[fewest]!r} has {per_class[fewest]} patients or groups"
            f"{' of patients that share a video or a picture' if per_class[fewest] else ''}"
        )
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    folds = []
    for number, (rest, test) in enumerate(splitter.split(frames.label, frames.label, groups)):
        part = _draw(frames, rest, groups, validation, seed + number)
        folds.append(Fold(str(number + 1), rest[~part], rest[part], np.asarray(test)))
    return folds


def single(frames: Labelled, groups: np.ndarray, validation: float, test: float, seed: int) -> list[Fold]:
    """One split: a share `test` of the groups is tested, and a share `validation` of the others chooses."""
    _check_share("validation", validation)
    _check_share("test", test)
    rows = np.arange(len(frames))
    tested = _draw(frames, rows, groups, test, seed)
    chosen = _draw(frames, rows[~tested], groups, validation, seed + 1)
    return [Fold("single", rows[~tested][~chosen], rows[~tested][chosen], rows[tested])]


def from_shards(frames: Labelled, groups: np.ndarray, validation: float, seed: int) -> list[Fold]:
    """The TFDS splits that the shards are named for; where there is no validation, a share of the training groups.

    Raises:
      InputError: the shards have no train or no test split.
    """
    named = {part: np.flatnonzero(np.isin(frames.split, names)) for part, names in _SPLITS.items()}
    for part in ("train", "test"):
        if not len(named[part]):
            there = sorted(set(frames.split.tolist()) - {""})
            raise InputError(
                f"the shards have no {part} split, only {', '.join(there) or 'unnamed ones'}; leave config.data.split "
                "empty, or use --config.split.kind=group"
            )
    return _with_validation([Fold("single", **named)], frames, groups, validation, seed)


_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def _with_validation(
    folds: Sequence[Fold], frames: Labelled, groups: np.ndarray, validation: float, seed: int
) -> list[Fold]:
    """Carves a validation part out of train, by group, in those folds that have none."""
    result = []
    for number, fold in enumerate(folds):
        if not len(fold.validation):
            _check_share("validation", validation)
            part = _draw(frames, fold.train, groups, validation, seed + number)
            fold = Fold(fold.name, fold.train[~part], fold.train[part], fold.test)
        result.append(fold)
    return result


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise InputError(f"config.split.{name}={share:g} is a share of the patients; give one above 0 and below 1")


def _draw(frames: Labelled, rows: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which of `rows` a share of their groups has, of every class the same share but one at least: bool `[len(rows)]`.

    A group belongs to the class that most of its frames have. A larger share of the same seed contains a smaller one.
    """
    _, codes = np.unique(groups[rows], return_inverse=True)
    counts = np.zeros((codes.max(initial=-1) + 1, len(frames.class_names)), np.int64)
    np.add.at(counts, (codes, frames.label[rows]), 1)
    order = np.random.default_rng(seed).permutation(len(counts))
    chosen = np.zeros(len(counts), bool)
    for label in range(counts.shape[1]):
        own = order[counts[order].argmax(axis=1) == label]
        chosen[own[: max(1, round(share * len(own)))]] = True
        # A class that no group has most of comes with the first group that has it at all.
        chosen[order[counts[order, label] > 0][:1]] = True
    return chosen[codes]


def take_fraction(frames: Labelled, fold: Fold, groups: np.ndarray, fraction: float, seed: int) -> Fold:
    """The fold with a share of its training groups; validation and test stay.

    Stratified by class, at least one group of each. For one seed, 1% is part of 5%, which is part of 10%.

    Raises:
      InputError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"config.fractions has {fraction:g}; give shares of the training patients above 0, 1 at most")
    if fraction == 1:
        return fold
    return Fold(fold.name, fold.train[_draw(frames, fold.train, groups, fraction, seed)], fold.validation, fold.test)


def plan(
    frames: Labelled,
    *,
    kind: str = "auto",
    path: str = "",
    folds: int = 5,
    validation: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    pairs: np.ndarray | None = None,
) -> tuple[list[Fold], np.ndarray, list[Excluded], str]:
    """Decides on the folds and checks them.

    Args:
      frames: N rows.
      kind: 'official' (the makers' table beside the shards), 'shards' (their TFDS splits), 'group' (cross-validation
        by patient) or 'single' (one split by patient); 'auto' takes `path` if given, else the first that is there.
      path: a file or folder for `read_splits`; or, with 'official', the table's name.
      folds: how many, of 'group'.
      validation: share of the training patients, where the split has no validation part.
      test: share of all patients, of 'single'.
      seed: of what is drawn.
      pairs: int `[P, 2]`, rows that show the same picture, see `duplicates`.

    Returns:
      The folds; groups int64 `[N]` (patients, videos and pairs together); what `check` excluded; and a sentence that
      says which split it is.

    Raises:
      InputError: no such split, or one that leaks or lacks a class.
    """
    if kind not in KINDS:
        raise InputError(f"config.split.kind={kind!r} is not known; give one of {', '.join(KINDS)}")
    if path and kind not in ("auto", "official"):
        raise InputError(f"config.split.path={path!r} needs --config.split.kind=auto, not {kind}")
    patients, together = groups(frames), groups(frames, pairs)
    if kind == "auto" and not path:
        named = {"train", "test"} <= set(frames.split.tolist())
        kind = "official" if split_files.official_tables(frames) else "shards" if named else "group"
    if kind == "official":
        name, found = official(frames, path)
        found, shared = _without_shared_validation(found, patients)
        note = f"official split {name}"
        note += f" (its validation shares {shared} patients with train and is drawn anew)" if shared else ""
    elif kind == "auto":
        found = read_splits(path, frames, frames.damaged + frames.unlabelled)
        note = f"split of {os.path.basename(path.rstrip('/'))}"
    elif kind == "shards":
        found, note = from_shards(frames, together, validation, seed), "train and test splits of the shards"
    elif kind == "group":
        found, note = group_folds(frames, together, folds, validation, seed), "cross-validation by patient"
    else:
        found, note = single(frames, together, validation, test, seed), "one split by patient"
    drawn = kind in ("group", "single") or any(not len(fold.validation) for fold in found)
    found, excluded = check(_with_validation(found, frames, together, validation, seed), frames, patients, pairs)
    used = min(sum(map(len, fold.parts().values())) for fold in found)
    note += f": {len(found)} fold{'s' if len(found) > 1 else ''}"
    note += f"; validation is {validation:.0%} of the other patients" if drawn else ""
    note += f"; {len(excluded)} copies of tested pictures are taken out" if excluded else ""
    note += f"; up to {len(frames) - used} frames are in no part" if used < len(frames) else ""
    return found, together, excluded, note


def _without_shared_validation(folds: Sequence[Fold], patients: np.ndarray) -> tuple[list[Fold], int]:
    """Gives validation parts back to train that were drawn by image, as some published ones are; test stays.

    Returns:
      The folds, and the highest number of patients on both sides in any of them.
    """
    shared = [len(np.intersect1d(patients[fold.train], patients[fold.validation])) for fold in folds]
    none = np.empty(0, np.int64)
    mended = [
        Fold(fold.name, np.union1d(fold.train, fold.validation), none, fold.test) if count else fold
        for fold, count in zip(folds, shared, strict=True)
    ]
    return mended, max(shared)
