"""From the numbers in a DICOM file to grey levels and colours, as one table per file.

Numbers have 16 bits at most, so that everything that DICOM puts between them and the screen (sign, modality, window,
inversion, palette) is worked out once for all of them.
"""

from collections.abc import MutableSequence
from typing import Any

import cv2
import numpy as np

from data_prep.readers.base import UnreadableError


def greys(header: Any, values: np.ndarray) -> np.ndarray:
    """Grey levels, bright = echo: MONOCHROME1 is inverted.

    Up to 8 bits are shown as they are, spread to 0..255. More than 8 go through the first VOI table or window of the
    file, if it has one, to uint8; else they become uint16 from 0 and whoever stores them chooses the window.

    Args:
      header: `pydicom.Dataset`.
      values: int32 `[2**stored]`, what the stored numbers 0, 1, 2, ... stand for.

    Returns:
      uint8 or uint16 `[2**stored]`.
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
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(values, header)
    if header.get("VOILUTSequence"):
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return np.clip(apply_voi(np.rint(values).astype(np.int32), header) / (2**bits - 1), 0, 1)
    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    if centre is None or width is None or not np.isfinite([centre, width]).all():
        return None
    function = header.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID" and width > 0:
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -50, 50)))
    if function == "LINEAR":  # reaches white at the centre of its last value
        centre, width = centre - 0.5, width - 1
    if width <= 0:
        return None
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    if isinstance(value, MutableSequence):
        value = value[0] if value else None
    return None if value in (None, "") else float(value)


def palette(header: Any, values: np.ndarray) -> np.ndarray:
    """Colours of a palette (DICOM PS3.3, C.7.6.3.1.5 and C.7.9.2), 16 bits cut to 8.

    Args:
      header: `pydicom.Dataset`.
      values: int32 `[2**stored]`, what the stored numbers 0, 1, 2, ... stand for.

    Returns:
      uint8 RGB `[2**stored, 3]`.
    """
    entries, first, bits = (int(number) for number in header.RedPaletteColorLookupTableDescriptor)
    entries = entries & 0xFFFF or 0x10000
    if values[0] == values.min():  # unsigned
        first &= 0xFFFF
    channels = [_channel(header, colour, entries, bits) for colour in ("Red", "Green", "Blue")]
    colours = np.stack(channels, axis=1)
    if colours.max() > 255:  # some that declare 16 bits hold 8
        colours >>= 8
    return colours.astype(np.uint8)[np.clip(values - first, 0, entries - 1)]


def _channel(header: Any, colour: str, entries: int, bits: int) -> np.ndarray:
    keyword = f"{colour}PaletteColorLookupTableData"
    segmented = keyword not in header
    data = header[f"Segmented{keyword}" if segmented else keyword].value
    if not isinstance(data, bytes):  # numbers already, if written as such
        data = np.atleast_1d(data).astype("<u2").tobytes()
    elif not header.original_encoding[1]:
        data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
    # Eight bits come two to a word, or one.
    wide = bits == 16 or (not segmented and len(data) >= 2 * entries)
    numbers = np.frombuffer(data, "<u2" if wide else np.uint8)
    if segmented:
        numbers = _unfold(numbers, entries)
    if len(numbers) < entries:
        raise UnreadableError("palette is cut off")
    return numbers[:entries].astype(np.uint16)


def _unfold(numbers: np.ndarray, entries: int) -> np.ndarray:
    unfolded: list[np.ndarray] = []
    length = position = 0
    while length < entries and position + 2 < len(numbers):
        kind, count = int(numbers[position]), int(numbers[position + 1])
        if kind == 0:
            unfolded.append(numbers[position + 2 : position + 2 + count])
            position += 2 + count
        elif kind == 1 and unfolded:
            unfolded.append(np.rint(np.linspace(unfolded[-1][-1], numbers[position + 2], count + 1)[1:]))
            position += 3
        else:
            raise UnreadableError("palette of a kind that is not supported")
        length += count
    return np.concatenate(unfolded) if unfolded else numbers[:0]


def look_up(numbers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[numbers]`, fast for the common 8 bits.

    Args:
      numbers: uint8 or uint16 `[H, W]`, all below the length of the table.
      table: uint8 or uint16 `[N]` or `[N, 3]`.
    """
    if numbers.dtype == np.uint8 and len(table) == 256 and table.dtype == np.uint8:
        if table.ndim == 1:
            return cv2.LUT(numbers, table)
        return cv2.LUT(cv2.merge([numbers] * 3), table[None])
    return table[numbers]
