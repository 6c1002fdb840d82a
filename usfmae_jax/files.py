"""Small files that a later start reads: written atomically; invalid JSON is a ValueError."""

import json
import os
from typing import Any

from etils import epath

from usfmae_jax.errors import InputError


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file atomically: an existing one stays until the new one is complete, even if the disk is full.

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
    """Parses JSON; raises ValueError if it is invalid, not UTF-8, or nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
