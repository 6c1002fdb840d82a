"""The pixels of a DICOM file: what the header says about them, and one frame at a time.

pydicom decodes what is not compressed, and with its plugins JPEG-LS, JPEG 2000 and JPEG of more than 8 bits. Other JPEG
goes through OpenCV, which is eight times faster and needs no plugin. All sizes are compared with the header before
anything is decoded.
"""

import dataclasses
import os
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import cv2
import numpy as np

from data_prep.readers import dicom_streams as streams
from data_prep.readers import dicom_tables as tables
from data_prep.readers.base import UnreadableError
from data_prep.readers.clips import check_size

MAX_FRAMES = 100_000
_MAX_CLIP_PIXELS = 50_000_000_000  # half an hour of 1024 x 768 at 30 frames a second
_MAX_STREAM = 1 << 16, 2  # bytes of a compressed frame: so many, and so many times its size

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
_NATIVE = {IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED}
_RLE = "1.2.840.10008.1.2.5"
# Of each compression: pydicom's plugin, and what to install. Not GDCM, which ends the process at a damaged stream.
_PLUGINS = {
    f"1.2.840.10008.1.2.4.{number}": how
    for numbers, how in (
        ((50, 51, 57, 70), ("pylibjpeg", "pylibjpeg-libjpeg")),  # JPEG of more than 8 bits; GPL, so nowhere required
        ((80, 81), ("pyjpegls", "pyjpegls")),  # JPEG-LS
        ((90, 91), ("pylibjpeg", "pylibjpeg[openjpeg]")),  # JPEG 2000
    )
    for number in numbers
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is needed to decode any frame of a file.

    Attributes:
      syntax: transfer syntax UID.
      rows: of a frame, in pixels.
      columns: likewise.
      samples: 1 or 3 numbers per pixel.
      allocated: bits per number in the file, 8 or 16.
      stored: how many of them count.
      shift: how far those that count are from the lowest bit.
      signed: the numbers are two's complement.
      interpretation: photometric interpretation, as DICOM spells it.
      planar: 1 if colour planes follow each other.
      count: of frames.
      vr: of the pixel data element.
      start: of the pixel data in the file, in bytes.
      end: where it ends, likewise.
      pieces: of each compressed frame, (offset, length) in the file.
      table: from stored numbers to what is shown, see `dicom_tables`; None for colour pixels.
    """

    syntax: str
    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    shift: int
    signed: bool
    interpretation: str
    planar: int
    count: int
    vr: str = ""
    start: int = 0
    end: int = 0
    pieces: Sequence[Sequence[streams.Piece]] = ()
    table: np.ndarray | None = None

    @property
    def frame_bytes(self) -> int:
        """Of an uncompressed frame."""
        return self.rows * self.columns * self.samples * self.allocated // 8


def open_clip(file: BinaryIO, syntax: str, header: Any) -> Clip:
    """Finds the frames of a file that stands at its pixel data element.

    Args:
      file: seekable.
      syntax: transfer syntax UID.
      header: `pydicom.Dataset` of everything before the pixels.

    Raises:
      UnreadableError: no pixels, cut off, too large, or a kind of pixels that is not supported.
      Exception: whatever pydicom raises where the header is damaged.
    """
    _check_syntax(syntax)
    vr, length = _read_pixel_element(file, *header.original_encoding)
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    end = min(start + length, size)  # an undefined length is larger than any
    clip = dataclasses.replace(_describe(header, syntax), vr=vr, start=start, end=end)
    if syntax in _NATIVE:
        clip = _check_length(clip)
    else:
        file.seek(start)
        pieces, end = streams.find_frames(file, end, clip.count)
        clip = dataclasses.replace(clip, pieces=pieces, end=end)
    if clip.samples == 3:
        return clip
    values = np.arange(1 << clip.stored, dtype=np.int32)
    if clip.signed:
        values[len(values) // 2 :] -= len(values)
    make = tables.palette if clip.interpretation == "PALETTE COLOR" else tables.greys
    return dataclasses.replace(clip, table=make(header, values))


def _check_syntax(syntax: str) -> None:
    from pydicom.uid import UID, UID_dictionary

    if syntax not in _NATIVE | {_RLE} | _PLUGINS.keys():
        # An unknown one is not repeated: a file can have anything there.
        name = UID(syntax).name if syntax in UID_dictionary else "unknown"
        raise UnreadableError(f"transfer syntax not supported: {name}")


def _read_pixel_element(file: BinaryIO, implicit: bool, little: bool) -> tuple[str, int]:
    """VR and length of the element that begins here."""
    order = "<" if little else ">"
    head = file.read(8 if implicit else 12)
    if len(head) < (8 if implicit else 12):
        raise UnreadableError("has no pixels, or is cut off before them")
    if struct.unpack_from(order + "HH", head) != (0x7FE0, 0x0010):
        raise UnreadableError("floating-point pixels, expected 8 or 16 bits")
    (length,) = struct.unpack_from(order + "I", head, len(head) - 4)
    return "OW" if implicit else head[4:6].decode("ascii"), length


def _describe(header: Any, syntax: str) -> Clip:
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    shift = int(header.get("HighBit") or 0) + 1 - stored
    clip = Clip(
        syntax=syntax,
        rows=int(header.Rows),
        columns=int(header.Columns),
        samples=int(header.get("SamplesPerPixel") or 1),
        allocated=allocated,
        stored=stored,
        # Streams know nothing of it, and what makes no sense is not meant.
        shift=shift if syntax in _NATIVE | {_RLE} and 0 <= shift <= allocated - stored else 0,
        signed=bool(header.get("PixelRepresentation")),
        interpretation=str(header.PhotometricInterpretation),
        planar=int(header.get("PlanarConfiguration") or 0),
        count=int(header.get("NumberOfFrames") or 1),
    )
    check_size(clip.columns, clip.rows)
    if not 0 < clip.count <= MAX_FRAMES or clip.count * clip.rows * clip.columns > _MAX_CLIP_PIXELS:
        raise UnreadableError(f"{clip.count} frames of {clip.columns} x {clip.rows} pixels, too many or too few")
    if allocated not in (8, 16) or not 0 < stored <= allocated:
        raise UnreadableError("not 8 or 16 bits per pixel")
    colours = ["RGB", "YBR_ICT", "YBR_RCT"]
    if stored == allocated == 8:
        colours += ["YBR_FULL", "YBR_FULL_422"]
    known = {1: ["MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"], 3: colours}
    if clip.interpretation not in known.get(clip.samples, []) or (clip.samples == 3 and clip.signed):
        raise UnreadableError("colour space not supported")
    return clip


def _check_length(clip: Clip) -> Clip:
    length = clip.end - clip.start
    halved = clip.interpretation == "YBR_FULL_422"  # two bytes a pixel, but some that say so store three
    if halved and length >= clip.count * clip.frame_bytes:
        return dataclasses.replace(clip, interpretation="YBR_FULL")
    if length < clip.count * (clip.frame_bytes * 2 // 3 if halved else clip.frame_bytes):
        raise UnreadableError("cut off: fewer pixels than the header declares")
    return clip


def decode(file: BinaryIO, clip: Clip, number: int) -> np.ndarray:
    """One frame as it is shown.

    Returns:
      uint8 or uint16 `[rows, columns]` (bright = echo), or RGB `[rows, columns, 3]`.

    Raises:
      UnreadableError: damaged, or the decoder is not installed.
      Exception: whatever the decoder raises.
    """
    if clip.syntax in _NATIVE:
        file.seek(clip.start)
        pixels, interpretation = _by_pydicom(file, clip, number, clip.count)
    else:
        pixels, interpretation = _decompress(file, clip, clip.pieces[number])
    if pixels.shape[:2] != (clip.rows, clip.columns):
        raise UnreadableError("a frame and the header disagree about its size")
    if interpretation in ("YBR_FULL", "YBR_FULL_422"):  # 8 bits, see _describe
        return cv2.cvtColor(pixels[:, :, [0, 2, 1]], cv2.COLOR_YCrCb2RGB)
    numbers = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(f"u{pixels.itemsize}")
    if clip.stored < 8 * pixels.itemsize:
        # Bits that do not count can hold an overlay, with whatever is written in it.
        numbers = numbers >> clip.shift & ((1 << clip.stored) - 1)
    if clip.table is not None:
        return tables.look_up(numbers, clip.table)
    return numbers.astype(np.uint8 if clip.stored <= 8 else np.uint16, copy=False)


def _decompress(file: BinaryIO, clip: Clip, pieces: Sequence[streams.Piece]) -> tuple[np.ndarray, str]:
    """Pixels and their photometric interpretation."""
    least, times = _MAX_STREAM
    if sum(length for _, length in pieces) > max(least, times * clip.frame_bytes):
        raise UnreadableError("a compressed frame is larger than its pixels")
    data = b"".join(streams.read_piece(file, piece) for piece in pieces)
    if clip.syntax == _RLE:
        return streams.unpack_runs(data, clip.rows, clip.columns, clip.samples, clip.allocated), clip.interpretation
    data = streams.check_stream(data, clip.rows, clip.columns, clip.samples)
    if decoded := streams.decode_jpeg(data, clip.interpretation):
        return decoded
    # As pydicom expects it: an empty table of offsets, and one piece.
    head = struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, len(data))
    return _by_pydicom(head + data, clip, 0, 1)


def _by_pydicom(source: Any, clip: Clip, index: int, count: int) -> tuple[np.ndarray, str]:
    from pydicom.pixels import get_decoder

    options: dict[str, Any] = {
        "number_of_frames": count,
        "rows": clip.rows,
        "columns": clip.columns,
        "samples_per_pixel": clip.samples,
        "bits_allocated": clip.allocated,
        "bits_stored": clip.stored,
        "pixel_representation": int(clip.signed),
        "photometric_interpretation": clip.interpretation,
        "planar_configuration": clip.planar,
        "pixel_keyword": "PixelData",
        "pixel_vr": clip.vr,
    }
    plugin, package = _PLUGINS.get(clip.syntax, ("", ""))
    decoder = get_decoder(clip.syntax)
    if plugin and plugin not in decoder.available_plugins:
        raise UnreadableError(f"{decoder.UID.name} needs a decoder that is not installed: pip install {package}")
    if not plugin:
        options["correct_unused_bits"] = False  # decode does
    pixels, properties = decoder.as_array(source, index=index, raw=True, decoding_plugin=plugin, **options)
    return pixels, str(properties["photometric_interpretation"])
