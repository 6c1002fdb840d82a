"""Meshes, sharding rules, and when a process knows that it is one of several."""

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


def test_large_arrays_are_split_along_their_longest_axis():
    mesh = meshes.make_mesh(2, 4)
    tree = {
        "wide": jnp.zeros((12, 64, 256)),
        "odd": jnp.zeros((255, 257)),
        "small": jnp.zeros((64,)),
        "step": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda s: s.spec, meshes.state_sharding(mesh, tree))
    assert specs == {
        "wide": PartitionSpec(None, None, "fsdp"),
        "odd": PartitionSpec(),
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


def test_a_coordinator_needs_its_numbers():
    with pytest.raises(InputError, match="--num_processes"):
        meshes.initialize_distributed("localhost:1234")
