"""The training step of all objectives and tasks: gradient of a (sum, count) loss, accumulation, optimiser, metrics."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.interop.model import flatten, unflatten
from usfmae_jax.training.mesh import batch_sharding, replicated
from usfmae_jax.training.state import State

Metrics = dict[str, jax.Array]
#: `(state, batch, total_steps)` to the next state and the step's metrics.
Update = Callable[[State, Any, Any], tuple[State, Metrics]]


def pick(params: Any, trained: tuple[str, ...]) -> Any:
    """The subtree of `params` whose names start with one of `trained`; () = all."""
    if not trained:
        return params
    return unflatten({name: leaf for name, leaf in flatten(params).items() if name.startswith(trained)})


def combine(params: Any, part: Any) -> Any:
    """`params` with the leaves of `part`, a subtree, replaced."""
    return unflatten(flatten(params) | flatten(part))


def make_update(
    graph: Any,
    prepare: Callable[[Any, jax.Array], tuple[Any, jax.Array]],
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array]],
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
    *,
    trained: tuple[str, ...] = (),
    accumulate: int = 1,
    skip: bool = False,
    ema: float = 0.0,
    teach: Callable[[Any, Any], Any] = lambda params, batch: batch,
) -> Update:
    """Builds the update `(state, batch, total_steps) -> (state, metrics)`.

    Args:
      graph: of the model, from `interop.model.model_graph`.
      prepare: of an objective or a task, `(batch, rng) -> (arrays, rng)`: draws random numbers for the whole batch.
      loss: likewise, `(model, arrays, rng) -> (sum, count)`.
      optimizer: the optimiser of `state["opt_state"]`, with a learning rate of 1.
      learning_rate: `(step, total_steps) -> rate`; the length is an argument, so that runs of different lengths share
        one compiled program.
      mesh: the batch is sharded over it.
      trained: name prefixes of the trained parameters, () = all; no gradient is computed for others.
      accumulate: micro-batches per update; the update is that of the whole batch (except that batch norm sees
        micro-batches).
      skip: a step whose loss or gradient is not finite changes nothing but the step number, and the metric `skipped`
        is 1.
      ema: decay of the running average of the parameters, `state["ema"]`; lower in the beginning, (1 + step) /
        (10 + step), so that the initial parameters are forgotten. 0 = none.
      teach: `(parameters, arrays) -> arrays` for `loss`: adds the output of a teacher, without gradient. The parameters
        are the fixed `state["teacher"]`, or else the running average.
    """
    sharding = batch_sharding(mesh)

    def summed(part: Any, params: Any, stats: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, combine(params, part), *([stats] if stats else []))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # see `models.layers.spread`
            total, count = loss(model, batch, rng)
        return total, (count, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    gradient = jax.value_and_grad(summed, has_aux=True)

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that every micro-batch is spread over all devices and no data move.
        return x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def update(state: State, batch: Any, total_steps: Any) -> tuple[State, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        batch, rng = prepare(batch, rng)
        batch = jax.lax.with_sharding_constraint(batch, sharding)
        params, stats = state["params"], state.get("stats", {})
        part = pick(params, trained)
        teacher = state.get("teacher", state.get("ema"))
        if accumulate == 1:
            (total, (count, stats)), gradients = gradient(part, params, stats, teach(teacher, batch), rng)
        else:

            def add(carry: Any, micro: Any) -> tuple[Any, None]:
                (sums, stats), (batch, rng) = carry, micro
                (total, (count, stats)), gradients = gradient(part, params, stats, teach(teacher, batch), rng)
                return (jax.tree.map(jnp.add, sums, ((total, count), gradients)), stats), None

            zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, part))
            micro = (jax.tree.map(split, batch), jax.random.split(rng, accumulate))
            (((total, count), gradients), stats), _ = jax.lax.scan(add, (zero, stats), micro)
        # The count does not depend on the parameters: dividing at the end gives the gradient of the mean.
        gradients = jax.tree.map(lambda g: g / count, gradients)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for Muon, see `optimizers`
            updates, opt_state = optimizer.update(gradients, state["opt_state"], part)
        rate = learning_rate(state["step"], total_steps)
        part = optax.apply_updates(part, jax.tree.map(lambda u: u * rate, updates))
        metrics = {"loss": total / count, "learning_rate": rate, "grad_norm": optax.tree.norm(gradients)}
        new = state | {"params": combine(params, part), "opt_state": opt_state} | ({"stats": stats} if stats else {})
        if ema:
            step = state["step"].astype(jnp.float32)
            decay = jnp.minimum(ema, (1 + step) / (10 + step))
            new |= {"ema": jax.tree.map(lambda old, now: old + (1 - decay) * (now - old), state["ema"], new["params"])}
        if skip:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, dict(state))
            metrics["skipped"] = 1.0 - finite
        return new | {"step": state["step"] + 1}, metrics

    return update


def compile_update(update: Update, state: Any, batch: Any, say: Callable[[str], None]) -> Update:
    """Compiles the update for given shapes and shardings, and reports how long that took.

    Args:
      update: from `make_update`.
      state: arrays, or shapes with shardings, of the train state; it is donated.
      batch: likewise, on the mesh.
      say: prints a line for the user.
    """
    say("compiling the training step ...")
    start = time.perf_counter()
    everywhere = replicated(jax.tree.leaves(state)[0].sharding.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    length = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere))
    compiled = jitted.lower(state, batch, length).compile()
    say(f"compiling the training step took {time.perf_counter() - start:.1f} s")
    return compiled
