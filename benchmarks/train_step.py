"""One pretraining step compared with Hugging Face's ViTMAE and AdamW, eager and compiled, in float32 or bfloat16.

    python -m benchmarks.train_step --model=base --batch=16       # or ti128 --batch=256, or tiny --batch=64
    python -m benchmarks.train_step --model=ti128 --batch=256 --dtypes=float32,bfloat16
    python -m benchmarks.train_step --model=tiny --batch=64 --allocators
    python -m benchmarks.train_step --model=tiny --batch=64 --ablate
    python -m benchmarks.train_step --model=tiny --batch=64 --profile

A side is a process that keeps training on one batch of noise; sides take turns of `--seconds`. The limit is the speed
if the step consisted only of its matrix products, each as fast as one large product, which each side measures in its
turn: no step with this arithmetic can be faster. With `--allocators`, ours runs with several memory allocators and
settings, in a new process every round; with `--ablate`, without each of the model's optimisations for speed in turn.
With `--profile`, ours is traced for some steps, and the time of its parts is printed.
"""

import argparse
import ast
import contextlib
import functools
import glob
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import alternate
from configs.pretrain import get_config
from usfmae_jax import cli

_PEER = "transformers"
_MODELS = ("base", "ti128", "tiny")
_ABLATIONS = (
    "products of [B, N, D], not flattened",
    "GELU differentiated automatically",
    "attention differentiated automatically",
    "no GELU at all",
)
_AS_IT_IS, _HUGE = "glibc as it is", "huge pages, as commands have them"


def sides(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The sides by name: `who`, and optionally `cross`, `compiled`, `dtype`, `without` and `environment`."""
    if args.allocators:
        ways: dict[str, dict[str, str]] = {_AS_IT_IS: {}, _HUGE: cli.huge_pages()} | allocators(args.libraries)
        return {name: {"who": alternate.OURS, "environment": environment} for name, environment in ways.items()}
    if args.ablate:
        found: dict[str, dict[str, Any]] = {alternate.OURS: {}} | {what: {"without": what} for what in _ABLATIONS}
        same = {"who": alternate.OURS, "environment": cli.huge_pages()}
        return {name: same | more for name, more in found.items()}
    all_sides: dict[str, dict[str, Any]] = {}
    for dtype in args.dtypes.split(","):
        kinds: dict[str, dict[str, Any]] = {
            alternate.OURS: {},
            f"{alternate.OURS}, cross decoder": {"cross": True},
            _PEER: {},
            f"{_PEER}, huge pages": {"environment": cli.huge_pages()},
            f"{_PEER}, compiled": {"compiled": True},
        }
        for name, more in kinds.items():
            if not (args.quick and more.get("compiled")):  # compiling takes minutes
                full = name if dtype == "float32" else f"{name}, {dtype}"
                who = name.partition(",")[0]
                environment = cli.huge_pages() if who == alternate.OURS else {}  # as the command has it
                all_sides[full] = {"who": who, "dtype": dtype, "environment": environment} | more
    return all_sides


def allocators(folder: str) -> dict[str, dict[str, str]]:
    """By name, the environment that preloads an allocator found on this machine, in the usual places or in `folder`."""
    found = {}
    for name, pattern in (("tcmalloc", "libtcmalloc*.so*"), ("jemalloc", "libjemalloc*.so*")):
        places = [folder] if folder else ["/usr/lib", "/usr/lib/*", "/usr/local/lib", "/usr/lib64", "/opt/*/lib"]
        paths = [path for place in places for path in sorted(glob.glob(f"{place}/{pattern}"), key=len)]
        if paths:
            found[name] = {"LD_PRELOAD": paths[0], "MALLOC_CONF": "thp:always"}  # the latter is jemalloc's
        else:
            alternate.tell(f"{name}: not on this machine; --libraries=DIR names a folder that has {pattern}")
    return found


def settings(args: argparse.Namespace, dtype: str, cross: bool) -> Any:
    """The config of a run."""
    config = get_config("base" if args.model == "ti128" else args.model)
    if args.model == "ti128":
        config.model.update(image_size=(128, 128), width=192, num_heads=3)
        config.model.update(decoder_width=128, decoder_depth=2, decoder_num_heads=4)
    if args.quick:
        config.model.update(image_size=(32, 32), width=32, depth=2, num_heads=2, patch_size=8)
        config.model.update(decoder_width=16, decoder_depth=1, decoder_num_heads=2)
    config.model.update(dtype=dtype, scan=False, remat="none")  # unrolled and without remat, as usual on a CPU
    config.train.batch_size = args.batch
    if cross:
        config.objective = "cross_mae"
    with config.unlocked():
        for change in args.set:
            name, _, value = change.partition("=")
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            config.update_from_flattened_dict({name: value})
    return config


def noise(config: Any) -> np.ndarray:
    """A batch of random images, uint8 `[B, H, W, C]`."""
    shape = (config.train.batch_size, *config.model.image_size, config.data.channels)
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


def ours(args: argparse.Namespace, side: dict[str, Any]) -> tuple[alternate.Result, Callable[[], alternate.Result]]:
    """The compiled step of `usfmae_jax.main`."""
    train, _, about = own_step(args, side)

    import jax
    import jax.numpy as jnp

    large = jnp.ones((args.product, args.product), side.get("dtype", "float32"))
    multiply = jax.jit(lambda a: a @ a)
    about |= warm_up(train, args.warm)
    return about, functools.partial(turn, args, train, lambda: multiply(large).block_until_ready())


def own_step(args: argparse.Namespace, side: dict[str, Any]) -> tuple[Callable[[], None], Any, alternate.Result]:
    """A function that trains for one step, the compiled program, and what there is to report on it."""
    import jax

    from usfmae_jax.pretraining import build
    from usfmae_jax.training import mesh as meshes
    from usfmae_jax.training.state import init_state
    from usfmae_jax.training.update import compile_update

    config = settings(args, side.get("dtype", "float32"), side.get("cross", False))
    objective, mesh = build.objective(config), meshes.make_mesh()
    graph, state = init_state(objective.make, build.make_optimizer(config)[0], mesh, 0)
    pixels, length = noise(config), jax.device_put(np.int32(1000), meshes.replicated(mesh))
    with without(side.get("without", "")):
        update = build.make_step(config, objective, graph, mesh)
        start = time.perf_counter()
        step = compile_update(update, state, meshes.global_batch(mesh, pixels), alternate.tell)
        compiled = time.perf_counter() - start

    def train() -> None:
        nonlocal state
        state, metrics = step(state, meshes.global_batch(mesh, pixels), length)
        jax.block_until_ready(metrics)

    return train, step, {"compile_s": compiled, "gflop": objective.flops() / 1e9}


def profile(args: argparse.Namespace, steps: int = 3) -> None:
    """Traces some steps of ours, and prints the time of the parts of a step.

    XLA runs what does not depend on each other at the same time, so that the parts add up to more than the whole.
    """
    train, program, _ = own_step(args, {"cross": args.cross})

    import jax

    warm_up(train, args.warm)
    start = time.perf_counter()
    for _ in range(steps):
        train()
    whole = 1e3 * (time.perf_counter() - start) / steps
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                train()
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        events = [e for p in jax.profiler.ProfileData.from_file(file).planes for line in p.lines for e in line.events]
    kinds = operations(program.as_text())
    found: dict[str, list[float]] = {}
    for event in events:
        kind, flops = kinds.get(event.name, ("", 0.0))
        if kind:
            sums = found.setdefault(kind, [0.0, 0.0])
            sums[0] += event.duration_ns / 1e6 / steps
            sums[1] += flops / steps
    print(f"{args.model}, batch {args.batch}: {whole:.0f} ms a step\n\n| | ms | GFLOP | GFLOP/s |\n|---|---|---|---|")
    for kind, (ms, flops) in sorted(found.items(), key=lambda item: -item[1][0]):
        speed = f"{flops / 1e9:.3g} | {flops / ms / 1e6:.0f}" if flops else " | "
        print(f"| {kind} | {ms:.0f} | {speed} |")


def operations(hlo: str) -> dict[str, tuple[str, float]]:
    """The kind and the floating-point operations of products of every operation of a compiled program, by name."""
    bodies: dict[str, dict[str, str]] = {}
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = bodies.setdefault("ENTRY" if line.startswith("ENTRY") else head[1], {})
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            body[operation[1]] = operation[2]

    def shape(text: str) -> list[int]:
        return [int(side) for side in re.match(r"\(?\w+\[([\d,]*)\]", text)[1].split(",") if side]  # type: ignore[index]

    def product(body: dict[str, str], text: str) -> tuple[str, float]:
        sides = [shape(body[name]) for name in re.findall(r"%([\w.\-]+)", text.split("dot(")[1].split(")")[0])]
        summed = [int(axis) for axis in re.search(r"lhs_contracting_dims=\{([\d,]*)", text)[1].split(",")]  # type: ignore[index]
        kind = "attention" if len(sides[0]) > 2 else "products with weights"
        return kind, 2.0 * math.prod(shape(text)) * math.prod(sides[0][axis] for axis in summed)

    found = {}
    for name, text in bodies["ENTRY"].items():
        called = re.search(r"calls=%?([\w.\-]+)", text)
        body = bodies.get(called[1], {}) if called else bodies["ENTRY"]
        inside = list(body.values()) if called else [text]
        products = [product(body, one) for one in inside if " dot(" in one]
        kind = "sums, as for norms and biases" if any(" reduce(" in one for one in inside) else "all else"
        found[name] = (products[0][0], sum(one[1] for one in products)) if products else (kind, 0.0)
    return found


@contextlib.contextmanager
def without(what: str) -> Any:
    """Disables one of the model's optimisations for speed while it is compiled."""
    import jax
    from flax import nnx

    from usfmae_jax.models import layers, vit

    patch: Any = {
        "": contextlib.nullcontext,
        _ABLATIONS[0]: lambda: mock.patch.object(
            layers.Linear, "__call__", lambda layer, x: nnx.Linear.__call__(layer, x)
        ),
        _ABLATIONS[1]: lambda: mock.patch.object(vit, "gelu", lambda x: jax.nn.gelu(x, approximate=False)),
        _ABLATIONS[2]: lambda: mock.patch.object(layers, "attend", lambda q, k, v: layers._attend(q, k, v)[0]),
        _ABLATIONS[3]: lambda: mock.patch.object(vit, "gelu", lambda x: x),
    }[what]
    with patch():
        yield


def theirs(args: argparse.Namespace, side: dict[str, Any]) -> tuple[alternate.Result, Callable[[], alternate.Result]]:
    """Hugging Face's ViTMAE with the same architecture, and PyTorch's fused AdamW."""
    import torch

    from benchmarks import torch_vit

    config = settings(args, side["dtype"], False)
    torch.manual_seed(0)
    model = torch_vit.vit_mae(config).train()
    run = torch.compile(model) if side.get("compiled") else model
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=config.optimizer.weight_decay, fused=True
    )
    images = torch.from_numpy(noise(config).transpose(0, 3, 1, 2).copy())
    dtype = getattr(torch, side["dtype"])

    def train() -> None:
        pixels = torch_vit.normalize(images, config.model.mean, config.model.std)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = run(pixels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    large = torch.ones(args.product, args.product, dtype=dtype)
    return warm_up(train, args.warm), functools.partial(turn, args, train, lambda: large @ large)


def warm_up(train: Callable[[], None], steps: int) -> alternate.Result:
    """Runs some steps that do not count; the first one compiles unless that was done before."""
    times = []
    for _ in range(max(steps, 1)):
        start = time.perf_counter()
        train()
        times.append(time.perf_counter() - start)
    return {"first_step_s": times[0], "last_warm_step_s": times[-1]}


def turn(args: argparse.Namespace, train: Callable[[], None], multiply: Callable[[], Any]) -> alternate.Result:
    """Trains for `--seconds`; returns images/s, and the GFLOP/s of the best of four large products."""
    start, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - start < args.seconds:
        train()
        steps += 1
    seconds, times = time.perf_counter() - start, []
    for _ in range(4):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return {"images": steps * args.batch / seconds, "steps": steps, "gflops": 2 * args.product**3 / min(times) / 1e9}


def add_limits(found: alternate.Found) -> None:
    """Adds to each round its speed as a share of the side's own limit, in percent."""
    for name, side in found.items():
        own = side if "gflop" in side["about"] else found.get(alternate.OURS, side)  # full decoders do equal work
        gflop = own["about"].get("gflop")
        best = max((one["gflops"] for one in side["rounds"]), default=0.0)
        for one in side["rounds"] if gflop else ():
            one["share"] = 100 * one["images"] * gflop / best
        side["about"]["limit"] = best / gflop if gflop else None
        limit = f"{best / gflop:.3g} images/s" if gflop else "unknown, since no side with this arithmetic ran"
        alternate.tell(f"{name}: at {best:.0f} GFLOP/s, its limit is {limit}")


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=_MODELS, help="ti128: ViT-Ti/16, 128 px, decoder 128 x 2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtypes", default="float32", help="of the arithmetic, separated by commas")
    parser.add_argument("--allocators", action="store_true", help="ours alone, under several ways to keep memory")
    parser.add_argument("--profile", action="store_true", help="ours alone: the time of the parts of a step")
    parser.add_argument("--cross", action="store_true", help="--profile with the cross decoder")
    parser.add_argument("--libraries", default="", help="folder of the libraries of --allocators")
    parser.add_argument("--ablate", action="store_true", help="ours alone, without one thing at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn, at least one step")
    parser.add_argument("--warm", type=int, default=3, help="steps before the first turn")
    parser.add_argument("--product", type=int, default=2048, help="side of the large product")
    parser.add_argument("--set", action="append", default=[], help="a field of ours, such as model.scan=True")
    alternate.add_arguments(parser, rounds=6)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.seconds, args.product, args.rounds = 8, 0.2, 256, min(args.rounds, 2)
    if args.profile:
        profile(args)
        return
    chosen = sides(args)
    if args.side:
        side = chosen[args.side]
        alternate.serve(lambda: (ours if side["who"] == alternate.OURS else theirs)(args, side))
        return
    with tempfile.TemporaryDirectory() as folder:
        # Processes that last only one round use a compilation cache; in lasting ones, compilation is measured.
        cached = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environments = {name: (cached if args.allocators else {}) | side.get("environment", {})
                        for name, side in chosen.items()}  # fmt: skip
        found = alternate.measure("benchmarks.train_step", environments, args, sys.argv[1:], fresh=args.allocators)
    add_limits(found)
    columns = {"images": "images/s", "share": "% of its limit", "gflops": "GFLOP/s of one large product"}
    peer = _AS_IT_IS if args.allocators else alternate.OURS if args.ablate else _PEER
    text = alternate.table(found, columns | {"peak_gb": "peak memory, GB"}, "images", peer)
    shape = settings(args, "float32", False).model
    title = (
        f"step, {args.model}: width {shape.width}, depth {shape.depth}, {shape.image_size[0]} px, batch {args.batch}"
    )
    alternate.report(args, title, found, text)


if __name__ == "__main__":
    main()
