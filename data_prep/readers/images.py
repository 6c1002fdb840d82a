"""Reads image files as frames: PNG, JPEG, TIFF and BMP with 8 or 16 bits, recognised by content, not by suffix.

The header is parsed here before anything is decoded: it shows that a file is too large, a stack or CMYK, for which
OpenCV would allocate memory, use the first page or convert, all silently. Pillow silently ends at a truncated or
circular chain of TIFF pages, and does not support JPEG of more than 8 bits.

Palettes are expanded, alpha is dropped, EXIF orientation is ignored (masks are drawn on the stored pixels), and colour
that carries no meaning becomes grey.
"""

import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data_prep.readers.base import Frame, Options, UnreadableError, open_file
from data_prep.readers.clips import (
    MAX_PIXELS,
    WRONG_COUNT,
    as_frames,
    channel_spread,
    check_size,
    chosen,
    has_colour,
    silence,
)

_MAX_BYTES = 6 * MAX_PIXELS + (1 << 20)  # three channels of 16 bits, uncompressed, and a generous header

_BAD_HEADER = "header is damaged or cut off"
_JPEG_LS = 0xF7
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PALETTE = 3  # colour type
_TIFF = b"II*\0", b"MM\0*"
_TIFF_SHORT = 3
_TIFF_KIND, _TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_PHOTOMETRIC = 254, 256, 257, 262
_TIFF_PAGE_NUMBER = 297
_TIFF_CMYK = 5
# What libjpeg prints when it continues without some of the data. Extraneous bytes, also reported, are harmless.
_PAINTED_OVER = re.compile(r"Corrupt JPEG data: (?!\d+ extraneous bytes)|Premature end|Inconsistent progression")
_PAGES = 16  # decoded at a time: every call of OpenCV walks through all earlier pages again


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frame of an image file, or the pages of a TIFF with several.

    Pages are frames of a clip: grey or colour is decided for all of them together (`as_frames`), and 16 bits are kept.
    Thumbnails and transparency masks among the pages are left out and not counted.

    Raises:
      UnreadableError: the file is missing, empty, damaged, too large, or of none of these formats.
    """
    data = load(path)
    pages, damage, warnings = _tiff_pages(data) if data.startswith(_TIFF) else ([], "", ())
    if len(pages) < 2 and not (pages and (pages[0].number or damage)):
        yield Frame(_one_or_three_channels(decode(checked(data))))
        return
    yield from as_frames(_decode_pages(data, pages, options), warnings=warnings)
    if damage:
        raise UnreadableError(damage)


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a mask as numbers: palette indices for a PNG with a palette, grey levels for all other images.

    Returns:
      uint8 `[H, W]`.

    Raises:
      UnreadableError: as in `read`, or the mask has several pages, colours without a palette or numbers above 255.
    """
    data = checked(load(path))
    if data.startswith(_PNG) and data[25] == _PNG_PALETTE:
        return _palette_indices(data)
    mask = _one_or_three_channels(decode(data), keep_colour=True)
    if mask.shape[2] != 1:
        raise UnreadableError("has colours, expected one number per pixel")
    if mask.max() > 255:
        raise UnreadableError("has numbers above 255")
    return mask[:, :, 0].astype(np.uint8)


def load(path: str | os.PathLike[str], most: int = _MAX_BYTES) -> bytes:
    """Reads the bytes of a file.

    Raises:
      UnreadableError: it cannot be read, is empty, or has more than `most` bytes.
    """
    with open_file(path) as file:
        data = file.read(most + 1)
    if not data:
        raise UnreadableError("empty file")
    if len(data) > most:
        raise UnreadableError(f"larger than {most >> 20} MiB")
    return data


def checked(data: bytes) -> bytes:
    """Returns the bytes of an image unchanged if its header is acceptable.

    Raises:
      UnreadableError: not a PNG, JPEG, TIFF or BMP, an unsupported kind of these, truncated, or larger than
        `MAX_PIXELS`.
    """
    try:
        if data.startswith(_PNG):
            width, height = struct.unpack_from(">II", data, 16)
        elif data.startswith(b"\xff\xd8\xff"):
            frame = jpeg_frame(data)
            if frame.components not in (1, 3):
                raise UnreadableError(f"JPEG with {frame.components} components (CMYK?), expected grey or colour")
            width, height = frame.width, frame.height
        elif data.startswith(_TIFF):
            pages, damage, _ = _tiff_pages(data)
            if damage or not pages:
                raise UnreadableError(damage or "TIFF has no pages")
            if len(pages) > 1 or pages[0].number:
                raise UnreadableError("TIFF with several pages, expected one image per file")
            _, width, height = pages[0]
        elif data.startswith(b"BM"):
            (header,) = struct.unpack_from("<I", data, 14)
            width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
            height = abs(height)  # negative if rows are stored from top to bottom
        else:
            raise UnreadableError("not a PNG, JPEG, TIFF or BMP")
    except struct.error as error:
        raise UnreadableError(_BAD_HEADER) from error
    check_size(width, height)
    return data


class JpegFrame(NamedTuple):
    """The content of the frame header of a JPEG or JPEG-LS stream, and its position in the stream."""

    width: int
    height: int
    components: int
    precision: int  # bits
    is_lossless: bool
    is_ls: bool  # JPEG-LS, which OpenCV does not support
    is_subsampled: bool  # the components differ in size
    position: int


def jpeg_frame(data: bytes) -> JpegFrame:
    """Reads the frame header of a JPEG or JPEG-LS stream.

    Raises:
      UnreadableError: it is damaged, or the stream is truncated.
    """
    frame, position = None, 2
    try:
        while True:
            fill, marker, length = struct.unpack_from(">BBH", data, position)
            if fill != 0xFF:
                raise UnreadableError(_BAD_HEADER)
            if marker == 0xFF:  # padding
                position += 1
                continue
            if marker == _JPEG_LS or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # not DHT, JPG, DAC
                precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
                sampling = set(data[position + 11 : position + 10 + 3 * components : 3])
                lossless, ls = marker in (0xC3, 0xC7, 0xCB, 0xCF), marker == _JPEG_LS
                frame = JpegFrame(width, height, components, precision, lossless, ls, len(sampling) > 1, position)
            if marker == 0xDA:  # start of scan
                # Within a scan, FF D9 can only be the end; decoders paint the missing rest of a truncated image grey.
                if frame is None or data.rfind(b"\xff\xd9") < position:
                    raise UnreadableError("cut off")
                return frame
            position += 2 + length
    except struct.error as error:
        raise UnreadableError(_BAD_HEADER) from error


class _Page(NamedTuple):
    number: int  # in the chain of all pages
    width: int
    height: int


def _tiff_pages(data: bytes) -> tuple[list[_Page], str, tuple[str, ...]]:
    """The pages of a TIFF that are pictures, why there are no more of them ("" = all), and `Frame.warnings`."""
    order = "<" if data.startswith(b"II") else ">"
    pages: list[_Page] = []
    seen: set[int] = set()
    declared, damage = 0, ""
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        while directory:
            if directory in seen:
                raise UnreadableError(_BAD_HEADER)
            seen.add(directory)
            (count,) = struct.unpack_from(order + "H", data, directory)
            tags = {}
            for offset in range(directory + 2, directory + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(order + "HH", data, offset)
                (tags[tag],) = struct.unpack_from(order + ("H" if kind == _TIFF_SHORT else "I"), data, offset + 8)
                if tag == _TIFF_PAGE_NUMBER:  # ... of how many
                    (declared,) = struct.unpack_from(order + "H", data, offset + 10)
            if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_CMYK:
                raise UnreadableError("CMYK TIFF, expected grey or colour")
            width, height = tags.get(_TIFF_WIDTH, 0), tags.get(_TIFF_HEIGHT, 0)
            check_size(width, height)  # for every page, since several are decoded at a time
            (directory,) = struct.unpack_from(order + "I", data, directory + 2 + 12 * count)
            if not tags.get(_TIFF_KIND, 0) & 0b101:  # reduced copy of another page, or transparency mask
                pages.append(_Page(len(seen) - 1, width, height))
    except struct.error:
        damage = _BAD_HEADER
    except UnreadableError as error:
        damage = str(error)
    wrong = not damage and declared not in (0, len(seen))
    return pages, damage, (WRONG_COUNT,) if wrong else ()


def _decode_pages(data: bytes, pages: list[_Page], options: Options) -> Iterator[tuple[int, np.ndarray]]:
    wanted = chosen(len(pages), options)
    buffer = np.frombuffer(data, np.uint8)
    step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    decoded: dict[int, np.ndarray] = {}
    for number in wanted:
        page, width, height = pages[number]
        together = min(_PAGES // step**2, MAX_PIXELS // (width * height), pages[-1].number + 1 - page)
        for end in (page + max(1, together), page + 1):  # then the page alone, in case a later one is damaged
            if page not in decoded:
                decoded = dict(enumerate(_decode_range(buffer, page, end), page))
        if page not in decoded:
            raise UnreadableError(f"page {number} cannot be decoded")
        yield number, _one_or_three_channels(_checked_depth(decoded.pop(page)), keep_colour=True)


def _decode_range(buffer: np.ndarray, first: int, end: int) -> Sequence[np.ndarray]:
    try:
        with silence():
            return cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(first, end))[1]
    except cv2.error:
        return []


def decode(data: bytes) -> np.ndarray:
    """Decodes an image whose header was checked: uint8 or uint16 `[H, W]` or `[H, W, C]`, BGR.

    Raises:
      UnreadableError: it cannot be decoded, or libjpeg continued without some of the data and concealed the damage.
    """
    try:
        with silence() as said:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UnreadableError("cannot be decoded") from error
    if pixels is None:
        raise UnreadableError("cannot be decoded")
    if _PAINTED_OVER.search(said[0]):
        raise UnreadableError("damaged")
    return _checked_depth(pixels)


def _checked_depth(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UnreadableError(f"{pixels.dtype} pixels, expected 8 or 16 bits")
    return pixels


def _palette_indices(data: bytes) -> np.ndarray:
    from PIL import Image  # OpenCV expands palettes

    try:
        return np.array(Image.open(io.BytesIO(data), formats=["PNG"]), np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError("cannot be decoded") from error


def _one_or_three_channels(pixels: np.ndarray, keep_colour: bool = False) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.shape[2] not in (3, 4):
        raise UnreadableError(f"{pixels.shape[2]} channels, expected grey or colour")
    if not cv2.countNonZero(channel_spread(pixels)):
        return pixels[:, :, 1:2].copy()
    if not keep_colour and not has_colour(pixels):
        return cv2.cvtColor(pixels[:, :, :3], cv2.COLOR_BGR2GRAY)[:, :, None]
    return cv2.cvtColor(pixels[:, :, :3], cv2.COLOR_BGR2RGB)
