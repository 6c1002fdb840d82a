"""The pixels of a DICOM file: locates its frames, and decodes them one at a time to what is displayed.

pydicom decodes, with whatever plugins are installed, except that 8-bit JPEG goes through OpenCV, which is faster and
reports damage that it concealed. Frames are located here rather than by pydicom, which trusts the number of frames in
the header and yields nothing for a truncated file. Stored values have at most 16 bits, so that everything between them
and the display (sign, modality LUT, window, inversion, palette) is computed once per file, as a lookup table.
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
_MAX_STREAM = 1 << 16, 2  # limits of a compressed frame, the larger holds: bytes, and multiples of its decoded size
_MAX_TILES = 4096  # of a JPEG 2000 frame; scanners write a single one

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
_NATIVE = {IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED}
_RLE = "1.2.840.10008.1.2.5"
_PACKAGES = {"JPEG-LS": "pyjpegls", "JPEG 2000": "pylibjpeg[openjpeg]"}  # others: GPL, so never required

_J2K, _JP2, _JPEG = b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ", b"\xff\xd8\xff"
# JPEG does not define whether three components are RGB; this marker states that they are, so nothing is converted.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"

_CUT_OFF = "cut off: fewer pixels than the header declares"
_DAMAGED = "compressed pixels are damaged"
_OTHER_SIZE = "a frame and the header disagree about its size"

Piece = tuple[int, int]  # offset and length in bytes


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is needed to decode any frame of a file.

    Attributes:
      decoder: decoder of pydicom.
      pixels: description of the pixels from the header, under the names of pydicom's options.
      shift: position of the lowest stored bit, from bit 0.
      table: uint8 or uint16 `[2**stored]` or `[2**stored, 3]`, maps stored to displayed values; None for RGB and YBR.
      start: offset of the pixel data in the file, in bytes.
      end: offset of their end, in bytes.
      count: number of complete frames present.
      pieces: fragments of each compressed frame; empty if the pixels are not compressed.
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
    """Finds the frames of a file that is positioned at its pixel data element.

    Args:
      file: seekable.
      syntax: transfer syntax UID.
      header: `pydicom.Dataset` of everything before the pixels.

    Raises:
      UnreadableError: no pixels, no complete frame, too large, or an unsupported kind of pixels.
      Exception: whatever pydicom raises if the header is damaged.
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
        count, shift = len(pieces), shift if syntax == _RLE else 0  # other streams hold the values unshifted
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
        # An unknown UID is not quoted: it may be any text.
        name = UID(syntax).name if syntax in UID_dictionary else "unknown"
        raise UnreadableError(f"transfer syntax not supported: {name}") from None


def _read_pixel_element(file: BinaryIO, implicit: bool, little: bool) -> tuple[str, int]:
    """VR and length of the pixel data element; an undefined length is larger than any file."""
    order = "<" if little else ">"
    head = file.read(8 if implicit else 12)
    if len(head) < (8 if implicit else 12):
        raise UnreadableError("has no pixels, or is cut off before them")
    if struct.unpack_from(order + "HH", head) != (0x7FE0, 0x0010):
        raise UnreadableError("floating-point pixels, expected 8 or 16 bits")
    (length,) = struct.unpack_from(order + "I", head, len(head) - 4)
    return "OW" if implicit else head[4:6].decode("ascii"), length


def _describe(header: Any, vr: str) -> tuple[dict[str, Any], int]:
    """The options that pydicom's decoders need, and the shift of the stored bits."""
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    shift = int(header.get("HighBit") or 0) + 1 - stored
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.get("SamplesPerPixel") or 1)
    interpretation, signed = str(header.PhotometricInterpretation), int(bool(header.get("PixelRepresentation")))
    header.PixelRepresentation = signed  # required by pydicom's functions
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
    return options, shift if 0 <= shift <= allocated - stored else 0  # an invalid shift is ignored


# ---- how many frames, and where ------------------------------------------------------------------------------------


def _declared_count(header: Any) -> int | None:
    """The declared number of frames: None if not declared, 0 if invalid."""
    try:
        value = header.get("NumberOfFrames")
        return None if value in (None, "") else max(int(value), 0)
    except (TypeError, ValueError):
        return 0


def _layout(pixels: dict[str, Any], length: int, declared: int | None) -> tuple[str, int]:
    """The photometric interpretation, and the number of bytes per frame."""
    interpretation = pixels["photometric_interpretation"]
    whole = pixels["rows"] * pixels["columns"] * pixels["samples_per_pixel"] * pixels["bits_allocated"] // 8
    if interpretation != "YBR_FULL_422":
        return interpretation, whole
    halved = whole * 2 // 3  # two bytes per pixel, but some such files store three
    left = {size: length - declared * size if declared else length % size for size in (whole, halved)}
    if 0 <= left[halved] <= 1:
        return interpretation, halved
    return (interpretation, halved) if left[whole] < 0 else ("YBR_FULL", whole)


def _count_frames(length: int, there: int, frame_bytes: int, declared: int | None) -> tuple[int, bool]:
    """Number of frames in `there` bytes of uncompressed pixels, `length` declared, and whether some are cut off."""
    found, rest = divmod(there, frame_bytes)
    if length > there:  # the file ends first, or the length is wrong
        count = min(found, declared or found)
        return count, count != declared
    if rest <= 1:  # padding
        return found, False
    # Part of a frame: either a declared frame that is cut off, or other data after the pixels.
    return min(found, declared or found), bool(declared and declared > found)


def _find_frames(file: BinaryIO, end: int, declared: int | None) -> tuple[list[list[Piece]], int, str]:
    """The fragments of each complete compressed frame, the end of the pixels, and any damage (PS3.5, A.4)."""
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
    else:  # without the sequence delimiter, which some writers omit
        damage = damage or (_CUT_OFF if declared else "")
    frames = _group(file, pieces, begins, declared, damage)
    if position > end:  # the last fragment is cut off
        frames = frames[:-1]
    return frames, min(position, end), "" if declared and declared <= len(frames) else damage


def _begins_frame(head: bytes) -> bool:
    """Whether a fragment is the first of a frame: JPEG, JPEG 2000, or RLE, whose first segment starts at byte 64."""
    return head.startswith((_JPEG, _J2K, _JP2)) or (head[1:] == b"\0\0\0\x40\0\0\0" and 0 < head[0] < 16)


def _group(
    file: BinaryIO, pieces: list[Piece], begins: list[bool], declared: int | None, damage: str
) -> list[list[Piece]]:
    """Fragments by frame. Their first bytes show where frames begin, unless only another grouping fits the header."""
    if len(pieces) < 2:
        return []
    (offset, length), *pieces = pieces
    file.seek(offset)
    starts = set(np.frombuffer(file.read(length // 4 * 4), "<u4").tolist())  # the basic offset table
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
    """Decodes one frame to what is displayed.

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
        # Unused bits can hold an overlay, with any annotation.
        numbers = numbers >> clip.shift & ((1 << stored) - 1)
    table = clip.table
    if table is None:
        return numbers.astype(np.uint8 if stored <= 8 else np.uint16, copy=False)
    if numbers.dtype == np.uint8 and len(table) == 256 and table.dtype == np.uint8:  # faster
        return cv2.LUT(numbers, table) if table.ndim == 1 else cv2.LUT(cv2.merge([numbers] * 3), table[None])
    return table[numbers]


def _decompress(file: BinaryIO, clip: Clip, pieces: Sequence[Piece]) -> tuple[np.ndarray, str]:
    """Decodes a compressed frame: pixels and their photometric interpretation."""
    how, decoder = clip.pixels, clip.decoder
    shape = how["rows"], how["columns"], how["samples_per_pixel"]
    most = max(_MAX_STREAM[0], _MAX_STREAM[1] * math.prod(shape) * how["bits_allocated"] // 8)
    if sum(length for _, length in pieces) > most:
        raise UnreadableError("a compressed frame is larger than its pixels")
    data = bytearray()
    for offset, length in pieces:
        file.seek(offset)
        data += file.read(length)
    # Decoders trust the size that a stream declares when they allocate memory, so it is checked first.
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
        stream = stream[max(stream.find(_J2K), 0) :]  # some writers put a file header before it
        if not stream.startswith(_J2K):
            raise UnreadableError(_DAMAGED)
        right, bottom, left, top, width, height, _, _, components = struct.unpack_from(">8IH", stream, 8)
        tiles = -(-right // max(width, 1)) * -(-bottom // max(height, 1))
        if not (width and height) or tiles > _MAX_TILES:
            raise UnreadableError(_DAMAGED)
        if (bottom - top, right - left, components) != shape:
            raise UnreadableError(_OTHER_SIZE)
    # Not GDCM, which kills the process on a damaged stream. The slow ones come last.
    plugins = sorted(set(decoder.available_plugins) - {"gdcm"}, key=lambda name: (name in ("pillow", "pydicom"), name))
    if stream.startswith(_JPEG) and "pillow" in plugins:  # which supports only 8 bits
        plugins.remove("pillow")
    if not plugins:
        package = next((pip for kind, pip in _PACKAGES.items() if kind in decoder.UID.name), "pylibjpeg-libjpeg")
        raise UnreadableError(f"{decoder.UID.name} needs a decoder that is not installed: pip install {package}")
    # As pydicom expects it: an empty basic offset table and one fragment.
    head = struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, len(stream))
    return _by_pydicom(clip, head + stream, 0, number_of_frames=1, decoding_plugin=plugins[0], **options)


def _by_pydicom(clip: Clip, source: Any, index: int, **options: Any) -> tuple[np.ndarray, str]:
    pixels, properties = clip.decoder.as_array(source, index=index, raw=True, **clip.pixels | options)
    return pixels, str(properties["photometric_interpretation"])


def _decode_jpeg(data: bytes, frame: images.JpegFrame, interpretation: str) -> tuple[np.ndarray, str]:
    """Decodes 8-bit JPEG: baseline, extended, progressive or lossless.

    The colour information in a lossy stream (JFIF, subsampled colour) overrides the header, which often states RGB for
    JPEG files that were wrapped in DICOM unchecked.
    """
    if frame.components == 3 and (frame.is_lossless or interpretation == "RGB"):
        before = data[: frame.position]
        if b"JFIF\0" not in before and b"Adobe" not in before and not frame.is_subsampled:
            data = data[:2] + _ADOBE_RGB + data[2:]
    pixels = images.decode(data)  # also refuses damage that libjpeg concealed
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

    Values of up to 8 bits are only scaled to 0..255. Wider ones are mapped to uint8 by the first VOI LUT or window of
    the file, if it has one; else they become uint16 starting at 0, and are windowed when they are stored.
    """
    from_zero = values - values.min()
    top = len(values) - 1
    window = _window(header, values) if top > 255 else from_zero / top
    shown = from_zero.astype(np.uint16) if window is None else np.rint(255 * window).astype(np.uint8)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = (top if window is None else 255) - shown
    return shown.astype(np.uint16 if window is None else np.uint8)


def _window(header: Any, values: np.ndarray) -> np.ndarray | None:
    """Displayed levels from 0 (black) to 1 (white), None if no window is declared (DICOM PS3.3, C.11.1 and C.11.2)."""
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
    except ValueError:  # an invalid width
        return None
    if header.get("ModalityLUTSequence"):
        low, high = 0, 2 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:  # the output range of pydicom's windows: from the smallest stored value to the largest
        middle = len(values) // 2 if header.PixelRepresentation else 0
        low, high = values[middle], values[middle - 1]
    return None if low == high else np.clip((shown - low) / (high - low), 0, 1)


def _colours(header: Any, values: np.ndarray) -> np.ndarray:
    """RGB uint8 `[2**stored, 3]` of values by the palette of the file; for 16-bit entries, their upper 8 bits."""
    descriptor = header["RedPaletteColorLookupTableDescriptor"]
    entries, first, bits = (int(number) for number in descriptor.value)
    entries = entries & 0xFFFF or 0x10000
    if not header.PixelRepresentation:
        first &= 0xFFFF
    for colour in ("Red", "Green", "Blue"):
        keyword = f"{colour}PaletteColorLookupTableData"
        if keyword not in header:  # a segmented palette, which pydicom expands
            continue
        data = header[keyword].value
        order = "<" if header.original_encoding[1] else ">"
        if not isinstance(data, bytes):  # already parsed to numbers
            data, order = np.atleast_1d(data).astype("<u2").tobytes(), "<"
        # 8-bit entries are stored two or one per word. pydicom does not swap the words of big-endian files.
        numbers = np.frombuffer(data, order + "u2")
        if bits != 16 and len(data) < 2 * entries:
            numbers = np.frombuffer(numbers.astype("<u2").tobytes(), np.uint8)
        header[keyword].value = numbers[:entries].astype("<u2").tobytes()
    # Starts at 0 and is clipped here: pydicom would clip to the number of bits of an entry, which may be too few.
    descriptor.value = [entries & 0xFFFF, 0, bits]
    colours = apply_color_lut(np.clip(values, first, first + entries - 1) - first, header)[:, :3]
    return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)  # some declare 16 bits but hold 8
