"""How fast files become augmented batches: ours from shards, compared with two PyTorch loaders.

    python -m benchmarks.input_pipeline --png=DIR [--rgb=560x470] [--size=224] [--workers=2]

The reference loader reads the original PNG files with Pillow, like USF-MAE's public one: nearest-neighbour resize,
rotation, flips, crop, second resize, normalisation. The tuned loader reads the same JPEG shards as ours, with OpenCV,
and combines all of that into one warp; it and ours return uint8. All use `--workers`: ours threads or processes
(`config.data.threads`, `.workers`), a DataLoader processes.

    python -m benchmarks.input_pipeline --records=1000000 --shards=1000

writes that many tiny records to a temporary folder and measures the cost of opening them and of resuming in the middle
of an epoch.
"""

import argparse
import glob
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import psutil
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks import alternate
from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.records import FIELDS, decode_image, decode_record, encode_record

PROCESSES = f"{alternate.OURS}, processes instead of threads"
REFERENCE, TUNED = "reference loader, PNG", "tuned loader, the same shards"
CROP, ROTATION = (0.5, 1.0), (0.0, 90.0)  # of the published recipe, without its impossible crops larger than the image


def prepare(args: argparse.Namespace, folder: pathlib.Path) -> int:
    """Fills `png/` with the original files and `shards/` with shards built from them; returns the number of files."""
    files = sorted(pathlib.Path(args.png).rglob("*.png"))[: args.files] if args.png else []
    if args.png and not files:
        sys.exit(f"--png={args.png} has no PNG files")
    if not files:
        alternate.tell("no --png: simulating frames ...")
        patients = max(args.files // 4, 2)
        _build(folder / "simulated", "--dataset=phantom", f"--patients={patients}", "--frames=4")
    (folder / "png").mkdir()
    frames: Any = pipeline.open_sources(str(folder / "simulated"), "")[0] if not files else []
    for number in range(len(files or frames)):
        if files:
            pixels: Any = cv2.imread(str(files[number]), cv2.IMREAD_UNCHANGED)
        else:
            pixels = decode_image(decode_record(frames[number])["image"], 1)
        if args.rgb:
            size = [int(side) for side in args.rgb.split("x")]
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
            pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR) if pixels.ndim == 2 else pixels[:, :, :3]
        cv2.imwrite(str(folder / f"png/{number:05d}.png"), pixels)
    alternate.tell("building shards ...")
    _build(folder / "shards", "--dataset=folder", f"--input={folder / 'png'}", "--name=frames")
    return len(list((folder / "png").iterdir()))


def _build(output: pathlib.Path, *how: str) -> None:
    off = ["--clean=off", "--thin=off", "--deduplicate=off"] if "--dataset=folder" in how else []
    command = [sys.executable, "-m", "data_prep.build", f"--output={output}", *how, *off]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())


def ours(args: argparse.Namespace) -> Iterator[int]:
    """Yields the sizes of batches of our training pipeline, with as many threads or processes as the peers have."""
    flags.FLAGS.mark_as_parsed()
    sources = pipeline.open_sources(args.work + "/shards", "")
    how = augment.Augmentation(crop_scale=CROP, rotation=ROTATION, hflip=0.5, vflip=0.5)
    load = pipeline.LoadView(pipeline.all_rows(sources), (args.size, args.size), 1, how)
    dataset = pipeline.training_batches(load, batch_size=args.batch, seed=0)
    processes = args.workers if args.side == PROCESSES else 0
    for batch in pipeline.iterate(dataset, 0, processes, args.workers):
        yield len(batch["image"])


def theirs(args: argparse.Namespace) -> Iterator[int]:
    """Yields the sizes of batches of a DataLoader, which reads the original files or the shards."""
    import torch

    from benchmarks import torch_loaders

    if args.side == REFERENCE:
        images = torch_loaders.Originals(sorted(glob.glob(args.work + "/png/*.png")), args.size)
    else:
        paths = sorted(glob.glob(args.work + "/shards/**/*.array_record*", recursive=True))
        images = torch_loaders.Records(paths, args.size, CROP, ROTATION)
    loader = torch.utils.data.DataLoader(
        images,
        args.batch,
        sampler=torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**9),
        num_workers=args.workers,
        worker_init_fn=torch_loaders.single_threaded,
        multiprocessing_context="spawn",  # array_record's threads do not survive a fork
    )
    for batch in loader:
        yield len(batch)


def serve(args: argparse.Namespace) -> None:
    """The process of a side: measures images/s, without the batches that were prefetched."""

    def begin() -> tuple[alternate.Result, Callable[[], alternate.Result]]:
        batches = (ours if args.side.startswith(alternate.OURS) else theirs)(args)
        next(batches)

        def turn() -> alternate.Result:
            for _ in range(2 * args.workers + 2):  # prefetched during the turns of the other sides
                next(batches)
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < args.seconds:
                images += next(batches)
            speed = images / (time.perf_counter() - start)
            return {"images": speed, "per_core": speed / min(args.workers, alternate.number_of_cores())}

        return {}, turn

    alternate.serve(begin)


def _write_many(folder: pathlib.Path, records: int, shards: int) -> None:
    image = cv2.imencode(".png", np.zeros((16, 16), np.uint8))[1].tobytes()
    common = FIELDS | {"image": image, "height": 16, "width": 16, "dataset": "made", "sha256": "0" * 64}
    for shard in range(shards):
        writer = ArrayRecordWriter(f"{folder}/made-train.array_record-{shard:05d}-of-{shards:05d}", "group_size:1")
        for number in range(shard, records, shards):
            ids = {"patient": f"p{number // 20}", "video": f"v{number // 5}", "frame": str(number % 5)}
            writer.write(encode_record(common | ids | {"source": f"{number}.png"}))
        writer.close()


def _measure_many(folder: pathlib.Path, batch: int) -> None:
    process = psutil.Process()

    def row(what: str, since: float, cpu: float) -> None:
        size, files = process.memory_full_info().uss / 1e6, process.num_fds()
        took = f"{time.perf_counter() - since:.1f} | {time.process_time() - cpu:.1f}"
        print(f"| {what} | {took} | {size - before:.0f} | {files} |", flush=True)

    before = process.memory_full_info().uss / 1e6
    print("| | s | CPU s of this process | MB more than before opening | open files |\n|---|---|---|---|---|")
    start = time.perf_counter(), time.process_time()
    sources = pipeline.open_sources(str(folder), "train")
    row("open", *start)
    load = pipeline.LoadView(pipeline.all_rows(sources), (32, 32), 1, augment.Augmentation())
    dataset = pipeline.training_batches(load, batch_size=batch, seed=0)
    middle = len(sources[0]) // 2 // batch
    for workers in (0, 1):
        start = time.perf_counter(), time.process_time()
        batches = pipeline.iterate(dataset, middle, workers)
        next(batches)
        row(f"the batch in the middle of an epoch, {'threads' if not workers else 'a new loader process'}", *start)
        batches.close()
    start = time.perf_counter(), time.process_time()
    for shard in sources:
        for number in range(0, len(shard), len(shard) // len(shard.paths)):
            shard[number]
    row("one record of every shard", *start)


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", default="", help="folder of PNG files; default: simulated ones")
    parser.add_argument("--files", type=int, default=800, help="how many of them")
    parser.add_argument("--rgb", default="", help="store them as colour of WIDTHxHEIGHT first, as 560x470")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes of a DataLoader, threads of ours")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--records", type=int, default=0, help="of many tiny ones, see above")
    parser.add_argument("--shards", type=int, default=1000)
    alternate.add_arguments(parser, rounds=5)
    args = parser.parse_args()
    if args.quick:
        args.files, args.size, args.batch, args.seconds, args.rounds = 8, 32, 4, 0.2, min(args.rounds, 2)
    if args.records:
        flags.FLAGS.mark_as_parsed()  # needed by grain's worker processes
        with tempfile.TemporaryDirectory() as folder:
            _write_many(pathlib.Path(folder), args.records, args.shards)
            _measure_many(pathlib.Path(folder), args.batch)
        return
    if args.side:
        serve(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        count = prepare(args, pathlib.Path(folder))
        sides: dict[str, dict[str, str]] = {alternate.OURS: {}, PROCESSES: {}, REFERENCE: {}, TUNED: {}}
        found = alternate.measure("benchmarks.input_pipeline", sides, args, [*sys.argv[1:], f"--work={folder}"])
    columns = {"images": "images/s", "per_core": "images/s/core", "peak_gb": "peak memory, GB, without workers"}
    text = alternate.table(found, columns, "images", REFERENCE)
    if found.get(TUNED, {}).get("rounds") and found.get(alternate.OURS, {}).get("rounds"):
        pairs = zip(found[alternate.OURS]["rounds"], found[TUNED]["rounds"], strict=False)
        ratio = alternate.spread([own["images"] / other["images"] for own, other in pairs])
        text += f"\n\nOurs is {ratio} times as fast as the {TUNED}."
    what = f"of {args.rgb} in colour" if args.rgb else "as they are"
    origin = "PNG files" if args.png else "simulated frames"
    title = f"input: {count} {origin} {what}, views of {args.size} px, {args.workers} workers each"
    alternate.report(args, title, found, text)


if __name__ == "__main__":
    main()
