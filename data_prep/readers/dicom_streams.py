"""Compressed pixels of DICOM files: where each frame lies, how large it says it is, and two decoders.

Run lengths are unpacked here, where they cannot unpack to more than a frame; JPEG of 8 bits is decoded by OpenCV.
"""

import contextlib
import struct
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np

from data_prep.readers import images
from data_prep.readers.base import UnreadableError

_MAX_PIECES = 200_000
_MAX_TILES = 4096  # of a JPEG 2000 frame; scanners write one
_J2K = b"\xff\x4f\xff\x51"

_JPEG_LS, _LOSSLESS = 0xF7, (0xC3, 0xC7, 0xCB, 0xCF)  # markers of the start of a frame

# JPEG leaves open whether three components are RGB; this marker says that they are, and nothing is converted.
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"

Piece = tuple[int, int]  # offset and length in bytes


def find_frames(file: BinaryIO, end: int, count: int) -> tuple[list[list[Piece]], int]:
    """Where the pieces of each frame lie, and where the pixel data ends (DICOM PS3.5, A.4).

    Args:
      file: stands at the table of offsets, the first item of the pixel data.
      end: of the pixel data or the file, in bytes.
      count: of frames, as declared.

    Raises:
      UnreadableError: cut off, damaged, or another number of frames.
    """
    pieces: list[Piece] = []
    while (position := file.tell()) + 8 <= end:
        group, element, length = struct.unpack("<HHI", read_piece(file, (position, 8)))
        if (group, element) == (0xFFFE, 0xE0DD):
            break
        if (group, element) != (0xFFFE, 0xE000) or len(pieces) > _MAX_PIECES:
            raise UnreadableError("compressed pixels are damaged")
        if position + 8 + length > end:
            raise UnreadableError("cut off: fewer pixels than the header declares")
        pieces.append((position + 8, length))
        file.seek(length, 1)
    if len(pieces) < 2:
        raise UnreadableError("cut off: fewer pixels than the header declares")
    after = file.tell()
    table, *pieces = pieces
    if count == 1:
        frames = [pieces]
    elif len(pieces) == count:
        frames = [[piece] for piece in pieces]
    elif table[1] == 4 * count:
        starts = set(struct.unpack(f"<{count}I", read_piece(file, table)))
        frames = _group(pieces, [offset - pieces[0][0] in starts for offset, _ in pieces])
    else:  # no table: a JPEG or JPEG 2000 stream ends with this marker, and perhaps a byte of padding
        tails = [read_piece(file, (offset + max(length - 3, 0), min(length, 3))) for offset, length in pieces]
        frames = _group(pieces, [True, *(b"\xff\xd9" in tail for tail in tails[:-1])])
    if len(frames) != count:
        raise UnreadableError("number of frames is not the one that the header declares")
    return frames, after


def _group(pieces: list[Piece], begins: list[bool]) -> list[list[Piece]]:
    frames: list[list[Piece]] = []
    for piece, begin in zip(pieces, begins, strict=True):
        if begin or not frames:
            frames.append([])
        frames[-1].append(piece)
    return frames


def read_piece(file: BinaryIO, piece: Piece) -> bytes:
    """Reads (offset, length) of a file.

    Raises:
      UnreadableError: cut off.
    """
    file.seek(piece[0])
    data = file.read(piece[1])
    if len(data) < piece[1]:
        raise UnreadableError("cut off: fewer pixels than the header declares")
    return data


def check_stream(data: bytes, rows: int, columns: int, samples: int) -> bytes:
    """Compares the size that a JPEG, JPEG-LS or JPEG 2000 stream declares with the header.

    Returns:
      The stream, without the file header that some put before JPEG 2000.

    Raises:
      UnreadableError: they differ, or the stream is damaged or cut off.
    """
    if data.startswith(b"\xff\xd8\xff"):
        start = _start_of_frame(data)
        shape = start.rows, start.columns, start.components
        if data.rfind(b"\xff\xd9") < start.position:  # decoders paint the missing rest grey, or look for it long
            raise UnreadableError("cut off: fewer pixels than the header declares")
    else:
        begin = data.find(_J2K)
        if begin < 0:
            raise UnreadableError("compressed pixels are damaged")
        data = data[begin:]
        shape = _j2k_shape(data)
    if shape != (rows, columns, samples):
        raise UnreadableError("a frame and the header disagree about its size")
    return data


class _Start(NamedTuple):
    """Start of frame of a JPEG or JPEG-LS stream."""

    marker: int
    precision: int
    rows: int
    columns: int
    components: int
    position: int  # in the stream


def _start_of_frame(data: bytes) -> _Start:
    position = 2
    while True:
        fill, marker, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF or marker == 0xDA:  # start of scan
            raise UnreadableError("compressed pixels are damaged")
        if marker == 0xFF:  # padding
            position += 1
        elif marker == _JPEG_LS or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # not DHT, JPG, DAC
            precision, rows, columns, components = struct.unpack_from(">BHHB", data, position + 4)
            return _Start(marker, precision, rows, columns, components, position)
        else:
            position += 2 + length


def _j2k_shape(data: bytes) -> tuple[int, int, int]:
    right, bottom, left, top, width, height, _, _, components = struct.unpack_from(">8IH", data, 8)
    if not (width and height) or -(-right // width) * -(-bottom // height) > _MAX_TILES:
        raise UnreadableError("compressed pixels are damaged")
    return bottom - top, right - left, components


def decode_jpeg(data: bytes, interpretation: str) -> tuple[np.ndarray, str] | None:
    """Decodes JPEG of 8 bits: baseline, extended, progressive or lossless.

    What a lossy stream says about its colours (JFIF, names of components, subsampled colour) counts more than the
    header, which says RGB of JPEG files that were wrapped up without a look.

    Args:
      data: that `check_stream` has seen.
      interpretation: photometric interpretation in the header.

    Returns:
      uint8 `[rows, columns]` or `[rows, columns, 3]`, and what it is now; None for JPEG-LS, JPEG 2000 and more bits.

    Raises:
      UnreadableError: damaged.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    start = _start_of_frame(data)
    if start.precision != 8 or start.marker == _JPEG_LS:
        return None
    lossless = start.marker in _LOSSLESS
    if start.components == 3 and (lossless or interpretation == "RGB"):
        before = data[: start.position]
        sampling = {data[start.position + 11 + 3 * index] for index in range(3)}
        if b"JFIF\0" not in before and b"Adobe" not in before and len(sampling) == 1:
            data = data[:2] + _ADOBE_RGB + data[2:]
    pixels = images.decode(data)  # also refuses what libjpeg painted over
    if start.components == 1:
        return pixels, interpretation
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), interpretation if lossless else "RGB"


def unpack_runs(data: bytes, rows: int, columns: int, samples: int, allocated: int) -> np.ndarray:
    """Unpacks run lengths (DICOM PS3.5, annex G): a segment for each byte of each sample, the high byte first.

    Returns:
      uint8 or uint16 `[rows, columns]` or `[rows, columns, 3]`.

    Raises:
      UnreadableError: damaged or cut off.
    """
    count, *offsets = struct.unpack_from("<16I", data)
    depth = allocated // 8
    if count != samples * depth:
        raise UnreadableError("compressed pixels are damaged")
    ends = [*offsets[1:count], len(data)]
    planes = [_unpack_segment(data, *span, rows * columns) for span in zip(offsets, ends, strict=False)]
    stacked = np.stack(planes).reshape(samples, depth, rows, columns)
    pixels = stacked[:, 0] if depth == 1 else stacked[:, 0].astype(np.uint16) << 8 | stacked[:, 1]
    return pixels[0] if samples == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _unpack_segment(data: bytes, start: int, end: int, size: int) -> np.ndarray:
    packed, unpacked, position = data[start:end], bytearray(), 0
    with contextlib.suppress(IndexError):  # the end, cheaper to run into than to look out for
        while len(unpacked) < size:
            for _ in range(1024):  # likewise for the size
                head = packed[position]
                if head < 128:
                    unpacked += packed[position + 1 : position + 2 + head]
                    position += 2 + head
                elif head > 128:
                    unpacked += packed[position + 1 : position + 2] * (257 - head)
                    position += 2
                else:
                    position += 1
    if len(unpacked) < size:
        raise UnreadableError("cut off: fewer pixels than the header declares")
    return np.frombuffer(unpacked, np.uint8, size)
