"""Image files to frames: PNG, JPEG, TIFF and BMP with 8 or 16 bits, told apart by their content, not by their suffix.

The header is read by hand before anything is decoded: it is where a file says that it is too large, a stack or CMYK,
and OpenCV would allocate, take the first page or convert without a word.
"""

import os
import pathlib
import re
import struct
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from data_prep.readers.base import Frame, Options, UnreadableError
from data_prep.readers.clips import MAX_PIXELS, as_frames, channel_spread, check_size, chosen, has_colour, silence
from data_prep.readers.kinds import IMAGES

SUFFIXES = IMAGES

_MAX_BYTES = 6 * MAX_PIXELS + (1 << 20)  # three channels of 16 bits, uncompressed, and a generous header

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PALETTE = 3  # colour type
_TIFF = b"II*\0", b"MM\0*"
_TIFF_SHORT = 3
_TIFF_KIND, _TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_PHOTOMETRIC = 254, 256, 257, 262
_TIFF_CMYK = 5
# What libjpeg prints when it goes on without some of the data. Bytes too many, which it prints too, are harmless.
_PAINTED_OVER = re.compile(r"Corrupt JPEG data: (?!\d+ extraneous bytes)|Premature end|Inconsistent progression")
_PAGES = 16  # decoded at a time: OpenCV walks through the pages before them again for each call


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frame of an image file as in `read_image`, or the pages of a TIFF that has several.

    Pages are frames of a clip: grey or colour is decided for all of them (`as_frames`), 16 bits stay as they are.
    Thumbnails and transparency masks among the pages are left out and not counted.
    """
    data = load(path)
    pages = _tiff_pages(data) if data.startswith(_TIFF) else []
    if len(pages) > 1 or any(page for page, *_ in pages):
        yield from as_frames(_decode_pages(data, pages, options))
    else:
        yield Frame(_one_or_three_channels(decode(_checked(data))))


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a PNG, JPEG, TIFF or BMP.

    Palettes are expanded, alpha is dropped, EXIF orientation is ignored (masks are drawn on the stored pixels), and
    colour that carries no meaning becomes grey.

    Returns:
      uint8 or uint16 `[H, W, 1]` (grey) or `[H, W, 3]` (RGB), at most `MAX_PIXELS` pixels.

    Raises:
      UnreadableError: the file is missing, empty, damaged, too large, or none of these.
    """
    return _one_or_three_channels(decode(_checked(load(path))))


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a mask as numbers: those of the palette for a PNG that has one, grey levels for all other images.

    Returns:
      uint8 `[H, W]`.

    Raises:
      UnreadableError: as in `read_image`, or the mask has colours without a palette or numbers above 255.
    """
    data = _checked(load(path))
    if data.startswith(_PNG) and data[25] == _PNG_PALETTE:
        return _palette_indices(data)
    mask = _one_or_three_channels(decode(data), keep_colour=True)
    if mask.shape[2] != 1:
        raise UnreadableError("has colours, expected one number per pixel")
    if mask.max() > 255:
        raise UnreadableError("has numbers above 255")
    return mask[:, :, 0].astype(np.uint8)


def load(path: str | os.PathLike[str], most: int = _MAX_BYTES) -> bytes:
    """The bytes of a file.

    Raises:
      UnreadableError: it cannot be read, is empty, or has more than `most` bytes.
    """
    try:
        with pathlib.Path(path).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error
    if not data:
        raise UnreadableError("empty file")
    if len(data) > most:
        raise UnreadableError(f"larger than {most >> 20} MiB")
    return data


def _checked(data: bytes) -> bytes:
    """The same bytes, if their header asks for nothing unreasonable."""
    check_size(*image_size(data))
    return data


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as the header declares them.

    Raises:
      UnreadableError: not a PNG, JPEG, TIFF or BMP, a kind of it that is not supported, or cut off.
    """
    try:
        if data.startswith(_PNG):
            width, height = struct.unpack_from(">II", data, 16)
        elif data.startswith(b"\xff\xd8\xff"):
            width, height = _jpeg_size(data)
        elif data.startswith(_TIFF):
            width, height = _tiff_size(data)
        elif data.startswith(b"BM"):
            width, height = _bmp_size(data)
        else:
            raise UnreadableError("not a PNG, JPEG, TIFF or BMP")
    except struct.error as error:
        raise UnreadableError("header is damaged or cut off") from error
    if not (width and height):
        raise UnreadableError("header declares no pixels")
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int]:
    size, position = None, 2
    while True:
        fill, marker, length = struct.unpack_from(">BBH", data, position)
        if fill != 0xFF:
            raise UnreadableError("header is damaged or cut off")
        if marker == 0xFF:  # padding
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame; not DHT, JPG, DAC
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            if components not in (1, 3):
                raise UnreadableError(f"JPEG with {components} components (CMYK?), expected grey or colour")
            size = width, height
        if marker == 0xDA:  # start of scan
            # In a scan FF D9 is nothing but the end; decoders paint the missing rest of a cut-off image grey.
            if size is None or data.rfind(b"\xff\xd9") < position:
                raise UnreadableError("cut off")
            return size
        position += 2 + length


def _tiff_size(data: bytes) -> tuple[int, int]:
    pages = _tiff_pages(data)
    if not pages:
        raise UnreadableError("TIFF has no pages")
    if len(pages) > 1 or pages[0][0]:
        raise UnreadableError("TIFF with several pages, expected one image per file")
    return pages[0][1:]


def _tiff_pages(data: bytes) -> list[tuple[int, int, int]]:
    """(position in the chain, width, height) of the pages that are pictures."""
    order = "<" if data.startswith(b"II") else ">"
    pages, seen = [], set()
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        while directory:
            if directory in seen:
                raise UnreadableError("header is damaged or cut off")
            seen.add(directory)
            (count,) = struct.unpack_from(order + "H", data, directory)
            tags = {}
            for offset in range(directory + 2, directory + 2 + 12 * count, 12):
                tag, kind = struct.unpack_from(order + "HH", data, offset)
                (tags[tag],) = struct.unpack_from(order + ("H" if kind == _TIFF_SHORT else "I"), data, offset + 8)
            if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_CMYK:
                raise UnreadableError("CMYK TIFF, expected grey or colour")
            width, height = tags.get(_TIFF_WIDTH, 0), tags.get(_TIFF_HEIGHT, 0)
            check_size(width, height)  # of all pages, since several are decoded at a time
            if not tags.get(_TIFF_KIND, 0) & 0b101:  # reduced copy of another page, or transparency mask
                pages.append((len(seen) - 1, width, height))
            (directory,) = struct.unpack_from(order + "I", data, directory + 2 + 12 * count)
    except struct.error as error:
        raise UnreadableError("header is damaged or cut off") from error
    return pages


def _decode_pages(data: bytes, pages: list[tuple[int, int, int]], options: Options) -> Iterator[tuple[int, np.ndarray]]:
    wanted = chosen(len(pages), options)
    buffer = np.frombuffer(data, np.uint8)
    step = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    decoded: dict[int, np.ndarray] = {}
    for number in wanted:
        page, width, height = pages[number]
        if page not in decoded:
            together = min(_PAGES // step**2, MAX_PIXELS // (width * height))
            decoded = dict(enumerate(_decode_range(buffer, page, page + max(1, together)), page))
        if page not in decoded:
            raise UnreadableError(f"page {number} cannot be decoded")
        yield number, _one_or_three_channels(_checked_depth(decoded.pop(page)), keep_colour=True)


def _decode_range(buffer: np.ndarray, first: int, end: int) -> Sequence[np.ndarray]:
    try:
        with silence():
            return cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(first, end))[1]
    except cv2.error as error:
        raise UnreadableError("cannot be decoded") from error


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return abs(width), abs(height)  # negative: the rows run from top to bottom


def decode(data: bytes) -> np.ndarray:
    """Decodes an image whose header was checked -> uint8 or uint16 `[H, W]` or `[H, W, C]`, BGR.

    Raises:
      UnreadableError: it cannot be decoded, or libjpeg went on without some of its data and painted over the rest.
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
    # OpenCV expands palettes; colours are looked up to get back what was drawn. Of equal ones the first counts.
    pixels, position = decode(data), 8
    length, kind = struct.unpack_from(">I4s", data, position)
    while kind != b"PLTE":  # there is one, or it would not have been decoded
        position += 12 + length
        length, kind = struct.unpack_from(">I4s", data, position)
    palette = np.frombuffer(data, np.uint8, length, position + 8).reshape(-1, 3).astype(np.int32)
    colours, numbers = np.unique(palette @ [1 << 16, 1 << 8, 1], return_index=True)
    found = pixels[:, :, :3].astype(np.int32) @ [1, 1 << 8, 1 << 16]  # decoded as BGR
    return numbers[np.searchsorted(colours, found)].astype(np.uint8)


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
