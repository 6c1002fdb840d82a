"""The evaluation loop: open, split, compute features, then for every member: fit, predict; at the end: report."""

import json
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from usfmae_jax import files
from usfmae_jax.data import provenance, splits
from usfmae_jax.data.table import Table
from usfmae_jax.evaluation.predictions import concatenate, identify
from usfmae_jax.interop.model import Model
from usfmae_jax.probing import build, features, finetuned, patches
from usfmae_jax.probing.build import Plan
from usfmae_jax.probing.inspect import Outcome, Tested, parted, record, sweep
from usfmae_jax.tasks import Task
from usfmae_jax.tasks.regression import Regression
from usfmae_jax.tasks.segmentation import Segmentation, classes_of
from usfmae_jax.training import checks, inspect, probes
from usfmae_jax.training.forward import fitting_batch
from usfmae_jax.training.mesh import make_mesh, on_first_process

HEADS = {
    "logistic": "Logistic regression",
    "knn": "Nearest neighbours",
    "linear": "Linear probe",
    "attentive": "Attentive probe",
    "segmentation": "Linear segmentation probe",
    "regression": "Ridge regression",
}


def evaluate(config: ml_collections.ConfigDict, workdir: str, command: str = "") -> dict[str, Any]:
    """Tests frozen features with a probe, or a fine-tuned model, and writes the results.

    Args:
      config: see `configs/evaluate.py`.
      workdir: folder for results.json, results.md, predictions.csv, report.html, splits/splits.csv and config.json.
      command: the command line that repeats it, for the report.

    Returns:
      the contents of results.json; in a job of several processes only in the first, {} in the others.

    Raises:
      InputError: the config or the data is invalid; raised before any features are computed.
    """
    build.check(config)
    mesh = make_mesh(**config.mesh)
    config = config.copy_and_resolve_references()
    config.batch_size = fitting_batch(config.batch_size, mesh, "config.batch_size")
    protocol = build.protocol(config)
    task: Task
    if protocol == "finetuned":
        build.check_finetuned(config)
        trained = finetuned.open_trained(config.checkpoint)
        model: Model | None = trained[0].model
        table, task, flip = build.of_model(config, trained[0].model)
        asked_for = build.asked_for(config, table, task.strata(table))
        workdir = checks.make_workdir(workdir)
        how: dict[str, Any] = {"batch_size": config.batch_size, "threads": config.data.threads}
        how |= {"dtype": jnp.dtype(config.dtype), "flip": flip}
        outcome = finetuned.test(trained, table, task, mesh, asked_for, **how)
    else:
        model = build.encoder(config)
        readers: dict[str, Any] = {"segmentation": build.masked, "regression": build.measured}
        table, task = readers.get(protocol, build.labelled)(config)
        build.refuse_labels_seen(model, table)
        if protocol in ("attentive", "segmentation"):
            features.check_tokens(model, len(table))
        workdir = checks.make_workdir(workdir)
        cache = config.cache or features.default_cache()
        plan = build.plan(config, table, task.strata(table), protocol, cache)
        written = f"{workdir}/splits/splits.csv"
        on_first_process(lambda: splits.write_splits(written, table, plan.folds, plan.groups))
        if isinstance(task, Segmentation):
            outcome = probe_patches(config, model, table, task, plan, mesh, cache)
        elif isinstance(task, Regression):
            outcome = probe_numbers(config, model, table, task, plan, mesh, cache)
        else:
            outcome = probe(config, protocol, model, table, plan, mesh, cache)
    robustness = None
    if config.corruptions:
        chosen = [outcome.tested[number] for number in inspect.foremost(outcome.tested)]
        how = {"batch_size": config.batch_size, "threads": config.data.threads}
        robustness = sweep(table, chosen, outcome, positive=config.positive, seed=config.seed, **how)
    found: dict[str, Any] = {}
    on_first_process(
        lambda: found.update(report(config, workdir, protocol, model, table, task, outcome, robustness, command))
    )
    return found


def probe(
    config: ml_collections.ConfigDict,
    protocol: str,
    model: Model | None,
    table: Table,
    plan: Plan,
    mesh: Mesh,
    cache: str,
) -> Outcome:
    """Computes features once, then fits each member."""
    pool = "patches" if protocol == "attentive" else config.pool
    extractor, found, about = _features(config, model, table, pool, mesh, cache)
    tested, fitted = [], []
    refit = _refits(config)
    for fraction, seed, fold in tqdm(plan.members, protocol, unit="fit", delay=2, leave=False):
        ids, classes = (fold.name, seed, fraction), len(table.label_names)
        recipe: dict[str, Any] = {
            "num_heads": model.description["encoder"]["num_heads"] if protocol == "attentive" and model else 0,
            "seed": seed,
            "options": {name: dict(config[name]) for name in ("linear", "attentive")},
        }
        learnt, held_out = ((found[rows], table.label[rows]) for rows in (fold.train, fold.validation))
        head = probes.fit(protocol, learnt, held_out, classes, **recipe)
        chosen = record(table, fold.validation, ids, head.predict(held_out[0]))
        settings = head.settings
        if refit:
            learnt = (np.concatenate([learnt[0], held_out[0]]), np.concatenate([learnt[1], held_out[1]]))
            head = probes.refit(protocol, settings, learnt, classes, **recipe)
        said = record(table, fold.test, ids, head.predict(found[fold.test]), fold.copied)
        settings |= {"training_frames": len(learnt[1]), "refit": refit}
        tested.append(Tested(fold.name, seed, fraction, fold.test, said, chosen if len(chosen) else None, settings))
        fitted.append(head)
    best = inspect.foremost(tested)

    def predict(images: Any, total: int, name: str) -> list[np.ndarray]:
        parts = parted(extractor(images, total, name), [tested[number] for number in best])
        return [fitted[number].predict(part) for number, part in zip(best, parts, strict=True)]

    pooled = found.astype(np.float32).mean(axis=1) if protocol == "attentive" else found
    attention = inspect.rollout(model, "cls" if config.pool == "cls" and protocol != "attentive" else "mean")
    return Outcome(
        tested=tested,
        split=plan.note + ("; fitted again on training and validation frames together" if refit else ""),
        mapped=(np.arange(len(table)), pooled, "frozen features"),
        looks=dict.fromkeys(best, attention),
        predict=predict,
        image_format=features.image_format(model),
        excluded=plan.excluded,
        features=about,
    )


def _features(
    config: ml_collections.ConfigDict, model: Model | None, table: Table, pool: str, mesh: Mesh, cache: str
) -> tuple[features.Extractor, np.ndarray, dict[str, str]]:
    """The feature extractor, the features of all frames, and what the results record about them."""
    how: dict[str, Any] = {"pool": pool, "batch_size": config.batch_size, "dtype": jnp.dtype(config.dtype)}
    extractor = features.extractor(model, mesh=mesh, **how)
    reused: list[bool] = []
    how |= {"threads": config.data.threads, "cache": cache, "reused": lambda: reused.append(True)}
    found = features.extract(extractor, model, table, **how)
    return extractor, found, {"sha256": features.digest(found), "computed": "before" if reused else "now"}


def _refits(config: ml_collections.ConfigDict) -> bool:
    return config.refit and tuple(config.fractions) == (1.0,)  # label fractions must not grow by the validation frames


def probe_numbers(
    config: ml_collections.ConfigDict,
    model: Model | None,
    table: Table,
    task: Regression,
    plan: Plan,
    mesh: Mesh,
    cache: str,
) -> Outcome:
    """Computes features once, then fits ridge regression for each member."""
    _, found, about = _features(config, model, table, config.pool, mesh, cache)
    tested, refit = [], _refits(config)
    for fraction, seed, fold in tqdm(plan.members, "regression", unit="fit", delay=2, leave=False):
        rows, own = fold.train, task.fitted(table, fold.train)
        learnt, held_out = ((found[part], own.targets(table, part)["value"]) for part in (rows, fold.validation))
        predict, settings = probes.ridge(learnt, held_out)
        if refit:
            rows = np.concatenate([fold.train, fold.validation])
            own = task.fitted(table, rows)
            predict, _ = probes.ridge((found[rows], own.targets(table, rows)["value"]), None, (settings["penalty"],))
        kept = own.measure(table, fold.test, {"value": predict(found[fold.test])})
        ids = identify(table, fold.test, fold.name, seed, fraction, fold.copied)
        settings |= {"training_frames": len(rows), "refit": refit}
        said = own.record(ids, table, fold.test, kept)
        tested.append(Tested(fold.name, seed, fraction, fold.test, said, settings=settings))
    attention = inspect.rollout(model, config.pool)
    return Outcome(
        tested=tested,
        split=plan.note + ("; fitted again on training and validation frames together" if refit else ""),
        mapped=(np.arange(len(table)), found, "frozen features"),
        looks=dict.fromkeys(inspect.foremost(tested), attention),
        image_format=features.image_format(model),
        excluded=plan.excluded,
        features=about,
        warnings=task.notes,
    )


def probe_patches(
    config: ml_collections.ConfigDict,
    model: Model | None,
    table: Table,
    task: Segmentation,
    plan: Plan,
    mesh: Mesh,
    cache: str,
) -> Outcome:
    """Computes patch tokens once, then fits a linear layer for each member; tested at the frames' own sizes."""
    extractor, found, about = _features(config, model, table, "patches", mesh, cache)
    grid = features.grid(model)
    targets = patches.shares(table, task, grid, config.data.threads)
    tested, fitted = [], []
    refit = _refits(config)
    for fraction, seed, fold in tqdm(plan.members, "segmentation", unit="fit", delay=2, leave=False):
        head = patches.fit(found, targets, fold.train, fold.validation)
        settings, rows = head.settings, fold.train
        if refit:
            rows = np.concatenate([fold.train, fold.validation])
            head = patches.fit(found, targets, rows, np.zeros(0, int), (settings["penalty"],))
        kept = task.measure(table, fold.test, head.predict(found[fold.test], grid))
        said = task.record(identify(table, fold.test, fold.name, seed, fraction, fold.copied), table, fold.test, kept)
        settings |= {"training_frames": len(rows), "refit": refit}
        tested.append(Tested(fold.name, seed, fraction, fold.test, said, settings=settings))
        fitted.append(head)

    def outlines(head: patches.PatchProbe) -> Any:
        def look(images: np.ndarray) -> np.ndarray:
            said = head.predict(extractor(iter([images]), len(images), ""), grid)["probabilities"]
            return np.stack([classes_of(one, images.shape[1:3]) for one in said])

        return look

    return Outcome(
        tested=tested,
        split=plan.note + ("; fitted again on training and validation frames together" if refit else ""),
        mapped=(np.arange(len(table)), found.astype(np.float32).mean(axis=1), "frozen features"),
        looks={number: outlines(fitted[number]) for number in inspect.foremost(tested)},
        image_format=features.image_format(model, "patches"),
        excluded=plan.excluded,
        features=about,
    )


def report(
    config: ml_collections.ConfigDict,
    workdir: str,
    protocol: str,
    model: Model | None,
    table: Table,
    task: Task,
    outcome: Outcome,
    robustness: dict[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """Writes and prints the results."""
    settings, tested = build.settings(config), outcome.tested
    lineage = model.lineage if model else []
    datasets = sorted(set(table.dataset.tolist()))
    warnings = [*outcome.warnings]
    rows = np.unique(np.concatenate([one.rows for one in tested]))
    # What a fine-tuned model has learnt from is not tested: that it has seen the rest of the dataset is no warning.
    warnings += provenance.warn_of_seen(lineage[:-1] if protocol == "finetuned" else lineage, table.take(rows))
    warnings += inspect.cautions(table)
    context = {
        "config": settings,
        "weights": {
            "source": settings["checkpoint"],
            "fingerprint": model.fingerprint if model else "",
            "kind": model.kind if model else "pixels",
        },
        "lineage": provenance.without_hashes(lineage),
        "data": provenance.describe_data([table.shards]),
        "fingerprint": table.fingerprint,
        "warnings": warnings,
        "excluded": outcome.excluded,
        "features": outcome.features,
        **({"targets_fingerprint": task.fingerprint} if task.fingerprint else {}),
        "members": [{"fold": t.fold, "seed": t.seed, "fraction": t.fraction, **t.settings} for t in tested],
        "command": command,
    }
    best = inspect.foremost(tested)
    examples = task.examples(table, [(tested[n].rows, tested[n].predictions) for n in best], config.examples)
    looks = [outcome.looks[number] for number in best]
    (rows, mapped, space), strata = outcome.mapped, task.strata(table)
    validation = [one.validation for one in tested if one.validation is not None]
    files.write(epath.Path(workdir, "config.json"), json.dumps(settings, indent=2) + "\n")
    found = task.finish(
        workdir,
        concatenate([one.predictions for one in tested]),
        concatenate(validation) if len(validation) == len(tested) else None,
        about={
            "title": title(protocol, model, datasets),
            "protocol": protocol,
            "datasets": datasets,
            "split": outcome.split,
        },
        context=context,
        embedding=inspect.feature_map(
            table, rows, np.asarray(strata.names)[strata.code[rows]], mapped, space, config.seed
        ),
        examples=inspect.shown(table, examples, looks, outcome.image_format),
        resamples=config.bootstrap,
        **({"robustness": robustness} if robustness else {}),
    )
    print(task.table(found), flush=True)
    return found


def title(protocol: str, model: Model | None, datasets: list[str]) -> str:
    """The heading of the report."""
    on = " and ".join(datasets)
    if model is None:
        return f"{HEADS[protocol]} on raw pixels of {on}"
    if protocol == "finetuned":
        kinds = {"resnet50": "ResNet", "unet": "U-Net", "vit": "ViT"}
        return f"Fine-tuned {kinds[model.description['model']]} on {on}"
    return f"{HEADS[protocol]} on {'a frozen' if model.lineage else 'an untrained'} encoder, {on}"
