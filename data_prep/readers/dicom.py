"""DICOM files to frames: ultrasound stills and clips, with or without a preamble or a suffix.

Orientation: rows and columns as they are stored, which is how a scanner shows them; nothing is flipped, turned or
resampled. Bright is echo: MONOCHROME1 is inverted.

Intensity: up to 8 bits are taken as they are. More go through the VOI table or window that the file declares, to 8
bits; without one they stay 16 bits wide, for a window over the percentiles of the frame.

Colour: palettes and YBR become RGB; a clip whose colour carries no meaning becomes grey, all of it. Where the file
declares its image regions, only they are asked, because a coloured logo or button beside them says nothing.

Regions: a region of spatial format 2D that shows tissue or colour flow is a box. Others (M-mode, spectra, traces,
ECG and other waveforms, grey and colour bars, graphics) are not images of tissue: outside of all boxes, they are
blanked by whoever cleans frames. Files that declare M-mode, spectra or waveforms and no 2D region are refused. Regions
that reach out of the picture were declared for another size, before it was cropped or shrunk: none is used then.

Only ultrasound is read: modality US or IVUS, or OT (secondary captures: paper, frame grabbers); a file without a
modality must say ultrasound or secondary capture as its class. Video inside DICOM (MPEG, HEVC) is not supported.

What leaves this module: pixels, with whatever is burnt into them, boxes, and the `facts` listed in `dicom_header`.
Overlays are never drawn. The ids in `patient` and `video` are raw, for `data_prep.identity`. Messages repeat nothing of
a file but sizes and well-known names.
"""

import contextlib
import io
import itertools
import logging
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import cv2
import numpy as np

from data_prep.readers import dicom_header, dicom_pixels
from data_prep.readers.base import Frame, Options, UnreadableError
from data_prep.readers.clips import chosen, has_colour, silence
from data_prep.readers.kinds import HEAD_BYTES, VRS, is_dicom
from usfmae_jax.errors import InputError

_DECIDING, _DECIDING_BYTES = 8, 64 << 20  # frames that say whether a clip has colour, fewer if they are large
_MAX_DEFLATED = 1 << 29
_MAX_ELEMENT = 1 << 20  # longer ones, raw data of the scanner, are not read into memory
_PIXELS = 0x7FE00008, 0x7FE00009, 0x7FE00010  # 32-bit float, 64-bit float, 8 or 16 bits


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frames of a DICOM file.

    Those left out are not decoded. One is in memory at a time; of a clip in colour, the first 8 together.

    Raises:
      UnreadableError: not DICOM, no ultrasound, no pixels, damaged, cut off, too large or of a kind that is not
        supported.
      InputError: pydicom is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise InputError("DICOM files need pydicom: pip install -r requirements-prep.txt") from error
    with contextlib.ExitStack() as stack:
        with _quietly("header is damaged"):
            file = stack.enter_context(_open(path))
            syntax, meta, header, file = _read_header(file)
            dicom_header.check_kind(header)
            clip = dicom_pixels.open_clip(file, syntax, header)
            boxes = dicom_header.boxes(header, clip.rows, clip.columns)
            facts = dicom_header.facts(header, clip, with_size=bool(boxes))
            patient, video = dicom_header.identifiers(header)
            removed = dicom_header.count_removed(meta, header, _read_rest(file, clip.end, header))
        pictures = _decode(file, clip, chosen(clip.count, options))
        for number, pixels in _all_grey_or_all_colour(pictures, boxes):
            yield Frame(pixels, number, boxes, patient, video, facts, removed)


def _decode(file: BinaryIO, clip: dicom_pixels.Clip, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    for number in numbers:
        with _quietly("a frame is damaged"):
            pixels = dicom_pixels.decode(file, clip, number)
        yield number, pixels


def _all_grey_or_all_colour(
    pictures: Iterator[tuple[int, np.ndarray]], boxes: dicom_header.Boxes
) -> Iterator[tuple[int, np.ndarray]]:
    """As `clips.as_frames` does, but only the boxes are asked for colour, where there are any."""
    first, size, colour = [], 0, False
    for number, pixels in pictures:
        first.append((number, pixels))
        size += pixels.nbytes
        height, width = pixels.shape[:2]
        parts = [pixels[top:bottom, left:right] for left, top, right, bottom in boxes or [(0, 0, width, height)]]
        colour = colour or any(map(has_colour, parts))
        if pixels.ndim == 2 or len(first) == _DECIDING or size >= _DECIDING_BYTES:
            break
    for number, pixels in itertools.chain(first, pictures):
        if pixels.ndim == 3 and not colour:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        yield number, pixels.reshape(*pixels.shape[:2], -1)


@contextlib.contextmanager
def _quietly(reason: str) -> Iterator[None]:
    """Turns all errors into `UnreadableError`, and keeps pydicom and its decoders from printing what is in the file."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg", "openjpeg")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            yield
    except (UnreadableError, InputError):
        raise
    except MemoryError:
        raise UnreadableError("needs more memory than there is") from None
    except Exception:
        raise UnreadableError(reason) from None  # its message and its cause repeat values
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from None


def _read_header(file: BinaryIO) -> tuple[str, Any, Any, BinaryIO]:
    """The transfer syntax, file meta information, the elements before the pixels, and the file that stands there."""
    from pydicom.filereader import read_dataset

    head = file.read(HEAD_BYTES)
    if not is_dicom(head):
        raise UnreadableError("not a DICOM file" if head else "empty file")
    file.seek(132 if head[128:132] == b"DICM" else 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >= 0x00030000, defer_size=_MAX_ELEMENT)
    syntax = str(meta.get("TransferSyntaxUID") or _guess(file))
    if syntax == dicom_pixels.DEFLATED:
        file = _inflate(file)
    header = read_dataset(
        file,
        syntax == dicom_pixels.IMPLICIT,
        syntax != dicom_pixels.BIG_ENDIAN,
        stop_when=lambda tag, vr, length: tag in _PIXELS,
        defer_size=_MAX_ELEMENT,
    )
    return syntax, meta, header, file


def _guess(file: BinaryIO) -> str:
    """The transfer syntax of a file that does not name one, from its first element."""
    start = file.read(6)
    file.seek(-len(start), os.SEEK_CUR)
    if start[4:6] not in VRS:
        return dicom_pixels.IMPLICIT
    return dicom_pixels.BIG_ENDIAN if start[0] == 0 else dicom_pixels.EXPLICIT


def _inflate(file: BinaryIO) -> BinaryIO:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(file.read(_MAX_DEFLATED), _MAX_DEFLATED)
    if not inflater.eof:
        raise UnreadableError(f"deflated data is cut off, or larger than {_MAX_DEFLATED >> 20} MiB")
    return io.BytesIO(data)


def _read_rest(file: BinaryIO, end: int, header: Any) -> Any:
    """The elements after the pixels; none if that is something else."""
    from pydicom import Dataset
    from pydicom.filereader import read_dataset

    file.seek(end)
    try:
        implicit, little = header.original_encoding
        rest = read_dataset(file, implicit, little, defer_size=_MAX_ELEMENT)
    except Exception:
        return Dataset()
    return rest[0x7FE00011:]
