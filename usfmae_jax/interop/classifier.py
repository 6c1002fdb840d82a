"""The classifier directory: a trained classifier with all that is needed to use it.

classifier/
  model.safetensors     float32 parameters; running statistics, if the model has them, below `stats.`
  architecture.json     format; model "vit" (with encoder: arguments of `ViT`, and pool) or "resnet50" (with resnet:
                        arguments of `ResNet`); classes: their names in the order of the logits
  preprocessing.json    how pixels become the model's input
  lineage.json          where the weights come from, see `interop.encoder`
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from usfmae_jax.errors import InputError
from usfmae_jax.interop.encoder import Lineage, flatten, read_lineage, read_model, unflatten, write_model
from usfmae_jax.models.heads import Classifier
from usfmae_jax.models.resnet import ResNet

#: Changes when an older reader could no longer use what is written.
FORMAT = 1

STATS = "stats."


def save_classifier(
    directory: str,
    params: Any,
    stats: Any,
    description: dict[str, Any],
    preprocessing: dict[str, Any],
    lineage: Lineage,
) -> None:
    """Writes a classifier directory; `model.safetensors` is renamed into place last.

    Args:
      directory: local or `gs://`; created if absent.
      params: nested dict of arrays of a `Classifier` or a `ResNet`.
      stats: nested dict of its running statistics; None or {} for a ViT.
      description: what `make_classifier` takes.
      preprocessing: image size, channels, mean and std.
      lineage: where the weights come from; stored in the safetensors metadata too.
    """
    flat = flatten(params) | {STATS + name: value for name, value in flatten(stats or {}).items()}
    write_model(directory, flat, {"format": FORMAT, **description}, preprocessing, lineage)


def read_classifier(
    directory: str,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], Lineage]:
    """Reads what `save_classifier` wrote.

    Returns:
      parameters, running statistics ({} if the model has none), description, preprocessing and lineage.

    Raises:
      InputError: no classifier there, a damaged file, or a newer format.
    """
    flat, description, preprocessing = read_model(directory, "a classifier", FORMAT)
    if description.get("model") not in ("vit", "resnet50"):
        raise InputError(f"{directory} holds no classifier but other weights, such as an encoder's")
    stats = {name.removeprefix(STATS): flat.pop(name) for name in list(flat) if name.startswith(STATS)}
    return unflatten(flat), unflatten(stats), description, preprocessing, read_lineage(directory)


def make_classifier(
    description: dict[str, Any],
    *,
    dtype: Any = jnp.float32,
    drop_path: float = 0.0,
    freeze: int = 0,
    **computation: Any,
) -> Callable[[nnx.Rngs], nnx.Module]:
    """What builds a classifier from its description.

    Args:
      description: `model`, `encoder` or `resnet`, `pool` and `classes`, see the head of this file.
      dtype: compute dtype.
      drop_path: highest rate of stochastic depth; a ResNet has none.
      freeze: number of first blocks (of a ResNet: stages, of which there are four) that are not trained.
      **computation: `attention`, `scan` and `remat` of `ViT`; a ResNet has none of them.
    """
    classes = len(description["classes"])
    if description["model"] == "resnet50":
        resnet = description["resnet"]
        return lambda rngs: ResNet(num_classes=classes, freeze=freeze, dtype=dtype, **resnet, rngs=rngs)
    encoder = description["encoder"] | {"image_size": tuple(description["encoder"]["image_size"])} | computation
    pool = description["pool"]
    return lambda rngs: Classifier(
        num_classes=classes, pool=pool, drop_path=drop_path, freeze=freeze, dtype=dtype, **encoder, rngs=rngs
    )
