"""Plans for absent hardware: the TPU and CUDA compilers, which need no device, report what a training step requires.

A target is a chip and a layout: `v5e:4x4`, a TPU slice, or `h100:8`, the GPUs of one machine. A step's memory use and
communication between devices are read from the compiled program. Nothing is executed, so times are estimates from
published figures.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from usfmae_jax.errors import InputError
from usfmae_jax.training.monitor import PEAK_FLOPS
from usfmae_jax.training.update import Update, compile_update

GIB = 2**30
#: Maximum number of settings to compile in search of one with which the step fits.
ATTEMPTS = 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a device.

    Attributes:
      flops: bf16 peak, dense, FLOP/s.
      memory: bytes; for a TPU, those that its compiler makes available.
      bandwidth: of the memory, bytes/s.
      links: bytes/s that a device can send to the others of its slice or machine, over all links.
      axes: number of axes of a slice; 0 for a GPU.
      spec: what else the CUDA compiler needs to know, fields of XLA's GpuTargetConfigProto.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    axes: int = 0
    spec: str = ""


_GPU = """threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
thread_dim_limit_y: 1024 thread_dim_limit_z: 64 registers_per_core_limit: 65536 registers_per_block_limit: 65536 """
_AMPERE = """core_count: 108 fpus_per_core: 64 l2_cache_size: 41943040 shared_memory_per_core: 167936
shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 }"""
_HOPPER = """core_count: 132 fpus_per_core: 128 l2_cache_size: 52428800 shared_memory_per_core: 233472
shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }"""

CHIPS = {
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], 15.75 * GIB, 819e9, 200e9, axes=2),
    "v5p": Chip(PEAK_FLOPS["TPU v5"], 95.74 * GIB, 2765e9, 600e9, axes=3),
    "v6e": Chip(PEAK_FLOPS["TPU v6"], 31.25 * GIB, 1640e9, 448e9, axes=2),
    "a100-80": Chip(PEAK_FLOPS["A100"], 85100068864, 2039e9, 300e9, spec=_GPU + _AMPERE),
    "h100": Chip(PEAK_FLOPS["H100"], 84942979072, 3352e9, 450e9, spec=_GPU + _HOPPER),
    "h200": Chip(PEAK_FLOPS["H200"], 151397597184, 4800e9, 450e9, spec=_GPU + _HOPPER),
}
#: Maximum number of GPUs in one machine, within which `Chip.links` applies.
_MOST_GPUS = 8


def parse_target(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Parses `CHIP:LAYOUT` into the chip and the layout's sizes, whose product is the number of devices.

    Raises:
      InputError: not a valid target.
    """
    kind, _, layout = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        raise InputError(
            f"--compile_for={name} must be a device and how many, such as v5e:4x4, v5p:2x2x1 or h100:8; devices are "
            f"{', '.join(CHIPS)}"
        )
    numbers = tuple(map(int, layout.split("x")))
    if chip.axes and len(numbers) != chip.axes:
        example = "x".join("4" * chip.axes)
        raise InputError(
            f"--compile_for={name}: a slice of {kind} is laid out in {chip.axes} axes, as {kind}:{example}"
        )
    if not chip.axes and (len(numbers) > 1 or numbers[0] > _MOST_GPUS):
        raise InputError(f"--compile_for={name}: {kind}:1 to {kind}:{_MOST_GPUS} are the GPUs of one machine")
    return chip, numbers


def devices_of(name: str) -> list[Any]:
    """The devices of a target, usable for compilation only.

    Raises:
      InputError: there is no such target, or its compiler is not installed.
    """
    chip, layout = parse_target(name)
    extra, packages = ("tpu", ("libtpu",)) if chip.axes else ("cuda13", ("jax_cuda13_plugin", "jax_cuda12_plugin"))
    if not any(map(importlib.util.find_spec, packages)):
        raise InputError(f"--compile_for={name} needs no such device but its compiler: pip install 'jax[{extra}]'")
    jax.config.update("jax_platforms", "cpu")  # local devices stay free for other programs
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu asks Google Cloud which machine this is
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # safe, since no chip is used
    try:
        if chip.axes:
            return list(topologies.get_topology_desc(topology_name=name, platform="tpu").devices)
        how = {"target_config": _target_config(name, chip), "topology": f"1x1x{layout[0]}"}
        return list(topologies.get_topology_desc(topology_name="", platform="cuda", **how).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--compile_for={name} is refused by its compiler: {str(error).splitlines()[0]}") from error


def _target_config(name: str, chip: Chip) -> str:
    """XLA's compilation target, a GpuTargetConfigProto as text."""
    return (
        f"gpu_device_info {{ {chip.spec} memory_bandwidth: {chip.bandwidth:.0f} "
        f"device_memory_size: {chip.memory:.0f} }}"
        f' platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"'
    )


def usable_memory(chip: Chip) -> int:
    """Bytes of a device available to a program: for a GPU, the share that JAX allocates, three quarters by default."""
    share = 1.0 if chip.axes else float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return int(chip.memory * share)


def measure(name: str, update: Update, state: Any, batch: Any, flops: float, *, remat: str) -> dict[str, Any]:
    """Compiles an update for a target and reads its requirements from the program.

    Args:
      name: of the target.
      update: from `update.make_update`.
      state: shapes with shardings over a mesh of the target's devices.
      batch: likewise.
      flops: floating-point operations of a step, over all devices.
      remat: what is recomputed, see `models.layers.recomputed`.

    Returns:
      JSON. `memory`, bytes per device: its size, `device`, and the part `available`; `arguments` (state and batch),
      `temporary`, and the total `needed` (None if the compiler ran out of memory without reporting it). `fits`;
      `collectives`, from `count_collectives`, and `estimate`, from the function of that name, both None if compilation
      failed; and `flops` of a step.
    """
    chip, _ = parse_target(name)
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    memory: dict[str, Any] = {"device": int(chip.memory), "available": usable_memory(chip)}
    found: dict[str, Any] = {
        "target": name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "images": jax.tree.leaves(batch)[0].shape[0],
        "memory": memory,
        "flops": flops,
        "collectives": None,
        "estimate": None,
    }
    try:
        compiled: Any = compile_update(update, state, batch, lambda line: print(line, file=sys.stderr))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        needed = float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]] if used else None
        return found | {"memory": memory | {"arguments": _bytes_of((state, batch)), "needed": needed}, "fits": False}
    said = compiled.memory_analysis()
    memory["arguments"], memory["temporary"] = said.argument_size_in_bytes, said.temp_size_in_bytes
    new = said.output_size_in_bytes - said.alias_size_in_bytes  # the next state reuses the memory of the previous one
    memory["needed"] = memory["arguments"] + memory["temporary"] + new + said.generated_code_size_in_bytes
    found["fits"] = memory["needed"] <= memory["available"]
    found["collectives"] = count_collectives(compiled.as_text(), mesh.size)
    moved = memory["arguments"] + said.output_size_in_bytes + 2 * memory["temporary"]
    sent = sum(kind["sent"] for kind in found["collectives"].values())
    found["estimate"] = estimate(chip, flops * (4 / 3 if remat == "full" else 1) / mesh.size, moved, sent)
    return found


def _bytes_of(tree: Any) -> int:
    """Bytes per device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def estimate(chip: Chip, flops: float, moved: float, sent: float) -> dict[str, Any]:
    """Roofline estimate (Williams et al. 2009): lower bound on the time of a step, if everything overlaps perfectly.

    Args:
      chip: the device.
      flops: floating-point operations per device.
      moved: bytes moved between a device and its memory, at least.
      sent: bytes sent by a device to others.

    Returns:
      seconds of `compute`, `memory` and `communication` at published peaks, of the `step`, and which of them it is
      `bound` by.
    """
    seconds = {"compute": flops / chip.flops, "memory": moved / chip.bandwidth, "communication": sent / chip.links}
    bound = max(seconds, key=lambda name: seconds[name])
    return seconds | {"step": seconds[bound], "bound": bound}


_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_WHILE = re.compile(r"\bwhile\(.*\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
#: The pieces of a TPU collective that overlaps with several fusions share a chain id.
_CHAIN = re.compile(r'channel_id=(\d+).*"?chain_id"?="?(\w+)')
#: Bytes that each of n devices sends on a ring, as a multiple of the size of the whole array.
_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


def count_collectives(text: str, devices: int) -> dict[str, dict[str, int]]:
    """Reads from a compiled program what its devices send to each other in one run.

    The body of a loop is counted once per iteration if the program states their number, as for loops made by
    `jax.lax.scan`; otherwise once.

    Args:
      text: of the optimised HLO module.
      devices: number of devices that run it.

    Returns:
      for each kind of collective that occurs: `count` of operations, `bytes` of the whole arrays that they work on, and
      bytes that a device has `sent`, on a ring.
    """
    lines: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            current = opened[1]
            lines[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            lines[current].append(line)
    found: list[tuple[str, int, float, int]] = []
    chains: set[tuple[str, ...]] = set()

    def visit(name: str, times: int) -> None:
        for line in lines.get(name, ()):
            loop, collective = _WHILE.search(line), _COLLECTIVE.search(line)
            if loop:
                visit(loop[2], times * _turns(line, lines.get(loop[1], ())))
                continue
            if collective:
                chain = _CHAIN.search(line)
                if not chain or chain.groups() not in chains:
                    chains.update([chain.groups()] if chain else [])
                    found.append((*_sized(name, collective, line, devices), times))
            called = _CALLED.findall(line)
            called += [one.strip(" %") for some in _BRANCHES.findall(line) for one in some.split(",")]
            for other in called:
                visit(other, times)

    visit(entry, 1)
    total: dict[str, dict[str, int]] = {}
    for kind, group, size, times in found:
        if group > 1:
            sums = total.setdefault(kind, {"count": 0, "bytes": 0, "sent": 0})
            sums["count"] += times
            sums["bytes"] += times * round(size)
            sums["sent"] += times * round(size * _SENT[kind](group))
    return total


def _turns(line: str, condition: Any) -> int:
    """Number of iterations of a loop: as stated by the compiler, else the constant its counter is compared with."""
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    limits = re.findall(r"= [su]\d+\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(limits[0]) if len(limits) == 1 else 1


def _sized(computation: str, collective: re.Match[str], line: str, devices: int) -> tuple[str, int, float]:
    """Kind, number of devices in a group, and bytes of the whole array."""
    result, kind, start = collective.groups()
    arrays = _ARRAY.findall(result)
    if start and result.startswith("(("):  # ((inputs), outputs)
        arrays = _ARRAY.findall(result.partition("), ")[2])
    elif start and kind in ("all-gather", "collective-permute"):  # (input, output) for a single array
        arrays = arrays[1:2]
    group = 2 if kind == "collective-permute" else _group(line, devices)
    size = sum(map(_bytes, arrays)) * (group if kind == "reduce-scatter" else 1)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # a fusion on TPUs
        kind = "reduce-scatter"
    return kind, group, size


def _bytes(array: tuple[str, str]) -> float:
    dtype, shape = array
    bits = re.search(r"\d+", dtype)
    return math.prod(map(int, filter(None, shape.split(",")))) * (int(bits[0]) / 8 if bits else 1)


def _group(line: str, devices: int) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named and named[2]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def fit(attempt: Callable[[dict[str, Any]], dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a run's step; if it does not fit, tries up to four other settings until one does.

    Args:
      attempt: compiles the step with changed settings, by name, and returns the result of `measure`.
      fields: the run's settings by name.

    Returns:
      the result of `measure` for the unchanged run; if it does not fit, also `remedy`, the settings with which it does
      and their memory and estimate, or None.
    """
    found = last = attempt({})
    if found["fits"]:
        return found
    settings: dict[str, Any] = {}
    for _ in range(ATTEMPTS):
        more = remedy(last, dict(fields) | settings)
        if not more:
            break
        settings |= more
        last = attempt(settings)
        if last["fits"]:
            return found | {"remedy": {"settings": settings, "memory": last["memory"], "estimate": last["estimate"]}}
    return found | {"remedy": None}


def remedy(found: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The next setting to change for a step that does not fit; {} if no change is left that preserves the results.

    A state that takes more than half of a device is split over more devices, since nothing else reduces it. Activations
    are recomputed before the batch is split into more micro-batches, which costs more time.
    """
    memory, devices, split = found["memory"], found["devices"], found["mesh"]["fsdp"]
    wider = [n for n in range(split + 1, devices + 1) if devices % n == 0]
    enough = [n for n in wider if memory["arguments"] * split / n <= memory["available"] / 2]
    if memory["arguments"] > memory["available"] / 2 and wider:
        return {"mesh.data": -1, "mesh.fsdp": (enough or wider[-1:])[0]}
    stricter = {"none": "dots", "dots": "full"}.get(fields.get("model.remat", ""))
    if stricter:
        return {"model.remat": stricter}
    room = 0.9 * memory["available"] - memory["arguments"]
    activations = memory.get("temporary", (memory["needed"] or 2 * memory["available"]) - memory["arguments"])
    parts, whole = fields["train.accumulate"], fields["train.batch_size"] // devices  # images per device
    finer = [n for n in range(2 * parts, whole + 1, parts) if whole % n == 0]
    enough = [n for n in finer if activations * parts / n <= room]
    return {"train.accumulate": (enough or finer[-1:])[0]} if finer else {}


def describe(found: Mapping[str, Any]) -> str:
    """The result of `fit` as text for the user."""
    memory, devices = found["memory"], found["devices"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    lines = [f"{found['target']}: {devices} devices as {mesh}, {found['images']} images a step; nothing was executed"]
    known = [f"{name} {_binary(memory[name])}" for name in ("arguments", "temporary") if name in memory]
    needed = "more" if memory["needed"] is None else _binary(memory["needed"])
    has = _binary(memory["available"])
    if memory["available"] < memory["device"]:
        has += f" (JAX's share of {_binary(memory['device'])}, see XLA_PYTHON_CLIENT_MEM_FRACTION)"
    fits = "fits" if found["fits"] else "does not fit"
    lines.append(f"memory of a device: {', '.join(known)}, in all {needed} of {has}: {fits}")
    if not found["fits"]:
        lines.append(_say_remedy(found["remedy"]))
    if found["collectives"] is not None:
        lines.append("sent by a device in a step:" + ("" if found["collectives"] else " nothing"))
        for kind, sums in sorted(found["collectives"].items()):
            lines.append(
                f"  {kind}: {sums['count']} of {sums['bytes'] / 1e6:,.1f} MB in all, {sums['sent'] / 1e6:,.1f} MB sent"
            )
    lines.append(f"arithmetic: {found['flops']:.3g} FLOP a step, {found['flops'] / devices:.3g} a device")
    if found["estimate"]:
        lines.append(_say_estimate(found["estimate"], found["images"]))
    return "\n".join(lines)


def _say_remedy(fitting: Mapping[str, Any] | None) -> str:
    if fitting is None:
        return "nothing that was tried makes it fit: take more devices, a smaller model or a smaller train.batch_size"
    flags = " ".join(f"--config.{name}={value}" for name, value in fitting["settings"].items())
    return f"it fits, in {_binary(fitting['memory']['needed'])}, with {flags}"


def _say_estimate(seconds: Mapping[str, Any], images: int) -> str:
    parts = ", ".join(f"{name} {1e3 * seconds[name]:.3g}" for name in ("compute", "memory", "communication"))
    return (
        f"estimate from published peaks, not measured: {1e3 * seconds['step']:.3g} ms a step at the least, bound by "
        f"{seconds['bound']} (ms: {parts}); {images / seconds['step']:,.0f} images/s at the most"
    )


def _binary(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
