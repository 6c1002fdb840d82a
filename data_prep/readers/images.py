"""Image files to frames: PNG, JPEG, TIFF and BMP with 8 or 16 bits, told apart by their content, not by their suffix.

The header is read by hand before anything is decoded: it is where a file says that it is too large, a stack or CMYK,
and OpenCV would allocate, take the first page or convert without a word.
"""

import os
import pathlib
import struct
from collections.abc import Iterator

import cv2
import numpy as np

from data_prep.readers.base import Frame, Options, UnreadableError

#: What a folder is searched for, in lower case.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})

MAX_PIXELS = 50_000_000
_MAX_BYTES = 6 * MAX_PIXELS + (1 << 20)  # three channels of 16 bits, uncompressed, and a generous header

# Colour carries meaning (Doppler, elastography) when more than this share of the pixels has channels that differ by
# more than this much of the range. Tinted B-mode stays below 45 / 255, and calipers and logos below 1 pixel in 1000.
_COLOUR_SHARE = 0.001
_COLOUR_SPREAD = 48 / 255

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PALETTE = 3  # colour type
_TIFF_SHORT = 3
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_PHOTOMETRIC = 256, 257, 262
_TIFF_CMYK = 5


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the one frame of an image file; see `read_image`."""
    del options  # for files with more than one frame
    yield Frame(read_image(path))


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a PNG, JPEG, TIFF or BMP.

    Palettes are expanded, alpha is dropped, EXIF orientation is ignored (masks are drawn on the stored pixels), and
    colour that carries no meaning becomes grey.

    Returns:
      uint8 or uint16 `[H, W, 1]` (grey) or `[H, W, 3]` (RGB), at most `MAX_PIXELS` pixels.

    Raises:
      UnreadableError: the file is missing, empty, damaged, too large, or none of these.
    """
    return _one_or_three_channels(_decode(_read_checked(path)))


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a mask as numbers: those of the palette for a PNG that has one, grey levels for all other images.

    Returns:
      uint8 `[H, W]`.

    Raises:
      UnreadableError: as in `read_image`, or the mask has colours without a palette or numbers above 255.
    """
    data = _read_checked(path)
    if data.startswith(_PNG) and data[25] == _PNG_PALETTE:
        return _palette_indices(data)
    mask = _one_or_three_channels(_decode(data), keep_colour=True)
    if mask.shape[2] != 1:
        raise UnreadableError("has colours, expected one number per pixel")
    if mask.max() > 255:
        raise UnreadableError("has numbers above 255")
    return mask[:, :, 0].astype(np.uint8)


def _read_checked(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file whose header asks for nothing unreasonable."""
    try:
        with pathlib.Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}") from error
    if not data:
        raise UnreadableError("empty file")
    if len(data) > _MAX_BYTES:
        raise UnreadableError(f"larger than {_MAX_BYTES >> 20} MiB")
    width, height = image_size(data)
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million")
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
        elif data[:4] in (b"II*\0", b"MM\0*"):
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
    order = "<" if data.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, directory)
    tags = {}
    for entry in range(count):
        offset = directory + 2 + 12 * entry
        tag, kind = struct.unpack_from(order + "HH", data, offset)
        (tags[tag],) = struct.unpack_from(order + ("H" if kind == _TIFF_SHORT else "I"), data, offset + 8)
    (following,) = struct.unpack_from(order + "I", data, directory + 2 + 12 * count)
    if following:
        raise UnreadableError("TIFF with several pages, expected one image per file")
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_CMYK:
        raise UnreadableError("CMYK TIFF, expected grey or colour")
    return tags.get(_TIFF_WIDTH, 0), tags.get(_TIFF_HEIGHT, 0)


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return abs(width), abs(height)  # negative: the rows run from top to bottom


def _decode(data: bytes) -> np.ndarray:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UnreadableError("cannot be decoded") from error
    if pixels is None:
        raise UnreadableError("cannot be decoded")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UnreadableError(f"{pixels.dtype} pixels, expected 8 or 16 bits")
    return pixels


def _palette_indices(data: bytes) -> np.ndarray:
    # OpenCV expands palettes; colours are looked up to get back what was drawn. Of equal ones the first counts.
    pixels, position = _decode(data), 8
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
    blue, green, red = cv2.split(pixels)[:3]
    spread = cv2.subtract(cv2.max(cv2.max(blue, green), red), cv2.min(cv2.min(blue, green), red))
    if not cv2.countNonZero(spread):
        return green[:, :, None]
    limit = _COLOUR_SPREAD * np.iinfo(pixels.dtype).max
    if not keep_colour and np.count_nonzero(spread > limit) <= _COLOUR_SHARE * spread.size:
        return cv2.cvtColor(pixels[:, :, :3], cv2.COLOR_BGR2GRAY)[:, :, None]
    return cv2.merge([red, green, blue])
