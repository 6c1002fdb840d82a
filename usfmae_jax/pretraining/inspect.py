"""Looks at a model during training: reconstruction pictures and frozen-feature probes."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from usfmae_jax.pretraining.pictures import encode_png, reconstruction_grid
from usfmae_jax.training import probes
from usfmae_jax.training.mesh import global_batch, replicated
from usfmae_jax.training.monitor import Monitor
from usfmae_jax.training.state import State


class Inspector:
    """Draws and probes at its own intervals; holds the same images and masks for the whole run, to compare over time.

    Args:
      mesh: devices of the run.
      workdir: pictures go to `reconstructions/`.
      reconstruct: from `step.make_reconstruct`.
      images: uint8 `[n, H, W, C]`, this process's part of the images to draw.
      pictures_every: steps; 0 = never.
      features: from `step.make_features`.
      labelled: from `pipeline.load_labelled`; None = no probe.
      note: said with the first probe.
      probe_every: steps; 0 = never.
      batch_size: of feature extraction; the devices must divide it.
      seed: of masks and folds.
    """

    def __init__(
        self,
        mesh: Mesh,
        workdir: str,
        *,
        reconstruct: Any,
        images: np.ndarray,
        pictures_every: int,
        features: Any,
        labelled: dict[str, Any] | None,
        note: str,
        probe_every: int,
        batch_size: int,
        seed: int,
    ):
        self._mesh, self._directory, self._seed = mesh, epath.Path(workdir) / "reconstructions", seed
        self._images, self._pictures_every = images, pictures_every
        self._labelled, self._probe_every, self._batch_size = labelled, probe_every, batch_size
        self._note = note
        self._reconstruct = jax.jit(reconstruct, out_shardings=replicated(mesh))
        self._features = jax.jit(features, out_shardings=replicated(mesh))
        if labelled:  # a bad split is found now, not after hours
            probes.group_folds(labelled["label"], labelled["patient"], seed=seed)

    def run(self, report: Monitor, state: State, step: int, *, last: bool = False) -> None:
        """Does what is due after `step` updates; everything at step 0 and at the last."""

        def due(every: int) -> bool:
            return bool(every) and (last or step % every == 0)

        if not due(self._pictures_every) and not (self._labelled and due(self._probe_every)):
            return
        report.flush()
        with report.pause():
            if due(self._pictures_every):
                self._draw(report, state["params"], step)
            if self._labelled and due(self._probe_every):
                self._probe(report, state["params"], step)

    def _draw(self, report: Monitor, params: Any, step: int) -> None:
        images = global_batch(self._mesh, self._images)
        predicted, hidden = self._reconstruct(params, images, jax.random.key(self._seed))
        shown = jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(self._mesh))(images))
        if jax.process_index():
            return
        grid = reconstruction_grid(shown[:8], np.asarray(predicted)[:8], np.asarray(hidden)[:8])
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"step_{step:07d}.png").write_bytes(encode_png(grid))
        report.write_image(step, "reconstruction", grid)

    def _probe(self, report: Monitor, params: Any, step: int) -> None:
        assert self._labelled
        scores = probes.probe(
            self.extract(params, self._labelled["image"]),
            self._labelled["label"],
            self._labelled["patient"],
            seed=self._seed,
        )
        if self._note:
            report.say(self._note)
            self._note = ""
        report.write(step, {f"probe/{name}": value for name, value in scores.items()})
        intervals = {
            name: [scores[f"{name}_auroc{end}"] for end in ("", "_low", "_high")] for name in ("knn", "logistic")
        }
        auroc = ", ".join(f"{name} {v:.3f} [{low:.3f}, {high:.3f}]" for name, (v, low, high) in intervals.items())
        report.say(f"step {step}: probe AUROC {auroc}; effective rank {scores['rankme']:.1f}")

    def extract(self, params: Any, images: np.ndarray) -> np.ndarray:
        """Features float32 `[N, D]` of uint8 images `[N, H, W, C]` that every process holds."""
        rows = self._batch_size // jax.process_count()
        found = []
        for start in range(0, len(images), self._batch_size):
            chunk = images[start : start + self._batch_size]
            padded = np.concatenate([chunk, np.zeros((self._batch_size - len(chunk), *images.shape[1:]), np.uint8)])
            local = padded[jax.process_index() * rows : (jax.process_index() + 1) * rows]
            found.append(np.asarray(self._features(params, global_batch(self._mesh, local)))[: len(chunk)])
        return np.concatenate(found)
