"""Train, validation and test splits that keep patients, videos and near-duplicates on one side.

Frames of one patient are not independent, and neither are two copies of an image: they form a group, and a group is on
one side of a split. `plan` determines the folds of a run, whatever their source, and accepts none that `check` refuses.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from usfmae_jax.data import split_files
from usfmae_jax.data.split_files import Fold as Fold
from usfmae_jax.data.split_files import official as official
from usfmae_jax.data.split_files import read_splits as read_splits
from usfmae_jax.data.split_files import write_splits as write_splits
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError

KINDS = ("auto", "official", "shards", "group", "single")
_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}

Excluded = dict[str, str]


class Strata(NamedTuple):
    """Strata that every part of a split contains, in proportions as even as groups allow; usually the classes.

    Attributes:
      code: int `[N]`, the stratum of every row of a table, in [0, S).
      names: the S names. With only one stratum, splits are by patient without stratification.
    """

    code: np.ndarray
    names: tuple[str, ...]

    def called(self, stratum: int) -> str:
        """The name of a stratum for sentences."""
        return f"class {self.names[stratum]!r}" if len(self.names) > 1 else "the data"


def groups(frames: Table, pairs: np.ndarray | None = None) -> np.ndarray:
    """Numbers the groups of rows: connected components over patients, videos and pairs of rows.

    Args:
      frames: N rows.
      pairs: int `[P, 2]`, rows with the same image; None = none.

    Returns:
      int64 `[N]`, numbered in the order of the rows.
    """
    return _components([frames.patient_key, frames.video_key], pairs)


def _components(keys: Sequence[np.ndarray], pairs: np.ndarray | None) -> np.ndarray:
    """Connected components: rows that share a value of any key, or a pair, get the same number."""
    count = len(keys[0])
    edges = [np.asarray(pairs if pairs is not None else (), np.int64).reshape(-1, 2)]
    for key in keys:
        _, first, codes = np.unique(key, return_index=True, return_inverse=True)
        edges.append(np.column_stack([np.arange(count), first[codes]]))
    one, other = np.concatenate(edges).T
    graph = coo_array((np.ones(len(one), bool), (one, other)), (count, count))
    _, first, codes = np.unique(connected_components(graph, directed=False)[1], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes]


def group_folds(strata: Strata, groups: np.ndarray, count: int, validation: float, seed: int) -> list[Fold]:
    """Cross-validation: each group is tested in one of `count` folds, with strata as even as groups allow.

    Args:
      strata: strata of N rows.
      groups: int `[N]`, group of each row.
      count: number of folds, at least 2.
      validation: fraction, in (0, 1), of the groups outside the test part that form the validation part.
      seed: seed of the random draw.

    Raises:
      InputError: a stratum has fewer groups than there are folds.
    """
    _check_share("validation", validation)
    held = np.unique(np.stack([strata.code, groups]), axis=1)[0]  # each pair of stratum and group once
    each = np.bincount(held, minlength=len(strata.names))
    fewest = int(np.argmin(each))
    if not 2 <= count <= each[fewest]:
        raise InputError(
            f"config.split.folds={count} needs 2 folds or more and not more than groups: {strata.called(fewest)} has "
            f"{each[fewest]} patients or groups"
            f"{' of patients that share a video or a picture' if each[fewest] else ''}"
        )
    folds = []
    for number, (rest, test) in enumerate(cross_validation(strata.code, groups, count, seed)):
        part = _draw(strata, rest, groups, validation, seed + number)
        folds.append(Fold(str(number + 1), rest[~part], rest[part], test))
    return folds


def cross_validation(
    strata: np.ndarray, groups: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rest, test) rows of `count` folds of N rows: each group is tested in one, strata as even as groups allow."""
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(splitter.split(strata, strata, groups))


def single(strata: Strata, groups: np.ndarray, validation: float, test: float, seed: int) -> list[Fold]:
    """One split: a fraction `test` of the groups is for testing, a fraction `validation` of the rest for validation."""
    _check_share("validation", validation)
    _check_share("test", test)
    rows = np.arange(len(groups))
    tested = _draw(strata, rows, groups, test, seed)
    chosen = _draw(strata, rows[~tested], groups, validation, seed + 1)
    return [Fold("single", rows[~tested][~chosen], rows[~tested][chosen], rows[tested])]


def from_shards(frames: Table, strata: Strata, groups: np.ndarray, validation: float, seed: int) -> list[Fold]:
    """The TFDS splits in the names of the shards; without validation shards, a fraction of the training groups.

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
    return _with_validation([Fold("single", **named)], strata, groups, validation, seed)


def _with_validation(
    folds: Sequence[Fold], strata: Strata, groups: np.ndarray, validation: float, seed: int
) -> list[Fold]:
    """Takes a validation part from train, by group, in folds that have none."""
    result = []
    for number, fold in enumerate(folds):
        if not len(fold.validation):
            _check_share("validation", validation)
            part = _draw(strata, fold.train, groups, validation, seed + number)
            fold = Fold(fold.name, fold.train[~part], fold.train[part], fold.test)
        result.append(fold)
    return result


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise InputError(f"config.split.{name}={share:g} is a share of the patients; give one above 0 and below 1")


def _draw(strata: Strata, rows: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draws a fraction of the groups of `rows`, equal in every stratum and at least one group: bool `[len(rows)]`.

    A group belongs to the stratum of most of its frames. With the same seed, a larger share contains a smaller one.
    """
    _, codes = np.unique(groups[rows], return_inverse=True)
    order = np.random.default_rng(seed).permutation(codes.max(initial=-1) + 1)
    chosen = np.zeros(len(order), bool)
    # Only existing pairs of group and stratum: classes without frames, and absent pairs, cost nothing.
    (group, stratum), counts = np.unique(np.stack([codes, strata.code[rows]]), axis=1, return_counts=True)
    by_count = np.lexsort([stratum, -counts, group])
    most = stratum[by_count[np.unique(group[by_count], return_index=True)[1]]]
    ordered = order[np.argsort(most[order], kind="stable")]
    for own in np.split(ordered, np.flatnonzero(np.diff(most[ordered])) + 1):
        chosen[own[: max(1, round(share * len(own)))]] = True
    # A stratum that is not the main one of any group comes with the first group that contains it.
    by_place = np.lexsort([np.argsort(order)[group], stratum])
    chosen[group[by_place[np.unique(stratum[by_place], return_index=True)[1]]]] = True
    return chosen[codes]


def take_fraction(strata: Strata, fold: Fold, groups: np.ndarray, fraction: float, seed: int) -> Fold:
    """The fold with a fraction of its training groups; validation and test stay the same.

    Stratified, with at least one group of each stratum. For a given seed, 1% is a subset of 5%, and 5% of 10%.

    Raises:
      InputError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"config.fractions has {fraction:g}; give shares of the training patients above 0, 1 at most")
    if fraction == 1:
        return fold
    return dataclasses.replace(fold, train=fold.train[_draw(strata, fold.train, groups, fraction, seed)])


def plan(
    frames: Table,
    strata: Strata,
    *,
    kind: str = "auto",
    path: str = "",
    folds: int = 5,
    validation: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
    pairs: np.ndarray | None = None,
    copies: str = "drop",
) -> tuple[list[Fold], np.ndarray, list[Excluded], str]:
    """Determines the folds and checks them.

    Args:
      frames: N rows.
      strata: strata of the rows.
      kind: 'official' (the published table beside the shards), 'shards' (their TFDS splits), 'group' (cross-validation
        by patient) or 'single' (one split by patient); 'auto' = `path` if given, else the first possible one.
      path: a file or folder for `read_splits`; or, with 'official', the table's name.
      folds: number of folds for 'group'.
      validation: fraction of the training patients, if the split has no validation part.
      test: fraction of all patients, for 'single'.
      seed: seed of the random draws.
      pairs: int `[P, 2]`, rows with the same image, see `duplicates`.
      copies: 'drop' removes copies of test images from the other parts, 'keep' leaves a split as published.

    Returns:
      the folds; groups int64 `[N]` (patients, videos and pairs together); the rows that `check` excluded; and a phrase
      that describes the split.

    Raises:
      InputError: there is no such split, or it leaks or lacks a stratum.
    """
    if kind not in KINDS:
        raise InputError(f"config.split.kind={kind!r} is not known; give one of {', '.join(KINDS)}")
    if path and kind not in ("auto", "official"):
        raise InputError(f"config.split.path={path!r} needs --config.split.kind=auto, not {kind}")
    if copies not in ("drop", "keep"):
        raise InputError(f"config.split.copies={copies!r} must be 'drop' or 'keep'")
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
        found = read_splits(path, frames, frames.damaged + frames.left_out)
        note = f"split of {os.path.basename(path.rstrip('/'))}"
    elif kind == "shards":
        found, note = from_shards(frames, strata, together, validation, seed), "train and test splits of the shards"
    elif kind == "group":
        found, note = group_folds(strata, together, folds, validation, seed), "cross-validation by patient"
    else:
        found, note = single(strata, together, validation, test, seed), "one split by patient"
    drawn = kind in ("group", "single") or any(not len(fold.validation) for fold in found)
    found = _with_validation(found, strata, together, validation, seed)
    found, excluded = check(found, frames, strata, patients, pairs, keep=copies == "keep")
    used = min(sum(map(len, fold.parts().values())) for fold in found)
    note += f": {len(found)} fold{'s' if len(found) > 1 else ''}"
    note += f"; validation is {validation:.0%} of the other patients" if drawn else ""
    note += f"; {len(excluded)} copies of tested pictures are taken out" if excluded else ""
    kept = max(len(fold.copied) for fold in found) if copies == "keep" else 0
    note += f"; up to {kept} tested pictures have a copy in the other parts, which stay" if kept else ""
    note += f"; up to {len(frames) - used} frames are in no part" if used < len(frames) else ""
    return found, together, excluded, note


def only(folds: Sequence[Fold], names: Sequence[str]) -> tuple[list[Fold], str]:
    """The folds with the given names, all if there are none; and a phrase to append to that of `plan`.

    Raises:
      InputError: there is no fold with one of the names.
    """
    unknown = sorted(set(names) - {fold.name for fold in folds})
    if unknown:
        raise InputError(
            f"config.split.only: there is no fold {unknown[0]!r}, only {', '.join(fold.name for fold in folds)}"
        )
    note = f"; only fold{'s' if len(names) > 1 else ''} {', '.join(names)} of them" if names else ""
    return [fold for fold in folds if not names or fold.name in names], note


def _without_shared_validation(folds: Sequence[Fold], patients: np.ndarray) -> tuple[list[Fold], int]:
    """Merges validation parts that were drawn by image, as some published ones are, into train; test is unchanged.

    Returns:
      the folds, and the maximum number of patients on both sides in any of them.
    """
    shared = [len(np.intersect1d(patients[fold.train], patients[fold.validation])) for fold in folds]
    none = np.empty(0, np.int64)
    mended = [
        Fold(fold.name, np.union1d(fold.train, fold.validation), none, fold.test) if count else fold
        for fold, count in zip(folds, shared, strict=True)
    ]
    return mended, max(shared)


def check(
    folds: Sequence[Fold],
    frames: Table,
    strata: Strata,
    patient_groups: np.ndarray,
    pairs: np.ndarray | None = None,
    keep: bool = False,
) -> tuple[list[Fold], list[Excluded]]:
    """Refuses folds that leak or lack a stratum, and removes copies of test images from the other parts.

    Patients who share an image count as one person under two names: then only their frames in test are kept, or those
    in validation if none is in test. So official test parts stay as published.

    Args:
      folds: the folds to check.
      frames: N rows.
      strata: strata of the rows.
      patient_groups: int `[N]`, `groups` without pairs.
      pairs: int `[P, 2]`, rows with the same image.
      keep: leave the copies where they are.

    Returns:
      the folds without the copies, with their `copied` set; and the excluded rows: `fold`, `part`, `dataset`,
      `patient`, `video`, `frame`, and in `of` and `reason` the frame and part that caused it.

    Raises:
      InputError: a patient or video is on two sides, or a part lacks a stratum.
    """
    persons = _components([patient_groups], pairs)
    checked, excluded = [], []
    for fold in folds:
        sides = np.zeros(len(frames), np.int64)  # 0 = none
        for side, rows in enumerate(fold.parts().values(), start=1):
            sides[rows] = side
        _refuse_leaks(fold, frames, sides, patient_groups)
        fold = dataclasses.replace(fold, copied=_copied(fold, pairs))
        highest = np.zeros(persons.max() + 1, np.int64)
        np.maximum.at(highest, persons, sides)
        copies = np.flatnonzero((sides > 0) & (sides < highest[persons])) if not keep else np.zeros(0, np.int64)
        excluded += [_reason(fold, frames, int(row), sides, persons, pairs) for row in copies]
        stays: dict[str, Any] = {part: np.setdiff1d(rows, copies) for part, rows in fold.parts().items()}
        fold = dataclasses.replace(fold, **stays)
        _refuse_missing_strata(fold, frames, strata)
        checked.append(fold)
    return checked, excluded


def _copied(fold: Fold, pairs: np.ndarray | None) -> np.ndarray:
    """The test rows that form a pair with a row of another part, ascending."""
    edges = np.asarray(pairs if pairs is not None else (), np.int64).reshape(-1, 2)
    tested, learnt = np.isin(edges, fold.test), np.isin(edges, np.concatenate([fold.train, fold.validation]))
    return np.unique(np.concatenate([edges[tested[:, i] & learnt[:, 1 - i], i] for i in (0, 1)]))


def _refuse_leaks(fold: Fold, frames: Table, sides: np.ndarray, patient_groups: np.ndarray) -> None:
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


def _refuse_missing_strata(fold: Fold, frames: Table, strata: Strata) -> None:
    for part, rows in fold.parts().items():
        counts = np.bincount(strata.code[rows], minlength=len(strata.names))
        if not counts.all():
            stratum = int(np.argmin(counts))
            patients = len(np.unique(frames.patient_key[strata.code == stratum]))
            has = "have it in all" if len(strata.names) > 1 else "are too few for three parts"
            raise InputError(
                f"fold {fold.name} has no frame of {strata.called(stratum)} in {part} ({patients} patients "
                f"{has}); use fewer folds, or another split"
            )


def _reason(
    fold: Fold, frames: Table, row: int, sides: np.ndarray, persons: np.ndarray, pairs: np.ndarray | None
) -> Excluded:
    """Reports the frame because of which a row is excluded: a copy of it, or else one of a connected patient."""
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
