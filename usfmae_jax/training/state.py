"""The train state: a plain pytree `{step, params, opt_state, rng}`, born sharded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.training.mesh import state_sharding

State = dict[str, Any]


def init_state(
    make_model: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> tuple[Any, State]:
    """Creates a model's train state on the mesh; no device ever holds more than its part.

    Args:
      make_model: builds the model from its random numbers.
      optimizer: its state is created for the parameters.
      mesh: from `mesh.make_mesh`.
      seed: of the parameters and of all randomness of training.

    Returns:
      the model's graph (`nnx.merge(graph, state["params"])` is the model) and the state.
    """
    create = _creator(make_model, optimizer, seed)
    abstract = jax.eval_shape(create)
    return model_graph(make_model), jax.jit(create, out_shardings=state_sharding(mesh, abstract))()


def abstract_state(
    make_model: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> State:
    """Shapes, dtypes and shardings of `init_state`, without computing anything."""
    abstract = jax.eval_shape(_creator(make_model, optimizer, seed))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_sharding(mesh, abstract),
    )


def model_graph(make_model: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """The static part of a model: `nnx.merge(model_graph(make), params)` is the model."""
    return nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))


def _creator(
    make_model: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, seed: int
) -> Callable[[], State]:
    def create() -> State:
        init_rng, train_rng = jax.random.split(jax.random.key(seed))
        params = nnx.to_pure_dict(nnx.state(make_model(nnx.Rngs(init_rng)), nnx.Param))
        return {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt_state": optimizer.init(params),
            # As raw words: a plain array is what every checkpoint reader understands.
            "rng": jax.random.key_data(train_rng),
        }

    return create
