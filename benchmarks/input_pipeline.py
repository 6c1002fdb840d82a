"""How fast shards become batches: our pipeline beside a plain loop of Pillow calls doing the same work.

    python -m benchmarks.input_pipeline --data=data/demo [--size=224] [--batches=20] [--rounds=5]

One thread each, so that the figures are images/s/core; rounds alternate. Pillow (`pip install pillow`) decodes, crops,
resizes and flips in separate steps, as torchvision's transforms do.

    python -m benchmarks.input_pipeline --records=1000000 --shards=1000

writes so many tiny records into a temporary folder and measures what opening them costs, and going on in the middle of
an epoch.
"""

import argparse
import io
import pathlib
import statistics
import tempfile
import time

import cv2
import numpy as np
import psutil
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.records import FIELDS, Shards, decode_record, encode_record


def _ours(sources: list[Shards], size: int, batches: int, batch: int, seed: int) -> float:
    load = pipeline.LoadView(pipeline.all_rows(sources), (size, size), 1, augment.Augmentation())
    dataset = pipeline.training_batches(load, batch_size=batch, seed=seed)
    start = time.perf_counter()
    for step in range(batches):
        dataset[step]
    return batches * batch / (time.perf_counter() - start)


def _pillow(sources: list[Shards], size: int, batches: int, batch: int, seed: int) -> float:
    from PIL import Image

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sources[0]))
    start = time.perf_counter()
    for step in range(batches):
        views = []
        for place in range(batch):
            record = decode_record(sources[0][int(order[(step * batch + place) % len(order)])])
            image = Image.open(io.BytesIO(record["image"])).convert("L")
            left, top, w, h = augment.random_crop(rng, image.height, image.width, (0.2, 1.0), (3 / 4, 4 / 3))
            image = image.crop((int(left), int(top), int(left + w), int(top + h)))
            image = image.resize((size, size), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            views.append(np.asarray(image)[..., None])
        np.stack(views)
    return batches * batch / (time.perf_counter() - start)


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
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=0, help="of many tiny ones, see above")
    parser.add_argument("--shards", type=int, default=1000)
    args = parser.parse_args()
    if args.records:
        flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
        with tempfile.TemporaryDirectory() as folder:
            _write_many(pathlib.Path(folder), args.records, args.shards)
            _measure_many(pathlib.Path(folder), args.batch)
        return
    sources = pipeline.open_sources(args.data, "train")
    speeds: dict[str, list[float]] = {"ours": [], "Pillow": []}
    for round_number in range(args.rounds + 1):
        for name, measure in (("ours", _ours), ("Pillow", _pillow)):
            speed = measure(sources, args.size, args.batches, args.batch, round_number)
            if round_number:  # the first one warms up
                speeds[name].append(speed)
    ratios = sorted(a / b for a, b in zip(speeds["ours"], speeds["Pillow"], strict=True))
    print(f"{len(sources[0])} records, views of {args.size} px, one thread, {args.rounds} rounds")
    print("| | images/s/core (median) |\n|---|---|")
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):.0f} |")
    print(f"| ratio (min, median, max) | {ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
