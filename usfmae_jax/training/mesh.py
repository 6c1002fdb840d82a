"""Devices: starting the processes, laying out the mesh, placing each array.

The mesh has two axes. `data` replicates parameters and splits the batch; `fsdp` splits both. With `fsdp=1` this is
plain data parallelism, with `data=1` every parameter is split over all devices (ZeRO-3); XLA inserts the collectives.
"""

import functools
import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # the key-value store shared by processes has no public API
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.tables import counted
from usfmae_jax.models.layers import split_axis

#: Seconds without a heartbeat after which a process of a job counts as dead, which ends the others.
DEAD_AFTER = 30
_GOODBYE = 10.0  # seconds that a failed process waits for others to fail for the same reason
_AS_LONG_AS_IT_TAKES = 7 * 24 * 3600 * 1000  # milliseconds
#: JAX's connection errors, which follow the kind of error in capitals.
_CONNECTION = re.compile(
    r"[A-Z_]{4,}: .*?((?:Gloo|NCCL|[Hh]eartbeat|[Cc]oordination service|[Cc]onnection (?:reset|closed)).*)"
)
_questions, _messages = itertools.count(), itertools.count()  # the former are the same on every process


def initialize_distributed(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the processes of a job into one JAX runtime; does nothing for a single process.

    With a coordinator (`host:port`), the three arguments are used. Without one, Cloud TPU pods, Slurm, GKE and Open MPI
    are recognised by their environment and JAX detects the rest. Must be called before any other JAX call.

    Raises:
      InputError: a coordinator is given without the other two arguments, or JAX does not find the other processes.
    """
    if coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise InputError("--coordinator needs --num_processes=N and --process_id, a number from 0 to N-1, too")
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=DEAD_AFTER)
    elif _is_multiprocess_job(os.environ) or _is_tpu_pod():
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=DEAD_AFTER)
        except ValueError as error:  # some of the settings it needs are missing
            raise InputError(
                "this is one process of several, says its environment, but JAX does not find the others; add "
                "--coordinator=HOST:PORT --num_processes=N --process_id=I"
            ) from error
    if distributed.global_state.process_id:
        _say_nothing()


def _say_nothing() -> None:
    """Silences standard output and progress bars, shown by process 0 for all, before JAX's libraries can print."""
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]


def _is_multiprocess_job(env: Mapping[str, str]) -> bool:
    """Whether the environment is that of a job of several processes."""
    return (
        # A Slurm step: srun sets the step's variables, a bare salloc shell does not.
        ("SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1)
        or int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        # GKE names all workers of a TPU slice; a multislice job has one coordinator for them.
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        # A GKE job with GPUs: an indexed Job or JobSet.
        or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and "JOBSET_NAME" in env)
    )


def _is_tpu_pod() -> bool:
    """Whether this is one of several machines of a TPU; only the metadata server tells, not the environment."""
    cluster = clusters.GceTpuCluster
    return cluster.is_env_present() and cluster.get_process_count() > 1


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays devices out as `(data, fsdp)`; one of the two may be -1, "the rest".

    The fsdp axis, which sends most, never leaves a slice of a TPU: several slices are several parts of the data axis.

    Args:
      data: size of the data axis.
      fsdp: size of the fsdp axis.
      devices: None = all available ones.

    Raises:
      InputError: the product is not the number of devices, or the fsdp axis would cross slices.
    """
    devices = jax.devices() if devices is None else devices
    # GPUs have slices too, their machines, but are laid out in their order, whatever the sizes of the axes.
    count, slices = len(devices), len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"} or {0})
    shape = np.asarray([data, fsdp])
    if (shape == -1).sum() == 1 and (shape != 0).all():
        shape[shape == -1] = count // -shape.prod()
    if (shape < 1).any() or shape.prod() != count:
        raise InputError(
            f"config.mesh data={data}, fsdp={fsdp} does not lay out {count} devices; "
            "their product must be that number (-1 = the rest)"
        )
    if shape[0] % slices:
        raise InputError(
            f"config.mesh data={shape[0]} must be a multiple of the {slices} slices; choose a smaller config.mesh.fsdp"
        )
    # jax.make_mesh refuses an fsdp axis of 8 in a cube of 16 x 16 x 16, whose axes would have to be split for it.
    inside = (shape // (slices, 1)).tolist()
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def describe(mesh: Mesh) -> str:
    """Devices, their layout and the processes, as text for the user."""
    devices, processes = counted(mesh.size, "device"), counted(jax.process_count(), "process")
    layout = f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}"
    return f"{jax.devices()[0].device_kind}: {devices} as {layout}, {processes}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_to_split(path: Sequence[Any], leaf: Any, parts: int) -> int | None:
    """The axis along which the array at a path of a state is split, or None; never the stacking axis of blocks."""
    first = int(any(getattr(key, "key", None) == "stack" for key in path))
    axis = split_axis(leaf.shape[first:], parts)
    return None if axis is None else first + axis


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Sharding of each array of a train state, by the same rule for parameters and the optimiser's moments.

    An array is split over `fsdp` along the axis that `place_to_split` returns.

    Args:
      mesh: from `make_mesh`.
      state: pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      a tree of `NamedSharding` of the same structure.
    """
    fsdp = mesh.shape["fsdp"]

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        axis = place_to_split(path, leaf, fsdp)
        return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map_with_path(place, state)


def global_batch(mesh: Mesh, local: Any) -> Any:
    """Assembles global arrays over the mesh from this process's host arrays; starts the transfer without waiting.

    Args:
      mesh: from `make_mesh`.
      local: pytree of numpy arrays, this process's consecutive rows of the global batch.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def on_first_process(action: Callable[[], Any]) -> None:
    """Runs an action on process 0 only, while the others wait; if it fails, all processes stop.

    They wait for a key in the key-value store rather than for a collective, which times out on some backends.

    Raises:
      InputError: on the other processes if the action failed; process 0 raises the original error.
    """
    client = distributed.global_state.client
    if client is None or jax.process_count() == 1:
        action()
        return
    name = f"usfmae_jax/first/{next(_questions)}"
    if jax.process_index() == 0:
        outcome = "failed"
        try:
            action()
            outcome = "done"
        finally:
            client.key_value_set(name, outcome)
    elif client.blocking_key_value_get(name, _AS_LONG_AS_IT_TAKES) == "failed":
        raise InputError("process 0 of this job has stopped; see what it says")


def damage_of_all(damaged: np.ndarray, run: str = "") -> np.ndarray:
    """Damaged records of a batch; process 0, which alone counts and reports them, also gets those found by the others.

    Args:
      damaged: int64 `[..., 2]`, (source, record) or -1, in this process's part of the batch.
      run: distinguishes the runs of a job.

    Returns:
      int64 `[n, 2]`; empty on processes other than the first.
    """
    own = damaged.reshape(-1, 2)
    own = own[own[:, 0] >= 0]
    client = distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return own
    place = f"usfmae_jax/damage/{run}/"
    if jax.process_index():
        if len(own):
            client.key_value_set(f"{place}{jax.process_index()}-{next(_messages)}", json.dumps(own.tolist()))
        return own[:0]
    told = [json.loads(text) for _, text in client.key_value_dir_get(place)]
    return np.concatenate([own, *(np.asarray(pairs, np.int64) for pairs in told)])


def rows_of_all(rows: np.ndarray, place: str) -> np.ndarray:
    """Gathers the rows of all processes' parts of a batch, on every process.

    Args:
      rows: int64 `[n, ...]`, of this process's part.
      place: unique name of this exchange; all processes must take part.
    """
    client = distributed.global_state.client
    if client is None or jax.process_count() == 1:
        return rows
    client.key_value_set(f"usfmae_jax/{place}/{jax.process_index()}", json.dumps(rows.tolist()))
    asked = [f"usfmae_jax/{place}/{number}" for number in range(jax.process_count())]
    return np.concatenate([np.asarray(json.loads(client.blocking_key_value_get(name, 60_000))) for name in asked])


def lost_another(error: BaseException | None) -> str:
    """The message to show if an error means that another process of the job is gone; "" if it does not."""
    while error:
        found = _CONNECTION.search(str(error))
        if isinstance(error, RuntimeError | ValueError) and found:
            return (
                "another process of this job has ended or cannot be reached; what it said is the reason, unless the "
                f"system ended it ({found[1].strip()[:200]}). The same command goes on from what was saved last"
            )
        error = error.__cause__ or error.__context__
    return ""


def leave(code: int, at_once: bool = False) -> None:
    """Ends a failed process in a job of several processes; just returns if there is only one.

    An ordinary exit would wait for the others for minutes, while they wait for this one. They end when it is gone.

    Args:
      code: the exit code.
      at_once: set if another process is known to be gone; otherwise wait briefly, so that all processes that failed for
        the same reason can report it.
    """
    if not jax.distributed.is_initialized():
        return
    if not at_once:
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(_GOODBYE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def one_device() -> Mesh:
    """A mesh of one local device, for computations that a process does alone."""
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=axes, devices=jax.local_devices()[:1])
