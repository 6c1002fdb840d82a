"""One update of a classifier, and the forward pass that predicts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.finetuning.regularization import erase, mix, smoothed_targets
from usfmae_jax.interop.encoder import flatten, unflatten
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.training.mesh import batch_sharding
from usfmae_jax.training.state import State

#: What runs that share a program differ in: `total_steps` int scalar, `class_weights` float32 `[C]`.
Member = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Supervision:
    """How a classifier is taught, and how it sees pixels.

    Attributes:
      num_classes: outputs of the model.
      mean: per channel of the model's input.
      std: per channel.
      smoothing: of the labels, in [0, 1).
      mixup: see `regularization.mix`; 0 = off.
      cutmix: see `regularization.mix`; 0 = off.
      erasing: probability, see `regularization.erase`.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0


def pick_trained(params: Any, trained: tuple[str, ...]) -> Any:
    """The part of `params` whose names start with one of `trained`; () = all."""
    if not trained:
        return params
    return unflatten({name: leaf for name, leaf in flatten(params).items() if name.startswith(trained)})


def combine(params: Any, part: Any) -> Any:
    """`params` with the leaves of `part`, a subtree of it, in their places."""
    return unflatten(flatten(params) | flatten(part))


def cross_entropy(logits: jax.Array, targets: jax.Array, class_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy in float32 as (weighted sum, sum of weights); their quotient is the loss.

    Kept apart so that gradients of micro-batches add up to that of the whole batch.

    Args:
      logits: `[B, C]`.
      targets: `[B, C]`, rows add up to 1.
      class_weights: `[C]`.
    """
    weighted = targets * class_weights
    return -(weighted * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(), weighted.sum()


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
    how: Supervision,
    *,
    trained: tuple[str, ...] = (),
    accumulate: int = 1,
) -> Callable[[State, Mapping[str, jax.Array], Member], tuple[State, dict[str, jax.Array]]]:
    """Builds the update `(state, {"image" uint8 [B, H, W, c], "label" int [B]}, member) -> (state, metrics)`.

    Args:
      graph: of the model, from `state.model_graph`; the model takes `(images, rng=, train=True)`.
      optimizer: what `state["opt_state"]` belongs to, with a learning rate of 1.
      learning_rate: `(step, total_steps) -> rate`.
      mesh: the batch is spread over it.
      how: see there.
      trained: first letters of the names of the parameters that are trained, as `pick_trained` takes them; no gradient
        is computed for others.
      accumulate: micro-batches per update; the update is that of the whole batch (batch norm sees micro-batches).
    """
    sharding = batch_sharding(mesh)

    def summed_error(part: Any, params: Any, stats: Any, inputs: Any, targets: Any, rng: jax.Array, weights: Any):
        model = nnx.merge(graph, combine(params, part), *([stats] if stats else []))
        error, count = cross_entropy(model(inputs, rng=rng, train=True), targets, weights)
        return error, (count, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    gradient = jax.value_and_grad(summed_error, has_aux=True)

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that every micro-batch is spread over all devices and nothing moves.
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def train_step(state: State, batch: Mapping[str, jax.Array], member: Member) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        mix_rng, erase_rng, model_rng = jax.random.split(rng, 3)
        inputs = normalize_images(batch["image"], how.mean, how.std)
        targets = smoothed_targets(batch["label"], how.num_classes, how.smoothing)
        inputs = erase(erase_rng, inputs, how.erasing)  # before they are mixed, as MAE's recipe has it
        inputs, targets = mix(mix_rng, inputs, targets, mixup=how.mixup, cutmix=how.cutmix)
        inputs, targets = jax.lax.with_sharding_constraint((inputs, targets), sharding)
        params, stats, weights = state["params"], state.get("stats", {}), member["class_weights"]
        part = pick_trained(params, trained)
        if accumulate == 1:
            (error, (count, stats)), gradients = gradient(part, params, stats, inputs, targets, model_rng, weights)
        else:

            def add(carry: Any, micro: Any) -> tuple[Any, None]:
                total, stats = carry
                (error, (count, stats)), gradients = gradient(part, params, stats, *micro, weights)
                return (jax.tree.map(jnp.add, total, ((error, count), gradients)), stats), None

            zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, part))
            micro = (*jax.tree.map(split, (inputs, targets)), jax.random.split(model_rng, accumulate))
            (((error, count), gradients), stats), _ = jax.lax.scan(add, (zero, stats), micro)
        # The weights' sum does not depend on the parameters: dividing last gives the gradient of the mean.
        gradients = jax.tree.map(lambda g: g / count, gradients)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], part)
        rate = learning_rate(state["step"], member["total_steps"])
        part = optax.apply_updates(part, jax.tree.map(lambda u: u * rate, updates))
        metrics = {"loss": error / count, "learning_rate": rate, "grad_norm": optax.tree.norm(gradients)}
        new = {"step": state["step"] + 1, "params": combine(params, part), "opt_state": opt_state}
        return state | new | ({"stats": stats} if stats else {}), metrics

    return train_step


def make_predict(graph: Any, how: Supervision) -> Callable[[Any, jax.Array], jax.Array]:
    """Builds `({"params", and "stats" if any}, images uint8 [B, H, W, c]) -> probabilities float32 [B, C]`."""

    def predict(variables: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graph, *variables.values())
        return jax.nn.softmax(model(normalize_images(images, how.mean, how.std)))

    return predict
