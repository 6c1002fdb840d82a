"""Eight fake devices, a compilation cache, and the smallest shards and config that train."""

import os
import pathlib
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# Tiny models take longer to compile than to run: without LLVM's optimisation that takes a third of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
# On a machine that stands still for a moment, XLA would end the process after 40 seconds.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import ml_collections  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from tests.helpers import tiny_config, write_shards  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it

#: They run doors in processes of their own, for minutes.
LONGEST = ("tests/test_finetune.py", "tests/pretraining/test_runs.py", "tests/finetuning/test_loop.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first: of two processes, one would wait for the other that took such a file last."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with 48 labelled frames of 24 patients in two ArrayRecord shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, count=48)
    return str(folder)


@pytest.fixture
def config(shards: str) -> ml_collections.ConfigDict:
    """A model of two small blocks on `shards`."""
    return tiny_config(shards)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _mappings() -> Iterator[None]:
    """Keeps a process that runs many files below the 65,530 memory mappings that Linux gives it, beyond which it dies.

    Every compiled function takes some; all files together would take more than all.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
