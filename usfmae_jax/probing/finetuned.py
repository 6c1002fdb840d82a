"""Fine-tuned classifiers as they are: every frame is judged by those that have not seen its patient."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from scipy.special import softmax

from usfmae_jax.data import provenance, splits
from usfmae_jax.data import table as labelled
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import predictions
from usfmae_jax.interop.model import Model, members, open_model
from usfmae_jax.probing import inspect as looking
from usfmae_jax.probing.features import image_format
from usfmae_jax.reporting.classification import embedding_points
from usfmae_jax.tasks import classification
from usfmae_jax.training import outcomes
from usfmae_jax.training.forward import apply_batches, classifier_function
from usfmae_jax.training.outcomes import Outcome, Tested


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A classifier and what it learnt from.

    Attributes:
      weights: of kind 'classifier'.
      fold, seed, fraction: which member of its run it is.
      seen: (dataset, video, frame) of its training and validation frames, and (dataset, patient) of their patients.
      chosen: (dataset, video, frame) of its validation frames alone.
      held_out: (dataset, video, frame) of its test frames.
    """

    weights: Model
    fold: str
    seed: int
    fraction: float
    seen: frozenset[tuple[str, ...]]
    chosen: frozenset[tuple[str, ...]]
    held_out: frozenset[tuple[str, ...]]


def open_judges(path: str) -> list[Member]:
    """Reads all members of a fine-tuning run, or the one classifier that `path` names.

    Raises:
      InputError: no classifier there, or members with different models.
    """
    found = []
    for folder in members(path) or [path]:
        weights = open_model(folder)
        if weights.kind != "classifier":
            raise InputError(
                f"config.protocol=finetuned, but {path} holds an encoder without a head; fine-tune it first, or probe "
                "it with --config.protocol=logistic"
            )
        found.append(_member(folder, weights))
    if any(m.weights.description != found[0].weights.description for m in found):
        raise InputError(f"the members of {path} are different models; choose one of them")
    return found


def _member(folder: str, weights: Model) -> Member:
    fold, seed, fraction = "", 0, 1.0
    root = epath.Path(folder)
    root = root if "://" in folder else root.expanduser().resolve()
    root = root.parent if root.name == "classifier" else root
    if (root / "predictions.csv").exists():
        own = predictions.read(root / "predictions.csv")
        fold, seed, fraction = str(own.fold[0]), int(own.seed[0]), float(own.fraction[0])
    table = root.parent.parent / "splits" / "splits.csv"
    seen: set[tuple[str, ...]] = set()
    parts: dict[str, set[tuple[str, ...]]] = {"train": set(), "validation": set(), "test": set()}
    if fold and table.exists():
        for row in csv.DictReader(io.StringIO(table.read_text(), newline="")):
            if row["fold"] == fold:
                frame = (row["dataset"], row["video"], row["frame"])
                parts[row["part"]].add(frame)
                if row["part"] != "test":
                    seen |= {frame, (row["dataset"], row["patient"])} if row["patient"] else {frame}
    return Member(
        weights, fold, seed, fraction, frozenset(seen), frozenset(parts["validation"]), frozenset(parts["test"])
    )


def test(judges: list[Member], config: ml_collections.ConfigDict, frames: Table, mesh: Mesh) -> Outcome:
    """Predicts every frame by the members that have not seen its patient; of several by their mean probability.

    On a run's own data that is the member of the fold in whose test part a frame is; on other data it is all of them.

    Args:
      judges: from `open_judges`.
      config: of the evaluation.
      frames: the table.
      mesh: devices.

    Raises:
      InputError: other classes, or it is not known what a classifier learnt from while the data may be among it.
    """
    description = judges[0].weights.description
    classes = [name.casefold() for name in description["classes"]]
    if classes != [name.casefold() for name in frames.label_names]:
        raise InputError(
            f"the classifier tells {', '.join(description['classes'])} apart, but the data has the classes "
            f"{', '.join(frames.label_names)}"
        )
    allowed, note, warnings = _allowed(judges, config, frames)
    names = _frame_names(frames)
    size, channels = image_format(judges[0].weights)
    function, _ = classifier_function(judges[0].weights, dtype=jnp.dtype(config.dtype))

    def judge(number: int, images: Iterable[np.ndarray], total: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        weights = judges[number].weights
        found = apply_batches(
            mesh,
            function,
            (weights.params, weights.stats),
            iter(images),
            batch_size=config.batch_size,
            total=total,
            desc=name,
        )
        return softmax(found["logits"].astype(np.float64), axis=1), found["features"]

    def judge_rows(number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        how: dict[str, Any] = {"batch_size": config.batch_size, "threads": config.data.threads}
        images = labelled.images(frames, rows, size=size, channels=channels, **how)
        return judge(number, images, len(rows), f"member {number + 1}/{len(judges)}")

    tested, panels = [], []
    embedded = None
    for panel, rows in _panels(judges, allowed):
        said = [judge_rows(number, rows) for number in panel]
        embedded = (rows, said[0][1]) if embedded is None else embedded
        alone = judges[panel[0]] if len(panel) == 1 else None
        chosen = np.flatnonzero([name in alone.chosen for name in names]) if alone else np.zeros(0, int)
        validation = judge_rows(panel[0], chosen)[0] if len(chosen) else np.zeros((0, len(classes)))
        tested.append(
            Tested(
                fold=(alone.fold if alone else "") or "all",
                seed=judges[panel[0]].seed,
                fraction=judges[panel[0]].fraction,
                rows=rows,
                probabilities=np.mean([probabilities for probabilities, _ in said], axis=0),
                validation_rows=chosen,
                validation_probabilities=validation,
                settings={"classifiers": len(panel)},
            )
        )
        panels.append(panel)
    best = outcomes.foremost(tested)

    def predict(images: Iterator[np.ndarray], total: int, name: str) -> list[np.ndarray]:
        found = []
        for number, part in zip(best, outcomes.parted(np.concatenate(list(images)), tested, best), strict=True):
            batches = [part[i : i + config.batch_size] for i in range(0, len(part), config.batch_size)]
            said = [judge(member, batches, len(part), name)[0] for member in panels[number]]
            found.append(np.mean(said, axis=0))
        return found

    robustness = None
    if config.corruptions:
        entries = [tested[number] for number in best]
        robustness = looking.sweep(frames, entries, predict, size=size, channels=channels, config=config)
    assert embedded is not None
    rows, points = embedding_points(embedded[1], config.seed)
    pool = description.get("pool", "mean")
    return Outcome(
        tested=tested,
        excluded=[],
        split=note,
        rows=embedded[0][rows],
        points=points,
        space="features of the fine-tuned classifier" + (f", fold {tested[0].fold}" if len(best) > 1 else ""),
        attention={number: looking.rollout(judges[panels[number][0]].weights, pool) for number in best},
        robustness=robustness,
        image_format=(size, channels),
        warnings=warnings,
    )


def _allowed(
    judges: list[Member], config: ml_collections.ConfigDict, frames: Table
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Which member may judge which frame, bool `[M, N]`; where the split comes from; what to warn of."""
    known = all(member.seen for member in judges)
    chosen = bool(config.split.path) or config.split.kind != "auto"
    learnt = [stage for stage in judges[0].weights.lineage if stage.get("job") == "finetune"]
    among = provenance.seen_in(learnt, [frames.shards])
    if among and not known and not chosen:
        raise InputError(
            f"the classifier was fine-tuned on frames of {', '.join(among)}, and which ones is not known without its "
            "run's splits/splits.csv; give the run's workdir, or name the test frames with --config.split.path=FILE"
        )
    names = _frame_names(frames)
    patients = list(zip(frames.dataset.tolist(), frames.patient.tolist(), strict=True))
    allowed = np.ones((len(judges), len(frames)), bool)
    held_out = np.zeros_like(allowed)
    for number, member in enumerate(judges):
        if member.seen:
            allowed[number] = [
                n not in member.seen and p not in member.seen for n, p in zip(names, patients, strict=True)
            ]
            held_out[number] = [n in member.held_out for n in names] & allowed[number]
    allowed = np.where(held_out.any(axis=0), held_out, allowed)
    note = "the run's own test parts" if held_out.any() else "all frames, none of whose patients was learnt from"
    unnamed = int((allowed.any(axis=0) & ~held_out.any(axis=0)).sum())
    note += f", and {unnamed} frames that it neither learnt from nor tested" if held_out.any() and unnamed else ""
    if chosen:
        options = {name: config.split[name] for name in ("kind", "path", "folds", "validation", "test")}
        folds, _, _, note = splits.plan(frames, classification.strata(frames), **options, seed=config.seed, pairs=None)
        tested = np.unique(np.concatenate([fold.test for fold in folds]))
        allowed &= np.isin(np.arange(len(frames)), tested)
    left_out = int((~allowed.any(axis=0)).sum())
    if left_out == len(frames):
        raise InputError("the classifiers have learnt from every patient of this data: nothing is left to test them on")
    warnings: tuple[str, ...] = ()
    if left_out and not chosen:
        warnings = (f"{left_out} frames of patients that the classifiers learnt from are left out",)
    return allowed, note, warnings


def _panels(judges: list[Member], allowed: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Members of one label fraction and seed that judge the same frames, and the rows of those frames."""
    for fraction, seed in sorted({(member.fraction, member.seed) for member in judges}):
        numbers = [i for i, member in enumerate(judges) if (member.fraction, member.seed) == (fraction, seed)]
        patterns, which = np.unique(allowed[numbers], axis=1, return_inverse=True)
        for pattern in range(patterns.shape[1] - 1, -1, -1):  # the first fold first
            if patterns[:, pattern].any():
                panel = [number for number, takes in zip(numbers, patterns[:, pattern], strict=True) if takes]
                yield panel, np.flatnonzero(which.ravel() == pattern)


def _frame_names(frames: Table) -> list[tuple[str, str, str]]:
    return list(zip(frames.dataset.tolist(), frames.video.tolist(), frames.frame_name.tolist(), strict=True))
