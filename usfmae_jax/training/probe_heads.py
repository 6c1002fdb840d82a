"""Heads that are trained by gradient descent on frozen features: a linear layer and an attentive pool.

Both see features that were computed once, so without augmentation. Several learning rates are trained side by side in
one program; the log loss of validation frames chooses among them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy.special import softmax

from usfmae_jax.interop.model import model_graph
from usfmae_jax.models.heads import AttentivePool
from usfmae_jax.training import probes
from usfmae_jax.training.probes import Probe, validation_loss

Data = tuple[np.ndarray, np.ndarray]

#: Learning rates per 256 frames that are tried: LARS takes large ones.
RATES = {"lars": (0.1, 0.3, 1.0, 3.0, 10.0), "adamw": (3e-4, 1e-3, 3e-3, 1e-2)}
#: Of the attentive probe, for its batch as it is.
ATTENTIVE_RATES = (3e-4, 1e-3, 3e-3)


def fit(
    protocol: str,
    train: Data,
    validation: Data,
    num_classes: int,
    *,
    num_heads: int,
    seed: int,
    options: Mapping[str, Mapping[str, Any]],
) -> Probe:
    """Fits the head of a protocol.

    Args:
      protocol: 'logistic', 'knn', 'linear' or 'attentive'.
      train: features float `[N, D]` (of 'attentive' tokens `[N, T, D]`) and labels int `[N]`.
      validation: the same of other patients; chooses the settings.
      num_classes: labels are below it.
      num_heads: of the attentive pool.
      seed: of the linear and the attentive probe.
      options: of those two, by their names.
    """
    if protocol == "logistic":
        return probes.logistic(train, validation, num_classes)
    if protocol == "knn":
        return probes.knn(train, validation, num_classes)
    if protocol == "linear":
        return linear(train, validation, num_classes, **options["linear"], seed=seed)
    return attentive(train, validation, num_classes, num_heads=num_heads, **options["attentive"], seed=seed)


def linear(
    train: Data,
    validation: Data,
    num_classes: int,
    *,
    optimizer: str = "lars",
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
) -> Probe:
    """MAE's linear probe (He et al. 2022): BatchNorm without affine parameters (eps 1e-6) and a linear layer.

    LARS (momentum 0.9) or AdamW, no weight decay, a tenth of the epochs to warm up, a cosine down to 0. Training
    standardises each batch; evaluation takes mean and variance of all training frames, which the running averages of a
    long training tend to when features do not change.

    Args:
      train: features float `[N, D]` and labels int `[N]`.
      validation: the same of other patients.
      num_classes: labels are below it.
      optimizer: 'lars' or 'adamw'.
      epochs: over the training frames.
      batch_size: at most; a smaller training set is one batch.
      seed: of the initial weights and the order.
    """
    x, y = jnp.asarray(train[0], jnp.float32), jnp.asarray(train[1])
    batch_size = min(batch_size, len(x))
    order = _order(len(x), batch_size, epochs, seed)
    rates = np.asarray(RATES[optimizer], np.float32) * batch_size / 256
    kernel = 0.01 * jax.random.truncated_normal(jax.random.key(seed), -2, 2, (x.shape[1], num_classes))
    params = jax.device_get(_train_linear(x, y, order, kernel, rates, optimizer))
    mean, variance = train[0].mean(axis=0, dtype=np.float64), train[0].var(axis=0, dtype=np.float64)

    def logits(features: np.ndarray, number: int) -> np.ndarray:
        standard = (features.astype(np.float64) - mean) / np.sqrt(variance + 1e-6)
        return standard @ params["kernel"][number] + params["bias"][number]

    losses = [validation_loss(validation[1], softmax(logits(validation[0], r), axis=1)) for r in range(len(rates))]
    best = int(np.argmin(losses))
    return Probe(
        lambda features: softmax(logits(features, best), axis=1),
        {"learning_rate": float(RATES[optimizer][best]), "epochs": epochs, "validation_log_loss": losses[best]},
    )


@functools.partial(jax.jit, static_argnames="optimizer")
def _train_linear(
    x: jax.Array, y: jax.Array, order: jax.Array, kernel: jax.Array, rates: jax.Array, optimizer: str
) -> Any:
    """Parameters of every rate, `[R, ...]`."""
    schedule = _schedule(len(order))
    # Decay is off, and so is the scaling of biases by their norm, which starts at 0.
    base = (
        optax.lars(schedule, weight_decay=0.0, trust_coefficient=0.001, trust_ratio_mask=_matrices, momentum=0.9)
        if optimizer == "lars"
        else optax.adamw(schedule, weight_decay=0.0)
    )
    params = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), params)

    def loss(params: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
        logits = features @ params["kernel"] + params["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(params: Any, state: Any, rate: jax.Array, features: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        updates, state = base.update(jax.grad(loss)(params, features, labels), state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, states = carry
        features = x[rows]
        features = (features - features.mean(axis=0)) / jnp.sqrt(features.var(axis=0) + 1e-6)
        return jax.vmap(update, in_axes=(0, 0, 0, None, None))(params, states, rates, features, y[rows]), None

    return jax.lax.scan(step, (params, jax.vmap(base.init)(params)), order)[0][0]


def attentive(
    train: Data,
    validation: Data,
    num_classes: int,
    *,
    num_heads: int,
    epochs: int = 30,
    batch_size: int = 64,
    patience: int = 5,
    seed: int = 0,
) -> Probe:
    """Attentive probe: `models.heads.AttentivePool` on the patch tokens of a frozen encoder.

    AdamW with weight decay 0.05 on matrices, cosine after a tenth of warm-up. After every epoch the validation frames
    are scored; the best epoch of the best rate is kept, and training ends when none has improved for `patience` epochs.

    Args:
      train: tokens float `[N, T, D]` and labels int `[N]`.
      validation: the same of other patients.
      num_classes: labels are below it.
      num_heads: of the pool; divides D.
      epochs: at most.
      batch_size: at most; a smaller training set is one batch.
      patience: epochs.
      seed: of the initial weights and the order.
    """
    batch_size = min(batch_size, len(train[0]))
    order = _order(len(train[0]), batch_size, epochs, seed)
    steps = len(order) // epochs
    width = train[0].shape[-1]

    def make(rngs: nnx.Rngs) -> AttentivePool:
        return AttentivePool(width, num_heads, num_classes, rngs=rngs)

    graph = model_graph(make)
    update, forward, optimizer = _attentive_program(graph, len(order))
    first = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed)), nnx.Param))
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(ATTENTIVE_RATES), *leaf.shape)), first)
    state = jax.vmap(optimizer.init)(params)
    best: tuple[float, int, Any] = (np.inf, 0, jax.tree.map(lambda leaf: leaf[None], first))
    settings: dict[str, float] = {}
    for epoch in range(epochs):
        for rows in order[epoch * steps : (epoch + 1) * steps]:
            params, state = update(params, state, train[0][rows], train[1][rows])
        predicted = softmax(_by_batches(forward, params, validation[0]), axis=-1)  # [N, R, C]
        losses = [validation_loss(validation[1], predicted[:, r]) for r in range(len(ATTENTIVE_RATES))]
        number = int(np.argmin(losses))
        if losses[number] < best[0]:
            best = (losses[number], epoch, jax.tree.map(lambda leaf, i=number: np.asarray(leaf[i : i + 1]), params))
            settings = {"learning_rate": ATTENTIVE_RATES[number], "epoch": epoch + 1, "validation_log_loss": best[0]}
        elif epoch - best[1] >= patience:
            break
    return Probe(lambda tokens: softmax(_by_batches(forward, best[2], tokens)[:, 0], axis=-1), settings)


@functools.lru_cache(4)  # folds of equal shapes share the compiled programs
def _attentive_program(graph: Any, steps: int) -> tuple[Any, Any, optax.GradientTransformation]:
    optimizer = optax.adamw(_schedule(steps), weight_decay=0.05, mask=_matrices)
    rates = jnp.asarray(ATTENTIVE_RATES, jnp.float32)

    def loss(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens.astype(jnp.float32))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def one(params: Any, state: Any, rate: jax.Array, tokens: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params, tokens, labels), state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    def update(params: Any, state: Any, tokens: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        return jax.vmap(one, in_axes=(0, 0, 0, None, None))(params, state, rates, tokens, labels)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda p: nnx.merge(graph, p)(tokens.astype(jnp.float32)), out_axes=1)(params)

    return jax.jit(update, donate_argnums=(0, 1)), jax.jit(forward), optimizer


def _by_batches(forward: Any, params: Any, tokens: np.ndarray, batch_size: int = 256) -> np.ndarray:
    found = []
    for start in range(0, len(tokens), batch_size):
        chunk = tokens[start : start + batch_size]
        padded = np.concatenate([chunk, np.zeros((batch_size - len(chunk), *chunk.shape[1:]), chunk.dtype)])
        found.append(np.asarray(forward(params, padded))[: len(chunk)])
    return np.concatenate(found)


def _order(count: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """Rows of every batch, int `[steps, batch_size]`: each epoch shuffled anew, its incomplete batch left out."""
    rng = np.random.default_rng(seed)
    kept = count // batch_size * batch_size
    return np.concatenate([rng.permutation(count)[:kept].reshape(-1, batch_size) for _ in range(epochs)])


def _schedule(steps: int) -> optax.Schedule:
    """Relative: the rate itself multiplies it."""
    warmup = steps // 10
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, max(steps, warmup + 1))


def _matrices(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
