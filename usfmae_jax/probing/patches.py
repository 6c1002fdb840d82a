"""A linear probe for segmentation: from a frozen encoder's patch tokens to the classes of the pixels in each patch.

Multinomial logistic regression from each token to the fraction of its patch that each class covers. The predictions are
upsampled bilinearly to the frame, as in the linear probes of DINOv2 (Oquab et al. 2024), and scored there.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from usfmae_jax.data.pipeline import decode_ahead
from usfmae_jax.data.table import Table, read_row
from usfmae_jax.tasks.segmentation import Segmentation

#: L2 penalties to try, strongest first: each fit starts from the solution of the previous one.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_STEPS = 60  # L-BFGS steps for each penalty
_PIECE = 1 << 14  # tokens per call


@dataclasses.dataclass(frozen=True)
class PatchProbe:
    """A linear layer on patch tokens.

    Attributes:
      kernel: float32 `[D, K]`.
      bias: float32 `[K]`.
      settings: the settings chosen on the validation frames; JSON.
    """

    kernel: np.ndarray
    bias: np.ndarray
    settings: dict[str, Any]

    def predict(self, tokens: np.ndarray, grid: tuple[int, int]) -> dict[str, np.ndarray]:
        """From tokens `[n, T, D]`, T = rows * columns, to `probabilities` scaled to 255, uint8 `[n, *grid, K]`."""
        found = np.empty((len(tokens), *grid, len(self.bias)), np.uint8)
        for place, one in enumerate(tokens):
            logits = one.astype(np.float32) @ self.kernel + self.bias
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            found[place] = np.rint(255 * shares / shares.sum(axis=1, keepdims=True)).reshape(*grid, -1)
        return {"probabilities": found}


def shares(table: Table, task: Segmentation, grid: tuple[int, int], threads: int) -> np.ndarray:
    """Fraction of each patch that each class covers, background first: float16 `[N, rows * columns, K]`."""
    count = 1 + len(task.outputs)

    def one(row: int) -> np.ndarray:
        classes = task.mask(read_row(table, row))
        layers = [
            cv2.resize((classes == c).astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA)
            for c in range(count)
        ]
        return np.stack(layers, axis=-1).reshape(-1, count).astype(np.float16)

    with contextlib.closing(decode_ahead(one, range(len(table)), threads, 64)) as found:
        return np.stack(list(found))


def fit(
    tokens: np.ndarray,
    targets: np.ndarray,
    train: np.ndarray,
    validation: np.ndarray,
    penalties: Sequence[float] = PENALTIES,
) -> PatchProbe:
    """Fits the layer on training frames; the penalty is chosen by the cross-entropy on validation frames.

    Args:
      tokens: float `[N, T, D]`.
      targets: from `shares`, `[N, T, K]`.
      train: rows to fit on.
      validation: rows of other patients; may be empty if there is only one penalty.
      penalties: L2 penalties to try.
    """
    x, y = (part[train].reshape(-1, part.shape[-1]) for part in (tokens, targets))
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * np.abs(mean) + 1e-12, scale, 1.0)  # leaves constant features unscaled
    learnt = _Data(x, y, mean, scale)
    held_out = None
    if len(validation):
        x_held, y_held = (part[validation].reshape(-1, part.shape[-1]) for part in (tokens, targets))
        held_out = _Data(x_held, y_held, mean, scale)
    weights = np.zeros((x.shape[1] + 1) * y.shape[1])
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in penalties:
        answer = scipy.optimize.minimize(
            functools.partial(_penalised, learnt, penalty, y.shape[1]),
            weights,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _STEPS},
        )
        weights = answer.x
        loss = held_out.loss(weights.reshape(-1, y.shape[1]))[0] if held_out else 0.0
        if best is None or loss < best[0]:
            best = (loss, penalty, weights.copy())
    assert best
    loss, penalty, weights = best
    layer = weights.reshape(-1, y.shape[1])
    kernel = layer[:-1] / scale[:, None]
    bias = layer[-1] - mean @ kernel
    settings = {"penalty": penalty} | ({"validation_loss": loss} if held_out else {})
    return PatchProbe(kernel.astype(np.float32), bias.astype(np.float32), settings)


class _Data:
    """Tokens and targets on the device, in chunks of equal shape."""

    def __init__(self, x: np.ndarray, y: np.ndarray, mean: np.ndarray, scale: np.ndarray):
        self._count = len(x)
        piece = min(_PIECE, len(x))
        pad, shape = -len(x) % piece, (-1, piece)
        self._x = jnp.asarray(np.pad(x, ((0, pad), (0, 0))).reshape(*shape, x.shape[1]))
        self._y = jnp.asarray(np.pad(y, ((0, pad), (0, 0))).reshape(*shape, y.shape[1]))  # padding has no weight
        self._mean, self._scale = jnp.asarray(mean, jnp.float32), jnp.asarray(scale, jnp.float32)

    def loss(self, layer: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy of a layer `[D + 1, K]`, the bias last, and its gradient."""
        value, gradient = _cross_entropy(jnp.asarray(layer, jnp.float32), self._x, self._y, self._mean, self._scale)
        return float(value) / self._count, np.asarray(gradient, np.float64) / self._count


@jax.jit
def _cross_entropy(
    layer: jax.Array, x: jax.Array, y: jax.Array, mean: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def piece(total: Any, part: Any) -> tuple[Any, None]:
        features = (part[0].astype(jnp.float32) - mean) / scale
        targets = part[1].astype(jnp.float32)

        def entropy(layer: jax.Array) -> jax.Array:
            return -(targets * jax.nn.log_softmax(features @ layer[:-1] + layer[-1])).sum()

        return jax.tree.map(jnp.add, total, jax.value_and_grad(entropy)(layer)), None

    return jax.lax.scan(piece, (jnp.zeros(()), jnp.zeros_like(layer)), (x, y))[0]


def _penalised(data: _Data, penalty: float, classes: int, weights: np.ndarray) -> tuple[float, np.ndarray]:
    layer = weights.reshape(-1, classes)
    loss, gradient = data.loss(layer)
    free = np.concatenate([layer[:-1], np.zeros((1, classes))])  # the bias is not penalised
    return loss + penalty / 2 * float((free**2).sum()), (gradient + penalty * free).ravel()
