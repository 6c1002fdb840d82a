"""Inspections of a model during training: pictures of its predictions, and probes of its frozen features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.models.patches import normalize_images
from usfmae_jax.objectives import Objective
from usfmae_jax.training import probes
from usfmae_jax.training.forward import apply_batches
from usfmae_jax.training.mesh import global_batch, replicated
from usfmae_jax.training.monitor import Monitor
from usfmae_jax.training.state import State, weights_of

#: Inspects the parameters after a step: `(report, params, step)`.
Look = Callable[[Monitor, Any, int], None]


def look(looks: Sequence[tuple[int, Look]], report: Monitor, state: State, step: int, *, last: bool = False) -> None:
    """Runs the inspections that are due after `step` updates; all of them at step 0 and at the last step.

    Args:
      looks: inspections, each with the number of steps between two of them.
      report: monitor of the run; the time spent is not counted as training time.
      state: state after the step.
      step: number of updates so far.
      last: whether this is the last step.
    """
    due = [one for every, one in looks if last or step % every == 0]
    if due:
        report.flush()
        with report.pause():
            for one in due:
                one(report, weights_of(state), step)


def pictures(objective: Objective, graph: Any, mesh: Mesh, images: np.ndarray, folder: epath.Path, seed: int) -> Look:
    """Draws the objective's pictures, always of the same images with the same randomness, to compare over time.

    Args:
      objective: objective of the run.
      graph: graph definition of the model.
      mesh: devices of the run.
      images: uint8 `[n, H, W, C]`, this process's part of the images to draw.
      folder: folder for `step_NNNNNNN.png`.
      seed: seed of the randomness.
    """
    captions: list[str] = []

    def draw(params: Any, images: jax.Array, rng: jax.Array) -> list[jax.Array]:
        columns = objective.pictures(nnx.merge(graph, params), images, rng) or {}
        captions[:] = columns  # keeps the order, which a dict loses when a compiled function returns it
        return list(columns.values())

    compiled = jax.jit(draw, out_shardings=replicated(mesh))

    def run(report: Monitor, params: Any, step: int) -> None:
        columns = compiled(params, global_batch(mesh, images), jax.random.key(seed))
        if not columns or jax.process_index():
            return
        grid = picture_grid({name: np.asarray(one)[:8] for name, one in zip(captions, columns, strict=True)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step_{step:07d}.png").write_bytes(encode_png(grid))
        report.write_image(step, "reconstruction", grid)

    return run


def probe(objective: Objective, graph: Any, mesh: Mesh, labelled: Mapping[str, Any], note: str, seed: int) -> Look:
    """Probes the mean patch token of labelled images, see `probes.probe`.

    Args:
      objective: objective of the run.
      graph: graph definition of the model, which has an `encoder`.
      mesh: devices of the run.
      labelled: from `classification.labelled_images`.
      note: printed with the first probe.
      seed: seed of the folds.

    Raises:
      InputError: the frames cannot be split; raised now, not after hours of training.
    """
    images, labels, patients = (labelled[name] for name in ("image", "label", "patient"))
    probes.group_folds(labels, patients, seed=seed)
    notes = [note] if note else []

    def features(params: Any, images: jax.Array) -> jax.Array:
        inputs = normalize_images(images, objective.mean, objective.std)
        return nnx.merge(graph, params).encoder(inputs)[:, 1:].mean(axis=1)

    def run(report: Monitor, params: Any, step: int) -> None:
        size = -(-128 // mesh.size) * mesh.size
        batches = (images[start : start + size] for start in range(0, len(images), size))
        found = apply_batches(mesh, features, params, batches, batch_size=size, total=len(images), desc="probe")
        scores = probes.probe(found, labels, patients, seed=seed)
        while notes:
            report.say(notes.pop())
        report.write(step, {f"probe/{name}": value for name, value in scores.items()})
        intervals = {
            name: [scores[f"{name}_auroc{end}"] for end in ("", "_low", "_high")] for name in ("knn", "logistic")
        }
        auroc = ", ".join(f"{name} {v:.3f} [{low:.3f}, {high:.3f}]" for name, (v, low, high) in intervals.items())
        report.say(f"step {step}: probe AUROC {auroc}; effective rank {scores['rankme']:.1f}")

    return run


def picture_grid(columns: Mapping[str, np.ndarray], side: int = 192) -> np.ndarray:
    """One row per image, one column per kind of picture.

    Args:
      columns: images uint8 `[B, H, W, C]` by caption.
      side: the longer side of each image as shown, in pixels.

    Returns:
      uint8 RGB `[rows, columns, 3]`, with a caption above each column.
    """
    count, height, width = next(iter(columns.values())).shape[:3]
    scale = side / max(height, width)
    size = (round(width * scale), round(height * scale))

    def tile(image: np.ndarray) -> np.ndarray:
        rgb = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        return np.pad(
            cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC),
            ((2, 2), (2, 2), (0, 0)),
        )

    rows = [np.hstack([tile(column[i]) for column in columns.values()]) for i in range(count)]
    caption = np.zeros((22, rows[0].shape[1], 3), np.uint8)
    for number, name in enumerate(columns):
        place = (number * (size[0] + 4) + 4, 16)
        cv2.putText(caption, name, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (230, 230, 230), 1, cv2.LINE_AA)
    return np.vstack([caption, *rows])


def encode_png(image: np.ndarray) -> bytes:
    """Encodes a uint8 RGB image as PNG."""
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
