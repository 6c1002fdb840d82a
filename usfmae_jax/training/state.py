"""The train state: a plain pytree `{step, params, opt_state, rng}`, born sharded.

A model with running statistics (`nnx.BatchStat`) has them beside the parameters, as `stats`; a run that averages its
parameters over time has the average as `ema`. A teacher that is not trained is beside them while a run lasts, as
`teacher`; no checkpoint has it.
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
    """Creates a model's train state on the mesh; no device ever holds more than its part.

    Args:
      make_model: builds the model from its random numbers.
      optimizer: its state is created for the parameters.
      mesh: from `mesh.make_mesh`.
      seed: of the parameters and of all randomness of training.
      ema: whether parameters are averaged over time.

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
    """Compiles once what creates the train state of a seed; see `init_state`.

    Args:
      make_model: see `init_state`.
      optimizer: see there.
      mesh: see there.
      trained: picks from all parameters those that are trained; the optimiser keeps moments for no others.
      ema: see there.
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
    """Shapes, dtypes and shardings of `init_state`, without computing anything."""
    abstract = jax.eval_shape(_creator(make_model, optimizer, trained, ema), _words(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_sharding(mesh, abstract),
    )


def fill(state: State, loaded: dict[str, Any]) -> State:
    """Puts weights into a fresh state, on the devices that its arrays are on.

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
    """What a train state has more where a teacher stays as it is: its parameters on the mesh, split as all others.

    Args:
      params: of the teacher, nested, on the host.
      mesh: from `mesh.make_mesh`.
      abstract: shapes, dtypes and shardings alone.
    """

    def place(leaf: Any, sharding: Any) -> Any:
        if abstract:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return {"teacher": jax.tree.map(place, params, state_sharding(mesh, params))}


def weights_of(state: State) -> Any:
    """The parameters to be tested and exported: their average where a run has one."""
    return state.get("ema", state["params"])


def _words(seed: int) -> jax.Array:
    # As an argument of the compiled function: another seed is no reason to compile again.
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
            # As raw words: a plain array is what every checkpoint reader understands.
            "rng": jax.random.key_data(train_rng),
        }
        state |= {"ema": jax.tree.map(jnp.copy, params)} if ema else {}
        return state | {"stats": stats} if stats else state

    return create
