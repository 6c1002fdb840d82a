"""Testing fine-tuned classifiers unchanged: each frame is predicted by the members that have not seen its patient."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from scipy.special import softmax

from usfmae_jax.data import cells, provenance
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.data.table import images as decode
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import predictions
from usfmae_jax.interop.model import Model, members, open_model
from usfmae_jax.probing.inspect import Outcome, Tested, parted, record
from usfmae_jax.training.forward import apply_batches, head_function
from usfmae_jax.training.inspect import foremost, rollout


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A classifier and the frames that it was trained on.

    Attributes:
      model: a model of kind 'classifier'.
      fold, seed, fraction: identify the member of its run.
      seen: (dataset, video, frame) of its training and validation frames, and (dataset, patient) of their patients.
      chosen: (dataset, video, frame) of its validation frames only.
      held_out: (dataset, video, frame) of its test frames.
      copied: those test frames that are marked in `Predictions.copied`.
    """

    model: Model
    fold: str
    seed: int
    fraction: float
    seen: frozenset[tuple[str, ...]]
    chosen: frozenset[tuple[str, ...]]
    held_out: frozenset[tuple[str, ...]]
    copied: frozenset[tuple[str, ...]]


def open_judges(path: str) -> list[Judge]:
    """Reads all members of a fine-tuning run, or the single classifier at `path`.

    Raises:
      InputError: there is no classifier, or the members have different models.
    """
    found = []
    for folder in members(path) or [path]:
        model = open_model(folder)
        if model.kind == "model":
            raise InputError(f"{path} holds a model of another task than classification; its own run has tested it")
        if model.kind != "classifier":
            raise InputError(
                f"config.protocol=finetuned, but {path} holds an encoder without a head; fine-tune it first, or probe "
                "it with --config.protocol=logistic"
            )
        found.append(_judge(folder, model))
    if any(m.model.description != found[0].model.description for m in found):
        raise InputError(f"the members of {path} are different models; choose one of them")
    return found


def _judge(folder: str, model: Model) -> Judge:
    fold, seed, fraction, copied = "", 0, 1.0, set[tuple[str, ...]]()
    root = epath.Path(folder)
    root = root if "://" in folder else root.expanduser().resolve()
    root = root.parent if root.name == "classifier" else root
    if (root / "predictions.csv").exists():
        own = predictions.read(root / "predictions.csv", predictions.ClassPredictions)
        fold, seed, fraction = str(own.fold[0]), int(own.seed[0]), float(own.fraction[0])
        own = own.select(own.copied)
        copied = set(zip(own.dataset.tolist(), own.video.tolist(), own.frame.tolist(), strict=True))
    table = root.parent.parent / "splits" / "splits.csv"
    seen: set[tuple[str, ...]] = set()
    parts: dict[str, set[tuple[str, ...]]] = {"train": set(), "validation": set(), "test": set()}
    if fold and table.exists():
        for row in cells.read_dicts(io.StringIO(table.read_text(), newline="")):
            if row["fold"] == fold:
                frame = (row["dataset"], row["video"], row["frame"])
                parts[row["part"]].add(frame)
                if row["part"] != "test":
                    seen |= {frame, (row["dataset"], row["patient"])} if row["patient"] else {frame}
    named = (seen, parts["validation"], parts["test"], copied)
    return Judge(model, fold, seed, fraction, *map(frozenset, named))


def test(
    judges: list[Judge],
    table: Table,
    mesh: Mesh,
    asked_for: Callable[[], tuple[list[Fold], str] | None],
    *,
    batch_size: int,
    threads: int,
    dtype: Any,
) -> Outcome:
    """Predicts each frame with the members that have not seen its patient, averaging their probabilities.

    On a run's own data that is the member in whose test part the frame is; on other data, all members.

    Args:
      judges: from `open_judges`.
      table: the frames.
      mesh: devices.
      asked_for: returns the folds that the config names, of which only the test parts are tested, and a phrase; or
        None.
      batch_size: images per call.
      threads: decoding threads.
      dtype: compute dtype.

    Raises:
      InputError: the classes differ, or a classifier's training data is not known and may include these frames.
    """
    model = judges[0].model
    classes = [name.casefold() for name in model.description["classes"]]
    if classes != [name.casefold() for name in table.label_names]:
        raise InputError(
            f"the classifier tells {', '.join(model.description['classes'])} apart, but the data has the classes "
            f"{', '.join(table.label_names)}"
        )
    allowed, note, warnings = _allowed(judges, table, asked_for)
    names = _frame_names(table)
    size, channels = model.image_format
    function, _ = head_function(model, dtype=dtype)

    def judge(number: int, images: Iterable[np.ndarray], total: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        variables = (judges[number].model.params, judges[number].model.stats)
        how: dict[str, Any] = {"batch_size": batch_size, "total": total, "desc": name}
        found = apply_batches(mesh, function, variables, iter(images), **how)
        return softmax(found["logits"].astype(np.float64), axis=1), found["features"]

    def judge_rows(number: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = decode(table, rows, size=size, channels=channels, batch_size=batch_size, threads=threads)
        return judge(number, images, len(rows), f"member {number + 1}/{len(judges)}")

    tested, panels = [], []
    mapped = None
    for panel, rows in _panels(judges, allowed):
        said = [judge_rows(number, rows) for number in panel]
        mapped = (rows, said[0][1]) if mapped is None else mapped
        first, alone = judges[panel[0]], len(panel) == 1
        ids = ((first.fold if alone else "") or "all", first.seed, first.fraction)
        mean = np.mean([probabilities for probabilities, _ in said], axis=0)
        chosen = np.flatnonzero([name in first.chosen for name in names]) if alone else np.zeros(0, int)
        copied = [row for row in rows.tolist() if any(names[row] in judges[number].copied for number in panel)]
        validation = record(table, chosen, ids, judge_rows(panel[0], chosen)[0]) if len(chosen) else None
        tested.append(
            Tested(*ids, rows, record(table, rows, ids, mean, copied), validation, {"classifiers": len(panel)})
        )
        panels.append(panel)
    best = foremost(tested)

    def predict(images: Iterator[np.ndarray], total: int, name: str) -> list[np.ndarray]:
        found = []
        parts = parted(np.concatenate(list(images)), [tested[number] for number in best])
        for number, part in zip(best, parts, strict=True):
            batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            said = [judge(member, batches, len(part), name)[0] for member in panels[number]]
            found.append(np.mean(said, axis=0))
        return found

    assert mapped is not None
    space = "features of the fine-tuned classifier" + (f", fold {tested[0].fold}" if len(best) > 1 else "")
    pool = model.description.get("pool", "mean")
    return Outcome(
        tested=tested,
        split=note,
        mapped=(*mapped, space),
        looks={number: rollout(judges[panels[number][0]].model, pool) for number in best},
        predict=predict,
        image_format=(size, channels),
        warnings=warnings,
    )


def _allowed(
    judges: list[Judge], frames: Table, asked_for: Callable[[], tuple[list[Fold], str] | None]
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Which member may predict which frame, bool `[M, N]`; where the split comes from; warnings."""
    known = all(member.seen for member in judges)
    learnt = [stage for stage in judges[0].model.lineage if stage.get("job") == "finetune"]
    among = provenance.seen_in(learnt, [frames.shards])
    chosen = asked_for()
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
        folds, note = chosen
        tested = np.unique(np.concatenate([fold.test for fold in folds]))
        allowed &= np.isin(np.arange(len(frames)), tested)
    left_out = int((~allowed.any(axis=0)).sum())
    if left_out == len(frames):
        raise InputError("the classifiers have learnt from every patient of this data: nothing is left to test them on")
    warnings: tuple[str, ...] = ()
    if left_out and not chosen:
        warnings = (f"{left_out} frames of patients that the classifiers learnt from are left out",)
    return allowed, note, warnings


def _panels(judges: list[Judge], allowed: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields members of one label fraction and seed that predict the same frames, and the rows of those frames."""
    for fraction, seed in sorted({(member.fraction, member.seed) for member in judges}):
        numbers = [i for i, member in enumerate(judges) if (member.fraction, member.seed) == (fraction, seed)]
        patterns, which = np.unique(allowed[numbers], axis=1, return_inverse=True)
        for pattern in range(patterns.shape[1] - 1, -1, -1):  # the first fold first
            if patterns[:, pattern].any():
                panel = [number for number, takes in zip(numbers, patterns[:, pattern], strict=True) if takes]
                yield panel, np.flatnonzero(which.ravel() == pattern)


def _frame_names(frames: Table) -> list[tuple[str, str, str]]:
    return list(zip(frames.dataset.tolist(), frames.video.tolist(), frames.frame_name.tolist(), strict=True))
