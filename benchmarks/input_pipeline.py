"""How fast shards become batches: our pipeline beside a plain loop of Pillow calls doing the same work.

    python -m benchmarks.input_pipeline --data=data/demo [--size=224] [--batches=20] [--rounds=5]

One thread each, so that the figures are images/s/core; rounds alternate. Pillow (`pip install pillow`) decodes, crops,
resizes and flips in separate steps, as torchvision's transforms do.
"""

import argparse
import io
import statistics
import time

import numpy as np

from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.records import Shards, decode_record


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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
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
