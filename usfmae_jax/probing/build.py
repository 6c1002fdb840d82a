"""Builds the parts of an evaluation from its config; invalid settings are refused before anything is computed."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from flax import nnx

from usfmae_jax.data import provenance, splits
from usfmae_jax.data.duplicates import cached_near_duplicates, rule_out
from usfmae_jax.data.table import Table
from usfmae_jax.data.targets import Targets, known, read_targets
from usfmae_jax.errors import InputError
from usfmae_jax.evaluation.classification import positive_class
from usfmae_jax.interop.model import Model, members, open_model, output_names, preprocessing
from usfmae_jax.interop.model import build as build_model
from usfmae_jax.models.vit import SIZES
from usfmae_jax.tasks import Task, classification, instances, multilabel, regression, segmentation
from usfmae_jax.training import checks, probes

PROTOCOLS = ("auto", "logistic", "knn", "linear", "attentive", "segmentation", "regression", "finetuned")
#: Minimum values of config fields.
LEAST = {
    "seed": 0,
    "bootstrap": 1,
    "examples": 0,
    "step": 0,
    "data.threads": 1,
    "linear.epochs": 1,
    "linear.batch_size": 1,
    "attentive.epochs": 1,
    "attentive.batch_size": 1,
    "attentive.patience": 1,
}
#: Settings of a run by which its masks are read, with their defaults.
_MASKS = {"unmasked": "drop", "mask_classes": "masks"}
#: Config fields without a meaning for a fine-tuned model, with their defaults.
PROBES_ONLY = {"seeds": (0,), "fractions": (1.0,), "split.only": (), "pool": "mean", "step": 0, "refit": True}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which members are fitted on which frames.

    Attributes:
      folds: folds, with near-duplicates removed from the training parts.
      groups: int `[N]`, frames of the same group stay together.
      members: (fraction, seed, fold with that fraction of its training rows), one for each fit.
      excluded: frames that were removed, and why.
      note: where the split comes from.
    """

    folds: list[splits.Fold]
    groups: Any
    members: list[tuple[float, int, splits.Fold]]
    excluded: list[dict[str, Any]]
    note: str


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for an invalid field, as far as the config alone shows it."""
    if config.protocol not in PROTOCOLS:
        raise InputError(f"config.protocol={config.protocol!r} must be one of {', '.join(PROTOCOLS)}")
    if config.pool not in ("mean", "cls"):
        raise InputError(f"config.pool={config.pool!r} must be 'mean' or 'cls'")
    if config.linear.optimizer not in probes.RATES:
        raise InputError(f"config.linear.optimizer={config.linear.optimizer!r} must be 'lars' or 'adamw'")
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"config.dtype={config.dtype!r} must be 'float32' or 'bfloat16'")
    if not config.fractions or not all(0 < fraction <= 1 for fraction in config.fractions):
        raise InputError(f"config.fractions={tuple(config.fractions)} must be shares above 0 and up to 1")
    checks.check_seeds(config.seeds)
    checks.check_least(checks.flat(config.to_dict()), LEAST)
    if not config.checkpoint:
        raise InputError(
            "config.checkpoint is missing: the workdir of a run, one of its checkpoints, an encoder or classifier "
            "directory; 'usfmae-tiny', which is included; or 'pixels' or 'random', which it has to beat: the raw "
            "pixels and an untrained encoder"
        )


def check_finetuned(config: ml_collections.ConfigDict) -> None:
    """Raises InputError if a field that only probes use is set for a fine-tuned model."""
    fields = checks.flat(config.to_dict())
    for name, default in PROBES_ONLY.items():
        if (tuple(fields[name]) if isinstance(default, tuple) else fields[name]) != default:
            raise InputError(
                f"config.{name} is for probes, and this checkpoint is a fine-tuned model, tested as it was trained: "
                "leave it out, or name a protocol such as --config.protocol=logistic"
            )


def protocol(config: ml_collections.ConfigDict) -> str:
    """The protocol; 'auto' is resolved to 'finetuned' for a model with a head and to 'logistic' for an encoder."""
    if config.protocol != "auto":
        return config.protocol
    if config.checkpoint.partition(":")[0] in ("pixels", "random"):
        return "logistic"
    if members(config.checkpoint):
        return "finetuned"
    kind = open_model(config.checkpoint, config.step or None).kind
    return "finetuned" if kind in ("classifier", "model") else "logistic"


def encoder(config: ml_collections.ConfigDict) -> Model | None:
    """The model whose encoder is probed, trained or, by the name `random:SIZE`, untrained; None for raw pixels.

    Raises:
      InputError: it cannot be read, or is not a vision transformer.
    """
    if config.checkpoint == "pixels":
        return None
    if config.checkpoint.partition(":")[0] == "random":
        return untrained(config.checkpoint.partition(":")[2] or "tiny", config.seed)
    model = open_model(config.checkpoint, config.step or None)
    model.encoder()
    return model


def untrained(size: str, seed: int) -> Model:
    """An encoder of grey frames with random weights: a baseline for trained ones."""
    if size not in SIZES:
        raise InputError(f"config.checkpoint=random:{size} must name one of the sizes {', '.join(SIZES)}")
    shape = {**SIZES[size], "image_size": list(SIZES[size]["image_size"])}
    description = {"model": "vit", "encoder": shape}
    params = nnx.to_pure_dict(nnx.state(build_model(description)(nnx.Rngs(seed)), nnx.Param))
    mean, std = ((0.25,) * shape["channels"], (0.2,) * shape["channels"])
    pixels = preprocessing(shape["image_size"], 1, mean, std)
    return Model({"encoder": jax.device_get(params)}, description, pixels, [])


def masked(
    config: ml_collections.ConfigDict, unmasked: str = "drop", mask_classes: str = ""
) -> tuple[Table, segmentation.Segmentation]:
    """The frames with masks, and their segmentation task.

    Args:
      config: of the evaluation.
      unmasked: treatment of frames without a mask, see `segmentation.select`.
      mask_classes: "masks" or "label"; "" = `config.mask_classes`.

    Raises:
      InputError: there are none, or they cannot be used.
    """
    _refuse_class_fields(config)
    if config.mask_classes not in ("masks", "label"):
        raise InputError(f"config.mask_classes={config.mask_classes!r} must be 'masks' or 'label'")
    table = checks.read_frames(config.data.path, config.data.split)
    how = {"by_label": (mask_classes or config.mask_classes) == "label"}
    return segmentation.of_table(table, checks.names(config.classes), unmasked, config.data.threads, **how)


def measured(config: ml_collections.ConfigDict) -> tuple[Table, regression.Regression]:
    """The frames with a number in a table, and their regression task.

    Raises:
      InputError: there are none, or they cannot be used.
    """
    table, found = _read_targets(config, checks.names([config.target]))
    return regression.of_table(table, found, config.of_frame)


def _read_targets(
    config: ml_collections.ConfigDict, names: Sequence[str], labels: bool = False
) -> tuple[Table, Targets]:
    """The frames, and the columns of `config.targets` with these names, or all suitable ones."""
    _refuse_class_fields(config, "classes")
    if not config.targets:
        raise InputError(f"the table of {'labels' if labels else 'numbers'} is missing: --config.targets=FILE.csv")
    table = checks.read_frames(config.data.path, config.data.split)
    return table, read_targets(config.targets, table, names, labels=labels)


def _refuse_class_fields(config: ml_collections.ConfigDict, *more: str) -> None:
    """Raises InputError if a field is set that only classification of whole frames uses."""
    for name in ("positive", "corruptions", *more):
        if config[name]:
            raise InputError(f"config.{name} is for classes of whole frames; --config=evaluate:folder leaves it unset")


def labelled(config: ml_collections.ConfigDict) -> tuple[Table, classification.Classification]:
    """The labelled frames, and their classification task.

    Raises:
      InputError: there are none, or they cannot be used.
    """
    table = checks.read_frames(config.data.path, config.data.split)
    table = classification.select(table, checks.names(config.classes))
    try:
        positive_class(table.label_names, config.positive)
    except InputError as error:
        raise InputError(f"config.{error}") from error
    return table, classification.Classification(table.label_names, positive=config.positive)


def of_model(config: ml_collections.ConfigDict, model: Model) -> tuple[Table, Task, bool]:
    """The frames that can test a fine-tuned model, its task on them, and whether mirror images are predicted too.

    What is annotated, and how the model is tested, is as in the run that trained it, which is in its lineage.

    Raises:
      InputError: there are none, they cannot be used, they have other classes, or the model's task is unknown.
    """
    settings = model.lineage[-1].get("config") if model.lineage else None
    trained = checks.flat(settings) if isinstance(settings, dict) else {}
    table, task = _again(config, model, trained)
    named = output_names(model.description)
    if [name.casefold() for name in named] != [name.casefold() for name in task.outputs]:
        unnamed = all(re.fullmatch(r"foreground|class \d+", name) for name in task.outputs)
        same = unnamed and len(named) == len(task.outputs)
        advice = f"; if these are the same, name them: --config.classes={','.join(named)}" if same else ""
        raise InputError(
            f"the model was trained for {', '.join(named)}, but the data has {', '.join(task.outputs)}{advice}"
        )
    # What queries find on a mirror image has another order.
    return table, task, trained.get("evaluate.flip") is True and model.task != "instances"


def _again(config: ml_collections.ConfigDict, model: Model, trained: Mapping[str, Any]) -> tuple[Table, Task]:
    """See `of_model`; `trained` has the settings of the run that trained the model."""
    outputs = output_names(model.description)
    if model.task == "classification":
        return labelled(config)
    if model.task in ("segmentation", "instances"):
        how = {key: str(trained.get(key, default)) for key, default in _MASKS.items()}
        table, masks = masked(config, **how)
        if set(masks.outputs) == set(outputs) and not masks.classes.by_label:
            masks = masks.ordered(outputs)
        least = trained.get("min_pixels")
        least = {"min_pixels": least} if isinstance(least, int) else {}
        return table, masks if model.task == "segmentation" else instances.Instances(masks, 0, **least)
    if model.task == "regression":
        return _measured_again(config, model.description["scale"], outputs[0])
    if model.task == "multilabel":
        table, found = known(*_read_targets(config, checks.names([config.target]) or outputs, labels=True))
        own: dict[str, Any] = {"fingerprint": found.fingerprint, "notes": found.notes}
        return table, multilabel.MultiLabel(found.names, found.values, **own)
    what = repr(model.task[:40]) if model.task else "a task that it does not name"
    raise InputError(f"config.checkpoint={config.checkpoint} is a model for {what}, which cannot be tested here")


def _measured_again(
    config: ml_collections.ConfigDict, scale: Mapping[str, Any], name: str
) -> tuple[Table, regression.Regression]:
    """The frames with a number in a table, and the regression task of a model of the quantity `name`."""
    table, found = _read_targets(config, checks.names([config.target]) or (name,))
    if len(found.units) == 1 and found.units[0] != scale["unit"][0]:
        units = (scale["unit"][0] or "no unit", found.units[0] or "no unit")
        raise InputError(f"the model gives {units[0]}, but the column of config.targets is in {units[1]}")
    table, task = regression.of_table(table, found, scale["of_frame"][0])
    other = f"the column {task.name!r} of config.targets is compared with the model's {name!r}"
    notes = (*task.notes, *([other] if task.name != name else []))
    return table, dataclasses.replace(task, name=name, notes=notes)


def refuse_labels_seen(model: Model | None, table: Table) -> None:
    """Raises InputError if the model may have been trained on labels of the frames that would test it."""
    tested = model is not None and model.kind in ("classifier", "model")
    for dataset, jobs in provenance.seen_in(model.lineage if model else [], table).items():
        seen = jobs.get("finetune")
        if seen and seen.possible:
            raise InputError(
                f"these weights were {provenance.say(dataset, 'finetune', seen, table)}: a probe of them on it is no "
                f"test; use {'--config.protocol=finetuned, ' * tested}weights from before, or other data"
            )


def split(
    config: ml_collections.ConfigDict, table: Table, strata: splits.Strata, pairs: Any = None
) -> tuple[list[splits.Fold], Any, list[dict[str, Any]], str]:
    """The folds of the data; see `splits.plan`."""
    how = {name: config.split[name] for name in ("kind", "path", "folds", "validation", "test", "copies")}
    return splits.plan(table, strata, **how, seed=config.seed, pairs=pairs)


def asked_for(
    config: ml_collections.ConfigDict, table: Table, strata: splits.Strata
) -> tuple[list[splits.Fold], str] | None:
    """The folds that the config names for a fine-tuned model, and a phrase on their source; None if none."""
    if not config.split.path and config.split.kind == "auto":
        return None
    folds, _, _, note = split(config, table, strata)
    return folds, note


def plan(config: ml_collections.ConfigDict, table: Table, strata: splits.Strata, protocol: str, cache: str) -> Plan:
    """Plans the folds of the data and the members to fit; identical ones are fitted once."""
    pairs = None
    if config.split.duplicates:
        kept = f"{cache}/duplicates-{table.fingerprint}.csv"
        found = cached_near_duplicates(table, kept, keep=jax.process_index() == 0)
        pairs = rule_out(table, found, config.split.no_copies)
    folds, groups, excluded, note = split(config, table, strata, pairs)
    folds, only = splits.only(folds, checks.names(config.split.only))
    chosen = []
    for fraction in sorted(set(config.fractions)):
        # Without randomness in the training data or the fit, all seeds would give the same result.
        seeds = config.seeds if fraction < 1 or protocol in ("linear", "attentive") else config.seeds[:1]
        for seed in seeds:
            for fold in folds:
                part = splits.take_fraction(strata, fold, groups, fraction, config.seed + seed)
                chosen.append((float(fraction), int(seed), part))
    return Plan(folds, groups, chosen, excluded, note + only)


def settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON, without anything that reveals who ran where."""
    text = config.copy_and_resolve_references().to_json_best_effort()
    return checks.public_settings(
        text, ("checkpoint", "data.path", "split.path", "split.no_copies", "cache", "targets")
    )
