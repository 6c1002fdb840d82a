"""What the choices inside the model buy: one training step with and without each of them, side by side.

    python -m benchmarks.train_step [--variant=tiny] [--batch=64] [--rounds=7]

Prints images/s of every arrangement and its ratio to ours, each round measuring all of them in turn, so that a machine
that slows down slows all. The floor is the time the matrix products alone need at the speed of one large product.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.pretrain import get_config
from usfmae_jax.models import layers, vit
from usfmae_jax.pretraining import build
from usfmae_jax.training.mesh import make_mesh
from usfmae_jax.training.state import init_state
from usfmae_jax.training.update import make_update


@contextlib.contextmanager
def _as_is() -> Iterator[None]:
    yield


def _three_dimensional(layer: layers.Linear, x: jax.Array) -> jax.Array:
    return nnx.Linear.__call__(layer, x)


ARRANGEMENTS: dict[str, Callable[[], Any]] = {
    "ours": _as_is,
    "products of [B, N, D], not flattened": lambda: mock.patch.object(layers.Linear, "__call__", _three_dimensional),
    "GELU differentiated automatically": lambda: mock.patch.object(
        vit, "gelu", lambda x: jax.nn.gelu(x, approximate=False)
    ),
    "attention differentiated automatically": lambda: mock.patch.object(
        layers, "attend", lambda q, k, v: layers._attend(q, k, v)[0]
    ),
    "no GELU at all": lambda: mock.patch.object(vit, "gelu", lambda x: x),
}


def _compile(config: Any, batch: int) -> tuple[Any, Any, jax.Array]:
    mesh = make_mesh()
    objective = build.objective(config)
    optimizer, learning_rate = build.make_optimizer(config)
    graph, state = init_state(objective.make, optimizer, mesh, 0)
    update = make_update(graph, objective.prepare, objective.loss, optimizer, learning_rate, mesh)
    size = (batch, *build.encoder(config)["image_size"], config.data.channels)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 255, size, np.uint8))
    return jax.jit(update).lower(state, images, 1000).compile(), state, images


def _peak(rounds: int = 5) -> float:
    """FLOP/s of a 2048 x 2048 product."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    config = get_config(args.variant)
    compiled = {}
    for name, arrangement in ARRANGEMENTS.items():
        with arrangement():
            compiled[name] = _compile(config, args.batch)
    speeds: dict[str, list[float]] = {name: [] for name in compiled}
    for round_number in range(args.rounds + 1):
        for name, (step, state, images) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, images, 1000))
            if round_number:  # the first one warms up
                speeds[name].append(args.batch / (time.perf_counter() - start))
    floor = _peak() / build.objective(config).flops()
    print(f"{jax.devices()[0].device_kind}, {args.variant}, batch {args.batch}, {args.rounds} rounds")
    print("| arrangement | images/s (median) | ours / this (min, median, max) |\n|---|---|---|")
    for name, values in speeds.items():
        ratios = sorted(a / b for a, b in zip(speeds["ours"], values, strict=True))
        spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
        print(f"| {name} | {statistics.median(values):.0f} | {spread} |")
    print(f"| floor: matrix products alone at the speed of one large product | {floor:.0f} | |")


if __name__ == "__main__":
    main()
