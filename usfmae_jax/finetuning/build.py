"""Builds the parts of a fine-tuning run from its config; invalid settings are refused before anything is compiled."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from usfmae_jax import __version__
from usfmae_jax.data import splits
from usfmae_jax.data.duplicates import cached_near_duplicates, rule_out
from usfmae_jax.data.provenance import describe_data, warn_of_seen
from usfmae_jax.data.splits import Fold
from usfmae_jax.data.table import Table
from usfmae_jax.errors import InputError
from usfmae_jax.finetuning import tasks
from usfmae_jax.finetuning.members import Member, count_steps, plan_members
from usfmae_jax.interop import resnet as resnet_files
from usfmae_jax.interop.files import TORCH
from usfmae_jax.interop.model import Model, build, flatten, open_model, preprocessing
from usfmae_jax.models.decoders import decoder_flops, unet_flops
from usfmae_jax.models.patches import check_patches
from usfmae_jax.models.resnet import STAGES, resnet_flops
from usfmae_jax.models.vit import SIZES, vit_flops
from usfmae_jax.tasks import Task
from usfmae_jax.training import checkpoints, checks, optimizers
from usfmae_jax.training.inspect import cautions

#: Config fields that a resumed run may change: where and how fast it computes, which members it has, and how they are
#: reported, but not what a member is. For initial weights, the fingerprint is compared instead of the path.
RESUMABLE = (
    *checkpoints.RESUMABLE,
    "parallel",
    "evaluate",
    "seeds",
    "fractions",
    "split.only",
    "split.path",  # the splits themselves are compared
    "split.no_copies",
    "targets",
    "positive",
    "save_masks",
)

#: Minimum and maximum values of fields.
RANGES = checks.RANGES | {
    "regularization.smoothing": (0, 0.99),
    "regularization.erasing": (0, 1),
    "regularization.mixup": (0, np.inf),
    "regularization.cutmix": (0, np.inf),
    "stop.patience": (0, np.inf),
    "parallel": (0, np.inf),
    "evaluate.bootstrap": (1, np.inf),
    "train.min_steps": (0, np.inf),
}
#: Mean and standard deviation of the input by channels: grey ultrasound frames; ImageNet, as published weights expect.
_PIXELS = {1: ((0.25,), (0.2,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
#: Fields of `config.model` that determine the parameters.
_SHAPE = ("patch_size", "channels", "width", "depth", "num_heads")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that is known about a run before it starts.

    Attributes:
      workdir: absolute path.
      task: the task to learn.
      table: all frames that can be used for the task.
      members: in the order in which they are trained.
      folds: all folds of the split, including those that are not run.
      groups: int `[N]`, groups of the rows of the table.
      split: a phrase on where the split comes from.
      excluded: near-duplicates that were left out, see `splits.check`.
      description: description of the model, see `interop.model`.
      preprocessing: how pixels are turned into its input.
      init: the model to start from; None = random weights.
      title: heading of the report.
      settings: the config as JSON, and fingerprints of data and weights.
      lineage: lineage of the resulting weights, JSON.
      warnings: sentences to show with the results.
    """

    workdir: str
    task: Task
    table: Table
    members: tuple[Member, ...]
    folds: tuple[Fold, ...]
    groups: np.ndarray
    split: str
    excluded: list[dict[str, Any]]
    description: dict[str, Any]
    preprocessing: dict[str, Any]
    init: Model | None
    title: str
    settings: dict[str, Any]
    lineage: list[dict[str, Any]]
    warnings: list[str]

    @property
    def image_format(self) -> tuple[tuple[int, int], int]:
        """(height, width) of the training views, and the number of decoded channels."""
        height, width = self.preprocessing["image_size"]
        return (height, width), self.preprocessing["channels"]

    def folder(self, member: Member) -> str:
        """The folder of a member."""
        return f"{self.workdir}/members/{member.name}"


def prepare(config: ml_collections.ConfigDict, workdir: str) -> Run:
    """Reads data, weights and splits, and plans the members.

    Args:
      config: see `configs/finetune.py`.
      workdir: created if missing, unless the config or the data is invalid.

    Raises:
      InputError: the config or the data is invalid.
    """
    table, task, init, description, pixels = read(config)
    pairs = np.zeros((0, 2), np.int64)
    if config.split.duplicates:
        kept = f"{checks.make_workdir(workdir)}/duplicates.csv"
        found = cached_near_duplicates(table, kept, keep=jax.process_index() == 0)
        pairs = rule_out(table, found, config.split.no_copies)
    strata = task.strata(table)
    how = {name: config.split[name] for name in ("kind", "path", "folds", "validation", "test", "copies")}
    folds, groups, excluded, note = splits.plan(table, strata, **how, seed=config.seed, pairs=pairs)
    chosen, only = splits.only(folds, checks.names(config.split.only))
    lengths = {name: config.train[name] for name in ("batch_size", "epochs", "steps", "min_steps")}
    members = plan_members(
        chosen,
        config.seeds,
        config.fractions,
        lambda fold, fraction, seed: splits.take_fraction(strata, fold, groups, fraction, config.seed + seed),
        functools.partial(count_steps, **lengths, every=config.stop.every),
    )
    paths = ("init", "data.path", "split.path", "split.no_copies", *(["targets"] if "targets" in config else []))
    settings = checks.public_settings(_json(config), paths) | {
        "data_fingerprint": table.fingerprint,
        "init_fingerprint": init.fingerprint if init else "",
    }
    settings |= {"targets_fingerprint": task.fingerprint} if task.fingerprint else {}
    before = init.lineage if init else []
    stage = {"job": "finetune", "code": f"usfmae_jax {__version__}", "config": settings}
    tested = np.concatenate([fold.test for fold in folds])
    return Run(
        workdir=checks.make_workdir(workdir),
        task=task,
        table=table,
        members=members,
        folds=tuple(folds),
        groups=groups,
        split=note + only,
        excluded=excluded,
        description=description,
        preprocessing=pixels,
        init=init,
        title=title(config, description, sorted(set(table.dataset.tolist()))),
        settings=settings,
        lineage=[*before, stage | {"data": describe_data([table.shards], hashes=True)}],
        warnings=[*warn_of_seen(before, table.take(np.unique(tested))), *cautions(table), *task.notes],
    )


def read(config: ml_collections.ConfigDict) -> tuple[Table, Task, Model | None, dict[str, Any], dict[str, Any]]:
    """Reads what is learnt, from which frames, and by which model, without decoding any image.

    Returns:
      `table`, `task`, `init`, `description` and `preprocessing` of a `Run`.

    Raises:
      InputError: the config or the data is invalid.
    """
    check(config)
    table = checks.read_frames(config.data.path, config.data.split)
    if config.task not in tasks.TASKS:
        raise InputError(f"config.task={config.task!r} must be one of {', '.join(tasks.TASKS)}")
    table, task = tasks.TASKS[config.task](config, table)
    if config.stop.metric not in task.metrics:
        raise InputError(f"config.stop.metric={config.stop.metric!r} must be one of {', '.join(task.metrics)}")
    init = read_init(config, len(task.outputs))
    backbone, pixels = describe_backbone(config, init)
    description = task.describe(backbone)
    freeze = trained_part(config, description)[0]
    if init:
        check_weights(model_maker(config, description, freeze), loadable(init, description), config.init)
    return table, task, init, description, pixels


def check_resumable(run: Run, stored: dict[str, Any]) -> None:
    """Raises InputError if the stored settings belong to a different run; see `checkpoints`."""
    # Version 0.1 had only this task, and earlier versions lacked the other options.
    absent: dict[str, Any] = {"task": "classification", "lora_rank": run.settings["lora_rank"]}
    stored = absent | stored | {"augment": {"trivialaugment": False} | stored.get("augment", {})}
    stored |= {"split": {"copies": "drop"} | stored.get("split", {})}
    checkpoints.check_resumable(stored, run.settings, run.workdir, RESUMABLE)


def _json(config: ml_collections.ConfigDict) -> str:
    return config.copy_and_resolve_references().to_json_best_effort()


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for fields that are out of range."""
    regular, stop = config.regularization, config.stop
    checks.check_ranges(checks.flat(config.to_dict()), RANGES)
    checks.check_augmentation(config.augment.to_dict())
    checks.check_least(config.model, dict.fromkeys(_SHAPE, 0), "model.")
    if stop.every <= 0:
        raise InputError(f"config.stop.every={stop.every:g} must be more than 0 epochs")
    if regular.class_weights not in ("none", "balanced"):
        raise InputError(f"config.regularization.class_weights={regular.class_weights!r} must be 'none' or 'balanced'")
    checks.check_seeds(config.seeds)
    shares = [isinstance(fraction, float | int) and 0 < fraction <= 1 for fraction in config.fractions]
    if not all(shares) or not shares:
        raise InputError(
            f"config.fractions={tuple(config.fractions)} must be shares of the training patients in (0, 1]"
        )


def read_init(config: ml_collections.ConfigDict, outputs: int) -> Model | None:
    """The weights of `config.init`; None for random weights.

    Raises:
      InputError: they cannot be read, or are a file although `config.model.arch` is not resnet50.
    """
    if not config.init:
        return None
    if not config.init.lower().endswith((".safetensors", *TORCH)):
        try:
            return open_model(config.init)
        except InputError as error:
            raise InputError(f"config.init: {error}") from error
    if config.model.arch != "resnet50":
        raise InputError(
            f"config.init={config.init} is a file: of a ResNet-50, add --config.model.arch=resnet50; of a ViT, convert "
            "it to an encoder directory first"
        )
    # The first convolution is reduced from three channels to one only on request: it changes the model's input.
    params, stats = resnet_files.read_resnet(config.init, num_classes=outputs, grey=config.model.channels == 1)
    shape = resnet_files.architecture(params)
    # The model's batch statistics assume ImageNet's normalisation; grey input uses its average over channels.
    mean, std = _PIXELS[3] if shape["channels"] == 3 else tuple((sum(v) / 3,) for v in _PIXELS[3])
    pixels = preprocessing((224, 224), 1, mean, std)
    lineage = [{"job": "published weights", "file": os.path.basename(config.init)}]
    return Model(params, {"model": "resnet50", "resnet": shape}, pixels, lineage, stats)


def describe_backbone(
    config: ml_collections.ConfigDict, weights: Model | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model without its head, as `interop.model` describes it, and how pixels are turned into its input.

    Raises:
      InputError: a field is invalid, or contradicts the weights; the message names it, and both values.
    """
    model = config.model
    checks.check_computation(model.dtype, model.attention, model.remat)
    archs = ("", *SIZES, *{"segmentation": ("unet",), "instances": ()}.get(config.task, ("resnet50",)))
    if model.arch not in archs:
        raise InputError(f"config.model.arch={model.arch!r} must be one of {', '.join(archs[1:])}")
    if not 0 <= model.drop_path < 1:
        raise InputError(f"config.model.drop_path={model.drop_path} must lie in [0, 1)")
    kind = weights.description["model"] if weights else "vit"
    asked = {"": kind, "resnet50": "resnet50", "unet": "unet"}.get(model.arch, "vit")
    if weights and asked != kind:
        raise InputError(f"config.model.arch={model.arch} but config.init={config.init} holds a {kind}")
    if kind == "unet" and config.task == "instances":
        raise InputError(f"config.init={config.init} holds a U-Net, which has no queries for instances; give a ViT")
    if kind == "resnet50" and config.task in ("segmentation", "instances"):
        raise InputError(f"config.init={config.init} holds a ResNet, which has no head for pixels; give a ViT")
    before = weights.preprocessing if weights else {}
    if asked == "resnet50":
        shape = _resnet_shape(config, weights)
        size = checks.square(model.image_size or before.get("image_size", (224, 224)))
        description = {"model": "resnet50", "resnet": shape}
    elif asked == "unet":
        shape = _unet_shape(config, weights)
        size = checks.square(model.image_size or before.get("image_size", (224, 224)))
        if size[0] % 2 ** shape["depth"] or size[1] % 2 ** shape["depth"]:
            raise InputError(
                f"config.model.image_size={size} must be divisible by {2 ** shape['depth']}, for the U-Net"
            )
        description = {"model": "unet", "unet": shape}
    else:
        shape = _vit_shape(config, weights)
        size = checks.square(model.image_size or before.get("image_size", shape["image_size"]))
        if not weights:
            shape["image_size"] = list(size)
        _check_vit(shape, size)
        if config.task == "instances" and model.query_blocks > shape["depth"]:
            raise InputError(
                f"config.model.query_blocks={model.query_blocks} is more than the model's {shape['depth']} blocks"
            )
        description = {"model": "vit", "encoder": shape}
    channels = shape["channels"]
    if channels not in _PIXELS or config.data.channels not in (1, channels):
        raise InputError(
            f"config.data.channels={config.data.channels} must be 1 or the model's {channels}, and those 1 or 3"
        )
    mean, std = (
        tuple(model[name] or before.get(name, default))
        for name, default in zip(("mean", "std"), _PIXELS[channels], strict=True)
    )
    if len(mean) != channels or len(std) != channels:
        raise InputError(f"config.model.mean={mean} and config.model.std={std} need {channels} entries, one a channel")
    return description, preprocessing(size, config.data.channels, mean, std)


def _vit_shape(config: ml_collections.ConfigDict, weights: Model | None) -> dict[str, Any]:
    model = config.model
    named = SIZES[model.arch] if model.arch else {}
    if weights is None:
        shape = dict(named or SIZES["tiny"]) | {name: model[name] for name in _SHAPE if model[name]}
        return shape | {"image_size": list(shape["image_size"])}
    shape = dict(weights.encoder().description["encoder"])
    for name in _SHAPE:
        field = f"config.model.{name}" if model[name] else f"config.model.arch={model.arch}, whose {name}"
        wanted = model[name] or named.get(name, shape[name])
        if wanted != shape[name]:
            raise InputError(f"{field} is {wanted}, but {shape[name]} in config.init={config.init}; leave one out")
    return shape


def _check_vit(shape: dict[str, Any], size: tuple[int, int]) -> None:
    if shape["width"] % shape["num_heads"] or shape["width"] % 4:
        raise InputError(
            f"config.model.width={shape['width']} must be divisible by 4 and by "
            f"config.model.num_heads={shape['num_heads']}"
        )
    try:
        check_patches(size, shape["patch_size"])
    except ValueError as error:
        raise InputError(f"{error}: change config.model.image_size or config.model.patch_size") from error


def _resnet_shape(config: ml_collections.ConfigDict, weights: Model | None) -> dict[str, Any]:
    model = config.model
    found: dict[str, Any] = (
        weights.description["resnet"] if weights else {"channels": 3, "depths": (3, 4, 6, 3), "width": 64}
    )
    depths = (model.depth,) * STAGES if model.depth else tuple(found["depths"])
    shape = {"channels": model.channels or found["channels"], "depths": depths, "width": model.width or found["width"]}
    if weights:
        for name, field in (("channels", "channels"), ("depths", "depth"), ("width", "width")):
            there = tuple(found[name]) if name == "depths" else found[name]
            if shape[name] != there:
                raise InputError(f"config.model.{field} gives {shape[name]}, but {there} in config.init={config.init}")
    return shape | {"depths": list(depths)}


def _unet_shape(config: ml_collections.ConfigDict, weights: Model | None) -> dict[str, Any]:
    model = config.model
    found: dict[str, Any] = weights.description["unet"] if weights else {"channels": 1, "width": 16, "depth": 4}
    shape = {name: model[name] or found[name] for name in found}
    if weights and shape != found:
        raise InputError(f"config.model gives a U-Net of {shape}, but config.init={config.init} holds one of {found}")
    if not (shape["width"] <= 256 and shape["depth"] <= 6):
        raise InputError("a U-Net has at most config.model.width=256 and config.model.depth=6")
    return shape


def trained_part(config: ml_collections.ConfigDict, description: dict[str, Any]) -> tuple[int, tuple[str, ...], int]:
    """What `config.mode` trains.

    Returns:
      `freeze` for `build`; prefixes of the names of the trained parameters, () = all; the number of encoder blocks
      that are updated, 0 = all.

    Raises:
      InputError: there is no such mode, or there are fewer blocks.
    """
    mode, last = config.mode, config.last_k
    if mode not in ("full", "frozen", "last_k", "lora"):
        raise InputError(f"config.mode={mode!r} must be 'full', 'frozen' (the head only), 'last_k' or 'lora'")
    vit = description["model"] == "vit"
    depth = description["encoder"]["depth"] if vit else STAGES
    if mode == "full":
        return 0, (), 0
    if description["model"] == "unet":
        raise InputError(f"config.mode={mode}: a U-Net is trained whole; leave it at 'full'")
    if mode == "lora":
        if not vit:
            raise InputError(f"config.mode=lora is for the attention of a ViT, which a {description['model']} has not")
        rank, width = config.lora_rank, description["encoder"]["width"]
        if not 1 <= rank <= width:
            raise InputError(f"config.lora_rank={rank} must lie between 1 and the width of the model, {width}")
        added = "encoder.blocks.stack.attn."
        return 0, ("head.", "head_norm.", added + "qkv_lora.", added + "proj_lora."), 0
    if mode == "frozen":
        return depth, ("head.", "head_norm."), 0
    if not 1 <= last <= depth:
        raise InputError(
            f"config.last_k={last} must lie between 1 and the {depth} {'blocks' if vit else 'stages'} of the model"
        )
    freeze = depth - last
    if vit:
        return freeze, ("head.", "head_norm.", "encoder.norm.", "encoder.blocks."), last
    return freeze, ("head.", *(f"layer{stage + 1}." for stage in range(freeze, depth))), 0


def model_maker(
    config: ml_collections.ConfigDict, description: dict[str, Any], freeze: int
) -> Callable[[nnx.Rngs], nnx.Module]:
    """A function that builds the model, with the compute settings of the config."""
    model = config.model
    how = {"attention": model.attention or None, "scan": model.scan, "remat": model.remat}
    how |= {"lora": config.lora_rank} if config.mode == "lora" else {}
    return build(
        description,
        dtype=jnp.dtype(model.dtype),
        drop_path=model.drop_path,
        freeze=freeze,
        **(how if description["model"] == "vit" else {}),
    )


def count_parameters(make_model: Callable[[nnx.Rngs], nnx.Module]) -> int:
    """The number of parameters of a model, without building it."""
    shapes = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make_model(nnx.Rngs(0)), nnx.Param)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def loadable(weights: Model, description: dict[str, Any]) -> dict[str, Any]:
    """The part of some weights that a model can load: `params`, and `stats` if any.

    An encoder fills the encoder. A model with a head fills all but the head, and the head too if the outputs are equal.

    Args:
      weights: from `read_init`.
      description: description of the model to fill.
    """
    params, old = dict(weights.params), weights.description
    for name in ("classes", "outputs", "task", "head"):
        if old.get(name, description.get(name)) != description.get(name):
            params.pop("head", None)
    if old.get("pool") != description.get("pool"):
        params.pop("head", None)
        params.pop("head_norm", None)
    return {"params": params, "stats": weights.stats} if weights.stats else {"params": params}


def check_weights(make_model: Callable[[nnx.Rngs], nnx.Module], loaded: dict[str, Any], source: str) -> None:
    """Checks that weights fill a model, except perhaps its head.

    Args:
      make_model: builds the model.
      loaded: from `loadable`.
      source: the name that the user gave for the weights.

    Raises:
      InputError: a parameter is unknown, missing or of another shape; the message names the first.
    """
    for group, kind in (("params", nnx.Param), ("stats", nnx.BatchStat)):
        own = jax.eval_shape(lambda kind=kind: nnx.to_pure_dict(nnx.state(make_model(nnx.Rngs(0)), kind)))
        new, old = flatten(loaded.get(group, {})), flatten(own)
        unknown = new.keys() - old.keys()
        if unknown:
            raise InputError(f"config.init={source} has the parameter {min(unknown)}, which this model has not")
        own_ones = ("head.", "head_norm."), ("_lora.down", "_lora.up")
        absent = {n for n in old.keys() - new.keys() if not (n.startswith(own_ones[0]) or n.endswith(own_ones[1]))}
        if absent:
            raise InputError(f"config.init={source} lacks the parameter {min(absent)} of this model")
        for name, leaf in new.items():
            if leaf.shape != old[name].shape:
                raise InputError(
                    f"config.init={source}: {name} is {leaf.shape} there and {old[name].shape} in this config"
                )


def make_optimizer(
    config: ml_collections.ConfigDict, description: dict[str, Any]
) -> tuple[optax.GradientTransformation, Callable[..., jax.Array]]:
    """AdamW for the part of a model that `config.mode` trains, and the learning rate by step and length of the run.

    The rate in the config is per 256 images.
    """
    optimizer = config.optimizer
    vit_layers = description["model"] == "vit" and config.mode not in ("frozen", "lora")
    rate = functools.partial(
        optimizers.warmup_cosine,
        learning_rate=optimizer.learning_rate * config.train.batch_size / 256,
        floor=optimizer.floor,
        warmup=optimizer.warmup,
    )
    adamw = optimizers.adamw(
        **{name: optimizer[name] for name in ("weight_decay", "b1", "b2", "clip_norm")},
        layer_decay=optimizer.layer_decay if vit_layers else 1.0,
        last_blocks=trained_part(config, description)[2],
    )
    return adamw, rate


def training_flops(description: dict[str, Any], size: tuple[int, int]) -> float:
    """Floating-point operations to train all parameters on one image; the backward pass counts as twice the forward."""
    if description["model"] == "resnet50":
        resnet = description["resnet"]
        return 3 * resnet_flops(size, resnet["width"], resnet["depths"])
    if description["model"] == "unet":
        return 3 * unet_flops(size, **description["unet"])
    encoder = description["encoder"]
    patch = encoder["patch_size"]
    patches = (size[0] // patch) * (size[1] // patch)
    shape = {name: encoder[name] for name in ("width", "depth", "mlp_ratio")}
    head = description.get("head", {})
    decoder = decoder_flops(size, patch, encoder["width"], head["width"]) if head.get("width") else 0.0
    return 3 * (vit_flops(patches, patch**2 * encoder["channels"], **shape) + decoder)


def title(config: ml_collections.ConfigDict, description: dict[str, Any], datasets: Sequence[str]) -> str:
    """The heading of the report."""
    if description["model"] == "resnet50":
        shape = description["resnet"]
        usual = (list(shape["depths"]), shape["width"]) == ([3, 4, 6, 3], 64)
        model = "ResNet-50" if usual else f"ResNet of {3 * sum(shape['depths']) + 2} layers and width {shape['width']}"
    elif description["model"] == "unet":
        model = f"U-Net of width {description['unet']['width']}"
    else:
        encoder = description["encoder"]
        names = ("patch_size", "width", "depth", "num_heads")
        size = next((size for size, kwargs in SIZES.items() if all(kwargs[n] == encoder[n] for n in names)), "")
        model = f"ViT-{size}" if size else f"ViT of width {encoder['width']} and depth {encoder['depth']}"
    on = " and ".join(datasets)
    if not config.init:
        return f"{model} trained from scratch on {on}"
    how = {"full": "", "frozen": ", head only", "last_k": f", last {config.last_k} blocks"}
    how["lora"] = f", LoRA of rank {config.lora_rank}"
    return f"Fine-tuned {model} on {on}{how[config.mode]}"
