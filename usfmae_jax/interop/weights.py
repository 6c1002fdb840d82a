"""Weights from wherever they lie: a run, a checkpoint, an encoder or a classifier directory."""

import dataclasses
import hashlib
import json
import os
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from usfmae_jax.errors import InputError
from usfmae_jax.interop.checkpoint import describe_encoder, holds_checkpoints, load_parameters
from usfmae_jax.interop.encoder import Lineage, flatten, read_encoder, read_lineage


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained model: parameters, what they belong to, and where they come from.

    Attributes:
      kind: 'encoder' (a ViT without a head) or 'classifier'.
      params: nested dict of float32 numpy arrays, of the ViT or of the classifier.
      stats: nested dict of running statistics (ResNet); {} where there are none.
      description: what `interop.classifier.make_classifier` takes; of an encoder `{"model": "vit", "encoder": kwargs}`.
      preprocessing: `image_size`, `channels` (as decoded), `mean` and `std`.
      lineage: stages, oldest first; see `interop.encoder.Lineage`.
      fingerprint: of names, shapes and values, 12 hex digits.
    """

    kind: Literal["encoder", "classifier"]
    params: dict[str, Any]
    stats: dict[str, Any]
    description: dict[str, Any]
    preprocessing: dict[str, Any]
    lineage: Lineage
    fingerprint: str

    def encoder(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and architecture of the ViT; a fine-tuned classifier gives the one inside it.

        Raises:
          InputError: the model is no vision transformer.
        """
        if self.description.get("model", "vit") != "vit":
            raise InputError(f"these weights are of a {self.description['model']}, not of a vision transformer")
        params = self.params if self.kind == "encoder" else self.params["encoder"]
        return params, dict(self.description["encoder"])


def open_weights(path: str, step: int | None = None) -> Weights:
    """Reads the weights that `path` names.

    Args:
      path: a pretraining workdir (its `encoder/`, else its newest checkpoint), its `checkpoints/` or one checkpoint
        there; an encoder or classifier directory, or what `usfmae_jax.convert` wrote; one member of a fine-tuning run,
        or a run with a single one.
      step: of a run's checkpoints; None takes `encoder/` if there is one, else the newest.

    Raises:
      InputError: nothing there, or it cannot be read.
    """
    root = epath.Path(path)
    root = root if "://" in path else root.expanduser().resolve()
    if not path or not root.is_dir():
        raise InputError(
            f"checkpoint {path!r} is no folder; give the workdir of a run, one of its checkpoints, or a directory "
            "with an encoder or a classifier"
        )
    if step is None:
        for directory in (root, root / "classifier", root / "encoder"):  # convert writes both, of a classifier
            if (directory / "architecture.json").exists():
                return _from_directory(os.fspath(directory))
    found = members(path)
    if len(found) == 1 and found[0] != os.fspath(root):
        return open_weights(found[0], step)
    if found:
        raise InputError(
            f"{path} holds {len(found)} trained models; choose one of them, such as "
            f"{os.path.join(path, 'members', os.path.basename(found[0]))}"
        )
    if root.name.isdigit() and step is None:
        return _from_checkpoint(root.parent, int(root.name))
    for directory in (root / "checkpoints", root):
        if holds_checkpoints(directory):
            return _from_checkpoint(directory, step)
    raise InputError(f"{path} holds neither an encoder or a classifier nor a finished checkpoint")


def members(path: str) -> list[str]:
    """Folders of the trained members of a fine-tuning run, in order; [] when `path` is none.

    A member counts as trained when it has a `classifier/`.
    """
    folder = epath.Path(path) / "members"
    if not folder.is_dir():
        return []
    return sorted(
        os.fspath(child) for child in folder.iterdir() if (child / "classifier" / "architecture.json").exists()
    )


def fingerprint(params: Any, stats: Any = None, *about: Any) -> str:
    """Hash of names, shapes and values of parameters and statistics, and of JSON about them, 12 hex digits."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode() if about else b"")
    for prefix, tree in (("", params), ("stats.", stats or {})):
        for name, leaf in sorted(flatten(tree).items()):
            value = np.ascontiguousarray(leaf, np.float32)
            digest.update(f"{prefix}{name}{value.shape}".encode())
            digest.update(value.data)
    return digest.hexdigest()[:12]


def _from_directory(directory: str) -> Weights:
    if _is_classifier(directory):
        from usfmae_jax.interop.classifier import read_classifier

        params, stats, description, preprocessing, lineage = read_classifier(directory)
        mark = fingerprint(params, stats, description, preprocessing)
        return Weights("classifier", params, stats, description, preprocessing, lineage, mark)
    params, architecture, preprocessing = read_encoder(directory)
    return _encoder(params, architecture, preprocessing, read_lineage(directory))


def _is_classifier(directory: str) -> bool:
    try:
        return "classes" in json.loads((epath.Path(directory) / "architecture.json").read_text())
    except (OSError, ValueError):
        return False  # its reader says what is wrong


def _encoder(params: Any, architecture: dict[str, Any], preprocessing: dict[str, Any], lineage: Lineage) -> Weights:
    description = {"model": "vit", "encoder": architecture}
    mark = fingerprint(params, None, description, preprocessing)
    return Weights("encoder", params, {}, description, preprocessing, lineage, mark)


def _from_checkpoint(directory: epath.Path, step: int | None) -> Weights:
    """The encoder in a checkpoint of a pretraining run; the config that made it travels inside."""
    params, config, step = load_parameters(os.fspath(directory), step)
    try:
        architecture, preprocessing = describe_encoder(config)
        encoder = params["encoder"]
        _ = config["model"]["decoder_width"]
    except KeyError as error:
        raise InputError(
            f"checkpoint {step} in {directory} is not of a pretraining run; finish the run to get its classifier/"
        ) from error
    return _encoder(jax.tree.map(np.asarray, encoder), architecture, preprocessing, lineage_of(directory.parent, step))


def lineage_of(workdir: epath.Path | str, step: int) -> Lineage:
    """The lineage of a run's weights as they are after a step."""
    lineage = read_lineage(os.fspath(workdir))
    lineage[-1:] = [stage | {"step": step} for stage in lineage[-1:]]
    return lineage
