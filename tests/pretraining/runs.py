"""Runs of the pretraining door in processes of their own, and what they leave."""

import json
import os
import subprocess
import sys

TINY = {
    "model.image_size": 32, "model.width": 32, "model.depth": 2, "model.num_heads": 2, "model.decoder_width": 16,
    "model.decoder_depth": 1, "model.decoder_num_heads": 2, "train.batch_size": 8, "train.steps": 12, "data.workers": 0,
    "checkpoint.every": 3, "log.every": 1, "log.pictures_every": 0, "probe.data.path": "",
}  # fmt: skip


def command(shards, workdir, *flags, **overrides):
    fields = TINY | {"data.path": shards} | {k.replace("__", "."): v for k, v in overrides.items()}
    overriding = [f"--config.{name}={value}" for name, value in fields.items()]
    script = [sys.executable, "-m", "usfmae_jax.main", "--config=configs/pretrain.py:demo", f"--workdir={workdir}"]
    return [*script, *overriding, *flags]


def environment(devices=1):
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"  # as in conftest.py
    return os.environ | {"XLA_FLAGS": flags}


def run(shards, workdir, devices=1, **overrides):
    return subprocess.run(
        command(shards, workdir, **overrides), env=environment(devices), capture_output=True, text=True, timeout=300
    )


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}


def losses_or_none(workdir):
    try:
        return [0, *losses(workdir)]
    except (ValueError, OSError):  # half a line, or no file yet
        return [0]
