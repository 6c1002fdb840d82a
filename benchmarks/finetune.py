"""Cross-validated fine-tuning: our command compared with a PyTorch loop with the same recipe.

    python -m benchmarks.finetune --data=data/bus_bra [--model=tiny] [--epochs=3] [--folds=5] [--rounds=3]

Same frames, folds, initial weights (random), batch size, epochs, augmentation, AdamW with layer-wise decay, schedule,
clipping, drop path and label smoothing; both evaluate on the validation part after every epoch and test the best model.
Each run is a separate process, and the sides take turns. Ours is the complete `python -m usfmae_jax.finetune`: its
process includes confidence intervals, checkpoints and the report, which the PyTorch loop lacks. `training` is the time
from opening the data to the last test, including compilation. Ours trains folds of a small model in parallel, one per
core, which is the command's default; the PyTorch loop trains them one after another, as such loops do, each on all
cores. With `--parallel=1`, ours does the same.
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import alternate, features


def settings(args: argparse.Namespace) -> Any:
    """Our recipe for labelled folders, with the epochs, batch size and folds of the arguments."""
    from configs.finetune import get_config

    config = get_config("folder")
    config.init = args.work + "/encoder"
    config.data.path = args.data
    config.train.update(epochs=args.epochs, min_steps=0, batch_size=args.batch)
    config.parallel = args.parallel
    config.split.duplicates = False  # the PyTorch loop does not look for them either
    if args.folds:
        known = json.loads(pathlib.Path(args.work, "frames.json").read_text())
        config.split.only = tuple(known["names"][: args.folds])
    return config


def ours(args: argparse.Namespace) -> alternate.Result:
    """Our command, with its loop timed."""
    from usfmae_jax.data import cells
    from usfmae_jax.finetuning import loop

    spent = []
    with tempfile.TemporaryDirectory() as workdir:
        describe, finish = loop.results.describe, loop.results.finish

        def begin(*arguments: Any) -> Any:
            describe(*arguments)
            spent.append(time.perf_counter())

        def stop(*arguments: Any) -> Any:
            spent.append(time.perf_counter())
            return finish(*arguments)

        loop.results.describe, loop.results.finish = begin, stop  # type: ignore[assignment]
        loop.finetune(settings(args), workdir)
        with open(f"{workdir}/predictions.csv", newline="") as file:
            tested = len(list(cells.read_dicts(file)))
        results = json.loads(pathlib.Path(workdir, "results.json").read_text())
    auroc = results["metrics"]["auroc"]["value"]
    return {"training": spent[1] - spent[0], "tested": tested, "auroc": auroc}


def _schedule(step: int, total: int, warmup: float, floor: float) -> float:
    """Learning rate as a fraction of its peak."""
    rising = round(warmup * total)
    if step < rising:
        return step / rising
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))


def _parameter_groups(model: Any, depth: int, rate: float, optimizer: Any) -> list[dict[str, Any]]:
    """Groups with layer-wise learning rates; weight decay applies to matrices, not to biases, norms and tokens."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("norm."):  # after the mean: part of the head
            layer = depth + 1
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = depth + 1 if name.startswith("head.") else 0
        scale = optimizer.layer_decay ** (depth + 1 - layer)
        decay = optimizer.weight_decay if name.endswith("weight") and parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": params, "lr": rate * scale, "weight_decay": decay} for (scale, decay), params in groups.items()]


def _auroc(model: Any, images: Any, labels: np.ndarray, pixels: dict[str, Any]) -> float:
    import torch
    from sklearn.metrics import roc_auc_score

    from benchmarks import torch_vit

    model.eval()
    with torch.inference_mode():
        logits = [model(torch_vit.normalize(part, pixels["mean"], pixels["std"])) for part in images.split(128)]
    return float(roc_auc_score(labels, torch.cat(logits).softmax(dim=1)[:, 1].numpy()))


def theirs(args: argparse.Namespace) -> alternate.Result:
    """The same as a plain PyTorch loop."""
    import copy

    import torch

    from benchmarks import torch_loaders, torch_vit
    from usfmae_jax.data import augment

    config, folder = settings(args), pathlib.Path(args.work)
    known = json.loads((folder / "frames.json").read_text())
    architecture = json.loads((folder / "encoder/architecture.json").read_text())
    pixels = json.loads((folder / "encoder/preprocessing.json").read_text())
    size, labels = tuple(architecture["image_size"]), np.array(known["labels"])
    how = augment.Augmentation(**config.augment)
    rng = np.random.default_rng()

    def view(image: np.ndarray) -> np.ndarray:
        image = image if image.ndim == 3 else image[:, :, None]
        matrix = augment.random_view(rng, image.shape[0], image.shape[1], size, how)
        return augment.adjust(augment.warp(image, matrix, size, how.interpolation), rng, how)

    def seed_worker(number: int) -> None:
        nonlocal rng
        rng = np.random.default_rng(torch.initial_seed() + number)
        torch_loaders.single_threaded(number)

    def take(rows: list[int], view: Any = None) -> Any:
        return torch_loaders.Images(
            [known["files"][row] for row in rows], labels[rows].tolist(), size, pixels["channels"], view
        )

    def decoded(rows: list[int]) -> Any:
        return torch.stack([image for image, _ in take(rows)])

    optimizer_settings, batch_size = config.optimizer, config.train.batch_size
    rate = optimizer_settings.learning_rate * batch_size / 256
    floor = optimizer_settings.floor / rate
    start, scores, tested = time.perf_counter(), [], 0
    for train, validation, test in known["folds"][: args.folds or None]:
        model = torch_vit.ViT(architecture, classes=2, drop_path=config.model.drop_path)
        torch_vit.load_encoder(model, folder / "encoder")
        run = torch.compile(model) if args.compile else model
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, architecture["depth"], rate, optimizer_settings),
            betas=(optimizer_settings.b1, optimizer_settings.b2),
        )
        loader = torch.utils.data.DataLoader(
            take(train, view),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            worker_init_fn=seed_worker,
        )
        total = round(args.epochs * len(train) / batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, total=total: _schedule(step, total, optimizer_settings.warmup, floor)
        )
        held_out, best = decoded(validation), None
        step = 0
        while step < total:
            model.train()
            for images, target in loader:
                logits = run(torch_vit.normalize(images, pixels["mean"], pixels["std"]))
                loss = torch.nn.functional.cross_entropy(
                    logits, target, label_smoothing=config.regularization.smoothing
                )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_settings.clip_norm)
                optimizer.step()
                schedule.step()
                step += 1
                if step == total:
                    break
            score = _auroc(model, held_out, labels[validation], pixels)
            if best is None or score > best[0]:
                best = score, copy.deepcopy(model.state_dict())
        assert best is not None
        model.load_state_dict(best[1])
        scores.append(_auroc(model, decoded(test), labels[test], pixels))
        tested += len(test)
    return {"training": time.perf_counter() - start, "tested": tested, "auroc": float(np.mean(scores))}


def main() -> None:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/bus_bra", help="labelled shards of two classes")
    parser.add_argument("--model", default="tiny", help="a size of usfmae_jax.models.vit.SIZES")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folds", type=int, default=0, help="how many of the folds; 0 = all")
    parser.add_argument("--parallel", type=int, default=0, help="folds of ours at a time; 0 = as the command does")
    parser.add_argument("--workers", type=int, default=1, help="of PyTorch's DataLoader")
    parser.add_argument("--compile", action="store_true", help="compile the PyTorch model")
    alternate.add_arguments(parser, rounds=1)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.epochs, args.folds, args.batch = 1, 1.0, 1, 8
    if args.side:
        side = ours if args.side == alternate.OURS else theirs
        alternate.serve(lambda: ({}, lambda: side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        features.prepare(args, pathlib.Path(folder))
        sides: dict[str, dict[str, str]] = {alternate.OURS: {}, alternate.THEIRS: {}}
        arguments = [*sys.argv[1:], f"--work={folder}"]
        found = alternate.measure("benchmarks.finetune", sides, args, arguments, fresh=True)
    columns = {"training": "training and testing, s", "seconds": "whole process, s", "cpu": "its CPU, s"}
    columns |= {"peak_gb": "peak memory, GB, one process", "auroc": "AUROC"}
    text = alternate.table(found, columns, "seconds", alternate.THEIRS, less=True)
    title = f"fine-tuning: {args.model}, batch {args.batch}, {args.epochs:g} epochs, {args.folds or 'all'} folds"
    alternate.report(args, title, found, text)


if __name__ == "__main__":
    main()
