"""Files to frames: one module per kind of file, chosen by content and not by suffix."""

import os
from collections.abc import Iterator

from data_prep.readers import images
from data_prep.readers.base import Frame, Options, UnreadableError
from data_prep.readers.images import read_mask

#: Suffixes of files that can be read, in lower case.
SUFFIXES = images.SUFFIXES

DEFAULTS = Options()

__all__ = ["DEFAULTS", "SUFFIXES", "Frame", "Options", "UnreadableError", "read_frames", "read_mask"]


def read_frames(path: str | os.PathLike[str], options: Options = DEFAULTS) -> Iterator[Frame]:
    """Yields the frames of a file, one at a time; no more than a few are in memory.

    Raises:
      UnreadableError: the file is missing, empty, damaged, too large, or of no kind that is known.
    """
    yield from images.read(path, options)
