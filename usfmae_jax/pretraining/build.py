"""From a config to the parts of a pretraining run, refusing what cannot work before anything is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from usfmae_jax.data import augment, pipeline
from usfmae_jax.data.records import Shards
from usfmae_jax.errors import InputError
from usfmae_jax.interop.checkpoint import load_parameters
from usfmae_jax.interop.encoder import Lineage, flatten, read_encoder, read_lineage
from usfmae_jax.interop.weights import lineage_of
from usfmae_jax.models.mae import MAE, num_visible, training_flops
from usfmae_jax.models.patches import check_patches
from usfmae_jax.pretraining.inspect import Inspector
from usfmae_jax.training import optimizers
from usfmae_jax.training.checks import public_settings
from usfmae_jax.training.common import check_computation, image_size
from usfmae_jax.training.state import State
from usfmae_jax.training.step import Objective, make_features, make_reconstruct


def model_maker(config: ml_collections.ConfigDict) -> Callable[[nnx.Rngs], MAE]:
    """Checks the model part of a config and returns what builds the model.

    Raises:
      InputError: names the field that cannot be.
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
    for width, heads in (("width", "num_heads"), ("decoder_width", "decoder_num_heads")):
        if model[width] % model[heads] or model[width] % 4:
            raise InputError(
                f"config.model.{width}={model[width]} must be divisible by 4 and by config.model.{heads}={model[heads]}"
            )
    try:
        check_patches(image_size(config), model.patch_size)
    except ValueError as error:
        raise InputError(f"{error}: change config.model.image_size or config.model.patch_size") from error
    try:
        num_visible(num_patches(config), config.mask.ratio)
    except ValueError as error:
        raise InputError(f"config.mask.ratio: {error}") from error
    check_computation(model)
    return lambda rngs: MAE(
        **architecture(config),
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_num_heads=model.decoder_num_heads,
        dtype=jnp.dtype(model.dtype),
        attention=model.attention or None,
        scan=model.scan,
        remat=model.remat,
        rngs=rngs,
    )


def objective(config: ml_collections.ConfigDict) -> Objective:
    """What the model is trained to do."""
    return Objective(
        patch_size=config.model.patch_size,
        mask_ratio=config.mask.ratio,
        fan_aware=config.mask.fan_aware,
        normalize_targets=config.loss.normalize_targets,
        mean=tuple(config.model.mean),
        std=tuple(config.model.std),
    )


def architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `vit.ViT` that fix the encoder's parameters."""
    names = ("patch_size", "channels", "width", "depth", "num_heads", "mlp_ratio")
    return {"image_size": image_size(config)} | {name: config.model[name] for name in names}


def num_patches(config: ml_collections.ConfigDict) -> int:
    """Patches of one view."""
    height, width = image_size(config)
    return (height // config.model.patch_size) * (width // config.model.patch_size)


def open_data(config: ml_collections.ConfigDict) -> tuple[list[Shards], Any]:
    """Opens the shards and describes this process's batches.

    Raises:
      InputError: there are none, with how to make some, or they cannot be used.
    """
    how_to = (
        "\n  Prepare some:  python -m data_prep.build --dataset=folder --input=DIR --output=data/mine"
        "\n                 then add --config.data.path=data/mine"
        "\n  Or try:        make pretrain    (simulated frames, --config=configs/pretrain.py:demo)"
    )
    if not config.data.path:
        raise InputError("config.data.path names no shards to train on." + how_to)
    try:
        sources = pipeline.open_sources(config.data.path, config.data.split, tuple(config.data.exclude))
    except InputError as error:
        if "excluded" in str(error):
            how_to = "\n  To train on it all the same, add --config.data.exclude='()'"
        raise InputError(f"config.data.path: {error}." + how_to) from error
    if config.augment.interpolation not in augment.INTERPOLATION:
        raise InputError(f"config.augment.interpolation must be one of {', '.join(augment.INTERPOLATION)}")
    dataset = pipeline.training_dataset(
        sources,
        size=image_size(config),
        channels=config.data.channels,
        batch_size=config.train.batch_size,
        how=augment.Augmentation(**config.augment),
        seed=config.seed,
        weights=config.data.weights,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    return sources, dataset


def settings(config: ml_collections.ConfigDict, sources: list[Shards]) -> dict[str, Any]:
    """The config as JSON and what tells the data apart, for checkpoints and `config.json`.

    Of absolute paths only the last part is kept: they tell who ran where, and the fingerprint tells the data better.
    """
    public = public_settings(config, ("init", "data.path", "probe.data.path"))
    return public | {"data_fingerprint": [s.fingerprint() for s in sources]}


def make_optimizer(
    config: ml_collections.ConfigDict, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Learning-rate schedule and AdamW; the rate in the config is per 256 images.

    Raises:
      InputError: the run would have no steps.
    """
    if total_steps < 1:
        raise InputError(
            f"the run has {total_steps} steps: config.train.epochs={config.train.epochs} of the data is less than one "
            f"batch of {config.train.batch_size}; raise the epochs, set config.train.steps or lower the batch size"
        )
    optimizer = config.optimizer
    rate = optimizer.learning_rate * config.train.batch_size / 256
    schedule = optimizers.warmup_cosine(rate, optimizer.floor, round(optimizer.warmup * total_steps), total_steps)
    names = ("weight_decay", "b1", "b2", "clip_norm", "layer_decay", "decay_all")
    return schedule, optimizers.adamw(schedule, **{name: optimizer[name] for name in names})


def with_weights(state: State, directory: str, model: ml_collections.ConfigDict) -> tuple[State, Lineage, str]:
    """Puts weights into a fresh state.

    Args:
      state: as initialised.
      directory: an encoder directory; or the workdir of a run or what `usfmae_jax.convert` wrote, which give the
        decoder too if they have one.
      model: `config.model` of this run.

    Returns:
      the state, the lineage of the weights, and what was taken, for a person.

    Raises:
      InputError: shapes or numbers of heads differ; names the first that does.
    """
    if (epath.Path(directory) / "checkpoints").is_dir():
        found, config, step = load_parameters(directory)
        lineage, about = lineage_of(directory, step), config["model"]
    else:
        if not (epath.Path(directory) / "architecture.json").exists():
            directory = f"{directory}/encoder"  # what convert writes of a classifier has both
        encoder, architecture, preprocessing = read_encoder(directory)
        found, lineage, about = {"encoder": encoder}, read_lineage(directory), architecture | preprocessing
    params = dict(state["params"])
    for part in [part for part in ("encoder", "decoder") if part in found]:
        params[part] = _fitted(found[part], params[part], directory, part)
    # Heads leave no trace in the shapes.
    for name in ("num_heads", "decoder_num_heads")[: len(found)]:
        if about[name] != model[name]:
            raise InputError(
                f"config.init={directory} has {about[name]} heads: add --config.model.{name}={about[name]}"
            )
    taken = "encoder and decoder" if "decoder" in found else "encoder, with a freshly initialised decoder,"
    said = f"starting from the {taken} of {directory}"
    for name in ("mean", "std"):
        if not np.allclose(about[name], model[name], atol=1e-3):
            said += f"\nwarning: its pixels had another {name}: {tuple(about[name])}, here {tuple(model[name])}"
    return state | {"params": params}, lineage, said


def _fitted(new: Any, own: Any, directory: str, part: str) -> Any:
    shapes, expected = ({k: v.shape for k, v in flatten(tree).items()} for tree in (new, own))
    for name in sorted(shapes.keys() | expected.keys()):
        there, here = shapes.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            instead = f"; to take the encoder alone, add --config.init={directory}/encoder" * (part == "decoder")
            message = f"config.init={directory}: {part}.{name} is {there} there and {here} in this config"
            raise InputError(message + instead)
    return jax.tree.map(lambda value, old: jax.device_put(value, old.sharding), new, own)


def make_inspector(
    config: ml_collections.ConfigDict, graph: Any, mesh: Mesh, sources: list[Shards], dataset: Any, workdir: str
) -> Inspector:
    """Loads what the run looks at while it trains."""
    labelled, note = None, ""
    if config.probe.data.path:
        try:
            shards = pipeline.open_shards(config.probe.data.path, config.probe.data.split)
        except InputError as error:
            raise InputError(f"config.probe.data.path: {error}") from error
        trained_on = {shard for source in sources for shard in source.contents()}
        if trained_on.intersection(shards.contents()):
            note = "warning: the probe's frames are also trained on, if without labels: no held-out result"
        labelled = pipeline.load_labelled(
            shards, size=image_size(config), channels=config.data.channels, limit=config.probe.limit
        )
    # Some pictures are drawn; every device needs as many.
    rows = -(-8 // mesh.size) * len(mesh.local_devices)
    return Inspector(
        mesh,
        workdir,
        reconstruct=make_reconstruct(graph, objective(config)),
        images=dataset[0]["image"][:rows],
        pictures_every=config.log.pictures_every,
        features=make_features(graph, objective(config)),
        labelled=labelled,
        note=note,
        probe_every=config.probe.every,
        batch_size=-(-128 // mesh.size) * mesh.size,
        seed=config.seed,
    )


def count_flops(config: ml_collections.ConfigDict) -> float:
    """Training arithmetic of one image."""
    model = config.model
    return training_flops(
        num_patches=num_patches(config),
        patch_dim=model.patch_size**2 * model.channels,
        mask_ratio=config.mask.ratio,
        width=model.width,
        depth=model.depth,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        mlp_ratio=model.mlp_ratio,
    )
