"""Probes of frozen features: logistic regression, k-NN, a linear layer, attentive pooling, and effective rank.

The settings of a probe are chosen by the log loss on validation frames: since the predictions of several folds are
pooled, a ranking metric would not do, as it leaves the scale of the probabilities open. All probes use features that
were computed once, hence without augmentation. Probes trained by gradient descent train several learning rates in
parallel in one program.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from usfmae_jax.data.splits import cross_validation
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import metrics
from usfmae_jax.evaluation.intervals import bootstrap_chunks
from usfmae_jax.models.heads import AttentivePool
from usfmae_jax.training.forward import apply_batches
from usfmae_jax.training.mesh import one_device
from usfmae_jax.training.optimizers import warmup_cosine
from usfmae_jax.training.state import model_graph

Data = tuple[np.ndarray, np.ndarray]

#: Inverse regularisation strengths to try, as in the DINO evaluations.
REGULARIZATION = tuple(10.0**power for power in range(-6, 6))
#: Penalties of ridge regression to try: factors of the squared weights relative to the mean squared error.
PENALTIES = tuple(10.0**power for power in range(-5, 3))
#: Numbers of neighbours to try, and the temperature of their votes (Caron et al. 2021).
NEIGHBOURS, TEMPERATURE = (10, 20, 100, 200), 0.07
#: Maximum number of rows of the Hessian that Newton's method factorises; above this, L-BFGS is faster.
LARGEST_HESSIAN = 1600
#: Learning rates to try, per 256 frames of batch size; LARS needs large ones.
RATES = {"lars": (0.1, 0.3, 1.0, 3.0, 10.0), "adamw": (3e-4, 1e-3, 3e-3, 1e-2)}
#: Learning rates of the attentive probe to try, not scaled by its batch size.
ATTENTIVE_RATES = (3e-4, 1e-3, 3e-3)


#: Number of frames per forward pass on patch tokens.
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Probe:
    """A head fitted to frozen features.

    Attributes:
      predict: features `[N, ...]` to probabilities float64 `[N, C]`.
      settings: the settings chosen on the validation frames, and their score there; JSON.
    """

    predict: Callable[[np.ndarray], np.ndarray]
    settings: dict[str, float]


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
      train: features float `[N, D]` (tokens `[N, T, D]` for 'attentive') and labels int `[N]`.
      validation: likewise, for other patients; used to choose the settings.
      num_classes: C; labels are in [0, C).
      num_heads: of the attentive pooling.
      seed: of the linear and the attentive probe.
      options: of those two, by name.
    """
    if protocol == "logistic":
        return logistic(train, validation, num_classes)
    if protocol == "knn":
        return knn(train, validation, num_classes)
    if protocol == "linear":
        return linear(train, validation, num_classes, **options["linear"], seed=seed)
    return attentive(train, validation, num_classes, num_heads=num_heads, **options["attentive"], seed=seed)


def refit(
    protocol: str,
    chosen: Mapping[str, float],
    train: Data,
    num_classes: int,
    *,
    num_heads: int,
    seed: int,
    options: Mapping[str, Mapping[str, Any]],
) -> Probe:
    """Fits the head of a protocol with settings already chosen, as the final step of DINO's evaluations.

    Args:
      protocol: see `fit`.
      chosen: `settings` of the `Probe` that `fit` returned.
      train: features and labels of the training and the validation frames together.
      num_classes: see `fit`.
      num_heads: likewise.
      seed: likewise.
      options: likewise.
    """
    if protocol == "logistic":
        return logistic(train, None, num_classes, (chosen["C"],))
    if protocol == "knn":
        return knn(train, None, num_classes, (int(chosen["k"]),))
    rates = (chosen["learning_rate"],)
    if protocol == "linear":
        return linear(train, None, num_classes, **options["linear"], seed=seed, rates=rates)
    how = {**options["attentive"], "rates": rates, "until": int(chosen["epoch"])}
    return attentive(train, None, num_classes, num_heads=num_heads, seed=seed, **how)


def logistic(
    train: Data, validation: Data | None, num_classes: int, strengths: Sequence[float] = REGULARIZATION
) -> Probe:
    """Multinomial logistic regression on standardised features, with regularisation chosen on validation frames.

    Models are fitted to the training frames alone for each inverse strength C, warm-started from the previous one; the
    lowest validation log loss wins.

    Args:
      train: features float `[N, D]` and labels int `[N]` that include every class.
      validation: likewise, for other patients; None if there is only one strength.
      num_classes: C; labels are in [0, C).
      strengths: inverse strengths to try.
    """
    mean, scale = train[0].mean(axis=0, dtype=np.float64), train[0].std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * np.abs(mean) + 1e-12, scale, 1.0)  # a constant feature carries no information
    x = (train[0] - mean) / scale
    # With an L2 penalty the weights lie in the span of the training frames: fewer frames than features, fewer unknowns.
    basis = np.linalg.svd(x, full_matrices=False)[2].T if len(x) < x.shape[1] else np.eye(x.shape[1])
    x = x @ basis
    held_out = (validation[0] - mean) / scale @ basis if validation else None
    unknowns = (x.shape[1] + 1) * (num_classes if num_classes > 2 else 1)
    model = LogisticRegression(
        solver="newton-cholesky" if unknowns <= LARGEST_HESSIAN else "lbfgs", max_iter=1000, warm_start=True
    )
    best: tuple[float, float, np.ndarray, np.ndarray] | None = None
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # separable and hardly regularised: the weights diverge
            model.set_params(C=strength).fit(x, train[1])
        loss = validation_loss(validation[1], model.predict_proba(held_out)) if validation else 0.0
        if best is None or loss < best[0]:
            best = (loss, strength, model.coef_.copy(), model.intercept_.copy())
    assert best
    loss, strength, weights, bias = best
    kernel = basis @ weights.T / scale[:, None]
    bias = bias - mean @ kernel

    def predict(features: np.ndarray) -> np.ndarray:
        logits = features @ kernel + bias
        return softmax(np.concatenate([0 * logits, logits], axis=1) if num_classes == 2 else logits, axis=1)

    return Probe(predict, {"C": strength, "validation_log_loss": loss})


def ridge(
    train: Data, validation: Data | None, penalties: Sequence[float] = PENALTIES
) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, float]]:
    """Ridge regression on standardised features, with the penalty chosen by the error on validation frames.

    Args:
      train: features float `[N, D]` and values float `[N]`.
      validation: likewise, for other patients; None if there is only one penalty.
      penalties: to try; ties are resolved in favour of the largest.

    Returns:
      a function that predicts values float64 `[n]` from features `[n, D]`; and the settings, JSON.
    """
    mean, scale = train[0].mean(axis=0, dtype=np.float64), train[0].std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6 * np.abs(mean) + 1e-12, scale, 1.0)  # a constant feature carries no information
    centre = float(train[1].mean())
    left, values, right = np.linalg.svd((train[0] - mean) / scale, full_matrices=False)
    onto = left.T @ (train[1] - centre)
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in sorted(penalties, reverse=True):
        kernel = right.T @ (values / (values**2 + penalty * len(train[1])) * onto) / scale
        error = 0.0
        if validation:
            error = float(np.mean((centre + (validation[0] - mean) @ kernel - validation[1]) ** 2))
        if best is None or error < best[0]:
            best = (error, penalty, kernel)
    assert best
    error, penalty, kernel = best
    return lambda features: centre + (features - mean) @ kernel, {"penalty": penalty, "validation_mse": error}


def knn(train: Data, validation: Data | None, num_classes: int, counts: Sequence[int] = NEIGHBOURS) -> Probe:
    """Weighted vote of the nearest training frames by cosine similarity (Wu et al. 2018, eq. 4), temperature 0.07.

    The number of neighbours is chosen by the log loss on validation frames.

    Args:
      train: features float `[N, D]` and labels int `[N]` that include every class.
      validation: likewise, for other patients; None if there is only one count.
      num_classes: C; labels are in [0, C).
      counts: numbers of neighbours to try, capped at N.
    """
    known, votes = _unit(train[0]), np.eye(num_classes)[train[1]]
    counts = sorted({min(count, len(known)) for count in counts})

    def predict(features: np.ndarray, count: int) -> np.ndarray:
        found = np.empty((len(features), num_classes))
        for start in range(0, len(features), 1024):  # similarities of all frames at once may not fit into memory
            similar = _unit(features[start : start + 1024]) @ known.T
            nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
            # Relative to the nearest neighbour: the same shares without overflow.
            near = np.take_along_axis(similar, nearest, axis=1)
            weight = np.exp((near - near.max(axis=1, keepdims=True)) / TEMPERATURE)
            found[start : start + 1024] = np.einsum(
                "nk,nkc->nc", weight / weight.sum(axis=1, keepdims=True), votes[nearest]
            )
        return found

    losses = [validation_loss(validation[1], predict(validation[0], count)) if validation else 0.0 for count in counts]
    best = counts[int(np.argmin(losses))]
    return Probe(lambda features: predict(features, best), {"k": best, "validation_log_loss": min(losses)})


def validation_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean log loss of probabilities `[N, C]`, clipped to at least 1e-6; infinite if any is not finite."""
    if not np.isfinite(probabilities).all():
        return np.inf
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-6)).mean())


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def rankme(features: np.ndarray) -> float:
    """Effective rank of features `[N, D]`, in [1, min(N, D)] (Garrido et al. 2023, eq. 1).

    The exponential of the entropy of the normalised singular values: low when features collapse onto few directions.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    share = values / max(values.sum(), 1e-12) + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def probe(features: np.ndarray, labels: np.ndarray, groups: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """Scores frozen features by 5-fold cross-validation with every group in one fold.

    It uses two probes with fixed settings, so that nothing is tuned on the test folds: `knn` with 20 neighbours and
    `logistic` with C = 0.01.

    Args:
      features: float `[N, D]`.
      labels: int `[N]`.
      groups: patient of each frame; a group is never split between training and test.
      seed: of the folds and the bootstrap.

    Returns:
      `{knn,logistic}_{auroc,balanced_accuracy}` over the pooled held-out predictions (AUROC one-vs-rest, macro); the
      ends of the AUROC's 95% interval over patients, `{knn,logistic}_auroc_{low,high}`; and `rankme`.

    Raises:
      InputError: see `group_folds`.
    """
    folds = group_folds(labels, groups, seed=seed)
    classes, codes = np.unique(labels, return_inverse=True)
    positive = 1 if len(classes) == 2 else None
    fits = {"knn": functools.partial(knn, counts=(20,)), "logistic": functools.partial(logistic, strengths=(0.01,))}
    scores: dict[str, float] = {}
    for name, fit_head in fits.items():
        held_out = np.zeros((len(labels), len(classes)))
        for train, test in folds:
            head = fit_head((features[train], codes[train]), None, len(classes))
            held_out[test] = head.predict(features[test])
        value = metrics(codes, held_out, positive)
        drawn = [
            metrics(codes, held_out, positive, w)["auroc"] for w in bootstrap_chunks(np.asarray(groups), 200, seed)
        ]
        low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
        scores |= {f"{name}_{metric}": float(value[metric][0]) for metric in ("auroc", "balanced_accuracy")}
        scores |= {f"{name}_auroc_low": float(low), f"{name}_auroc_high": float(high)}
    return scores | {"rankme": rankme(features)}


def group_folds(
    labels: np.ndarray, groups: Sequence[str], *, count: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stratified folds as (train, test) indices, each group in one test fold; fewer if a class has fewer groups.

    Raises:
      InputError: a class has frames of fewer than two groups, or too few groups to be in every training fold.
    """
    group_array = np.asarray(groups)
    fewest = min((len(np.unique(group_array[labels == label])), label) for label in np.unique(labels))
    if fewest[0] < 2:
        raise InputError(
            f"class {fewest[1]} has frames of one patient only, so that it cannot be tested on another one"
        )
    folds = cross_validation(labels, group_array, min(count, fewest[0]), seed)
    if any(len(np.unique(labels[train])) < len(np.unique(labels)) for train, _ in folds):
        raise InputError(f"class {fewest[1]} has too few patients ({fewest[0]}) to be in every training fold")
    return folds


def linear(
    train: Data,
    validation: Data | None,
    num_classes: int,
    *,
    optimizer: str = "lars",
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
    rates: Sequence[float] = (),
) -> Probe:
    """MAE's linear probe (He et al. 2022): BatchNorm without affine parameters (eps 1e-6) and a linear layer.

    LARS (momentum 0.9) or AdamW without weight decay; warm-up over a tenth of the steps, then a cosine down to 0.
    Training standardises each batch; evaluation uses mean and variance of all training frames, to which running
    averages would converge, since the features are fixed.

    Args:
      train: features float `[N, D]` and labels int `[N]`.
      validation: likewise, for other patients; None if there is only one rate.
      num_classes: C; labels are in [0, C).
      optimizer: 'lars' or 'adamw'.
      epochs: over the training frames.
      batch_size: maximum; a smaller training set is one batch.
      seed: of the initial weights and the order.
      rates: learning rates to try, per 256 frames of batch size; () = those of `RATES`.
    """
    x, y = jnp.asarray(train[0], jnp.float32), jnp.asarray(train[1])
    batch_size = min(batch_size, len(x))
    order = _order(len(x), batch_size, epochs, seed)
    tried = rates or RATES[optimizer]
    scaled = np.asarray(tried, np.float32) * batch_size / 256
    kernel = 0.01 * jax.random.truncated_normal(jax.random.key(seed), -2, 2, (x.shape[1], num_classes))
    params = jax.device_get(_train_linear(x, y, order, kernel, scaled, optimizer))
    mean, variance = train[0].mean(axis=0, dtype=np.float64), train[0].var(axis=0, dtype=np.float64)

    def logits(features: np.ndarray, number: int) -> np.ndarray:
        standard = (features.astype(np.float64) - mean) / np.sqrt(variance + 1e-6)
        return standard @ params["kernel"][number] + params["bias"][number]

    losses = [0.0]
    if validation:
        losses = [validation_loss(validation[1], softmax(logits(validation[0], r), axis=1)) for r in range(len(tried))]
    best = int(np.argmin(losses))
    return Probe(
        lambda features: softmax(logits(features, best), axis=1),
        {"learning_rate": float(tried[best]), "epochs": epochs, "validation_log_loss": losses[best]},
    )


@functools.partial(jax.jit, static_argnames="optimizer")
def _train_linear(
    x: jax.Array, y: jax.Array, order: jax.Array, kernel: jax.Array, rates: jax.Array, optimizer: str
) -> Any:
    """Trained parameters for every rate, `[R, ...]`."""
    schedule = _schedule(len(order))
    # No weight decay, and no trust ratio for biases, whose norm starts at 0.
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
    validation: Data | None,
    num_classes: int,
    *,
    num_heads: int,
    epochs: int = 30,
    batch_size: int = 64,
    patience: int = 5,
    seed: int = 0,
    rates: Sequence[float] = ATTENTIVE_RATES,
    until: int = 0,
) -> Probe:
    """Attentive probe: `models.heads.AttentivePool` on the patch tokens of a frozen encoder.

    AdamW with weight decay 0.05 on matrices; warm-up over a tenth of the steps, then a cosine. Validation frames are
    scored after every epoch; the best epoch of the best rate is kept, and training stops after `patience` epochs
    without improvement.

    Args:
      train: tokens float `[N, T, D]` and labels int `[N]`.
      validation: likewise, for other patients; None if there is only one rate and `until` is given.
      num_classes: C; labels are in [0, C).
      num_heads: of the pooling; must divide D.
      epochs: maximum, and length of the schedule.
      batch_size: maximum; a smaller training set is one batch.
      patience: in epochs.
      seed: of the initial weights and the order.
      rates: learning rates to try.
      until: without validation, the epoch after which to stop and keep the weights.
    """
    batch_size = min(batch_size, len(train[0]))
    order = _order(len(train[0]), batch_size, epochs, seed)
    steps = len(order) // epochs
    width = train[0].shape[-1]

    def make(rngs: nnx.Rngs) -> AttentivePool:
        return AttentivePool(width, num_heads, num_classes, rngs=rngs)

    graph = model_graph(make)
    update, forward, optimizer = _attentive_program(graph, len(order), tuple(rates))
    first = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(seed)), nnx.Param))
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), first)
    state = jax.vmap(optimizer.init)(params)
    best: tuple[float, int, Any] = (np.inf, 0, jax.tree.map(lambda leaf: leaf[None], first))
    settings: dict[str, float] = {}
    for epoch in range(epochs):
        for rows in order[epoch * steps : (epoch + 1) * steps]:
            params, state = update(params, state, train[0][rows], train[1][rows])
        if validation is None:
            if epoch + 1 < until:
                continue
            best = (0.0, epoch, jax.tree.map(np.asarray, params))
            settings = {"learning_rate": rates[0], "epoch": until}
            break
        predicted = softmax(_by_batches(forward, params, validation[0]), axis=-1)  # [N, R, C]
        losses = [validation_loss(validation[1], predicted[:, r]) for r in range(len(rates))]
        number = int(np.argmin(losses))
        if losses[number] < best[0]:
            best = (losses[number], epoch, jax.tree.map(lambda leaf, i=number: np.asarray(leaf[i : i + 1]), params))
            settings = {"learning_rate": rates[number], "epoch": epoch + 1, "validation_log_loss": best[0]}
        elif epoch - best[1] >= patience:
            break
    return Probe(lambda tokens: softmax(_by_batches(forward, best[2], tokens)[:, 0], axis=-1), settings)


@functools.lru_cache(4)  # folds of equal shape share the compiled programs
def _attentive_program(
    graph: Any, steps: int, tried: tuple[float, ...]
) -> tuple[Any, Any, optax.GradientTransformation]:
    optimizer = optax.adamw(_schedule(steps), weight_decay=0.05, mask=_matrices)
    rates = jnp.asarray(tried, jnp.float32)

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

    return jax.jit(update, donate_argnums=(0, 1)), forward, optimizer


def _by_batches(forward: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    batches = (tokens[start : start + _BATCH] for start in range(0, len(tokens), _BATCH))
    return apply_batches(one_device(), forward, params, batches, batch_size=_BATCH, total=len(tokens))


def _order(count: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """Rows of every batch, int `[steps, batch_size]`: reshuffled every epoch, dropping the incomplete last batch."""
    rng = np.random.default_rng(seed)
    kept = count // batch_size * batch_size
    return np.concatenate([rng.permutation(count)[:kept].reshape(-1, batch_size) for _ in range(epochs)])


def _schedule(steps: int) -> optax.Schedule:
    """Schedule with a peak of 1, to be multiplied by the learning rate."""
    warmup = steps // 10 / steps
    return lambda step: warmup_cosine(step, jnp.asarray(steps), learning_rate=1.0, floor=0.0, warmup=warmup)


def _matrices(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
