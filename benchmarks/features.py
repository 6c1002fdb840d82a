"""Frozen features and a logistic regression on them: our evaluation compared with PyTorch and scikit-learn scripts.

    python -m benchmarks.features --data=data/bus_bra [--model=tiny] [--images=0] [--rounds=3]
    python -m benchmarks.features --data=data/bus_bra --model=base --images=64

All sides use the same frames, (random) weights, folds and regularisation strengths; each run is a separate process,
and the sides take turns. Measured are the seconds for the features (from files to an array, including compilation), for
the regression (5 folds, 12 strengths), and for the whole process. PyTorch reads single JPEG files, which are written
before the clock starts. The largest difference between our features and theirs is printed, relative to their standard
deviation.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np

from benchmarks import alternate

LIBRARY = "transformers ViTModel"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
GREY = {"mean": [0.5], "std": [0.25]}


def prepare(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Writes the inputs of all sides: an encoder directory, and for PyTorch also JPEG files, labels and folds."""
    from flax import nnx

    from usfmae_jax.data import splits
    from usfmae_jax.data.records import decode_record
    from usfmae_jax.data.table import read_table
    from usfmae_jax.interop.model import Model, preprocessing, save_model
    from usfmae_jax.interop.writing import write_hf
    from usfmae_jax.models.patches import sincos_table
    from usfmae_jax.models.vit import SIZES, ViT
    from usfmae_jax.tasks import classification

    architecture = dict(SIZES[args.model])
    params = nnx.to_pure_dict(nnx.state(ViT(**architecture, rngs=nnx.Rngs(0))))
    pixels = preprocessing(architecture["image_size"], 1, **(IMAGENET if architecture["channels"] == 3 else GREY))
    description = {"model": "vit", "encoder": architecture}
    model = Model({"encoder": params}, description, pixels, [])
    save_model(str(folder / "encoder"), model)
    (folder / "hf").mkdir()
    write_hf(model, str(folder / "hf"))
    grid = [side // architecture["patch_size"] for side in architecture["image_size"]]
    np.save(folder / "encoder/position.npy", np.asarray(sincos_table((grid[0], grid[1]), architecture["width"])))
    frames = classification.select(read_table(args.data))
    folds, *_ = splits.plan(frames, classification.strata(frames))
    files = []
    (folder / "images").mkdir()
    for row in range(len(frames)):
        record = decode_record(frames.shards[int(frames.index[row])])
        files.append(str(folder / f"images/{row}.jpg"))
        pathlib.Path(files[-1]).write_bytes(record["image"])
    parts = [[part.tolist() for part in (fold.train, fold.validation, fold.test)] for fold in folds]
    known: dict[str, Any] = {
        "files": files,
        "labels": frames.label.tolist(),
        "names": [fold.name for fold in folds],
        "folds": parts,
    }
    (folder / "frames.json").write_text(json.dumps(known))


def ours(args: argparse.Namespace) -> alternate.Result:
    """The work of `usfmae_jax.evaluate` between its settings and its report."""
    import jax
    from sklearn.metrics import roc_auc_score

    from usfmae_jax.data import splits
    from usfmae_jax.data.table import read_table
    from usfmae_jax.interop.model import open_model
    from usfmae_jax.probing import features as frozen
    from usfmae_jax.tasks import classification
    from usfmae_jax.training import probes
    from usfmae_jax.training.mesh import make_mesh

    jax.devices()
    start = time.perf_counter()
    weights = open_model(args.work + "/encoder")
    frames = classification.select(read_table(args.data))
    how: dict[str, Any] = {"pool": "mean", "batch_size": args.batch}
    run = frozen.extractor(weights, mesh=make_mesh(), **how)
    if args.images:
        from usfmae_jax.data import table

        size, channels = frozen.image_format(weights)
        batches = table.images(frames, range(args.images), size=size, channels=channels, batch_size=args.batch)
        features = run(batches, args.images, "features")
    else:
        features = frozen.extract(run, weights, frames, **how)
    extracted = time.perf_counter()
    np.save(args.work + f"/features-{args.side}.npy", features)
    times = {"features": extracted - start}
    if args.images:
        return times
    start = time.perf_counter()
    scores = []
    for fold in splits.plan(frames, classification.strata(frames))[0]:
        parts = [(features[rows], frames.label[rows]) for rows in (fold.train, fold.validation, fold.test)]
        head = probes.logistic(parts[0], parts[1], len(frames.label_names))
        scores.append(roc_auc_score(parts[2][1], head.predict(parts[2][0])[:, 1]))
    return times | {"regression": time.perf_counter() - start, "auroc": float(np.mean(scores))}


def theirs(args: argparse.Namespace) -> alternate.Result:
    """The same work as a plain PyTorch and scikit-learn script."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from benchmarks import torch_loaders, torch_vit

    library = torch_vit.transformers().ViTModel if args.side == LIBRARY else None  # imported before the clock starts
    start = time.perf_counter()
    folder = pathlib.Path(args.work)
    known = json.loads((folder / "frames.json").read_text())
    architecture = json.loads((folder / "encoder/architecture.json").read_text())
    pixels = json.loads((folder / "encoder/preprocessing.json").read_text())
    count = args.images or len(known["files"])
    labels = np.array(known["labels"])
    size = tuple(architecture["image_size"])
    images = torch_loaders.Images(known["files"][:count], known["labels"], size, pixels["channels"])
    loader = torch.utils.data.DataLoader(
        images, args.batch, num_workers=args.workers, worker_init_fn=torch_loaders.single_threaded
    )
    model: Any
    if library:
        vit = library.from_pretrained(folder / "hf", add_pooling_layer=False).eval()

        def model(x: torch.Tensor) -> torch.Tensor:
            return vit(x).last_hidden_state[:, 1:].mean(dim=1)
    else:
        model = torch_vit.load_encoder(torch_vit.ViT(architecture), folder / "encoder").eval()
    found = []
    with torch.inference_mode():
        for batch, _ in loader:
            found.append(model(torch_vit.normalize(batch, pixels["mean"], pixels["std"])).numpy())
    features = np.concatenate(found)
    extracted = time.perf_counter()
    np.save(args.work + f"/features-{args.side}.npy", features)
    times = {"features": extracted - start}
    if args.images:
        return times
    start = time.perf_counter()
    scores = []
    for train, validation, test in known["folds"]:
        best: Any = None
        for strength in 10.0 ** np.arange(-6, 6):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
                classifier.fit(features[train], labels[train])
            loss = log_loss(labels[validation], classifier.predict_proba(features[validation]))
            if best is None or loss < best[0]:
                best = loss, classifier
        scores.append(roc_auc_score(labels[test], best[1].predict_proba(features[test])[:, 1]))
    return times | {"regression": time.perf_counter() - start, "auroc": float(np.mean(scores))}


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/bus_bra", help="labelled shards of two classes")
    parser.add_argument("--model", default="tiny", help="a size of usfmae_jax.models.vit.SIZES")
    parser.add_argument("--images", type=int, default=0, help="only the features of so many frames; 0 = all, and fit")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="of PyTorch's DataLoader")
    alternate.add_arguments(parser, rounds=3)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.images, args.batch = min(args.rounds, 1), 8, 4
    if args.side:
        side = ours if args.side == alternate.OURS else theirs
        alternate.serve(lambda: ({}, lambda: side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, pathlib.Path(folder))
        sides: dict[str, dict[str, str]] = {alternate.OURS: {}, alternate.THEIRS: {}, LIBRARY: {}}
        arguments = [*sys.argv[1:], f"--work={folder}"]
        found = alternate.measure("benchmarks.features", sides, args, arguments, fresh=True)
        arrays = {
            side: np.load(file) for side in found if (file := pathlib.Path(folder, f"features-{side}.npy")).exists()
        }
    columns = {"features": "features, s", "regression": "logistic regression, s", "seconds": "whole process, s"}
    columns |= {"cpu": "its CPU, s", "peak_gb": "peak memory, GB", "auroc": "AUROC"}
    if args.images:
        columns = {key: columns[key] for key in columns if key not in ("regression", "auroc")}
    text = alternate.table(found, columns, "seconds" if not args.images else "features", LIBRARY, less=True)
    mine = arrays.pop(alternate.OURS, None)
    for name, other in arrays.items() if mine is not None else ():
        text += f"\n\nFeatures of {name} differ by {np.abs(mine - other).max() / other.std():.1e} of their deviation."
    count = args.images or len(next(iter(arrays.values()), []))
    alternate.report(args, f"frozen features: {args.model}, {count} images, batch {args.batch}", found, text)


if __name__ == "__main__":
    main()
