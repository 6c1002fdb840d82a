"""Readers that convert files to frames: one module per kind of file, chosen by content rather than suffix."""

import importlib
import os
from collections.abc import Iterator

from data_prep.readers.base import UNKNOWN_SPACING, Frame, Options, UnreadableError, known_spacing, open_file
from data_prep.readers.images import read_mask
from data_prep.readers.kinds import ARRAYS, DICOM, HEAD_BYTES, IMAGES, VIDEOS, VOLUMES, kind_of
from usfmae_jax.errors import InputError, install

#: Suffixes that a folder is searched for, in lower case. Not the empty one of DICOM: a licence file is not DICOM.
SUFFIXES = (IMAGES | VIDEOS | VOLUMES | ARRAYS | DICOM) - {""}

DEFAULTS = Options()

_LIBRARIES = {"av": "Videos", "h5py": "HDF5 and MATLAB 7.3 files", "pydicom": "DICOM files"}  # optional ones

__all__ = [
    "ARRAYS",
    "DEFAULTS",
    "DICOM",
    "IMAGES",
    "SUFFIXES",
    "UNKNOWN_SPACING",
    "VIDEOS",
    "VOLUMES",
    "Frame",
    "Options",
    "UnreadableError",
    "kind_of",
    "known_spacing",
    "read_frames",
    "read_mask",
]


def read_frames(path: str | os.PathLike[str], options: Options = DEFAULTS) -> Iterator[Frame]:
    """Yields the frames of a file one at a time, with no more than a few in memory.

    For a file damaged part of the way through, the intact frames come first, then the error.

    Raises:
      UnreadableError: the file is missing, empty, damaged, too large, or of an unknown kind.
      InputError: a library that this kind of file needs is not installed.
    """
    with open_file(path) as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise UnreadableError("empty file")
    kind = kind_of(head)
    if not kind:
        raise UnreadableError("not a kind of file that can be read")
    try:
        # Imported here: most readers need libraries that are slow to load or may be missing.
        reader = importlib.import_module(f"data_prep.readers.{kind}")
        yield from reader.read(path, options)
    except ImportError as error:
        if error.name not in _LIBRARIES:
            raise
        needs = f"{_LIBRARIES[error.name]} need {error.name}"
        raise InputError(f"{needs}: {install('prep')}") from error
    except MemoryError as error:
        raise UnreadableError("needs more memory than there is") from error
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error
