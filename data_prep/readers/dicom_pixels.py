"""The pixels of a DICOM file: where its frames lie, and one of them at a time as it is shown.

pydicom decodes, with whatever plugins are installed; only JPEG of 8 bits goes through OpenCV, which is faster and tells
when it painted over damage. Where frames begin is found here and not by pydicom: it believes the header about their
number, and of a file that is cut off it gives nothing. Numbers have 16 bits at most, so that all that lies between them
and the screen (sign, modality, window, inversion, palette) is worked out once for a file, as a table.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import cv2
import numpy as np
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing, get_decoder
from pydicom.uid import UID, UID_dictionary

from data_prep.readers import images
from data_prep.readers.base import UnreadableError
from data_prep.readers.clips import WRONG_COUNT, check_size

MAX_FRAMES = 100_000
_MAX_CLIP_PIXELS = 50_000_000_000  # half an hour of 1024 x 768 at 30 frames a second
_MAX_STREAM = 1 << 16, 2  # bytes of a compressed frame: so many, and so many times its size
_MAX_TILES = 4096  # of a JPEG 2000 frame; scanners write one

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
_NATIVE = {IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED}
_RLE = "1.2.840.10008.1.2.5"
_PACKAGES = {"JPEG-LS": "pyjpegls", "JPEG 2000": "pylibjpeg[openjpeg]"}  # others: GPL, so nowhere required

_J2K, _JP2, _JPEG = b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ", b"\xff\xd8\xff"
# JPEG leaves open whether three components are RGB; this marker says that they are, and nothing is converted.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"

_CUT_OFF = "cut off: fewer pixels than the header declares"
_DAMAGED = "compressed pixels are damaged"
_OTHER_SIZE = "a frame and the header disagree about its size"

Piece = tuple[int, int]  # offset and length in bytes


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is needed to decode any frame of a file.

    Attributes:
      decoder: of pydicom.
      pixels: what the header says, under the names of pydicom's options.
      shift: how far the bits that count are from the lowest one.
      table: uint8 or uint16 `[2**stored]` or `[2**stored, 3]`, from stored numbers to what is shown; None for colours.
      start: of the pixel data in the file, in bytes.
      end: where it ends, likewise.
      count: of the frames that are there and whole.
      pieces: of each compressed frame; empty if nothing is compressed.
      damage: why there are no more frames, or "".
      warnings: for `Frame.warnings`.
    """

    decoder: Any
    pixels: dict[str, Any]
    shift: int
    table: np.ndarray | None
    start: int
    end: int
    count: int
    pieces: Sequence[Sequence[Piece]]
    damage: str
    warnings: tuple[str, ...]


def open_clip(file: BinaryIO, syntax: str, header: Any) -> Clip:
    """Finds the frames of a file that stands at its pixel data element.

    Args:
      file: seekable.
      syntax: transfer syntax UID.
      header: `pydicom.Dataset` of everything before the pixels.

    Raises:
      UnreadableError: no pixels, not one whole frame, too large, or a kind of pixels that is not supported.
      Exception: whatever pydicom raises where the header is damaged.
    """
    decoder = _find_decoder(syntax)
    vr, length = _read_pixel_element(file, *header.original_encoding)
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    pixels, shift = _describe(header, vr)
    pieces: list[list[Piece]] = []
    declared = _declared_count(header)
    if syntax in _NATIVE:
        end = min(start + length, size)
        pixels["photometric_interpretation"], frame_bytes = _layout(pixels, length, declared)
        count, cut = _count_frames(length, end - start, frame_bytes, declared)
        damage = _CUT_OFF if cut else ""
    else:
        file.seek(start)
        pieces, end, damage = _find_frames(file, min(start + length, size), declared)
        count, shift = len(pieces), shift if syntax == _RLE else 0  # other streams know nothing of it
    if not count:
        raise UnreadableError(damage or _CUT_OFF)
    if count > MAX_FRAMES or count * pixels["rows"] * pixels["columns"] > _MAX_CLIP_PIXELS:
        raise UnreadableError(f"{count} frames of {pixels['columns']} x {pixels['rows']} pixels, too many")
    pixels["number_of_frames"] = count
    wrong = not damage and count != (1 if declared is None else declared)
    table = _table(header, pixels) if pixels["samples_per_pixel"] == 1 else None
    warnings = (WRONG_COUNT,) if wrong else ()
    return Clip(decoder, pixels, shift, table, start, end, count, pieces, damage, warnings)


def _find_decoder(syntax: str) -> Any:
    try:
        return get_decoder(syntax)
    except NotImplementedError:
        # An unknown one is not repeated: a file can have anything there.
        name = UID(syntax).name if syntax in UID_dictionary else "unknown"
        raise UnreadableError(f"transfer syntax not supported: {name}") from None


def _read_pixel_element(file: BinaryIO, implicit: bool, little: bool) -> tuple[str, int]:
    """VR and length of the element that begins here; an undefined length is larger than any file."""
    order = "<" if little else ">"
    head = file.read(8 if implicit else 12)
    if len(head) < (8 if implicit else 12):
        raise UnreadableError("has no pixels, or is cut off before them")
    if struct.unpack_from(order + "HH", head) != (0x7FE0, 0x0010):
        raise UnreadableError("floating-point pixels, expected 8 or 16 bits")
    (length,) = struct.unpack_from(order + "I", head, len(head) - 4)
    return "OW" if implicit else head[4:6].decode("ascii"), length


def _describe(header: Any, vr: str) -> tuple[dict[str, Any], int]:
    """The options that pydicom wants, and the shift of the bits that count."""
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    shift = int(header.get("HighBit") or 0) + 1 - stored
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.get("SamplesPerPixel") or 1)
    interpretation, signed = str(header.PhotometricInterpretation), int(bool(header.get("PixelRepresentation")))
    header.PixelRepresentation = signed  # for pydicom's functions, which want one
    check_size(columns, rows)
    if allocated not in (8, 16) or not 0 < stored <= allocated:
        raise UnreadableError("not 8 or 16 bits per pixel")
    colours = ["RGB", "YBR_ICT", "YBR_RCT"]
    if stored == allocated == 8:
        colours += ["YBR_FULL", "YBR_FULL_422"]
    known = {1: ["MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"], 3: colours}
    if interpretation not in known.get(samples, []) or (samples == 3 and signed):
        raise UnreadableError("colour space not supported")
    options = {
        "rows": rows,
        "columns": columns,
        "samples_per_pixel": samples,
        "bits_allocated": allocated,
        "bits_stored": stored,
        "pixel_representation": signed,
        "photometric_interpretation": interpretation,
        "planar_configuration": int(header.get("PlanarConfiguration") or 0),
        "pixel_keyword": "PixelData",
        "pixel_vr": vr,
    }
    return options, shift if 0 <= shift <= allocated - stored else 0  # what makes no sense is not meant


# ---- how many frames, and where ------------------------------------------------------------------------------------


def _declared_count(header: Any) -> int | None:
    """None where the header does not say; 0 for what is no number of frames."""
    try:
        value = header.get("NumberOfFrames")
        return None if value in (None, "") else max(int(value), 0)
    except (TypeError, ValueError):
        return 0


def _layout(pixels: dict[str, Any], length: int, declared: int | None) -> tuple[str, int]:
    """The photometric interpretation, and the bytes of a frame."""
    interpretation = pixels["photometric_interpretation"]
    whole = pixels["rows"] * pixels["columns"] * pixels["samples_per_pixel"] * pixels["bits_allocated"] // 8
    if interpretation != "YBR_FULL_422":
        return interpretation, whole
    halved = whole * 2 // 3  # two bytes a pixel, but some that say so store three
    left = {size: length - declared * size if declared else length % size for size in (whole, halved)}
    if 0 <= left[halved] <= 1:
        return interpretation, halved
    return (interpretation, halved) if left[whole] < 0 else ("YBR_FULL", whole)


def _count_frames(length: int, there: int, frame_bytes: int, declared: int | None) -> tuple[int, bool]:
    """Frames of uncompressed pixels, of which the element says `length` bytes, and whether some are cut off."""
    found, rest = divmod(there, frame_bytes)
    if length > there:  # the file ends first, or the length is wrong
        count = min(found, declared or found)
        return count, count != declared
    if rest <= 1:  # padding
        return found, False
    # A piece of a frame: of one that the header knows of, or something else behind the pixels.
    return min(found, declared or found), bool(declared and declared > found)


def _find_frames(file: BinaryIO, end: int, declared: int | None) -> tuple[list[list[Piece]], int, str]:
    """The pieces of each whole frame of compressed pixels, where these end, and what is wrong there (PS3.5, A.4)."""
    pieces: list[Piece] = []
    begins: list[bool] = []
    damage, position = "", file.tell()
    while not damage and position + 8 <= end:
        file.seek(position)
        group, element, length = struct.unpack("<HHI", file.read(8))
        position += 8
        if (group, element) == (0xFFFE, 0xE0DD):
            break
        if (group, element) != (0xFFFE, 0xE000):
            damage = _DAMAGED
            break
        pieces.append((position, length))
        begins.append(_begins_frame(file.read(min(length, 8))))
        position += length
        damage = _CUT_OFF if position > end else ""
    else:  # without the item that ends them, which some leave out
        damage = damage or (_CUT_OFF if declared else "")
    frames = _group(file, pieces, begins, declared, damage)
    if position > end:  # in the middle of the last piece
        frames = frames[:-1]
    return frames, min(position, end), "" if declared and declared <= len(frames) else damage


def _begins_frame(head: bytes) -> bool:
    """Whether a piece is the first one of a frame: JPEG, JPEG 2000, or run lengths, which begin at byte 64."""
    return head.startswith((_JPEG, _J2K, _JP2)) or (head[1:] == b"\0\0\0\x40\0\0\0" and 0 < head[0] < 16)


def _group(
    file: BinaryIO, pieces: list[Piece], begins: list[bool], declared: int | None, damage: str
) -> list[list[Piece]]:
    """Pieces by frame. What they begin with says where frames begin, unless only something else fits the header."""
    if len(pieces) < 2:
        return []
    (offset, length), *pieces = pieces
    file.seek(offset)
    starts = set(np.frombuffer(file.read(length // 4 * 4), "<u4").tolist())  # the table of offsets
    known = [True, *begins[2:]]
    ways = [known, [offset - pieces[0][0] in starts for offset, _ in pieces]]
    if not damage:
        ways.append([True] * len(pieces))
    chosen = next((way for way in ways if sum(way) == declared and declared >= sum(known)), known)
    frames: list[list[Piece]] = []
    for piece, begin in zip(pieces, chosen, strict=True):
        if begin or not frames:
            frames.append([])
        frames[-1].append(piece)
    return frames


# ---- one frame -----------------------------------------------------------------------------------------------------


def decode(file: BinaryIO, clip: Clip, number: int) -> np.ndarray:
    """One frame as it is shown.

    Returns:
      uint8 or uint16 `[rows, columns]` (bright = echo), or RGB `[rows, columns, 3]`.

    Raises:
      UnreadableError: damaged, or the decoder is not installed.
      Exception: whatever the decoder raises.
    """
    stored = clip.pixels["bits_stored"]
    if clip.pieces:
        pixels, interpretation = _decompress(file, clip, clip.pieces[number])
    else:
        file.seek(clip.start)
        pixels, interpretation = _by_pydicom(clip, file, number, correct_unused_bits=False)
    if pixels.shape[:2] != (clip.pixels["rows"], clip.pixels["columns"]):
        raise UnreadableError(_OTHER_SIZE)
    if interpretation in ("YBR_FULL", "YBR_FULL_422"):  # 8 bits, see _describe
        return cv2.cvtColor(pixels[:, :, [0, 2, 1]], cv2.COLOR_YCrCb2RGB)
    numbers = pixels.astype(pixels.dtype.newbyteorder("="), copy=False).view(f"u{pixels.itemsize}")
    if stored < 8 * pixels.itemsize:
        # Bits that do not count can hold an overlay, with whatever is written in it.
        numbers = numbers >> clip.shift & ((1 << stored) - 1)
    table = clip.table
    if table is None:
        return numbers.astype(np.uint8 if stored <= 8 else np.uint16, copy=False)
    if numbers.dtype == np.uint8 and len(table) == 256 and table.dtype == np.uint8:  # faster
        return cv2.LUT(numbers, table) if table.ndim == 1 else cv2.LUT(cv2.merge([numbers] * 3), table[None])
    return table[numbers]


def _decompress(file: BinaryIO, clip: Clip, pieces: Sequence[Piece]) -> tuple[np.ndarray, str]:
    """Pixels and their photometric interpretation."""
    how, decoder = clip.pixels, clip.decoder
    shape = how["rows"], how["columns"], how["samples_per_pixel"]
    most = max(_MAX_STREAM[0], _MAX_STREAM[1] * math.prod(shape) * how["bits_allocated"] // 8)
    if sum(length for _, length in pieces) > most:
        raise UnreadableError("a compressed frame is larger than its pixels")
    data = bytearray()
    for offset, length in pieces:
        file.seek(offset)
        data += file.read(length)
    # What a stream says about its size is believed by those who allocate for it.
    stream, options = bytes(data), dict[str, Any]()
    if decoder.UID == _RLE:
        options["correct_unused_bits"] = False
    elif stream.startswith(_JPEG):
        frame = images.jpeg_frame(stream)
        if (frame.height, frame.width, frame.components) != shape:
            raise UnreadableError(_OTHER_SIZE)
        if not frame.is_ls and frame.precision == 8:
            return _decode_jpeg(stream, frame, how["photometric_interpretation"])
    else:
        stream = stream[max(stream.find(_J2K), 0) :]  # some put a file header before it
        if not stream.startswith(_J2K):
            raise UnreadableError(_DAMAGED)
        right, bottom, left, top, width, height, _, _, components = struct.unpack_from(">8IH", stream, 8)
        tiles = -(-right // max(width, 1)) * -(-bottom // max(height, 1))
        if not (width and height) or tiles > _MAX_TILES:
            raise UnreadableError(_DAMAGED)
        if (bottom - top, right - left, components) != shape:
            raise UnreadableError(_OTHER_SIZE)
    # Not GDCM, which ends the process at a damaged stream. The slow ones come last.
    plugins = sorted(set(decoder.available_plugins) - {"gdcm"}, key=lambda name: (name in ("pillow", "pydicom"), name))
    if stream.startswith(_JPEG) and "pillow" in plugins:  # which knows no more than 8 bits of it
        plugins.remove("pillow")
    if not plugins:
        package = next((pip for kind, pip in _PACKAGES.items() if kind in decoder.UID.name), "pylibjpeg-libjpeg")
        raise UnreadableError(f"{decoder.UID.name} needs a decoder that is not installed: pip install {package}")
    # As pydicom expects it: an empty table of offsets, and one piece.
    head = struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, len(stream))
    return _by_pydicom(clip, head + stream, 0, number_of_frames=1, decoding_plugin=plugins[0], **options)


def _by_pydicom(clip: Clip, source: Any, index: int, **options: Any) -> tuple[np.ndarray, str]:
    pixels, properties = clip.decoder.as_array(source, index=index, raw=True, **clip.pixels | options)
    return pixels, str(properties["photometric_interpretation"])


def _decode_jpeg(data: bytes, frame: images.JpegFrame, interpretation: str) -> tuple[np.ndarray, str]:
    """JPEG of 8 bits: baseline, extended, progressive or lossless.

    What a lossy stream says about its colours (JFIF, subsampled colour) counts more than the header, which says RGB of
    JPEG files that were wrapped up without a look.
    """
    if frame.components == 3 and (frame.is_lossless or interpretation == "RGB"):
        before = data[: frame.position]
        if b"JFIF\0" not in before and b"Adobe" not in before and not frame.is_subsampled:
            data = data[:2] + _ADOBE_RGB + data[2:]
    pixels = images.decode(data)  # also refuses what libjpeg painted over
    if frame.components == 1:
        return pixels, interpretation
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), interpretation if frame.is_lossless else "RGB"


# ---- what numbers stand for ----------------------------------------------------------------------------------------


def _table(header: Any, pixels: dict[str, Any]) -> np.ndarray:
    values = np.arange(1 << pixels["bits_stored"], dtype=np.int32)
    if pixels["pixel_representation"]:
        values[len(values) // 2 :] -= len(values)
    return (_colours if pixels["photometric_interpretation"] == "PALETTE COLOR" else _greys)(header, values)


def _greys(header: Any, values: np.ndarray) -> np.ndarray:
    """Grey levels of values, int32 `[2**stored]`: bright = echo, so MONOCHROME1 is inverted.

    Up to 8 bits are shown as they are, spread to 0..255. More than 8 go through the first VOI table or window of the
    file, if it has one, to uint8; else they become uint16 from 0 and whoever stores them chooses the window.
    """
    from_zero = values - values.min()
    top = len(values) - 1
    window = _window(header, values) if top > 255 else from_zero / top
    shown = from_zero.astype(np.uint16) if window is None else np.rint(255 * window).astype(np.uint8)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = (top if window is None else 255) - shown
    return shown.astype(np.uint16 if window is None else np.uint8)


def _window(header: Any, values: np.ndarray) -> np.ndarray | None:
    """From 0 (black) to 1 (white), or None if the file does not say (DICOM PS3.3, C.11.1 and C.11.2)."""
    values = apply_modality_lut(values, header)
    if header.get("VOILUTSequence"):
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return np.clip(apply_voi(np.rint(values).astype(np.int32), header) / (2**bits - 1), 0, 1)
    for name in ("WindowCenter", "WindowWidth"):
        value = header.get(name)
        if value in (None, "") or not np.isfinite([float(number) for number in np.ravel(value)]).all():
            return None
    if not header.get("VOILUTFunction"):
        header.VOILUTFunction = "LINEAR"
    try:
        shown = apply_windowing(values, header)
    except ValueError:  # a width that makes no sense
        return None
    if header.get("ModalityLUTSequence"):
        low, high = 0, 2 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:  # what pydicom spreads a window over: from the smallest stored number to the largest
        middle = len(values) // 2 if header.PixelRepresentation else 0
        low, high = values[middle], values[middle - 1]
    return None if low == high else np.clip((shown - low) / (high - low), 0, 1)


def _colours(header: Any, values: np.ndarray) -> np.ndarray:
    """RGB uint8 `[2**stored, 3]` of values by the palette of the file; of 16 bits the upper 8."""
    descriptor = header["RedPaletteColorLookupTableDescriptor"]
    entries, first, bits = (int(number) for number in descriptor.value)
    entries = entries & 0xFFFF or 0x10000
    if not header.PixelRepresentation:
        first &= 0xFFFF
    for colour in ("Red", "Green", "Blue"):
        keyword = f"{colour}PaletteColorLookupTableData"
        if keyword not in header:  # in segments, which pydicom unfolds
            continue
        data = header[keyword].value
        order = "<" if header.original_encoding[1] else ">"
        if not isinstance(data, bytes):  # numbers already, if written as such
            data, order = np.atleast_1d(data).astype("<u2").tobytes(), "<"
        # Eight bits come two to a word, or one. pydicom takes the words of big-endian files as they are.
        numbers = np.frombuffer(data, order + "u2")
        if bits != 16 and len(data) < 2 * entries:
            numbers = np.frombuffer(numbers.astype("<u2").tobytes(), np.uint8)
        header[keyword].value = numbers[:entries].astype("<u2").tobytes()
    # From 0 and within its ends: pydicom would clip in the bits of an entry, which may be few.
    descriptor.value = [entries & 0xFFFF, 0, bits]
    colours = apply_color_lut(np.clip(values, first, first + entries - 1) - first, header)[:, :3]
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)  # some that declare 16 bits hold 8
