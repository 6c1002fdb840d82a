"""The comparisons with PyTorch: how sides take turns, and that each of them runs."""

import argparse
import collections
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import alternate, train_step
from tests.helpers import record
from tests.interop.torch_models import need
from usfmae_jax.data.records import encode_record


def _measure(names, fresh=False, **arguments):
    parser = argparse.ArgumentParser()
    alternate.add_arguments(parser, rounds=3)
    args = parser.parse_args([f"--{name}={value}" for name, value in arguments.items()])
    return alternate.measure("tests.benchmarks.toy", {name: {"TOY": name} for name in names}, args, [], fresh=fresh)


def test_a_side_that_fails_is_a_row_that_says_so_and_the_others_go_on():
    found = _measure(["ours", "broken", "peer", "tired"])
    assert [one["speed"] for one in found["ours"]["rounds"]] == [4, 8, 12]
    assert [one["from"] for one in found["peer"]["rounds"]] == ["peer"] * 3
    assert found["broken"] == {"about": {}, "rounds": [], "error": "ImportError: no such library"}
    assert len(found["tired"]["rounds"]) == 1
    assert found["tired"]["error"].startswith("killed by signal 9")
    assert alternate.table(found, {"speed": "frames/s"}, "speed", "peer").splitlines() == [
        "| | frames/s | times peer |",
        "|---|---|---|",
        "| ours | 8.00 (4.00 to 12.0) | 2.00 |",
        "| broken | failed: ImportError: no such library | |",
        "| peer | 4.00 (2.00 to 6.00) |  |",
        f"| tired (then failed: {found['tired']['error']}) | 2.00 | 1.00 |",
    ]


def test_a_fresh_process_each_round_is_measured_from_start_to_end():
    found = _measure(["ours", "peer"], fresh=True, rounds=2, sides="o*")
    assert set(found) == {"ours"}
    assert [one["speed"] for one in found["ours"]["rounds"]] == [4, 4]
    for one in found["ours"]["rounds"]:
        assert 0 < one["cpu"] <= 2 * one["seconds"]
        assert 0.005 < one["peak_gb"] < 0.2  # a Python with psutil, whatever this process takes


def test_the_peer_finds_the_image_in_a_record():
    need("torch")
    from benchmarks.torch_loaders import image_of

    made = record(3)
    assert image_of(encode_record(made)) == made["image"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("train_step", {"ours", "ours, cross decoder", "transformers"}),
        ("train_step --allocators", {"glibc as it is", "huge pages, as commands have them"}),
        ("input_pipeline", {"ours", "reference loader, PNG", "tuned loader, the same shards"}),
        ("features --data={shards}", {"ours", "PyTorch", "transformers ViTModel"}),
        ("finetune --data={shards}", {"ours", "PyTorch"}),
        ("start --variants=demo", {":demo"}),
        ("start --demo", {"0", "2", "4"}),
    ],
)
def test_every_comparison_runs(command, rows, tmp_path, shards):
    need("torch", "transformers")
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # and one device
    module, *arguments = command.format(shards=shards).split()
    line = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--quick", f"--json={tmp_path / 'found.json'}"]
    done = subprocess.run(line, env={**os.environ, **flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "found.json").read_text())["table"]
    assert table in done.stdout
    assert rows <= {row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()}
    assert "failed" not in table


@pytest.mark.parametrize("model", ["base", "ti128", "tiny"])
def test_a_step_beside_one_that_keeps_all_its_values_recomputes_none(model):
    args = argparse.Namespace(model=model, batch=8, quick=False, set=[])
    assert train_step.settings(args, "float32", cross=False).model.remat == "none"


def test_a_profile_knows_what_each_operation_of_a_program_computes():
    def compute(x, w, q):
        return (jax.nn.relu(x) @ w).sum(axis=0), jnp.einsum("bhnd,bhmd->bhnm", q, q)

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((40, 24), (24, 16), (2, 3, 20, 8))]
    found = train_step.operations(jax.jit(compute).lower(*shapes).compile().as_text())
    flops = collections.Counter()
    for kind, count in found.values():
        flops[kind] += count
    assert flops["products with weights"] == 2 * 40 * 24 * 16
    assert flops["attention"] == 2 * 2 * 3 * 20 * 20 * 8
    assert sum(flops.values()) == flops["products with weights"] + flops["attention"]
