"""Reads PyTorch and safetensors files from others, without executing any code in them; writes safetensors files.

Tensors are read lazily and written one at a time, so that converting a large model needs the memory of its parameters
only once, not once per processing step.
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

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np
import safetensors
from etils import epath

from usfmae_jax import files
from usfmae_jax.errors import InputError, install, some
from usfmae_jax.interop import schema
from usfmae_jax.weights import find

#: File names of weights in a directory, in order of preference.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "mae.pth")
#: Weights larger than this, in bytes, are stored outside of exported programs, in a separate file.
EXTERNAL = 512 * 2**20

#: File name extensions of PyTorch files.
TORCH = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
#: Keys under which training scripts store the parameters in a checkpoint, and their running average.
_NESTED = ("model", "state_dict", "model_state_dict", "module", "net", "network")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "module_ema")
_SETTINGS = ("config", "preprocessor_config", "export", "architecture", "preprocessing", "lineage")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A float32 tensor, possibly still in a file.

    Attributes:
      shape: known without reading.
      read: returns the values, a float32 array of that shape.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights as found in files.

    Attributes:
      tensors: by their names in the files.
      metadata: of the safetensors header.
      settings: the JSON files next to the weights, by file name without suffix: `config`, `preprocessor_config`, and
        ours: `export`, `architecture`, `preprocessing`, `lineage`.
      files: names of the weight files.
      sha256: of those files.
      note: a message stating which of several sets of weights in the file these are; "" = there is only one.
    """

    tensors: Tensors
    metadata: dict[str, str]
    settings: dict[str, dict[str, Any]]
    files: tuple[str, ...]
    sha256: str
    note: str = ""


def from_array(array: np.ndarray) -> Tensor:
    """A tensor that is already in memory."""
    return Tensor(array.shape, lambda: np.asarray(array, np.float32))


def check_output(output: str, written: Sequence[str]) -> None:
    """Raises InputError if the output folder is a file or holds anything but the files `written` by the command."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output={output} is a file; name a new folder")
    others = sorted(set(os.listdir(output)) - set(written)) if os.path.isdir(output) else []
    if others:
        raise InputError(f"--output={output} holds something else ({some(others)}); name a new folder")


def open_source(path: str, *, averaged: bool = False) -> Source:
    """Opens weights.

    Args:
      path: a weights file, a directory with one under a usual name, or the name of weights included in the package.
      averaged: take the running average of the weights (EMA) that a training script stored with them.

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
    # Other files belong to the weights only if these have a usual name.
    settings = _read_settings(os.path.dirname(path)) if os.path.basename(path) in WEIGHTS else {}
    return Source(tensors, metadata, settings, tuple(map(os.path.basename, files)), digest.hexdigest(), note)


def open_safetensors(path: str) -> tuple[Tensors, dict[str, str]]:
    """Floating-point tensors and metadata of a local safetensors file; values are read lazily.

    Raises:
      InputError: the file is damaged or not a safetensors file.
    """

    def tensor(name: str, shape: Sequence[int]) -> Tensor:
        def read() -> np.ndarray:
            # Reopened: the file is memory-mapped, and the parts read would stay in memory while it is open.
            with safetensors.safe_open(path, framework="np") as file:
                return file.get_tensor(name).astype(np.float32, copy=False)

        return Tensor(tuple(shape), read)

    try:
        with safetensors.safe_open(path, framework="np") as file:  # validates the header against the file size
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
    """Writes float32 tensors one at a time; the file is renamed into place at the end.

    The safetensors library would need all of them in memory at once, in the layout of the file.

    Args:
      path: local or `gs://`.
      tensors: by name; stored in order of name.
      metadata: stored in the header.
    """
    names, offset = sorted(tensors), 0
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name in names:
        end = offset + 4 * math.prod(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data start at a multiple of 8 bytes
    whole = epath.Path(path)
    partial = whole.parent / (whole.name + ".incomplete")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name].read(), "<f4").data)
    partial.replace(whole)


def open_torch(path: str, *, averaged: bool = False) -> tuple[Tensors, str]:
    """The floating-point tensors of the state dict in a PyTorch file, nested as in training checkpoints or not.

    Args:
      path: of the file.
      averaged: see `open_source`.

    Returns:
      the tensors, and a note on which set they are if there are several; see `Source`.

    Raises:
      InputError: PyTorch is missing, the file is damaged, holds code, or holds no named (averaged) tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch: {install('interop')}, or convert it to safetensors elsewhere"
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
    """The state dict in a training checkpoint, and a note on which one it is if there are several."""
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
    """Unwraps averages that some scripts nest once more, next to their decay."""
    return next((state[key] for key in (*_NESTED, "shadow") if isinstance(state.get(key), dict)), state)


def _harmless() -> list[Any]:
    """Types that training scripts store along with tensors and that execute no code: arguments and NumPy scalars."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [argparse.Namespace, np.dtype, *kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _unpickle(path: str) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickles; errors are reported below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
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
    # A name with folders in it could point anywhere.
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
