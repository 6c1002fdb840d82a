"""The encoder directory: what a finished run leaves for others to use.

encoder/
  model.safetensors     float32 parameters of the ViT; blocks stacked along their first axis
  architecture.json     arguments of `models.vit.ViT`
  preprocessing.json    how pixels become the model's input
  lineage.json          where the weights come from: one entry for each job that trained them, oldest first
"""

import json
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from usfmae_jax.errors import InputError
from usfmae_jax.interop.tensors import from_array, write_safetensors

#: Changes when an older reader could no longer use what is written.
FORMAT = 1


#: One entry for each job that trained the weights, oldest first: `job`, `code`, `step`, `config` and `data`
#: (see `data.provenance.describe_data`).
Lineage = list[dict[str, Any]]


def save_encoder(
    directory: str, params: Any, architecture: dict[str, Any], preprocessing: dict[str, Any], lineage: Lineage
) -> None:
    """Writes an encoder directory; `model.safetensors` is renamed into place last, so that nobody reads half of one.

    Args:
      directory: local or `gs://`; created if absent.
      params: nested dict of arrays of a `ViT`.
      architecture: arguments that build it.
      preprocessing: image size, channels, mean and std.
      lineage: where the weights come from; stored in the safetensors metadata too, which stays with the weights.
    """
    write_model(directory, flatten(params), {"format": FORMAT, **architecture}, preprocessing, lineage)


def read_encoder(directory: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads what `save_encoder` wrote.

    Returns:
      parameters, architecture and preprocessing.

    Raises:
      InputError: no encoder there, a damaged file, or a newer format.
    """
    flat, architecture, preprocessing = read_model(directory, "an encoder", FORMAT)
    return unflatten(flat), architecture, preprocessing


def write_model(
    directory: str, flat: dict[str, Any], about: dict[str, Any], preprocessing: dict[str, Any], lineage: Lineage
) -> None:
    """Writes the files that directories of encoders and of classifiers have alike.

    Args:
      directory: local or `gs://`; created if absent.
      flat: arrays by name, stored as float32.
      about: for `architecture.json`, with its `format`.
      preprocessing: for `preprocessing.json`.
      lineage: for `lineage.json` and the safetensors metadata.
    """
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / "architecture.json").write_text(json.dumps(about, indent=2) + "\n")
    (root / "preprocessing.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
    write_lineage(directory, lineage)
    tensors = {name: from_array(np.asarray(value, np.float32)) for name, value in flat.items()}
    write_safetensors(root / "model.safetensors", tensors, {"lineage": json.dumps(lineage)})


def read_model(directory: str, what: str, version: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Reads what `write_model` wrote.

    Args:
      directory: see there.
      what: "an encoder" or "a classifier", for the message.
      version: the format that is understood.

    Returns:
      arrays by name, what `architecture.json` holds but the format, and preprocessing.

    Raises:
      InputError: files are absent or damaged, or the format is another.
    """
    root = epath.Path(directory)
    try:
        about = json.loads((root / "architecture.json").read_text())
        preprocessing = json.loads((root / "preprocessing.json").read_text())
        flat = safetensors.numpy.load((root / "model.safetensors").read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{directory} is not {what} directory: {error}") from error
    if about.pop("format", None) != version:
        raise InputError(f"{directory} has another {what.split()[1]} format than {version}; update usfmae_jax")
    return flat, about, preprocessing


def write_lineage(directory: str, lineage: Lineage) -> None:
    """Writes `lineage.json`, into an encoder directory or a workdir."""
    (epath.Path(directory) / "lineage.json").write_text(json.dumps({"stages": lineage}, indent=2) + "\n")


def read_lineage(directory: str) -> Lineage:
    """The stages in `lineage.json` of an encoder directory or a workdir; [] if it has none that can be read."""
    try:
        return list(json.loads((epath.Path(directory) / "lineage.json").read_text())["stages"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def flatten(params: Any) -> dict[str, Any]:
    """Nested dict to `{"a.b.c": leaf}`."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    params: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params
