"""Opens what somebody else saved: one file or a directory, PyTorch or safetensors, with the settings beside it."""

import dataclasses
import hashlib
import json
import os
from typing import Any

from usfmae_jax.errors import InputError
from usfmae_jax.interop.tensors import Tensors, open_safetensors
from usfmae_jax.interop.torch_files import open_torch

#: Names of weights in a directory, best first.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "mae.pth")
_TORCH = (".pt", ".pth", ".bin")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights as they were found.

    Attributes:
      tensors: by the names of whoever wrote them.
      metadata: of the safetensors header.
      settings: the JSON files beside the weights, by file name without the suffix: `config`, `preprocessor_config`,
        and ours: `export`, `architecture`, `preprocessing`, `lineage`.
      files: names of the files that hold the weights.
      sha256: of them.
    """

    tensors: Tensors
    metadata: dict[str, str]
    settings: dict[str, dict[str, Any]]
    files: tuple[str, ...]
    sha256: str


def open_source(path: str) -> Source:
    """Opens a weights file, or a directory with one under a usual name.

    Raises:
      InputError: nothing there, or it cannot be read.
    """
    folder = ""
    if os.path.isdir(path):
        found = [name for name in WEIGHTS if os.path.isfile(os.path.join(path, name))]
        if not found:
            raise InputError(
                f"--input={path} holds no weights; expected is one of {', '.join(WEIGHTS)}, or name a file"
            )
        path = os.path.join(path, found[0])
    if not os.path.isfile(path):
        raise InputError(f"--input={path} does not exist; give a file of weights, or a directory with {WEIGHTS[0]}")
    if os.path.basename(path) in WEIGHTS:  # only there do other files belong to it
        folder = os.path.dirname(path) or "."
    files = _parts(path)
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for file in files:
        found_tensors, found_metadata = _open(file)
        tensors |= found_tensors
        metadata |= found_metadata
    return Source(tensors, metadata, _settings(folder), tuple(map(os.path.basename, files)), _sha256(files))


def _open(path: str) -> tuple[Tensors, dict[str, str]]:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a pointer to a file that Git LFS did not fetch; run git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise InputError(f"{path} is a web page, not weights; download the file that the page links to")
    if path.endswith(".safetensors"):
        return open_safetensors(path)
    if path.endswith(_TORCH):
        return open_torch(path), {}
    raise InputError(f"--input={path}: expected is a file that ends in .safetensors, {', '.join(_TORCH)}")


def _parts(path: str) -> list[str]:
    if not path.endswith(".index.json"):
        return [path]
    try:
        with open(path) as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is no index of safetensors files: {error}") from error
    # A name with a folder in it could point anywhere.
    parts = [os.path.join(os.path.dirname(path), os.path.basename(str(name))) for name in names]
    missing = [part for part in parts if not os.path.isfile(part)]
    if missing:
        raise InputError(f"{path} names {os.path.basename(missing[0])}, which is not there; download it too")
    return parts


def _settings(folder: str) -> dict[str, dict[str, Any]]:
    settings = {}
    for name in ("config", "preprocessor_config", "export", "architecture", "preprocessing", "lineage"):
        file = os.path.join(folder, name + ".json")
        if not folder or not os.path.isfile(file):
            continue
        try:
            with open(file) as opened:
                value = json.load(opened)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as JSON ({error}); download it again or move it away") from error
        if isinstance(value, dict):
            settings[name] = value
    return settings


def _sha256(files: list[str]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
