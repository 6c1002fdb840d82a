"""Testing fine-tuned models unchanged: each frame is predicted by the members that have not seen its patient."""

import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from usfmae_jax.data import cells, provenance
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.data.table import images as decode
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import comparison
from usfmae_jax.evaluation.predictions import ClassPredictions, Predictions, identify
from usfmae_jax.interop.model import Model, members, open_model
from usfmae_jax.probing.inspect import Outcome, Tested, parted
from usfmae_jax.tasks import Arrays, Task
from usfmae_jax.training.forward import apply_batches, features_of, in_pieces, model_function, with_mirror
from usfmae_jax.training.inspect import foremost
from usfmae_jax.training.mesh import one_device


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A fine-tuned model and the frames that it was trained on.

    Attributes:
      model: a model of kind 'classifier' or 'model'.
      fold, seed, fraction: identify the member of its run.
      seen: (dataset, video, frame) of its training and validation frames, and of their patients what `_patient` gives.
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


def open_trained(path: str) -> list[Trained]:
    """Reads all members of a fine-tuning run, or the single model at `path`.

    Raises:
      InputError: there is no fine-tuned model, or the members have different models.
    """
    found = []
    for folder in members(path):
        if not epath.Path(folder, "predictions.csv").exists():
            raise InputError(
                f"{folder} is not finished; finish the run with the command that began it, or name one of its members"
            )
    for folder in members(path) or [path]:
        model = open_model(folder)
        if model.kind not in ("classifier", "model"):
            raise InputError(
                f"config.protocol=finetuned, but {path} holds an encoder without a head; fine-tune it first, or probe "
                "it with --config.protocol=logistic"
            )
        found.append(_trained(folder, model))
    if any(_shape(one.model) != _shape(found[0].model) for one in found):
        raise InputError(f"the members of {path} are different models; choose one of them")
    return found


def _shape(model: Model) -> dict[str, Any]:
    """The description without what each member has estimated from its own training data."""
    scale = {name: value for name, value in model.description.get("scale", {}).items() if name in ("unit", "of_frame")}
    return {**model.description, "scale": scale}


def _trained(folder: str, model: Model) -> Trained:
    fold, seed, fraction, copied = "", 0, 1.0, set[tuple[str, ...]]()
    root = epath.Path(folder)
    root = root if "://" in folder else root.expanduser().resolve()
    root = root.parent if root.name == model.kind else root
    if (root / "predictions.csv").exists():
        own = comparison.read(str(root / "predictions.csv"))
        fold, seed, fraction = str(own.fold[0]), int(own.seed[0]), float(own.fraction[0])
        own = own.select(own.copied)
        copied = set(zip(own.dataset.tolist(), own.video.tolist(), own.frame.tolist(), strict=True))
    table = root.parent.parent / "splits" / "splits.csv"
    seen: set[tuple[str, ...]] = set()
    parts: dict[str, set[tuple[str, ...]]] = {"train": set(), "validation": set(), "test": set()}
    try:
        for row in cells.read_dicts(io.StringIO(table.read_text(), newline="")) if fold and table.exists() else ():
            if row["fold"] == fold:
                frame = (row["dataset"], row["video"], row["frame"])
                parts[row["part"]].add(frame)
                if row["part"] != "test":
                    seen |= {frame, _patient(row["dataset"], row["patient"], row["video"])}
    except (KeyError, ValueError) as error:
        raise InputError(f"{table} is damaged: it should have the rows that the run wrote ({error})") from error
    named = (seen, parts["validation"], parts["test"], copied)
    return Trained(model, fold, seed, fraction, *map(frozenset, named))


def _patient(dataset: str, patient: str, video: str) -> tuple[str, ...]:
    """Identifies a patient; a clip of an unknown one counts as its own."""
    return (dataset, patient) if patient else (dataset, "", video, "")


def test(
    trained: Sequence[Trained],
    table: Table,
    task: Task,
    mesh: Mesh,
    asked_for: tuple[list[Fold], str] | None,
    *,
    flip: bool,
    batch_size: int,
    threads: int,
    dtype: Any,
) -> Outcome:
    """Predicts each frame with the members that have not seen its patient; several are averaged, see `Task.together`.

    On a run's own data that is the member in whose test part the frame is; on other data, all members.

    Args:
      trained: from `open_trained`.
      table: the frames.
      task: the models' task, on this table.
      mesh: devices.
      asked_for: the folds that the config names, of which only the test parts are tested, and a phrase; or None.
      flip: average the predictions for each frame and its mirror image.
      batch_size: images per call.
      threads: decoding threads.
      dtype: compute dtype.

    Raises:
      InputError: the training data of the models is not known and may include these frames, or includes all of them.
    """
    model = trained[0].model
    allowed, note, warnings = _allowed(trained, table, asked_for)
    names = _frame_names(table)
    size, channels = model.image_format
    how: dict[str, Any] = {"size": size, "channels": channels, "batch_size": batch_size, "threads": threads}
    function, _ = model_function(model, task.predict, dtype=dtype)
    function = with_mirror(function, task.mirror) if flip else function
    variables = [(one.model.params, one.model.stats) for one in trained]

    def predict(panel: Sequence[int], batches: Iterable[np.ndarray], total: int, on: Mesh = mesh) -> Arrays:
        """The joint prediction of some members for images."""
        batches = batches if len(panel) == 1 else list(batches)  # decoded once for all members
        said, form = [], {"batch_size": batch_size if on is mesh else total, "total": total}
        for number in panel:
            desc = f"member {number + 1}/{len(trained)}"
            said.append(apply_batches(on, function, variables[number], iter(batches), **form, desc=desc))
        return task.together(said, [trained[number].model.description for number in panel])

    def tested_rows(panel: Sequence[int], rows: np.ndarray) -> Arrays:
        """What the task keeps of the predictions for rows of the table."""

        def work(piece: np.ndarray) -> Arrays:
            return task.measure(table, piece, predict(panel, decode(table, piece, **how), len(piece)))

        return in_pieces(rows, work, "test")

    def record(panel: Sequence[int], ids: tuple[str, int, float], rows: np.ndarray, copied: Any = ()) -> Predictions:
        return task.record(identify(table, rows, *ids, copied), table, rows, tested_rows(panel, rows))

    tested, panels = [], []
    for panel, rows in _panels(trained, allowed):
        first, alone = trained[panel[0]], len(panel) == 1
        ids = ((first.fold if alone else "") or "all", first.seed, first.fraction)
        chosen = np.flatnonzero([name in first.chosen for name in names]) if alone else np.zeros(0, int)
        copied = [row for row in rows.tolist() if any(names[row] in trained[number].copied for number in panel)]
        said = record(panel, ids, rows, copied)
        # Only classification reports on validation frames.
        validation = record(panel, ids, chosen) if len(chosen) and task.predictions is ClassPredictions else None
        tested.append(Tested(*ids, rows, said, validation, {"models": len(panel)}))
        panels.append(panel)
    best = foremost(tested)

    def again(images: Iterator[np.ndarray], total: int, name: str) -> list[np.ndarray]:
        found = []
        parts = parted(np.concatenate(list(images)), [tested[number] for number in best])
        for number, part in zip(best, parts, strict=True):
            batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            found.append(predict(panels[number], batches, len(part))["probabilities"])
        return found

    def look(panel: Sequence[int]) -> Any:
        # On one device, since only one process writes the report.
        return task.look(lambda images: predict(panel, [images], len(images), one_device()), trained[panel[0]].model)

    rows, shown = tested[best[0]].rows, panels[best[0]][0]
    features, _ = model_function(model, features_of, dtype=dtype)
    form: dict[str, Any] = {"batch_size": batch_size, "total": len(rows), "desc": "features"}
    mapped = apply_batches(mesh, features, variables[shown], decode(table, rows, **how), **form)
    space = "features of the fine-tuned model" + (f", fold {trained[shown].fold}" if len(trained) > 1 else "")
    return Outcome(
        tested=tested,
        split=note,
        mapped=(rows, mapped, space),
        looks={number: look(panels[number]) for number in best},
        predict=again,
        image_format=(size, channels),
        warnings=(*warnings, *task.notes),
    )


def _allowed(
    trained: Sequence[Trained], frames: Table, chosen: tuple[list[Fold], str] | None
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Which member may predict which frame, bool `[M, N]`; where the split comes from; warnings."""
    known = all(member.seen for member in trained)
    learnt = [[stage for stage in member.model.lineage if stage.get("job") == "finetune"] for member in trained]
    pixels = [
        {name: jobs["finetune"] for name, jobs in provenance.seen_in(stages, frames).items()} for stages in learnt
    ]
    among = sorted({name for found in pixels for name, seen in found.items() if seen.possible})
    if among and not known and (not chosen or len(chosen[0]) > 1):
        which = f", of the one fold that is its own (there are {len(chosen[0])})" if chosen else ""
        raise InputError(
            f"the model was fine-tuned on frames of {', '.join(among)}, and which ones is not known without its "
            f"run's splits/splits.csv; give the run's workdir, or name the test frames{which} with "
            "--config.split.path=FILE"
        )
    names = _frame_names(frames)
    ids = (frames.dataset.tolist(), frames.patient.tolist(), frames.video.tolist())
    patients = [_patient(*one) for one in zip(*ids, strict=True)]
    allowed: np.ndarray = np.ones((len(trained), len(frames)), bool)
    held_out = np.zeros_like(allowed)
    for number, member in enumerate(trained):
        if member.seen:
            allowed[number] = [
                n not in member.seen and p not in member.seen for n, p in zip(names, patients, strict=True)
            ]
            held_out[number] = [n in member.held_out for n in names] & allowed[number]
        for seen in pixels[number].values():
            # What the run itself has tested may be a copy of what it has learnt from, and is marked as one.
            other = [row for row in seen.rows.tolist() if names[row] not in member.held_out]
            allowed[number, other] = False
            if known and not seen.certain and not chosen and any(names[row] not in member.seen for row in other):
                raise InputError(
                    "the model was fine-tuned on some of these frames under other names, and others may not be "
                    "recognised; give the data of its run, or name the test frames with --config.split.path=FILE"
                )
    note = "all frames but those with the pixels, the name or the patient of one that was learnt from"
    named = np.ones(len(frames), bool)
    beside = np.zeros(len(frames), bool)
    if held_out.any():
        # Frames in no part of the run's split were left out of it as copies, or are new: only its own tests count.
        beside = np.asarray(allowed.any(axis=0) & ~held_out.any(axis=0))
        allowed, note = held_out, "the run's own test parts"
    if chosen:
        folds, note = chosen
        named[:] = False
        named[np.concatenate([fold.test for fold in folds])] = True
    gone = named & ~allowed.any(axis=0)
    allowed &= named
    if not allowed.any():
        raise InputError("the models have learnt from every patient of this data: nothing is left to test them on")
    warnings = []
    if (gone & beside).any():
        count = int((gone & beside).sum())
        warnings.append(f"{count} frames that are in no part of the run's split, such as copies, are left out")
    if (gone & ~beside).any():
        count = int((gone & ~beside).sum())
        warnings.append(f"{count} frames of patients that the models learnt from are left out")
    return allowed, note, tuple(warnings)


def _panels(trained: Sequence[Trained], allowed: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields members of one label fraction and seed that predict the same frames, and the rows of those frames."""
    for fraction, seed in sorted({(member.fraction, member.seed) for member in trained}):
        numbers = [i for i, member in enumerate(trained) if (member.fraction, member.seed) == (fraction, seed)]
        patterns, which = np.unique(allowed[numbers], axis=1, return_inverse=True)
        for pattern in range(patterns.shape[1] - 1, -1, -1):  # the first fold first
            if patterns[:, pattern].any():
                panel = [number for number, takes in zip(numbers, patterns[:, pattern], strict=True) if takes]
                yield panel, np.flatnonzero(which.ravel() == pattern)


def _frame_names(frames: Table) -> list[tuple[str, str, str]]:
    return list(zip(frames.dataset.tolist(), frames.video.tolist(), frames.frame_name.tolist(), strict=True))
