"""Reads DICOM files as frames: ultrasound stills and clips, with or without a preamble or a suffix.

Orientation: rows and columns as stored, which is how a scanner displays them; nothing is flipped, rotated or
resampled. Bright means echo: MONOCHROME1 is inverted.

Intensity: values of up to 8 bits are kept unchanged. Wider ones are mapped to 8 bits by the VOI LUT or window that the
file declares; without one they stay 16 bits wide, to be windowed later by the percentiles of the frame.

Colour: palettes and YBR become RGB; a clip whose colour carries no meaning becomes grey as a whole. If the file
declares image regions, only these are examined, since a coloured logo or button beside them means nothing.

Regions: a region with spatial format 2D and data type tissue or colour flow becomes a box, if its location is given.
Others (M-mode, spectra, traces, ECG and other waveforms, grey and colour bars, graphics) are not images of tissue;
cleaning blanks whatever is outside all boxes. Files that declare M-mode, spectra or waveforms but no 2D region are
refused. If a region extends beyond the picture, the regions were declared before it was cropped or resized, and none
is used.

Pixel size: that of the 2D regions, if they state one in cm, else `PixelSpacing`; unknown if regions state different
ones or were declared for another size of picture.

Only ultrasound is read: modality US or IVUS, or OT (secondary captures: paper, frame grabbers); a file without a
modality must have an ultrasound or secondary capture SOP class. Video inside DICOM (MPEG, HEVC) is not supported.

This module passes on pixels, including anything burnt into them, boxes, and the facts listed here; everything else is
only counted by kind. Overlays are never drawn. The ids in `patient` and `video` are raw, for `data_prep.identity`.
Error messages quote nothing from a file except sizes and well-known names.
"""

import collections
import contextlib
import io
import logging
import os
import warnings
import zlib
from collections.abc import Iterator, MutableSequence, Sequence
from typing import Any, BinaryIO

import numpy as np
from pydicom import Dataset
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.filereader import read_dataset

from data_prep.readers import dicom_pixels
from data_prep.readers.base import UNKNOWN_SPACING, Frame, Options, UnreadableError, known_spacing, open_file
from data_prep.readers.clips import Boxes, as_frames, chosen, silence
from data_prep.readers.kinds import HEAD_BYTES, VRS, kind_of

_MAX_DEFLATED = 1 << 29
_MAX_ELEMENT = 1 << 20  # bytes; longer elements, such as raw scanner data, are not read into memory
_PIXELS = 0x7FE00008, 0x7FE00009, 0x7FE00010  # 32-bit float, 64-bit float, 8 or 16 bits

#: Text elements that become facts.
TEXTS = ("Manufacturer", "ManufacturerModelName", "TransducerType", "PhotometricInterpretation")
_MAX_FACT = 64

_MODALITIES = frozenset(("US", "IVUS", "OT"))
# Well-known values may be quoted in a message; any other text in this element could be the name of a person.
_OTHER_MODALITIES = frozenset(
    ("CR", "CT", "DX", "ECG", "ES", "KO", "MG", "MR", "NM", "OP", "PR", "PT", "RF", "SEG", "SR", "XA", "XC")
)
_CLASSES = tuple(  # ultrasound, ultrasound clip, volume, secondary capture; retired UIDs are prefixes of current ones
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("3", "3.1", "6", "6.1", "6.2", "7", "7.1", "7.2", "7.3", "7.4")
)

# PS3.3, C.8.5.5.1.1 and C.8.5.5.1.2
_FORMATS = ("none", "2D", "M-mode", "spectral", "waveform", "graphics")
_TYPES = (
    *("none", "tissue", "colour flow", "PW spectral", "CW spectral", "Doppler mean trace", "Doppler mode trace"),
    *("Doppler max trace", "volume trace", "d(volume)/dt trace", "ECG", "pulse", "phonocardiogram", "grey bar"),
    *("colour bar", "integrated backscatter", "area trace", "d(area)/dt trace", "other physiological"),
)
_CORNERS = "RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1"
_2D, _STRIPS, _TISSUE_OR_FLOW, _CM = 1, (2, 3, 4), (1, 2), 3

_DATES, _TEXTS = ("DA", "DT", "TM"), ("LO", "LT", "SH", "ST", "UC", "UT")
_IDENTIFIERS = ("AE", "AS", "UN", "UR")
_IDENTIFYING = (
    *("AccessionNumber", "AdmissionID", "StudyID", "StationName", "DeviceSerialNumber", "RequestedProcedureID"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "ScheduledProcedureStepID"),
    *("PerformedProcedureStepID", "PlacerOrderNumberImagingServiceRequest", "FillerOrderNumberImagingServiceRequest"),
)
_EMBEDDED = {
    "IconImageSequence": "embedded pictures and documents",
    "EncapsulatedDocument": "embedded pictures and documents",
    "GraphicAnnotationSequence": "curves and graphics",
    "WaveformSequence": "curves and graphics",
}
_PLACEHOLDERS = (
    *("anon", "anonymised", "anonymized", "anonymous", "deidentified", "na", "noid", "noname", "none", "null"),
    *("removed", "unknown"),
)


def read(path: str | os.PathLike[str], options: Options) -> Iterator[Frame]:
    """Yields the frames of a DICOM file that are actually present, whatever number its header states.

    Frames left out are not decoded. One frame at a time is in memory, except for the first 8 of a colour clip.

    Raises:
      UnreadableError: not DICOM, not ultrasound, no pixels, damaged, truncated, too large, or of an unsupported kind.
    """
    with contextlib.ExitStack() as stack:
        with _quietly("header is damaged"):
            file = stack.enter_context(open_file(path))
            syntax, meta, header, file = _read_header(file)
            _check_kind(header)
            clip = dicom_pixels.open_clip(file, syntax, header)
            found = _boxes(header, clip.pixels["rows"], clip.pixels["columns"])
            patient, video = _identifiers(header)
            technical = _facts(header, clip, with_size=bool(found))
            spacing = _spacing(header, trusted=bool(found) or not _images(header))
            removed = _count_removed(meta, header, _read_rest(file, clip, header))
        pictures = _decode(file, clip, chosen(clip.count, options))
        # A coloured logo or button outside the regions does not make a clip coloured.
        for frame in as_frames(pictures, found):
            yield Frame(frame.pixels, frame.number, found, patient, video, technical, removed, clip.warnings, spacing)
    if clip.damage:
        raise UnreadableError(clip.damage)


def _decode(file: BinaryIO, clip: dicom_pixels.Clip, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    for number in numbers:
        with _quietly("a frame is damaged"):
            pixels = dicom_pixels.decode(file, clip, number)
        yield number, pixels


@contextlib.contextmanager
def _quietly(reason: str) -> Iterator[None]:
    """Converts all errors to `UnreadableError`, and keeps pydicom and its decoders from printing values of the file."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg", "openjpeg")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            yield
    except (UnreadableError, MemoryError):
        raise
    except Exception:
        raise UnreadableError(reason) from None  # its message and cause could quote values of the file
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_header(file: BinaryIO) -> tuple[str, Any, Any, BinaryIO]:
    """Transfer syntax, file meta information, elements before the pixels, and the file, positioned at the pixels."""
    head = file.read(HEAD_BYTES)
    if kind_of(head) != "dicom":
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
    """Guesses the transfer syntax of a file that does not state it, from its first element."""
    start = file.read(6)
    file.seek(-len(start), os.SEEK_CUR)
    if start[4:6] not in VRS:
        return dicom_pixels.IMPLICIT
    return dicom_pixels.BIG_ENDIAN if start[0] == 0 else dicom_pixels.EXPLICIT


def _inflate(file: BinaryIO) -> BinaryIO:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(file.read(_MAX_DEFLATED), _MAX_DEFLATED)  # of a truncated file, what is left
    if inflater.unconsumed_tail:
        raise UnreadableError(f"deflated data is larger than {_MAX_DEFLATED >> 20} MiB")
    return io.BytesIO(data)


def _read_rest(file: BinaryIO, clip: dicom_pixels.Clip, header: Any) -> Any:
    """The elements after the pixels; none if they cannot be parsed."""
    if clip.damage:
        return Dataset()
    file.seek(clip.end)
    try:
        implicit, little = header.original_encoding
        return read_dataset(file, implicit, little, defer_size=_MAX_ELEMENT)[0x7FE00011:]
    except Exception:
        return Dataset()


# ---- what is taken from the header, and what is not -----------------------------------------------------------------


def _check_kind(header: Any) -> None:
    """Raises UnreadableError unless the file is an ultrasound image."""
    modality = _text(header, "Modality")
    if modality in _OTHER_MODALITIES:
        raise UnreadableError(f"modality {modality}, expected US, IVUS or OT")
    known = modality in _MODALITIES if modality else str(header.get("SOPClassUID")) in _CLASSES
    if not known:
        raise UnreadableError("not said to be ultrasound: expected modality US, IVUS or OT")
    formats = {region.get("RegionSpatialFormat") for region in _regions(header)}
    if _2D not in formats and formats.intersection(_STRIPS):
        raise UnreadableError("declares M-mode, spectra or waveforms only, no 2D image")


def _boxes(header: Any, rows: int, columns: int) -> Boxes:
    """The 2D regions of tissue or flow, as `Frame.boxes`."""
    found = []
    for region in _images(header):
        left, top, right, bottom = (int(region.get(name)) for name in _CORNERS)
        # The standard means the last pixel, but some devices write the first one after it.
        if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
            return ()  # declared for another size of the picture
        found.append((left, top, min(right + 1, columns), min(bottom + 1, rows)))
    return tuple(dict.fromkeys(found))


def _facts(header: Any, clip: dicom_pixels.Clip, with_size: bool) -> dict[str, str]:
    """Technical values that may be written; includes the pixel size (`with_size`) if the regions can be trusted."""
    regions = _regions(header)
    found = {name: _text(header, name)[:_MAX_FACT] for name in TEXTS} | {
        "BitsStored": str(clip.pixels["bits_stored"]),
        "NumberOfFrames": str(clip.count),
        "Rows": str(clip.pixels["rows"]),
        "Columns": str(clip.pixels["columns"]),
        "TransferSyntax": clip.decoder.UID.name,
        "RegionSpatialFormat": _names(regions, "RegionSpatialFormat", _FORMATS),
        "RegionDataType": _names(regions, "RegionDataType", _TYPES),
    }
    for axis in "XY" if with_size else "":
        sizes = {  # in four digits, since all of them could identify an examination
            f"{abs(float(region.get(f'PhysicalDelta{axis}') or 0)):.4g} cm"
            for region in _images(header)
            if region.get(f"PhysicalUnits{axis}Direction") == _CM
        }
        found[f"PhysicalDelta{axis}"] = ", ".join(sorted(sizes))
    return {name: value for name, value in found.items() if value}


def _spacing(header: Any, trusted: bool) -> tuple[float, float]:
    """Pixel spacing as in `Frame`; `trusted`: whether the regions, if any, were declared for this picture."""
    if not trusted:
        return UNKNOWN_SPACING
    try:
        sizes = {
            known_spacing(*(10 * abs(float(region.get(f"PhysicalDelta{axis}") or 0)) for axis in "YX"))
            for region in _images(header)
            if all(region.get(f"PhysicalUnits{axis}Direction") == _CM for axis in "YX")
        }
        if len(sizes) == 1:
            return sizes.pop()
        return known_spacing(*map(float, header.get("PixelSpacing") or (0, 0))) if not sizes else UNKNOWN_SPACING
    except Exception:  # an unreadable size is no reason to lose frames
        return UNKNOWN_SPACING


def _identifiers(header: Any) -> tuple[str, str]:
    """The patient, by ID and its issuer or else by name, empty if both are placeholders; and the SOP instance UID."""
    patient, issuer = _text(header, "PatientID"), _text(header, "IssuerOfPatientID")
    if not _says_something(patient):
        patient, issuer = _text(header, "PatientName"), ""
    if not _says_something(patient):
        patient = issuer = ""
    return f"{patient} ({issuer})" if issuer else patient, _text(header, "SOPInstanceUID")


def _says_something(value: str) -> bool:
    letters = "".join(filter(str.isalnum, value.casefold()))
    return bool(letters.strip("0x")) and letters not in _PLACEHOLDERS


def _text(header: Any, name: str) -> str:
    """A text value on one line; the first if there are several."""
    value = header.get(name)
    if isinstance(value, MutableSequence):
        value = value[0] if value else None
    shown = (letter for letter in str(value or "") if letter.isprintable() or letter.isspace())
    return " ".join("".join(shown).split())


def _regions(header: Any) -> list[Any]:
    return list(header.get("SequenceOfUltrasoundRegions") or ())


def _images(header: Any) -> list[Any]:
    return [
        region
        for region in _regions(header)
        if region.get("RegionSpatialFormat") == _2D
        and region.get("RegionDataType") in _TISSUE_OR_FLOW
        and all(isinstance(region.get(name), int) for name in _CORNERS)
    ]


def _names(regions: list[Any], element: str, names: tuple[str, ...]) -> str:
    numbers = {region.get(element) for region in regions}
    return ", ".join(name for number, name in enumerate(names) if number in numbers)


def _count_removed(*datasets: Any) -> dict[str, int]:
    """Number of elements that are not kept, by kind; elements without a value do not count."""
    counts: collections.Counter[str] = collections.Counter()
    for dataset in datasets:
        _count(dataset, counts, kept=TEXTS)
        for low, kind in ((0x5000, "curves and graphics"), (0x6000, "overlays")):
            groups = {tag.group for tag in list(dataset.keys())}  # each repeating group counts once
            counts[kind] += sum(low <= group < low + 0x100 for group in groups)
        counts["declared burnt-in annotation"] += _text(dataset, "BurnedInAnnotation") == "YES"
    return dict(+counts)


def _count(dataset: Any, counts: collections.Counter[str], kept: tuple[str, ...] = ()) -> None:
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)  # raw, without parsing its value
        if (element.length == 0) if element.is_raw else element.is_empty:
            continue
        keyword, vr = keyword_for_tag(tag), element.VR
        if keyword in kept or 0x5000 <= tag.group < 0x5100 or 0x6000 <= tag.group < 0x6100:
            continue
        if vr is None:  # implicit
            vr = dictionary_VR(tag) if keyword else "UN"
        kind = _kind(tag, keyword, vr, element.value)
        counts[kind] += bool(kind)
        if vr == "SQ" and not kind:
            try:
                items = list(dataset[tag].value)
            except Exception:
                counts["other identifiers"] += 1  # of unknown content
                continue
            for item in items:
                _count(item, counts)


def _kind(tag: Any, keyword: str, vr: str, value: Any) -> str:
    if tag.is_private:
        return "private tags"
    if keyword in _EMBEDDED:
        return _EMBEDDED[keyword]
    if vr == "PN":
        return "person names"
    if vr in _DATES:
        return "dates and times"
    if vr == "UI":
        # UIDs of the standard identify classes and encodings, not individual objects.
        text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
        return "" if text.startswith("1.2.840.10008.") else "UIDs"
    if tag.group == 0x0010 or vr in _IDENTIFIERS or keyword in _IDENTIFYING:
        return "other identifiers"
    return "free text" if vr in _TEXTS else ""
