"""What is compiled once for all members of a fine-tuning run that have a process in common."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.finetuning import build as supervised_setup
from usfmae_jax.finetuning import classifiers
from usfmae_jax.finetuning import results as member_reports
from usfmae_jax.finetuning.build import Job
from usfmae_jax.interop.model import model_graph
from usfmae_jax.training.mesh import batch_sharding
from usfmae_jax.training.state import State, abstract_state, state_maker
from usfmae_jax.training.update import compile_update, make_update
from usfmae_jax.training.update import pick as pick_trained


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled once and shared by all members.

    Attributes:
      mesh: devices.
      start: a seed to a fresh state.
      abstract: shapes and shardings of a state and of the best weights beside it.
      step: the update.
      predict: `(variables, images)` to what the task predicts.
      best_of: copies from a state what is kept of the best evaluation: the trained parameters and the statistics.
      images: batches of whole images of given rows.
    """

    mesh: Mesh
    start: Callable[[int], State]
    abstract: State
    step: Callable[[State, Any, Any], tuple[State, dict[str, jax.Array]]]
    predict: Callable[[Any, jax.Array], dict[str, jax.Array]]
    best_of: Callable[[State], State]
    images: Callable[[np.ndarray], Iterator[np.ndarray]]


def compile_programs(job: Job, mesh: Mesh) -> Programs:
    """Compiles what all members share, and says what the model is and how long that took."""
    config = job.config
    images = supervised_setup.whole_images(job)
    freeze, trained, _ = classifiers.trained_part(config, job.description)
    make_model = classifiers.model_maker(config, job.description, freeze)
    optimizer = supervised_setup.make_optimizer(config, job.description)
    how, graph = supervised_setup.supervision(job), model_graph(make_model)

    def pick(params: Any) -> Any:
        return pick_trained(params, trained)

    @jax.jit
    def best_of(state: State) -> State:
        return jax.tree.map(jnp.copy, {name: pick(state[name]) if name == "params" else state[name] for name in kept})

    abstract = abstract_state(make_model, optimizer, mesh, pick)
    kept = [name for name in ("params", "stats") if name in abstract]
    best = {name: pick(abstract[name]) if name == "params" else abstract[name] for name in kept}
    step = make_update(
        graph,
        how,
        optimizer,
        supervised_setup.learning_rate(config),
        mesh,
        trained=trained,
        accumulate=config.train.accumulate,
    )
    member_reports.say(parameter_overview.get_parameter_overview(abstract["params"], include_stats=False))
    size, batch, over = (*job.size, config.data.channels), config.train.batch_size, batch_sharding(mesh)
    examples = {
        "image": jax.ShapeDtypeStruct((batch, *size), jnp.uint8, sharding=over),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=over),
        "weight": jax.ShapeDtypeStruct((batch, how.num_classes), jnp.float32, sharding=over),
    }
    compiled = compile_update(step, abstract, examples, member_reports.say)

    def predict(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        return how.predict(nnx.merge(graph, *variables.values()), images)

    return Programs(
        mesh=mesh,
        start=state_maker(make_model, optimizer, mesh, pick),
        abstract=abstract | {"best": best},
        step=compiled,
        predict=predict,
        best_of=best_of,
        images=images,
    )
