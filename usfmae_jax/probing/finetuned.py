"""Testing fine-tuned models unchanged: each frame is predicted by the members that have not seen its patient."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from usfmae_jax.data import cells, provenance
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.data.table import images as decode
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation import comparison
from usfmae_jax.evaluation.predictions import Predictions, identify
from usfmae_jax.interop.model import Model, members, open_model, output_names
from usfmae_jax.probing.inspect import Outcome, Tested, parted
from usfmae_jax.tasks import Arrays, Task
from usfmae_jax.training.forward import PATIENCE, PIECE, apply_batches, features_of, model_function
from usfmae_jax.training.inspect import foremost
from usfmae_jax.training.mesh import one_device


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A fine-tuned model and the frames that it was trained on.

    Attributes:
      model: a model of kind 'classifier' or 'model'.
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


def open_trained(path: str) -> list[Trained]:
    """Reads all members of a fine-tuning run, or the single model at `path`.

    Raises:
      InputError: there is no fine-tuned model, or the members have different models.
    """
    found = []
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
    if fold and table.exists():
        for row in cells.read_dicts(io.StringIO(table.read_text(), newline="")):
            if row["fold"] == fold:
                frame = (row["dataset"], row["video"], row["frame"])
                parts[row["part"]].add(frame)
                if row["part"] != "test":
                    seen |= {frame, (row["dataset"], row["patient"])} if row["patient"] else {frame}
    named = (seen, parts["validation"], parts["test"], copied)
    return Trained(model, fold, seed, fraction, *map(frozenset, named))


def test(
    trained: Sequence[Trained],
    table: Table,
    task: Task,
    mesh: Mesh,
    asked_for: Callable[[], tuple[list[Fold], str] | None],
    *,
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
      asked_for: returns the folds that the config names, of which only the test parts are tested, and a phrase; or
        None.
      batch_size: images per call.
      threads: decoding threads.
      dtype: compute dtype.

    Raises:
      InputError: the models have other outputs, or their training data is not known and may include these frames.
    """
    model = trained[0].model
    named = output_names(model.description)
    if [name.casefold() for name in named] != [name.casefold() for name in task.outputs]:
        raise InputError(
            f"the model was trained for {', '.join(named)}, but the data has {', '.join(task.outputs)}; if they mean "
            f"the same, name those of the data with --config.classes={','.join(named)}"
        )
    allowed, note, warnings = _allowed(trained, table, asked_for)
    names = _frame_names(table)
    size, channels = model.image_format
    how: dict[str, Any] = {"size": size, "channels": channels, "batch_size": batch_size, "threads": threads}
    function, _ = model_function(model, task.predict, dtype=dtype)
    variables = [(one.model.params, one.model.stats) for one in trained]

    def predict(panel: Sequence[int], batches: Iterable[np.ndarray], total: int, over: Mesh = mesh) -> Arrays:
        """The joint prediction of some members for images."""
        batches = batches if len(panel) == 1 else list(batches)  # decoded once for all members
        said, form = [], {"batch_size": batch_size, "total": total}
        for number in panel:
            desc = f"member {number + 1}/{len(trained)}"
            said.append(apply_batches(over, function, variables[number], iter(batches), **form, desc=desc))
        return task.together(said, [trained[number].model.description for number in panel])

    def tested_rows(panel: Sequence[int], rows: np.ndarray) -> Arrays:
        """What the task keeps of the predictions for rows of the table."""
        found = []
        for start in tqdm(range(0, len(rows), PIECE), "test", unit="piece", delay=PATIENCE, leave=False):
            piece = rows[start : start + PIECE]
            found.append(task.measure(table, piece, predict(panel, decode(table, piece, **how), len(piece))))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def record(panel: Sequence[int], ids: tuple[str, int, float], rows: np.ndarray, copied: Any = ()) -> Predictions:
        return task.record(identify(table, rows, *ids, copied), table, rows, tested_rows(panel, rows))

    tested, panels = [], []
    for panel, rows in _panels(trained, allowed):
        first, alone = trained[panel[0]], len(panel) == 1
        ids = ((first.fold if alone else "") or "all", first.seed, first.fraction)
        chosen = np.flatnonzero([name in first.chosen for name in names]) if alone else np.zeros(0, int)
        copied = [row for row in rows.tolist() if any(names[row] in trained[number].copied for number in panel)]
        said = record(panel, ids, rows, copied)
        validation = record(panel, ids, chosen) if len(chosen) else None
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

    rows = tested[0].rows
    features, _ = model_function(model, features_of, dtype=dtype)
    form: dict[str, Any] = {"batch_size": batch_size, "total": len(rows), "desc": "features"}
    mapped = apply_batches(mesh, features, variables[panels[0][0]], decode(table, rows, **how), **form)
    space = "features of the fine-tuned model" + (f", fold {tested[0].fold}" if len(best) > 1 else "")
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
    trained: Sequence[Trained], frames: Table, asked_for: Callable[[], tuple[list[Fold], str] | None]
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Which member may predict which frame, bool `[M, N]`; where the split comes from; warnings."""
    known = all(member.seen for member in trained)
    learnt = [stage for stage in trained[0].model.lineage if stage.get("job") == "finetune"]
    among = provenance.seen_in(learnt, [frames.shards])
    chosen = asked_for()
    if among and not known and not chosen:
        raise InputError(
            f"the model was fine-tuned on frames of {', '.join(among)}, and which ones is not known without its "
            "run's splits/splits.csv; give the run's workdir, or name the test frames with --config.split.path=FILE"
        )
    names = _frame_names(frames)
    patients = list(zip(frames.dataset.tolist(), frames.patient.tolist(), strict=True))
    allowed = np.ones((len(trained), len(frames)), bool)
    held_out = np.zeros_like(allowed)
    for number, member in enumerate(trained):
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
        raise InputError("the models have learnt from every patient of this data: nothing is left to test them on")
    warnings: tuple[str, ...] = ()
    if left_out and not chosen:
        warnings = (f"{left_out} frames of patients that the models learnt from are left out",)
    return allowed, note, warnings


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
