"""Tensors that are read when they are needed, and safetensors files read and written one tensor at a time.

Converting a large model so costs the memory of its parameters once, not once for every step on the way.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from usfmae_jax.errors import InputError

#: Floating-point dtypes by their names in safetensors.
_FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


#: Weights of more bytes than this stay outside of exported programs, in a file beside them.
EXTERNAL = 512 * 2**20


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


def from_array(array: np.ndarray) -> Tensor:
    """A tensor that is in memory already."""
    return Tensor(array.shape, lambda: np.asarray(array, np.float32))


def write_safetensors(path: os.PathLike | str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes float32 tensors, one after the other; the file is renamed into place last.

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


def open_safetensors(path: str) -> tuple[Tensors, dict[str, str]]:
    """Floating-point tensors and metadata of a local safetensors file; values are read when asked for.

    Raises:
      InputError: the file is damaged or of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:  # checks the whole header against the file's size
            metadata = dict(file.metadata() or {})
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); download it again") from error
    header.pop("__metadata__", None)

    def tensor(entry: dict[str, Any]) -> Tensor:
        dtype, shape, begin = np.dtype(_FLOATS[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"][0]

        def read() -> np.ndarray:
            values = np.fromfile(path, dtype, math.prod(shape), offset=8 + length + begin)
            return values.reshape(shape).astype(np.float32, copy=False)

        return Tensor(shape, read)

    return {name: tensor(entry) for name, entry in header.items() if entry["dtype"] in _FLOATS}, metadata
