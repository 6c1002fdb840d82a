"""The evaluation loop: open, split, compute features, then for every member: fit, predict; at the end: report."""

import json
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from usfmae_jax.data import provenance, splits
from usfmae_jax.data.table import Table
from usfmae_jax.evaluation.predictions import concatenate
from usfmae_jax.interop.model import Model
from usfmae_jax.probing import build, features, finetuned
from usfmae_jax.probing.build import Plan
from usfmae_jax.probing.inspect import Outcome, Tested, parted, record, sweep
from usfmae_jax.reporting import classification as reporting
from usfmae_jax.tasks import classification
from usfmae_jax.training import checks, inspect, probes
from usfmae_jax.training.forward import fitting_batch
from usfmae_jax.training.mesh import make_mesh, on_first_process

HEADS = {
    "logistic": "Logistic regression",
    "knn": "Nearest neighbours",
    "linear": "Linear probe",
    "attentive": "Attentive probe",
}


def evaluate(config: ml_collections.ConfigDict, workdir: str, command: str = "") -> dict[str, Any]:
    """Tests frozen features under a probe, or a fine-tuned classifier, and writes the results.

    Args:
      config: see `configs/evaluate.py`.
      workdir: receives results.json, results.md, predictions.csv, report.html, splits/splits.csv and config.json.
      command: how to repeat it, for the report.

    Returns:
      what results.json holds; of a job of several processes the first one alone, the others {}.

    Raises:
      InputError: something given cannot be used; raised before any features are computed.
    """
    build.check(config)
    mesh = make_mesh(**config.mesh)
    config = config.copy_and_resolve_references()
    config.batch_size = fitting_batch(config.batch_size, mesh, "config.batch_size")
    protocol = build.protocol(config)
    if protocol == "finetuned":
        build.check_finetuned(config)
        judges = finetuned.open_judges(config.checkpoint)
        model: Model | None = judges[0].model
        table = build.labelled(config)
        workdir = checks.make_workdir(workdir)
        how = {"batch_size": config.batch_size, "threads": config.data.threads, "dtype": jnp.dtype(config.dtype)}
        outcome = finetuned.test(judges, table, mesh, lambda: build.asked_for(config, table), **how)
    else:
        model = build.encoder(config)
        table = build.labelled(config)
        build.refuse_labels_seen(model, table)
        workdir = checks.make_workdir(workdir)
        cache = config.cache or features.default_cache()
        plan = build.plan(config, table, protocol, cache)
        if protocol == "attentive":
            features.check_tokens(model, len(table))
        written = f"{workdir}/splits/splits.csv"
        on_first_process(lambda: splits.write_splits(written, table, plan.folds, plan.groups))
        outcome = probe(config, protocol, model, table, plan, mesh, cache)
    robustness = None
    if config.corruptions:
        chosen = [outcome.tested[number] for number in inspect.foremost(outcome.tested)]
        how = {"batch_size": config.batch_size, "threads": config.data.threads}
        robustness = sweep(table, chosen, outcome, positive=config.positive, seed=config.seed, **how)
    found: dict[str, Any] = {}
    on_first_process(
        lambda: found.update(report(config, workdir, protocol, model, table, outcome, robustness, command))
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
    """Features once, then one fit for each member."""
    how: dict[str, Any] = {
        "pool": "patches" if protocol == "attentive" else config.pool,
        "batch_size": config.batch_size,
        "dtype": jnp.dtype(config.dtype),
    }
    extractor = features.extractor(model, mesh=mesh, **how)
    reused: list[bool] = []
    how |= {"threads": config.data.threads, "cache": cache, "reused": lambda: reused.append(True)}
    found = features.extract(extractor, model, table, **how)
    tested, fitted = [], []
    refit = config.refit and tuple(config.fractions) == (1.0,)  # shares of the labels stay those shares
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
        said = record(table, fold.test, ids, head.predict(found[fold.test]))
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
        attention=dict.fromkeys(best, attention),
        predict=predict,
        image_format=features.image_format(model),
        excluded=plan.excluded,
        features={"sha256": features.digest(found), "computed": "before" if reused else "now"},
    )


def report(
    config: ml_collections.ConfigDict,
    workdir: str,
    protocol: str,
    model: Model | None,
    table: Table,
    outcome: Outcome,
    robustness: dict[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """Writes what was found."""
    settings, tested = build.settings(config), outcome.tested
    lineage = model.lineage if model else []
    datasets = sorted(set(table.dataset.tolist()))
    warnings = [*outcome.warnings]
    for dataset, jobs in provenance.seen_in(lineage, [table.shards]).items():
        if "pretrain" in jobs:
            warnings.append(f"the encoder was pretrained on frames of {dataset}, without labels: no held-out result")
    warnings += inspect.cautions(table)
    context = {
        "config": settings,
        "weights": {
            "source": settings["checkpoint"],
            "fingerprint": model.fingerprint if model else "",
            "kind": model.kind if model else "pixels",
        },
        "lineage": lineage,
        "data": provenance.describe_data([table.shards]),
        "fingerprint": table.fingerprint,
        "warnings": warnings,
        "excluded": outcome.excluded,
        "features": outcome.features,
        "members": [{"fold": t.fold, "seed": t.seed, "fraction": t.fraction, **t.settings} for t in tested],
        "command": command,
    }
    best = inspect.foremost(tested)
    examples = classification.errors([(tested[n].rows, tested[n].predictions) for n in best], config.examples)
    looks = [outcome.attention[number] for number in best]
    rows, mapped, space = outcome.mapped
    validation = [one.validation for one in tested if one.validation is not None]
    epath.Path(workdir, "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return reporting.finish(
        workdir,
        concatenate([one.predictions for one in tested]),
        about={
            "title": title(protocol, model, datasets),
            "protocol": protocol,
            "datasets": datasets,
            "split": outcome.split,
        },
        positive=config.positive,
        context=context,
        validation=concatenate(validation) if len(validation) == len(tested) else None,
        embedding=inspect.feature_map(table, rows, table.label_name[rows], mapped, space, config.seed),
        examples=inspect.shown(table, examples, looks, outcome.image_format),
        robustness=robustness,
        resamples=config.bootstrap,
    )


def title(protocol: str, model: Model | None, datasets: list[str]) -> str:
    """What was done, as a heading."""
    on = " and ".join(datasets)
    if model is None:
        return f"{HEADS[protocol]} on raw pixels of {on}"
    if protocol == "finetuned":
        kind = "ResNet-50" if model.description["model"] == "resnet50" else "ViT"
        return f"Fine-tuned {kind} on {on}"
    return f"{HEADS[protocol]} on a frozen encoder, {on}"
