"""Builds the parts of a pretraining run from its config; invalid settings are refused before anything is compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.records import NoShardsError, Shards
from usfmae_jax.data.table import read_table
from usfmae_jax.errors import InputError
from usfmae_jax.interop.model import Lineage, Model, flatten, open_model, preprocessing
from usfmae_jax.models.mae import num_visible
from usfmae_jax.models.patches import check_patches
from usfmae_jax.objectives import Objective
from usfmae_jax.objectives.cross_mae import CrossMaskedAutoencoding
from usfmae_jax.objectives.latent import LatentPrediction
from usfmae_jax.objectives.mae import MaskedAutoencoding
from usfmae_jax.pretraining import inspect
from usfmae_jax.tasks import classification
from usfmae_jax.training import checkpoints, checks, optimizers
from usfmae_jax.training.mesh import batch_sharding
from usfmae_jax.training.state import State, fill
from usfmae_jax.training.update import Update, make_update
from usfmae_jax.weights import find

#: Fields that configs of earlier versions lacked, with the values that they stand for.
ABSENT: dict[str, dict[str, Any]] = {
    "latent": {"teacher": "ema", "everywhere": False},
    "mask": {"block": 1, "blur": 0.0, "share": 0.5},
    "optimizer": {"muon": False},
    "train": {"ema": 0.0},
}
#: Minimum and maximum values of fields.
RANGES = checks.RANGES | dict.fromkeys(("log.pictures_every", "probe.every", "probe.limit"), (0, np.inf))
#: Fields that only one objective uses.
USED_BY = {"mask.share": "cross_mae", "latent.teacher": "latent", "latent.everywhere": "latent"}
#: Config fields that a resumed run may change.
RESUMABLE = (*checkpoints.RESUMABLE, "probe", "latent.teacher")  # its path; its fingerprint is compared


def objective(config: ml_collections.ConfigDict) -> Objective:
    """The objective of the run: the entry of `OBJECTIVES` that `config.objective` names.

    Raises:
      InputError: there is no such objective, or a field is invalid, which the message names.
    """
    if config.objective not in OBJECTIVES:
        raise InputError(f"config.objective={config.objective!r} must be one of {', '.join(OBJECTIVES)}")
    for field, name in USED_BY.items():
        group, _, last = field.partition(".")
        if config.objective != name and config[group][last] != ABSENT[group][last]:
            raise InputError(f"config.{field} is for another objective: add --config.objective={name}, or leave it out")
    return OBJECTIVES[config.objective](config)


def masked_autoencoding(
    config: ml_collections.ConfigDict, kind: type[MaskedAutoencoding] = MaskedAutoencoding, **more: Any
) -> MaskedAutoencoding:
    """The masked autoencoder of `config.model`, `.mask` and `.loss`; or a subclass `kind` with the arguments `more`."""
    model = config.model
    decoder = {name: model[name] for name in ("decoder_width", "decoder_depth", "decoder_num_heads")}
    shape = encoder(config)
    _check_widths(model, "decoder_width", "decoder_num_heads")
    checks.check_least(model, {"decoder_depth": 1}, "model.")
    (height, width), patch = shape["image_size"], shape["patch_size"]
    ranges = {"ratio": (0, 1), "block": (1, min(height, width) // patch), "blur": (0, 32)}
    checks.check_ranges(config.mask.to_dict(), ranges, "mask.")
    try:
        num_visible((height // patch) * (width // patch), config.mask.ratio)
    except ValueError as error:
        raise InputError(f"config.mask.ratio: {error}") from error
    return kind(
        shape,
        decoder,
        config.mask.ratio,
        tuple(model.mean),
        tuple(model.std),
        **{name: config.mask[name] for name in ("fan_aware", "block", "blur")},
        normalize_targets=config.loss.normalize_targets,
        computation=computation(config),
        **more,
    )


def cross_masked_autoencoding(config: ml_collections.ConfigDict) -> MaskedAutoencoding:
    """The same with a cross-attention decoder, which predicts `config.mask.share` of the masked patches."""
    if not 0 < config.mask.share <= 1:
        raise InputError(f"config.mask.share={config.mask.share:g} must be more than 0 and at most 1")
    return masked_autoencoding(config, CrossMaskedAutoencoding, share=config.mask.share)


def latent_prediction(config: ml_collections.ConfigDict) -> MaskedAutoencoding:
    """The same, predicting features of `config.latent.teacher`: an encoder, or the moving average of the model."""
    teacher, path = None, config.latent.teacher
    if path != "ema":
        try:
            teacher = open_model(path).encoder()
        except InputError as error:
            raise InputError(f"config.latent.teacher: {error}; or 'ema', the average of the model itself") from error
        channels = teacher.description["encoder"]["channels"]
        if config.data.channels not in (1, channels):
            raise InputError(
                f"config.latent.teacher={path} is for images of {channels} channels, not {config.data.channels}"
            )
    elif not config.train.ema:
        raise InputError("config.latent.teacher=ema is the average of the model itself: add --config.train.ema=0.996")
    return masked_autoencoding(config, LatentPrediction, teacher=teacher, everywhere=config.latent.everywhere)


OBJECTIVES: dict[str, Callable[[ml_collections.ConfigDict], Objective]] = {
    "mae": masked_autoencoding,
    "cross_mae": cross_masked_autoencoding,
    "latent": latent_prediction,
}


def encoder(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `vit.ViT` that determine the encoder's parameters.

    Raises:
      InputError: a field is invalid, which the message names.
    """
    model = config.model
    if model.channels not in (1, 3) or len(model.mean) != model.channels or len(model.std) != model.channels:
        raise InputError(
            f"config.model.channels={model.channels} must be 1 or 3 and have as many entries in config.model.mean "
            f"({len(model.mean)}) and config.model.std ({len(model.std)})"
        )
    if config.data.channels not in (1, model.channels):
        raise InputError(
            f"config.data.channels={config.data.channels} must be 1 or config.model.channels={model.channels}"
        )
    _check_widths(model, "width", "num_heads")
    checks.check_least(model, {"depth": 1, "patch_size": 1}, "model.")
    if not all(np.isfinite((*model.mean, *model.std))) or min(model.std) <= 0:
        raise InputError(f"config.model.std={tuple(model.std)} must be above 0, config.model.mean finite")
    size = checks.square(model.image_size)
    try:
        check_patches(size, model.patch_size)
    except ValueError as error:
        raise InputError(f"{error}: change config.model.image_size or config.model.patch_size") from error
    names = ("patch_size", "channels", "width", "depth", "num_heads", "mlp_ratio")
    return {"image_size": size} | {name: model[name] for name in names}


def _check_widths(model: ml_collections.ConfigDict, width: str, heads: str) -> None:
    checks.check_least(model, {width: 1, heads: 1}, "model.")
    if model[width] % model[heads] or model[width] % 4:
        raise InputError(
            f"config.model.{width}={model[width]} must be divisible by 4 and by config.model.{heads}={model[heads]}"
        )
    if model.mlp_ratio * model[width] < 1:
        raise InputError(f"config.model.mlp_ratio={model.mlp_ratio:g} must be larger, such as 4")


def computation(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `vit.ViT` that set how it computes, and change no parameter."""
    model = config.model
    checks.check_computation(model.dtype, model.attention, model.remat)
    how = {"dtype": jnp.dtype(model.dtype), "attention": model.attention or None}
    return how | {"scan": model.scan, "remat": model.remat}


def about(config: ml_collections.ConfigDict, learn: Objective) -> dict[str, Any]:
    """The description in a checkpoint: the kind of run that wrote it, its model, and the model's input."""
    pixels = preprocessing(
        checks.square(config.model.image_size), config.data.channels, config.model.mean, config.model.std
    )
    return {"kind": config.objective, "description": learn.describe(), "preprocessing": pixels}


def check(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises InputError for a field of the training itself that is invalid.

    Args:
      config: of the run.
      devices: of the mesh.
    """
    fields = checks.flat(config.to_dict())
    checks.check_batch(fields, devices)
    checks.check_ranges(fields, RANGES)
    if not 0 <= config.train.ema < 1:
        raise InputError(f"config.train.ema={config.train.ema:g} must be 0 or a decay below 1, such as 0.999")


def open_data(config: ml_collections.ConfigDict) -> tuple[list[Shards], Any]:
    """Opens the shards and sets up this process's batches.

    Raises:
      InputError: there are none (the message shows how to build some), or they cannot be used.
    """
    how_to = (
        "\n  Prepare some:  python -m data_prep.build --dataset=folder --input=DIR --output=data/mine"
        "\n                 then add --config.data.path=data/mine"
        "\n  Or simulate:   python -m data_prep.build --dataset=phantom --output=data/demo"
        "\n                 then --config=pretrain:demo"
    )
    if not config.data.path:
        raise InputError("config.data.path names no shards to train on." + how_to)
    try:
        sources = pipeline.open_sources(config.data.path, config.data.split, tuple(config.data.exclude))
    except InputError as error:
        if isinstance(error, NoShardsError) and error.advised:
            raise InputError(f"config.data.path: {error}") from error
        if "excluded" in str(error):
            how_to = "\n  To train on it all the same, add --config.data.exclude='()'"
        raise InputError(f"config.data.path: {error}." + how_to) from error
    checks.check_augmentation(config.augment.to_dict())
    how, size = augment.Augmentation(**config.augment), checks.square(config.model.image_size)
    dataset = pipeline.training_batches(
        pipeline.LoadView(pipeline.all_rows(sources), size, config.data.channels, how),
        batch_size=config.train.batch_size,
        seed=config.seed,
        weights=config.data.weights,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    return sources, dataset


def settings(config: ml_collections.ConfigDict, sources: list[Shards], teacher: Model | None = None) -> dict[str, Any]:
    """The config as JSON with fingerprints of data and teacher, for checkpoints and `config.json`.

    Absolute paths are cut to their last part: they reveal who ran where, and a fingerprint identifies data better.
    """
    public = checks.public_settings(
        config.to_json_best_effort(), ("init", "latent.teacher", "data.path", "probe.data.path")
    )
    told = {"data_fingerprint": [s.fingerprint() for s in sources], "data_content": [s.content() for s in sources]}
    return public | told | ({"teacher_fingerprint": teacher.fingerprint} if teacher else {})


def count_steps(config: ml_collections.ConfigDict, sources: list[Shards]) -> int:
    """Number of updates of the whole run.

    Raises:
      InputError: there would be none.
    """
    train = config.train
    total = train.steps or train.epochs * sum(map(len, sources)) // train.batch_size
    if total < 1:
        raise InputError(
            f"the run has {total} steps: config.train.epochs={train.epochs} of the data is less than one "
            f"batch of {train.batch_size}; raise the epochs, set config.train.steps or lower the batch size"
        )
    return total


def make_optimizer(config: ml_collections.ConfigDict) -> tuple[optax.GradientTransformation, Callable[..., jax.Array]]:
    """The optimizer, and the learning rate by step and length of the run; the rate in the config is per 256 images."""
    optimizer = config.optimizer
    names = ("weight_decay", "b1", "b2", "clip_norm", "layer_decay", "decay_all", "muon")
    rate = functools.partial(
        optimizers.warmup_cosine,
        learning_rate=optimizer.learning_rate * config.train.batch_size / 256,
        floor=optimizer.floor,
        warmup=optimizer.warmup,
    )
    return optimizers.adamw(**{name: optimizer[name] for name in names}), rate


def make_step(config: ml_collections.ConfigDict, learn: Objective, graph: Any, mesh: Mesh) -> Update:
    """The training step of the run, see `training.update`.

    Args:
      config: config of the run.
      learn: from `objective`.
      graph: graph definition of its model.
      mesh: the devices that the batch is split over.
    """
    optimizer, rate = make_optimizer(config)
    train = config.train
    how = {"accumulate": train.accumulate, "skip": train.skip_nonfinite > 0, "ema": train.ema, "teach": learn.teach}
    return make_update(graph, learn.prepare, learn.loss, optimizer, rate, mesh, **how)


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a batch of images on the mesh."""
    shape = (config.train.batch_size, *checks.square(config.model.image_size), config.data.channels)
    return jax.ShapeDtypeStruct(shape, np.uint8, sharding=batch_sharding(mesh))


def with_weights(state: State, directory: str, model: ml_collections.ConfigDict) -> tuple[State, Lineage, str]:
    """Loads weights into a newly initialised state.

    Args:
      state: the initial state.
      directory: an encoder directory, or the name of included weights; or the workdir of a run or output of
        `usfmae_jax.convert`, from which the decoder is loaded too if there is one.
      model: `config.model` of this run.

    Returns:
      the state, the lineage of the weights, and a readable note on what was loaded.

    Raises:
      InputError: shapes or numbers of heads differ; the message names the first difference.
    """
    places = ("checkpoints", "architecture.json", "encoder/architecture.json")
    if not any((epath.Path(find(directory)) / place).exists() for place in places):
        raise InputError(
            f"config.init: {directory} is not an encoder directory, nor a run or what usfmae_jax.convert wrote"
        )
    weights = open_model(directory, whole=True)
    weights = weights if weights.kind in ("mae", "encoder") else weights.encoder()
    own, about = state["params"], weights.description["encoder"] | weights.preprocessing
    parts = sorted(weights.params, key=lambda part: part != "encoder")  # report problems of the encoder first
    taken = {part: weights.params[part] for part in parts if part in own}
    names = [f for f in ("patch_size", "width", "depth") if model[f] != about[f]]
    if names:
        changed = " ".join(f"--config.model.{name}={about[name]}" for name in names)
        raise InputError(f"config.init={directory} is a model of another size: add {changed}")
    for part, params in taken.items():
        _check_shapes(params, own[part], directory, part)
    # The shapes do not show the number of heads.
    for part, name in (("encoder", "num_heads"), ("decoder", "decoder_num_heads")):
        heads = (about | weights.description.get("decoder", {})).get(name)
        if part in taken and heads != model[name]:
            raise InputError(f"config.init={directory} has {heads} heads: add --config.model.{name}={heads}")
    fresh = [part for part in own if part not in taken]
    said = f"starting from the {' and '.join(taken)}{', with a freshly initialised ' * bool(fresh)}"
    said += f"{' and '.join(fresh)}{',' * bool(fresh)} of {directory}"
    for name in ("mean", "std"):
        if not np.allclose(about[name], model[name], atol=1e-3):
            said += f"\nwarning: its pixels had another {name}: {tuple(about[name])}, here {tuple(model[name])}"
    return fill(state, {name: taken for name in ("params", "ema") if name in state}), weights.lineage, said


def _check_shapes(new: Any, own: Any, directory: str, part: str) -> None:
    shapes, expected = ({k: v.shape for k, v in flatten(tree).items()} for tree in (new, own))
    for name in sorted(shapes.keys() | expected.keys()):
        there, here = shapes.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            instead = f"; to take the encoder alone, add --config.init={directory}/encoder" * (part != "encoder")
            message = f"config.init={directory}: {part}.{name} is {there} there and {here} in this config"
            raise InputError(message + instead)


def inspections(
    config: ml_collections.ConfigDict,
    learn: Objective,
    graph: Any,
    mesh: Mesh,
    sources: list[Shards],
    dataset: Any,
    workdir: str,
) -> list[tuple[int, inspect.Look]]:
    """The inspections of the run during training, each with the number of steps between two of them."""
    found = []
    if config.log.pictures_every:
        # A few pictures are drawn; every device needs the same number.
        rows = -(-8 // mesh.size) * len(mesh.local_devices)
        images, folder = dataset[0]["image"][:rows], epath.Path(workdir) / "reconstructions"
        found.append((config.log.pictures_every, inspect.pictures(learn, graph, mesh, images, folder, config.seed)))
    if config.probe.data.path and config.probe.every:
        try:
            table = read_table(config.probe.data.path, config.probe.data.split)
        except InputError as error:
            raise InputError(f"config.probe.data.path: {error}") from error
        trained_on = {shard for source in sources for shard in source.contents()}
        note = ""
        if trained_on.intersection(table.shards.contents()):
            note = (
                "warning: The probe's frames are also in the training data (without labels), so this is not a held-out "
                "result."
            )
        labelled = classification.labelled_images(
            table, size=checks.square(config.model.image_size), channels=config.data.channels, limit=config.probe.limit
        )
        found.append((config.probe.every, inspect.probe(learn, graph, mesh, labelled, note, config.seed)))
    return found
