"""The members of a fine-tuning run: one trained model for each fold, seed and label fraction."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from usfmae_jax.data import splits
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError
from usfmae_jax.tasks import classification


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained model of a run.

    Attributes:
      name: of its folder in `members/`.
      fold: with the training patients that `fraction` leaves.
      seed: as in `config.seeds`.
      fraction: as in `config.fractions`.
      total_steps: updates.
      evaluations: steps after which it is evaluated, ascending; the last is `total_steps`.
    """

    name: str
    fold: Fold
    seed: int
    fraction: float
    total_steps: int
    evaluations: tuple[int, ...]


def names(values: Sequence[Any]) -> tuple[str, ...]:
    """Names as a person may type them: `('a', 'b')`, `a,b`, or numbers."""
    return tuple(name.strip() for value in values for name in str(value).split(",") if name.strip())


def only_note(only: Sequence[Any]) -> str:
    """What belongs behind the description of a split of which only those folds are run; "" if all are."""
    chosen = names(only)
    return f"; only fold{'s' if len(chosen) > 1 else ''} {', '.join(chosen)} of them" if chosen else ""


def plan_members(
    config: ml_collections.ConfigDict, frames: Table, folds: Sequence[Fold], groups: np.ndarray
) -> tuple[Member, ...]:
    """One member for each seed, fraction and fold.

    Raises:
      InputError: `config.split.only` names no fold, or a member would have no steps.
    """
    only = names(config.split.only)
    unknown = set(only) - {fold.name for fold in folds}
    if unknown:
        raise InputError(
            f"config.split.only: there is no fold {min(unknown)!r}, only {', '.join(fold.name for fold in folds)}"
        )
    members = []
    for seed in config.seeds:
        for fraction in sorted(config.fractions, reverse=True):
            for fold in folds:
                if only and fold.name not in only:
                    continue
                name = fold.name if fold.name == "single" else f"fold-{fold.name}"
                name += f"-seed-{seed}" if seed else ""
                name += f"-fraction-{100 * fraction:g}" if fraction < 1 else ""
                if fraction < 1:
                    fold = splits.take_fraction(
                        classification.strata(frames), fold, groups, fraction, config.seed + seed
                    )
                members.append(Member(name, fold, seed, fraction, *_lengths(config, len(fold.train))))
    return tuple(members)


def _lengths(config: ml_collections.ConfigDict, images: int) -> tuple[int, tuple[int, ...]]:
    """How many updates on so many images, and after which of them to evaluate."""
    train, batch = config.train, config.train.batch_size
    total = train.steps or max(round(train.epochs * images / batch), train.min_steps)
    if total < 1:
        raise InputError(
            f"the run has {total} steps: config.train.epochs={train.epochs:g} of {images} images is less than one "
            f"batch of {batch}; raise the epochs, set config.train.steps or lower the batch size"
        )
    epochs = total * batch / images if train.steps else train.epochs
    # Evenly spread, so that a member with few images is not evaluated after every update.
    count = max(1, round(epochs / config.stop.every))
    return total, tuple(sorted({round(total * (i + 1) / count) for i in range(count)} - {0}))


def class_weights(config: ml_collections.ConfigDict, frames: Table, member: Member) -> np.ndarray:
    """Weights of the classes in the loss, float32 `[C]`; balanced: inverse to their share of the training part."""
    classes = len(frames.label_names)
    counts = np.bincount(frames.label[member.fold.train], minlength=classes)
    if config.regularization.class_weights == "none":
        return np.ones(classes, np.float32)
    return (counts.sum() / (classes * np.maximum(counts, 1))).astype(np.float32)


def write_splits(
    workdir: str, frames: Table, folds: Sequence[Fold], groups: np.ndarray, members: Sequence[Member]
) -> None:
    """Leaves who is trained and tested on: `splits/splits.csv`, and what label fractions keep in `splits/fractions/`.

    Raises:
      InputError: another split is there already.
    """
    folder = epath.Path(workdir) / "splits"
    folder.mkdir(parents=True, exist_ok=True)
    whole, new = folder / "splits.csv", folder / ".splits.csv.new"
    splits.write_splits(new, frames, folds, groups)
    if whole.exists() and whole.read_text() != new.read_text():
        new.unlink()
        raise InputError(f"{workdir}/splits/splits.csv holds another split than this run's; choose another --workdir")
    new.replace(whole)
    parts: dict[str, list[Fold]] = {}
    for member in members:
        if member.fraction < 1:
            parts.setdefault(f"fraction-{100 * member.fraction:g}-seed-{member.seed}", []).append(member.fold)
    for name, kept in parts.items():
        splits.write_splits(folder / "fractions" / f"{name}.csv", frames, kept, groups)
