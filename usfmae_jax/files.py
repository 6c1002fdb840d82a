"""Small files that a later start reads: they appear whole or not at all, and JSON that is none is a ValueError."""

import json
import os
from typing import Any

from etils import epath

from usfmae_jax.errors import InputError


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file; what was there before stays until the new one is whole, also on a disk that is full.

    Raises:
      InputError: there is a folder of that name.
    """
    place = epath.Path(path)
    if place.is_dir():
        raise InputError(f"{place} is a folder, and a file of that name is to be written; move it away and start again")
    partial = place.parent / (place.name + ".incomplete")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    partial.replace(place)


def parse(text: str | bytes) -> Any:
    """What JSON says; raises ValueError where it is none, is no UTF-8, or is nested deeper than Python follows."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
