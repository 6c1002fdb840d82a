"""The members of a fine-tuning run: one trained model for each fold, seed and label fraction."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from usfmae_jax.data import splits
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained model of a run.

    Attributes:
      name: name of its folder in `members/`.
      fold: its fold, with only the training patients that `fraction` leaves.
      seed: as in `config.seeds`.
      fraction: as in `config.fractions`.
      total_steps: number of updates.
      evaluations: steps after which it is evaluated, ascending; the last is `total_steps`.
    """

    name: str
    fold: Fold
    seed: int
    fraction: float
    total_steps: int
    evaluations: tuple[int, ...]


def plan_members(
    folds: Sequence[Fold],
    seeds: Sequence[int],
    fractions: Sequence[float],
    take: Callable[[Fold, float, int], Fold],
    length: Callable[[int], tuple[int, tuple[int, ...]]],
) -> tuple[Member, ...]:
    """Plans one member for each seed, fraction and fold.

    Args:
      folds: folds to run.
      seeds: seeds of the members.
      fractions: fractions of the training patients, in (0, 1].
      take: `(fold, fraction, seed)` -> the fold with that fraction of its training patients.
      length: number of training frames -> `total_steps` and `evaluations`.
    """
    members = []
    for seed in seeds:
        for fraction in sorted(fractions, reverse=True):
            for fold in folds:
                name = fold.name if fold.name == "single" else f"fold-{fold.name}"
                name += f"-seed-{seed}" if seed else ""
                name += f"-fraction-{100 * fraction:g}" if fraction < 1 else ""
                part = take(fold, fraction, seed)
                members.append(Member(name, part, seed, fraction, *length(len(part.train))))
    return tuple(members)


def steps_in(epochs: float, images: int, batch_size: int) -> int:
    """The number of updates that `epochs` passes over the images take."""
    return round(epochs * images / batch_size)


def count_steps(
    images: int, *, batch_size: int, epochs: float, steps: int, min_steps: int, every: float
) -> tuple[int, tuple[int, ...]]:
    """The number of updates for a number of images, and the steps after which to evaluate.

    Args:
      images: number of training images.
      batch_size: images per update.
      epochs: passes over the images.
      steps: number of updates, instead of `epochs`, if not 0.
      min_steps: minimum number of updates, so that small sets are seen more often.
      every: epochs between evaluations.

    Raises:
      InputError: there would be no update.
    """
    total = steps or max(steps_in(epochs, images, batch_size), min_steps)
    if total < 1:
        raise InputError(
            f"the run has {total} steps: config.train.epochs={epochs:g} of {images} images is less than one "
            f"batch of {batch_size}; raise the epochs, set config.train.steps or lower the batch size"
        )
    shown = total * batch_size / images if steps else epochs
    # Evenly spaced, so that a member with few images is not evaluated after every update.
    count = max(1, round(shown / every))
    return total, tuple(sorted({round(total * (i + 1) / count) for i in range(count)} - {0}))


def write_splits(workdir: str, table: Table, folds: Sequence[Fold], groups: Any, members: Sequence[Member]) -> None:
    """Writes the folds to `splits/splits.csv`, and the frames of each label fraction to `splits/fractions/`.

    Raises:
      InputError: the workdir already holds another split.
    """
    folder = epath.Path(workdir) / "splits"
    folder.mkdir(parents=True, exist_ok=True)
    whole, new = folder / "splits.csv", folder / ".splits.csv.new"
    splits.write_splits(new, table, folds, groups)
    if whole.exists() and whole.read_bytes() != new.read_bytes():
        new.unlink()
        raise InputError(f"{workdir}/splits/splits.csv holds another split than this run's; choose another --workdir")
    new.replace(whole)
    parts: dict[str, list[Fold]] = {}
    for member in members:
        if member.fraction < 1:
            parts.setdefault(f"fraction-{100 * member.fraction:g}-seed-{member.seed}", []).append(member.fold)
    for name, kept in parts.items():
        splits.write_splits(folder / "fractions" / f"{name}.csv", table, kept, groups)
