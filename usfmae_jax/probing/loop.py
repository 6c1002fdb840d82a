"""The evaluation loop: open, split, compute features, then for every member: fit, predict; at the end: report."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from usfmae_jax.data import provenance, splits
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import positive_class
from usfmae_jax.finetuning.members import names as names_of
from usfmae_jax.finetuning.members import only_note
from usfmae_jax.interop.model import Model, members, open_model
from usfmae_jax.probing import features as feature_cache
from usfmae_jax.probing import finetuned as testing
from usfmae_jax.probing import inspect as looking
from usfmae_jax.reporting import classification as reporting
from usfmae_jax.reporting.classification import embedding_points
from usfmae_jax.tasks import classification
from usfmae_jax.training import checks as field_checks
from usfmae_jax.training import outcomes, probes
from usfmae_jax.training.common import known_duplicates, make_workdir, read_frames
from usfmae_jax.training.forward import fitting_batch
from usfmae_jax.training.mesh import make_mesh
from usfmae_jax.training.outcomes import Outcome, Tested

#: Names of config fields that hold paths.
PATHS = ("checkpoint", "data.path", "split.path", "cache")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who is fitted on what.

    Attributes:
      folds: after near-duplicates were taken out of their training parts.
      members: (fraction, seed, fold with its share of the training rows), one for each fit.
      excluded: frames that were taken out, and why.
      note: where the split comes from.
    """

    folds: list[splits.Fold]
    groups: np.ndarray
    members: list[tuple[float, int, splits.Fold]]
    excluded: list[dict[str, Any]]
    note: str


def evaluate(config: ml_collections.ConfigDict, workdir: str, command: str = "") -> dict[str, Any]:
    """Tests frozen features under a probe, or a fine-tuned classifier, and writes the results.

    Args:
      config: see `configs/evaluate.py`.
      workdir: receives results.json, results.md, predictions.csv, report.html, splits/splits.csv and config.json.
      command: how to repeat it, for the report.

    Returns:
      what results.json holds.

    Raises:
      InputError: something given cannot be used; raised before any features are computed.
    """
    field_checks.check_evaluate(config)
    mesh = make_mesh(**config.mesh)
    config = config.copy_and_resolve_references()
    config.batch_size = fitting_batch(config.batch_size, mesh, "config.batch_size")
    protocol = choose_protocol(config)
    cache = config.cache or feature_cache.default_cache()
    if protocol == "finetuned":
        field_checks.check_finetuned(config)
        judges = testing.open_judges(config.checkpoint)
        weights: Model | None = judges[0].weights
    else:
        weights = None if config.checkpoint == "pixels" else open_model(config.checkpoint, config.step or None)
        if weights:
            weights.encoder()
    frames = classification.select(read_frames(config), names_of(config.classes))
    try:
        positive_class(frames.label_names, config.positive)
    except InputError as error:
        raise InputError(f"config.{error}") from error
    refuse_labels_seen(protocol, weights, frames)
    workdir = make_workdir(workdir)
    if protocol == "finetuned":
        outcome = testing.test(judges, config, frames, mesh)
    else:
        plan = make_plan(config, frames, protocol, cache)
        if protocol == "attentive":
            feature_cache.check_tokens(weights, len(frames))
        if jax.process_index() == 0:
            splits.write_splits(f"{workdir}/splits/splits.csv", frames, plan.folds, plan.groups)
        outcome = probe(config, protocol, weights, frames, plan, mesh, cache)
    return report(config, workdir, protocol, weights, frames, outcome, command)


def refuse_labels_seen(protocol: str, weights: Model | None, frames: Table) -> None:
    """Raises InputError if a probe would test features on frames whose labels they may have been trained on."""
    if protocol == "finetuned" or not weights:
        return
    for dataset, jobs in provenance.seen_in(weights.lineage, [frames.shards]).items():
        if "finetune" in jobs:
            raise InputError(
                f"these weights were fine-tuned on labels of {dataset}: a probe of them on it is no test; use "
                "--config.protocol=finetuned, weights from before, or other data"
            )


def choose_protocol(config: ml_collections.ConfigDict) -> str:
    """The protocol that 'auto' stands for: a classifier is tested as it is, an encoder by logistic regression."""
    if config.protocol != "auto":
        return config.protocol
    if config.checkpoint == "pixels":
        return "logistic"
    if members(config.checkpoint):
        return "finetuned"
    return "finetuned" if open_model(config.checkpoint, config.step or None).kind == "classifier" else "logistic"


def make_plan(config: ml_collections.ConfigDict, frames: Table, protocol: str, cache: str) -> Plan:
    """Folds of the data and the members to fit; equal ones are made once."""
    pairs = None
    if config.split.duplicates:
        pairs = known_duplicates(frames, f"{cache}/duplicates-{frames.fingerprint}.csv")
    names = ("kind", "path", "folds", "validation", "test")
    strata = classification.strata(frames)
    folds, groups, excluded, note = splits.plan(
        frames, strata, **{name: config.split[name] for name in names}, seed=config.seed, pairs=pairs
    )
    folds = only(folds, names_of(config.split.only))
    chosen = []
    for fraction in sorted(set(config.fractions)):
        # Without chance in what is learnt from, or in how, all seeds would be the same.
        seeds = config.seeds if fraction < 1 or protocol in ("linear", "attentive") else config.seeds[:1]
        for seed in seeds:
            for fold in folds:
                part = (
                    splits.take_fraction(strata, fold, groups, fraction, config.seed + seed) if fraction < 1 else fold
                )
                chosen.append((float(fraction), int(seed), part))
    return Plan(folds, groups, chosen, excluded, note + only_note(config.split.only))


def only(folds: list[splits.Fold], names: Sequence[str]) -> list[splits.Fold]:
    """The folds of those names; all without names."""
    unknown = sorted(set(names) - {fold.name for fold in folds})
    if unknown:
        raise InputError(
            f"config.split.only: there is no fold {unknown[0]!r}, only {', '.join(fold.name for fold in folds)}"
        )
    return [fold for fold in folds if not names or fold.name in names]


def probe(
    config: ml_collections.ConfigDict,
    protocol: str,
    weights: Model | None,
    frames: Table,
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
    run = feature_cache.extractor(weights, mesh=mesh, **how)
    features = feature_cache.extract(run, weights, frames, threads=config.data.threads, cache=cache, **how)
    tested, fitted = [], []
    for fraction, seed, fold in tqdm(plan.members, protocol, unit="fit", delay=2, leave=False):
        head = probes.fit(
            protocol,
            (features[fold.train], frames.label[fold.train]),
            (features[fold.validation], frames.label[fold.validation]),
            len(frames.label_names),
            num_heads=weights.description["encoder"]["num_heads"] if protocol == "attentive" and weights else 0,
            seed=seed,
            options={name: dict(config[name]) for name in ("linear", "attentive")},
        )
        tested.append(
            Tested(
                fold=fold.name,
                seed=seed,
                fraction=fraction,
                rows=fold.test,
                probabilities=head.predict(features[fold.test]),
                validation_rows=fold.validation,
                validation_probabilities=head.predict(features[fold.validation]),
                settings=head.settings | {"training_frames": len(fold.train)},
            )
        )
        fitted.append(head)
    best = outcomes.foremost(tested)
    size, channels = feature_cache.image_format(weights)
    robustness = None
    if config.corruptions:
        robustness = looking.sweep(
            frames,
            [tested[number] for number in best],
            lambda images, total, name: [
                fitted[number].predict(part)
                for number, part in zip(best, outcomes.parted(run(images, total, name), tested, best), strict=True)
            ],
            size=size,
            channels=channels,
            config=config,
        )
    pooled = features.astype(np.float32).mean(axis=1) if protocol == "attentive" else features
    rows, points = embedding_points(pooled, config.seed)
    attention = looking.rollout(weights, "cls" if config.pool == "cls" and protocol != "attentive" else "mean")
    return Outcome(
        tested=tested,
        excluded=plan.excluded,
        split=plan.note,
        rows=rows,
        points=points,
        space="frozen features",
        attention=dict.fromkeys(best, attention),
        robustness=robustness,
        image_format=(size, channels),
    )


def report(
    config: ml_collections.ConfigDict,
    workdir: str,
    protocol: str,
    weights: Model | None,
    frames: Table,
    outcome: Outcome,
    command: str,
) -> dict[str, Any]:
    """Writes what was found."""
    settings = field_checks.public_settings(config, PATHS)
    lineage = weights.lineage if weights else []
    datasets = sorted(set(frames.dataset.tolist()))
    warnings = [*outcome.warnings]
    for dataset, jobs in provenance.seen_in(lineage, [frames.shards]).items():
        if "pretrain" in jobs:
            warnings.append(f"the encoder was pretrained on frames of {dataset}, without labels: no held-out result")
    warnings += outcomes.cautions(frames)
    source = settings["checkpoint"]
    context = {
        "config": settings,
        "weights": {"source": source, "fingerprint": weights.fingerprint, "kind": weights.kind}
        if weights
        else {"source": source, "fingerprint": "", "kind": "pixels"},
        "lineage": lineage,
        "data": provenance.describe_data([frames.shards]),
        "fingerprint": frames.fingerprint,
        "warnings": warnings,
        "excluded": outcome.excluded if protocol != "finetuned" else None,  # the run that trained it has looked
        "members": [{"fold": t.fold, "seed": t.seed, "fraction": t.fraction, **t.settings} for t in outcome.tested],
        "command": command,
    }
    if jax.process_index():
        return {}
    epath.Path(workdir, "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return reporting.finish(
        workdir,
        outcomes.predictions(frames, outcome.tested),
        task={
            "title": outcomes.title(protocol, weights, datasets),
            "protocol": protocol,
            "datasets": datasets,
            "split": outcome.split,
        },
        positive=config.positive,
        context=context,
        validation=outcomes.validation(frames, outcome.tested),
        embedding=outcomes.embedding(frames, outcome),
        examples=looking.errors(frames, outcome, config.examples),
        robustness=outcome.robustness,
        resamples=config.bootstrap,
    )
