"""Memory and time of importing and exporting weights: a ViT-L MAE with random weights, one process per step.

    python -m benchmarks.interop [--size=large] [--folder=DIR]

Prints the table of RESULTS.md. `copy` is the disk's own time to read, write and sync a file of the same size. PyTorch
files and the comparisons inside the exports need the interop extra; steps that need what is missing are left out.
"""

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from usfmae_jax.interop.files import Tensor, write_safetensors
from usfmae_jax.interop.names import expected_shapes, stored_table
from usfmae_jax.models.vit import SIZES

DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_num_heads": 16}


def main() -> None:
    """Makes the file, runs the commands, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large", choices=list(SIZES))
    parser.add_argument("--folder", help="where to work; default: a temporary one")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        measure(SIZES[args.size], folder)
    finally:
        shutil.rmtree(folder)


def measure(size: dict, folder: str) -> None:
    """Runs all steps in a folder."""
    source = os.path.join(folder, "random.safetensors")
    write_random(size, source)
    megabytes = os.path.getsize(source) / 1e6
    print(f"{megabytes:.0f} MB of parameters, {os.cpu_count()} cores\n")
    print("| step | s | of them CPU | peak memory, MB | times the file |\n|---|---|---|---|---|")
    start = time.perf_counter()
    shutil.copyfile(source, source + ".copy")
    with open(source + ".copy", "rb+") as file:
        os.fsync(file.fileno())
    os.remove(source + ".copy")
    print(f"| copy | {time.perf_counter() - start:.1f} | | | |")
    weights = os.path.join(folder, "weights")
    run("import jax, and nothing more", ["-c", "import jax, usfmae_jax.interop.model"], megabytes)
    run(
        "convert, from safetensors", ["-m", "usfmae_jax.convert", f"--input={source}", f"--output={weights}"], megabytes
    )
    with contextlib.suppress(ImportError):
        import torch
        from safetensors.torch import load_file

        torch.save({"model": load_file(source)}, source[:-11] + "pth")
        os.remove(source)
        shutil.rmtree(weights)
        command = ["-m", "usfmae_jax.convert", f"--input={source[:-11]}pth", f"--output={weights}"]
        run("convert, from .pth", command, megabytes)
        os.remove(source[:-11] + "pth")
    for form in ("safetensors", "timm", "hf", "mae", "onnx", "stablehlo"):
        output = os.path.join(folder, form)
        command = ["-m", "usfmae_jax.export", f"--checkpoint={weights}", f"--format={form}", f"--output={output}"]
        run(f"export, {form}", command, megabytes)
        shutil.rmtree(output, ignore_errors=True)


def write_random(size: dict, path: str) -> None:
    """Writes random weights under the original names, including the decoder."""
    rng = np.random.default_rng(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, lambda: 0.02 * rng.standard_normal(shape, np.float32))

    tensors = {name: tensor(shape) for name, shape in expected_shapes(size, DECODER).items()}
    grid = (size["image_size"][0] // size["patch_size"], size["image_size"][1] // size["patch_size"])
    for name, width in (("pos_embed", size["width"]), ("decoder_pos_embed", DECODER["decoder_width"])):
        table = stored_table(grid, grid, width)
        tensors[name] = Tensor(table.shape, table.copy)
    write_safetensors(path, tensors, {})


def run(name: str, command: list[str], megabytes: float) -> None:
    """Runs Python with these arguments; prints a row with the seconds and its peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"| {name} | failed: {said.strip().splitlines()[-1] if said.strip() else process.returncode} | | | |")
        return
    peak = _peak_megabytes(usage)
    seconds, computed = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    print(f"| {name} | {seconds:.1f} | {computed:.1f} | {peak:.0f} | {peak / megabytes:.2f} |", flush=True)


def _peak_megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e6


if __name__ == "__main__":
    main()
