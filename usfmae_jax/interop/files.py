"""Somebody else's files: PyTorch and safetensors, opened without running anything; and safetensors files written.

A tensor is read when it is needed and written at once, so that converting a large model costs the memory of its
parameters once, not once for every step on the way.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401 - numpy has no bfloat16 without it
import numpy as np
import safetensors
from etils import epath

from usfmae_jax import files
from usfmae_jax.errors import InputError
from usfmae_jax.interop import schema
from usfmae_jax.weights import find

#: Names of weights in a directory, best first.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "mae.pth")
#: Weights of more bytes than this stay outside of exported programs, in a file beside them.
EXTERNAL = 512 * 2**20

#: Endings of PyTorch's files.
TORCH = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
#: Where training scripts keep the parameters in a checkpoint, and their average over the last steps.
_NESTED = ("model", "state_dict", "model_state_dict", "module", "net", "network")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "module_ema")
_SETTINGS = ("config", "preprocessor_config", "export", "architecture", "preprocessing", "lineage")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A float32 tensor that may still lie in a file.

    Attributes:
      shape: known without reading.
      read: gives the values, a float32 array of that shape.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


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
      note: which of several parameters in a file these are, for a person; "" = there are no others.
    """

    tensors: Tensors
    metadata: dict[str, str]
    settings: dict[str, dict[str, Any]]
    files: tuple[str, ...]
    sha256: str
    note: str = ""


def from_array(array: np.ndarray) -> Tensor:
    """A tensor that is in memory already."""
    return Tensor(array.shape, lambda: np.asarray(array, np.float32))


def check_output(output: str, written: Sequence[str]) -> None:
    """Raises InputError when a folder holds anything but what a door writes, or is a file."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output={output} is a file; name a new folder")
    others = sorted(set(os.listdir(output)) - set(written)) if os.path.isdir(output) else []
    if others:
        raise InputError(f"--output={output} holds something else ({', '.join(others[:3])}); name a new folder")


def open_source(path: str, *, averaged: bool = False) -> Source:
    """Opens a weights file, or a directory with one under a usual name, or weights that are included by theirs.

    Args:
      path: see above.
      averaged: take the average of the weights over the last steps (EMA) that a training script kept beside them.

    Raises:
      InputError: nothing there, it cannot be read, or it holds no averaged weights.
    """
    path = find(path)
    if os.path.isdir(path):
        found = [name for name in WEIGHTS if os.path.isfile(os.path.join(path, name))]
        if not found:
            raise InputError(
                f"--input={path} holds no weights; expected is one of {', '.join(WEIGHTS)}, or name a file"
            )
        path = os.path.join(path, found[0])
    if not os.path.isfile(path):
        raise InputError(f"--input={path} does not exist; give a file of weights, or a directory with {WEIGHTS[0]}")
    files = _parts(path) if path.endswith(".index.json") else [path]
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    digest, note = hashlib.sha256(), ""
    for name in files:
        found_tensors, found_metadata, note = _open(name, averaged)
        tensors |= found_tensors
        metadata |= found_metadata
        with open(name, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    # Only to weights under a usual name do other files belong.
    settings = _read_settings(os.path.dirname(path)) if os.path.basename(path) in WEIGHTS else {}
    return Source(tensors, metadata, settings, tuple(map(os.path.basename, files)), digest.hexdigest(), note)


def open_safetensors(path: str) -> tuple[Tensors, dict[str, str]]:
    """Floating-point tensors and metadata of a local safetensors file; values are read when asked for.

    Raises:
      InputError: the file is damaged or of another kind.
    """

    def tensor(name: str, shape: Sequence[int]) -> Tensor:
        def read() -> np.ndarray:
            # Opened anew: the file is mapped into memory, and what was read of it would stay there while it is open.
            with safetensors.safe_open(path, framework="np") as file:
                return file.get_tensor(name).astype(np.float32, copy=False)

        return Tensor(tuple(shape), read)

    try:
        with safetensors.safe_open(path, framework="np") as file:  # checks the whole header against the file's size
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            tensors = {
                name: tensor(name, part.get_shape())
                for name, part in parts.items()
                if part.get_dtype() in ("F64", "F32", "F16", "BF16")
            }
            return tensors, dict(file.metadata() or {})
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); download it again") from error


def write_safetensors(path: os.PathLike | str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes float32 tensors, one after the other; the file is renamed into place last.

    The library wants all of them in memory, laid out as they are stored.

    Args:
      path: local or `gs://`.
      tensors: by name; stored in the order of their names.
      metadata: stored in the header.
    """
    names, offset = sorted(tensors), 0
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name in names:
        end = offset + 4 * math.prod(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values start at a multiple of 8 bytes
    whole = epath.Path(path)
    partial = whole.parent / (whole.name + ".incomplete")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name].read(), "<f4").data)
    partial.replace(whole)


def open_torch(path: str, *, averaged: bool = False) -> tuple[Tensors, str]:
    """The floating-point tensors of a PyTorch file's state dict, nested as training scripts do it or not.

    Args:
      path: of the file.
      averaged: see `open_source`.

    Returns:
      the tensors, and which ones they are if there are others; see `Source`.

    Raises:
      InputError: PyTorch is missing, the file is damaged, holds code, or holds no (averaged) tensors by name.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch: pip install 'usfmae_jax[interop]', or convert it to safetensors elsewhere"
        ) from error

    def tensor(value: Any) -> Tensor:
        return Tensor(tuple(value.shape), lambda: np.asarray(value.detach().to(torch.float32).numpy()))

    state, note = _choose(_unpickle(path), path, averaged)
    tensors = {
        name: tensor(value)
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not tensors:
        raise InputError(f"{path} holds no tensors by name; save it with torch.save(model.state_dict(), FILE)")
    return tensors, note


def _choose(state: Any, path: str, averaged: bool) -> tuple[Any, str]:
    """The state dict in what a training script saved, and which one it is if there are several."""
    if not isinstance(state, dict):
        return state, ""
    plain, ema = ([key for key in keys if isinstance(state.get(key), dict)] for keys in (_NESTED, _AVERAGED))
    if averaged and not ema:
        raise InputError(f"{path} holds no averaged weights, such as {', '.join(_AVERAGED[:3])}; leave out --ema")
    if ema and (averaged or not plain):
        note = f"the averaged weights in it are taken ({ema[0]})"
        return _inner(state[ema[0]]), note + (f"; the plain ones ({plain[0]}) without --ema" if plain else "")
    if ema:
        return _inner(state[plain[0]]), (
            f"the plain weights in it are taken ({plain[0]}), not the averaged ones ({ema[0]}), which --ema takes"
        )
    return (_inner(state[plain[0]]) if plain else state), ""


def _inner(state: dict[str, Any]) -> Any:
    """Averages are wrapped once more by some scripts, beside their decay."""
    return next((state[key] for key in (*_NESTED, "shadow") if isinstance(state.get(key), dict)), state)


def _harmless() -> list[Any]:
    """What training scripts keep beside tensors and runs nothing: their arguments, and numbers of NumPy's."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [argparse.Namespace, np.dtype, *kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _unpickle(path: str) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of pickles; what cannot be read is said below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"{path} holds code ({code[1]}) beside tensors, which is not run; where it was made, save the "
                "tensors alone: torch.save(model.state_dict(), FILE)"
            ) from error
        inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = inner[1] if inner else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} is no whole PyTorch file of tensors ({reason[:200]}); download it again, or save it anew where it "
            "was made: torch.save(model.state_dict(), FILE)"
        ) from error


def _open(path: str, averaged: bool) -> tuple[Tensors, dict[str, str], str]:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a pointer to a file that Git LFS did not fetch; run git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise InputError(f"{path} is a web page, not weights; download the file that the page links to")
    if path.endswith(".safetensors"):
        if averaged:
            raise InputError(f"{path} holds one set of weights; leave out --ema")
        return *open_safetensors(path), ""
    if path.endswith(TORCH):
        tensors, note = open_torch(path, averaged=averaged)
        return tensors, {}, note
    raise InputError(f"--input={path}: expected is a file that ends in .safetensors, {', '.join(TORCH)}")


def _parts(index: str) -> list[str]:
    try:
        names = sorted(set(files.parse(epath.Path(index).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no index of safetensors files: {error}") from error
    # A name with a folder in it could point anywhere.
    parts = [os.path.join(os.path.dirname(index), os.path.basename(str(name))) for name in names]
    missing = [part for part in parts if not os.path.isfile(part)]
    if missing:
        raise InputError(f"{index} names {os.path.basename(missing[0])}, which is not there; download it too")
    return parts


def _read_settings(folder: str) -> dict[str, dict[str, Any]]:
    settings = {}
    for name in _SETTINGS:
        file = os.path.join(folder, name + ".json")
        if not os.path.isfile(file):
            continue
        try:
            value = files.parse(epath.Path(file).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as JSON ({error}); download it again or move it away") from error
        if isinstance(value, dict):
            try:
                schema.check_settings(name, value)
            except InputError as error:
                raise InputError(f"{folder} cannot be used: {error}; download it again or move it away") from error
            settings[name] = value
    return settings
