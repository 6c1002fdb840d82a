"""Illustrations for reports: attention maps, example images, and a map of the features."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from usfmae_jax.data.table import Table, whole_image
from usfmae_jax.interop.model import Model, build, model_graph
from usfmae_jax.models.patches import normalize_images
from usfmae_jax.models.vit import attention_rollout
from usfmae_jax.reporting.classification import embedding_points

#: Maps images uint8 `[n, H, W, C]` to the maps shown beside them, such as attention, float32 `[n, gh, gw]`.
Attention = Callable[[np.ndarray], np.ndarray]


def rollout(model: Model | None, pool: Literal["mean", "cls"]) -> Attention | None:
    """Attention rollout of a vision transformer; None for other models and for raw pixels (no model)."""
    if model is None or model.description["model"] != "vit":
        return None
    encoder = model.encoder()
    params = encoder.params["encoder"]
    mean, std = tuple(model.preprocessing["mean"]), tuple(model.preprocessing["std"])
    follow = _follower(model_graph(build(encoder.description)), mean, std, pool)
    return lambda images: np.asarray(follow(params, images))


@functools.lru_cache(4)  # the members of a run share the compiled program
def _follower(
    graph: Any, mean: tuple[float, ...], std: tuple[float, ...], pool: Literal["mean", "cls"]
) -> Callable[[Any, np.ndarray], jax.Array]:
    return jax.jit(
        lambda params, images: attention_rollout(nnx.merge(graph, params), normalize_images(images, mean, std), pool)
    )


def foremost(members: Sequence[Any]) -> list[int]:
    """Indices of the members to illustrate: those of the largest label `fraction` and its first `seed`."""
    fraction = max(member.fraction for member in members)
    seed = next(member.seed for member in members if member.fraction == fraction)
    return [i for i, member in enumerate(members) if member.fraction == fraction and member.seed == seed]


def shown(
    table: Table,
    examples: Sequence[Mapping[str, Any]],
    looks: Sequence[Attention | None],
    image_format: tuple[tuple[int, int], int],
) -> list[dict[str, Any]]:
    """Adds to examples the `image`, the `map` shown beside it and the name of the `frame`.

    Args:
      table: of the frames.
      examples: with `row`, and `member`, an index into `looks`.
      looks: for each model, the function that computes the maps, or None.
      image_format: (height, width) and channels of the model's input.
    """
    size, channels = image_format
    found = []
    for example in examples:
        image, look = whole_image(table, example["row"], size, channels), looks[example["member"]]
        beside = {"map": look(image[None])[0] if look else None, "frame": str(table.frame_key[example["row"]])}
        found.append({**example, "image": image, **beside})
    return found


def feature_map(
    table: Table, rows: np.ndarray, names: np.ndarray, features: np.ndarray, space: str, seed: int = 0
) -> dict[str, Any] | None:
    """A 2-D map of features for a report; None if there are no points to show.

    Args:
      table: of the frames.
      rows: int `[N]`, rows of the table.
      names: str `[N]`, by which points are coloured.
      features: float `[N, D]`.
      space: a few words on what the features are.
      seed: of the map.
    """
    chosen, points = embedding_points(features, seed)
    if not len(chosen):
        return None
    return {
        "points": points,
        "label": names[chosen],
        "dataset": table.dataset[rows[chosen]],
        "frame": table.frame_key[rows[chosen]],
        "space": space,
    }


def cautions(table: Table) -> list[str]:
    """Caveats about these frames that readers of any result on them should know."""
    found = []
    # Without a patient id, a build writes the file's path.
    unknown = int(((table.patient == "") | (table.patient == table.source)).sum())
    if unknown:
        found.append(f"{unknown} of {len(table)} frames have no patient id and count as patients of their own")
    if table.damaged:
        found.append(f"{table.damaged} damaged records were left out")
    return found
