"""The train state: a plain pytree `{step, params, opt_state, rng}`, created sharded.

Running statistics of a model (`nnx.BatchStat`) are in `stats`, and the running average of the parameters, if a run
keeps one, in `ema`. A fixed teacher is in `teacher` during a run, but not in checkpoints.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.interop.model import flatten, model_graph, unflatten
from usfmae_jax.training.mesh import state_sharding

State = dict[str, Any]


def init_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    ema: bool = False,
) -> tuple[Any, State]:
    """Creates a model's train state on the mesh; no device ever holds more than its shard.

    Args:
      make_model: builds the model from `nnx.Rngs`.
      optimizer: its state is created for the parameters.
      mesh: from `mesh.make_mesh`.
      seed: for the initial parameters and all randomness in training.
      ema: whether to keep a running average of the parameters.

    Returns:
      the model's graph (`nnx.merge(graph, state["params"])` is the model) and the state.
    """
    return model_graph(make_model), state_maker(make_model, optimizer, mesh, ema=ema)(seed)


def state_maker(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trained: Callable[[Any], Any] = lambda params: params,
    ema: bool = False,
) -> Callable[[int], State]:
    """Compiles, once, a function that creates the train state from a seed; see `init_state`.

    Args:
      make_model: see `init_state`.
      optimizer: likewise.
      mesh: likewise.
      trained: selects the trained parameters; the optimiser keeps moments for these only.
      ema: see `init_state`.
    """
    create = _creator(make_model, optimizer, trained, ema)
    compiled = jax.jit(create, out_shardings=state_sharding(mesh, jax.eval_shape(create, _words(0))))
    return lambda seed: compiled(_words(seed))


def abstract_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trained: Callable[[Any], Any] = lambda params: params,
    ema: bool = False,
) -> State:
    """Shapes, dtypes and shardings of the train state, without computing anything."""
    abstract = jax.eval_shape(_creator(make_model, optimizer, trained, ema), _words(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_sharding(mesh, abstract),
    )


def fill(state: State, loaded: dict[str, Any]) -> State:
    """Loads weights into a fresh state, with the sharding of its arrays.

    Args:
      state: from `init_state`.
      loaded: `params`, and `stats` if any: nested, some or all of the state's.
    """
    filled = {}
    for group, new in loaded.items():
        old = flatten(state[group])
        placed = {name: jax.device_put(leaf, old[name].sharding) for name, leaf in flatten(new).items()}
        filled[group] = unflatten(old | placed)
    return state | filled


def teacher_state(params: Any, mesh: Mesh, *, abstract: bool = False) -> State:
    """The `teacher` entry of a train state with a fixed teacher: its parameters, sharded like all others.

    Args:
      params: of the teacher, nested, on the host.
      mesh: from `mesh.make_mesh`.
      abstract: return only shapes, dtypes and shardings.
    """

    def place(leaf: Any, sharding: Any) -> Any:
        if abstract:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return {"teacher": jax.tree.map(place, params, state_sharding(mesh, params))}


def weights_of(state: State) -> Any:
    """The parameters to evaluate and export: the running average if the run keeps one."""
    return state.get("ema", state["params"])


def _words(seed: int) -> jax.Array:
    # An argument of the compiled function, so that another seed does not recompile it.
    return jax.random.key_data(jax.random.key(seed))


def _creator(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    trained: Callable[[Any], Any],
    ema: bool,
) -> Callable[[jax.Array], State]:
    def create(words: jax.Array) -> State:
        init_rng, train_rng = jax.random.split(jax.random.wrap_key_data(words))
        model = make_model(nnx.Rngs(init_rng))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt_state": optimizer.init(trained(params)),
            # As raw key data: a plain array, which every checkpoint reader understands.
            "rng": jax.random.key_data(train_rng),
        }
        state |= {"ema": jax.tree.map(jnp.copy, params)} if ema else {}
        return state | {"stats": stats} if stats else state

    return create
