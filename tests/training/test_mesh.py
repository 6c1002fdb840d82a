"""Meshes, sharding rules, and when a process knows that it is one of several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from usfmae_jax.errors import InputError
from usfmae_jax.training import mesh as meshes


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (2, -1, (2, 4)), (1, 8, (1, 8)), (4, 2, (4, 2))])
def test_mesh_lays_out_all_devices(data, fsdp, shape):
    mesh = meshes.make_mesh(data, fsdp)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp")


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, 8), (-2, 8)])
def test_a_layout_that_does_not_fit_the_devices_is_refused(data, fsdp):
    with pytest.raises(InputError, match="does not lay out 8 devices"):
        meshes.make_mesh(data, fsdp)


@dataclasses.dataclass(frozen=True)
class _Chip:
    """Stands in for a chip of a TPU."""

    id: int
    coords: tuple[int, ...]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


def _tpu(x, y, z=1, slices=1):
    cells = [(index, place) for index in range(slices) for place in np.ndindex(x, y, z)]
    return [_Chip(number, place, index) for number, (index, place) in enumerate(cells)]


@pytest.mark.parametrize("sizes", [(4, 4), (16, 16, 16)])
def test_parameters_are_split_over_neighbours_even_if_an_axis_of_the_tpu_must_be_split_for_it(sizes):
    mesh = meshes.make_mesh(-1, 8, _tpu(*sizes))
    assert mesh.devices.shape == (np.prod(sizes) // 8, 8)
    for row in mesh.devices:
        spans = np.ptp([device.coords for device in row], axis=0)
        assert np.prod(spans + 1) == 8  # a box of chips


def test_the_fsdp_axis_stays_within_a_slice():
    mesh = meshes.make_mesh(-1, 8, _tpu(4, 4, slices=2))
    assert mesh.devices.shape == (4, 8)
    assert all(len({device.slice_index for device in row}) == 1 for row in mesh.devices)
    with pytest.raises(InputError, match="data=1 must be a multiple of the 2 slices"):
        meshes.make_mesh(-1, 32, _tpu(4, 4, slices=2))


def test_large_arrays_are_split_along_the_first_axis_that_can_be_and_of_stacked_blocks_each_by_itself():
    mesh = meshes.make_mesh(2, 4)
    tree = {
        "wide": jnp.zeros((12, 64, 256)),
        "odd": jnp.zeros((255, 257)),
        "stack": {"kernel": jnp.zeros((1024, 128, 128)), "bias": jnp.zeros((1024, 64))},
        "small": jnp.zeros((64,)),
        "step": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda s: s.spec, meshes.state_sharding(mesh, tree))
    assert specs == {
        "wide": PartitionSpec("fsdp"),
        "odd": PartitionSpec(),
        "stack": {"kernel": PartitionSpec(None, "fsdp"), "bias": PartitionSpec()},
        "small": PartitionSpec(),
        "step": PartitionSpec(),
    }


def test_the_batch_is_split_over_both_axes():
    mesh = meshes.make_mesh(2, 4)
    batch = meshes.global_batch(mesh, np.arange(16).reshape(16, 1))
    assert [int(s.data[0, 0]) for s in batch.addressable_shards] == list(range(0, 16, 2))


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, False),  # a shell inside an allocation
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0", "JOBSET_NAME": "j"}, True),
        ({"KUBERNETES_SERVICE_HOST": "x"}, False),
    ],
)
def test_jobs_of_several_processes_are_recognised(env, several):
    assert meshes._is_multiprocess_job(env) is several


def test_machines_of_a_tpu_are_recognised_by_the_metadata_server(monkeypatch):
    cluster = meshes.clusters.GceTpuCluster
    assert not meshes._is_tpu_pod()  # no TPU here, and nobody is asked
    monkeypatch.setattr(cluster, "is_env_present", classmethod(lambda _: True))
    for addresses, several in ((["10.0.0.1"], False), (["10.0.0.1", "10.0.0.2"], True)):
        monkeypatch.setattr(cluster, "_get_worker_list_in_slice", staticmethod(lambda addresses=addresses: addresses))
        monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
        assert meshes._is_tpu_pod() is several


@pytest.mark.parametrize("flags", [(), (2,), (2, -1), (2, 2)])
def test_a_coordinator_needs_its_numbers(flags):
    with pytest.raises(InputError, match="--num_processes"):
        meshes.initialize_distributed("localhost:1234", *flags)


def test_a_job_whose_processes_are_not_found_is_told_what_to_add(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # and nothing else of Open MPI
    with pytest.raises(InputError, match="add --coordinator=HOST:PORT"):
        meshes.initialize_distributed()


class Noticeboard:
    """JAX's client of what processes tell each other; who is asked for must have told."""

    def __init__(self):
        self.told = {}

    def key_value_set(self, name, value):
        assert name not in self.told
        self.told[name] = value

    def blocking_key_value_get(self, name, _):
        return self.told[name]

    def key_value_dir_get(self, place):
        return [(name, value) for name, value in self.told.items() if name.startswith(place)]


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process a number of two."""
    monkeypatch.setattr(meshes.distributed.global_state, "client", Noticeboard())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return lambda number: monkeypatch.setattr(jax, "process_index", lambda: number)


def test_the_first_process_knows_the_damaged_records_of_all(as_process):
    none = np.full((2, 8, 2), -1)
    found = none.copy()
    found[1, 0] = 0, 7
    as_process(1)
    assert meshes.damage_of_all(none).shape == (0, 2)
    assert meshes.damage_of_all(found).shape == (0, 2)
    assert meshes.damage_of_all(found + 1, "another").shape == (0, 2)
    as_process(0)
    for _ in range(2):  # a report counts each once
        assert meshes.damage_of_all(none).tolist() == [[0, 7]]
    assert meshes.damage_of_all(found).tolist() == [[0, 7], [0, 7]]


def test_a_batch_of_all_is_its_parts_in_their_order(as_process):
    as_process(1)
    with pytest.raises(KeyError):  # a client waits
        meshes.rows_of_all(np.array([[0, 3], [0, 4]]), "batch")
    as_process(0)
    assert meshes.rows_of_all(np.array([[0, 1], [0, 2]]), "batch").tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]


def test_what_the_first_process_does_or_refuses_is_known_to_all(as_process, monkeypatch):
    done = []

    def refuse():
        raise OSError("disk full")

    monkeypatch.setattr(meshes, "_questions", iter([0, 1, 0, 1]))
    as_process(0)
    meshes.on_first_process(lambda: done.append(0))
    with pytest.raises(OSError, match="disk full"):
        meshes.on_first_process(refuse)
    as_process(1)
    meshes.on_first_process(lambda: done.append(1))
    with pytest.raises(InputError, match="process 0 of this job has stopped"):
        meshes.on_first_process(refuse)
    assert done == [0]


def test_an_error_of_a_connection_says_that_another_process_is_gone():
    broken = jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer\n at x")
    outer = RuntimeError("saving failed")
    outer.__cause__ = broken
    said = meshes.lost_another(outer)
    assert said.startswith("another process of this job has ended or cannot be reached")
    assert "(Gloo all-reduce failed: Connection closed by peer). The same command" in said
    assert not meshes.lost_another(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert meshes.lost_another(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    assert not meshes.lost_another(ValueError("Gloo"))
