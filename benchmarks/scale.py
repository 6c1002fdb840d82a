"""Compiles the training steps of the shipped configs for their target hardware, none of which needs to be present.

    python -m benchmarks.scale [--data=data/demo] [--only=pretrain:huge] [--output=runs/scale] [--list]

Needs the TPU compiler, and for GPUs that of CUDA: see docs/launch.md. A row takes minutes; rows already in `--output`
are not compiled again. Prints the table of docs/scale.md; the exit status is 1 if a step does not fit, except for those
that keep all activations to show where memory ends.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from usfmae_jax import cli
from usfmae_jax.pretraining import build
from usfmae_jax.training.hardware import GIB
from usfmae_jax.training.mesh import one_device, place_to_split
from usfmae_jax.training.state import abstract_state

#: Config, target, and overrides.
ROWS = [
    ("pretrain:demo", "v5e:2x2", ""),
    ("pretrain:tiny", "v5e:2x2", ""),
    ("pretrain:small", "v5e:2x4", ""),
    ("pretrain:base", "v5e:2x4", ""),
    ("pretrain:base", "v5e:2x4", "model.remat=none"),
    ("pretrain:base", "v5e:2x4", "mesh.data=1 mesh.fsdp=8"),
    ("pretrain:base", "v5e:16x16", "mesh.fsdp=8 train.batch_size=4096"),
    ("pretrain:base", "v5p:16x16x16", "mesh.fsdp=8 train.batch_size=16384"),
    ("pretrain:base", "v5e:4x8", "train.batch_size=4096"),
    ("pretrain:base", "v6e:4x4", "train.batch_size=4096"),
    ("pretrain:base", "h200:1", ""),
    ("pretrain:base", "h200:1", "model.remat=none"),
    ("pretrain:base", "h100:8", ""),
    ("pretrain:base", "a100-80:8", ""),
    ("pretrain:cross", "v5e:2x4", ""),
    ("pretrain:paper", "h100:1", ""),
    ("pretrain:large", "v5e:4x4", ""),
    ("pretrain:large", "h100:8", ""),
    ("pretrain:large", "v5e:2x4", "mesh.fsdp=8"),
    ("pretrain:large", "v5e:16x16", "mesh.fsdp=8 train.batch_size=4096"),
    ("pretrain:large", "v5p:16x16x16", "mesh.fsdp=8 train.batch_size=16384"),
    ("pretrain:huge", "v5e:2x4", ""),
    ("pretrain:huge", "v5e:4x4", ""),
    ("pretrain:huge", "v5e:16x16", "train.batch_size=4096"),
    ("pretrain:huge", "v5p:16x16x16", "train.batch_size=16384"),
    ("pretrain:huge", "h100:8", ""),
    ("pretrain:gigantic", "v5e:2x4", ""),
    ("pretrain:gigantic", "v5e:4x4", ""),
    ("pretrain:gigantic", "v5e:16x16", "train.batch_size=4096"),
    ("pretrain:gigantic", "v5p:16x16x16", "train.batch_size=16384"),
    ("finetune:folder", "v5e:2x2", ""),
    ("finetune:folder", "h100:1", ""),
    ("segment:folder", "v5e:2x2", ""),
]
HEAD = (
    "| config | devices | data x fsdp | batch | remat | state | needs, GiB | sent, MB | times least | images/s below |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
#: Overrides for fine-tuning: a model of the reference's size, and shards that define the classes.
_FINETUNE = "model.arch=base data.path={data}"


def main() -> None:
    """Compiles the requested rows that do not exist yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configs, as pretrain:base, separated by commas; default: all")
    parser.add_argument("--data", default="data/demo", help="labelled shards for fine-tuning; default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/scale"))
    parser.add_argument("--list", action="store_true", help="say what there is, and the commands")
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.only or row[0] in args.only.split(",")]
    table, fits = [], True
    for config, target, overridden in rows:
        pretrains = config.startswith("pretrain")
        said_fields = overridden if pretrains else f"{overridden} {_FINETUNE.format(data=args.data)}"
        fields = [f"--config.{field}" for field in said_fields.split()]
        workdir = args.output / "-".join([config.replace(":", "-"), *overridden.replace("=", "").split()])
        door = ["-m", f"usfmae_jax.{'main' if pretrains else 'finetune'}", f"--config={config}"]
        door += [f"--compile_for={target}", *fields]
        if args.list:
            print("python", shlex.join(door))
            continue
        found = workdir / f"compiled_for_{target.replace(':', '_')}.json"
        if not found.exists():
            print(shlex.join(door), file=sys.stderr, flush=True)
            subprocess.run([sys.executable, *door, f"--workdir={workdir}"], check=False, stdout=sys.stderr)
        if not found.exists():  # the command has printed why
            fits = False
            continue
        said = json.loads(found.read_text())
        fits &= said["fits"] or "model.remat=none" in overridden
        table.append(row(config, overridden, said))
    if args.list:
        return
    print(*HEAD, *table, sep="\n")
    sys.exit(not fits)


def row(name: str, overridden: str, said: dict[str, Any]) -> str:
    """One row of the table, from the report of the command."""
    config = cli.load_config(name)
    config.update_from_flattened_dict(dict(_pairs(overridden)))
    memory, mesh = said["memory"], said["mesh"]
    needed = "more" if memory["needed"] is None else f"{memory['needed'] / GIB:.1f}"
    fits = "" if said["fits"] else ": **does not fit**"
    sent, ratio, speed = "", "", ""
    if said["collectives"] is not None:
        whole = sum(kind["sent"] for kind in said["collectives"].values())
        sent = f"{whole / 1e6:,.0f}"
        if name.startswith("pretrain") and mesh["fsdp"] > 1:
            ratio = f"{whole / least_sent(config, mesh['data'], mesh['fsdp']):.2f}"
    if said["estimate"]:
        speed = f"{said['images'] / said['estimate']['step']:,.0f}, {said['estimate']['bound']}"
    cells = [name, said["target"], f"{mesh['data']} x {mesh['fsdp']}", f"{said['images']:,}", config.model.remat]
    cells += [f"{memory['arguments'] / GIB:.2f}", f"{needed} of {memory['available'] / GIB:.1f}{fits}"]
    cells += [sent, ratio, speed]
    return f"| {' | '.join(cells)} |"


def _pairs(overridden: str) -> Iterator[tuple[str, Any]]:
    for one in overridden.split():
        name, value = one.split("=")
        yield name, int(value) if value.isdecimal() else value


def least_sent(config: Any, data: int, fsdp: int) -> float:
    """Least bytes that a device must send per step, on rings, if all matrices are split over `fsdp` devices (ZeRO-3).

    A split matrix is all-gathered for the forward and for the backward pass; its gradient is reduce-scattered, and the
    parts all-reduced over `data`, all in the compute dtype. The gradient of any other parameter is all-reduced whole.
    """
    optimizer, _ = build.make_optimizer(config)
    params = abstract_state(build.objective(config).make, optimizer, one_device())["params"]
    number = 2 if config.model.dtype == "bfloat16" else 4
    total = 0.0
    for path, leaf in jax.tree.leaves_with_path(params):
        size = number * leaf.size
        if place_to_split(path, leaf, fsdp) is None:
            total += size * 2 * (data * fsdp - 1) / (data * fsdp)
        else:
            total += size * 3 * (fsdp - 1) / fsdp + size / fsdp * 2 * (data - 1) / data
    return total * config.train.accumulate


if __name__ == "__main__":
    main()
