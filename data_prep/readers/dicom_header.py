"""What is taken from the header of a DICOM file, and what is not.

Only the facts below may be written anywhere; all else is counted by kind and left behind.
"""

import collections
import collections.abc
from typing import Any

from data_prep.readers.base import UnreadableError
from data_prep.readers.dicom_pixels import Clip

Boxes = tuple[tuple[int, int, int, int], ...]

#: Texts of the file that become facts.
TEXTS = ("Manufacturer", "ManufacturerModelName", "TransducerType", "PhotometricInterpretation")
_MAX_FACT = 64

_MODALITIES = frozenset(("US", "IVUS", "OT"))
# Well-known ones may be named in a message; anything else in their place could be the name of a person.
_OTHER_MODALITIES = frozenset(
    ("CR", "CT", "DX", "ECG", "ES", "KO", "MG", "MR", "NM", "OP", "PR", "PT", "RF", "SEG", "SR", "XA", "XC")
)
_CLASSES = tuple(  # ultrasound, ultrasound clip, volume, secondary capture; the older ones are their beginnings
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("3", "3.1", "6", "6.1", "6.2", "7", "7.1", "7.2", "7.3", "7.4")
)

# PS3.3, C.8.5.5.1.1 and C.8.5.5.1.2
_FORMATS = ("none", "2D", "M-mode", "spectral", "waveform", "graphics")
_TYPES = (
    *("none", "tissue", "colour flow", "PW spectral", "CW spectral", "Doppler mean trace", "Doppler mode trace"),
    *("Doppler max trace", "volume trace", "d(volume)/dt trace", "ECG", "pulse", "phonocardiogram", "grey bar"),
    *("colour bar", "integrated backscatter", "area trace", "d(area)/dt trace", "other physiological"),
)
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


def check_kind(header: Any) -> None:
    """Refuses what is no picture of ultrasound.

    Raises:
      UnreadableError: another modality, no pixels by its kind, or no 2D region.
    """
    modality = _text(header, "Modality")
    if modality in _OTHER_MODALITIES:
        raise UnreadableError(f"modality {modality}, expected US, IVUS or OT")
    known = modality in _MODALITIES if modality else str(header.get("SOPClassUID")) in _CLASSES
    if not known:
        raise UnreadableError("not said to be ultrasound: expected modality US, IVUS or OT")
    formats = {region.get("RegionSpatialFormat") for region in _regions(header)}
    if _2D not in formats and formats.intersection(_STRIPS):
        raise UnreadableError("declares M-mode, spectra or waveforms only, no 2D image")


def boxes(header: Any, rows: int, columns: int) -> Boxes:
    """The 2D regions of tissue or flow, as (left, top, right, bottom) in pixels, right and bottom exclusive.

    Empty if none is declared or one reaches out of the picture: it was declared for another size.
    """
    found = []
    for region in _images(header):
        left, top = int(region.RegionLocationMinX0), int(region.RegionLocationMinY0)
        right, bottom = int(region.RegionLocationMaxX1), int(region.RegionLocationMaxY1)
        # The last pixel is meant, but some write the first one after it.
        if not (0 <= left < right <= columns and 0 <= top < bottom <= rows):
            return ()
        found.append((left, top, min(right + 1, columns), min(bottom + 1, rows)))
    return tuple(dict.fromkeys(found))


def facts(header: Any, clip: Clip, with_size: bool) -> dict[str, str]:
    """Technical values that may be written.

    Args:
      header: `pydicom.Dataset`.
      clip: what is known about its pixels.
      with_size: the size of a pixel in the regions can be trusted; four digits of it are kept, because all of them
        could tell one examination from all others.
    """
    from pydicom.uid import UID

    regions = _regions(header)
    found = {name: _text(header, name)[:_MAX_FACT] for name in TEXTS} | {
        "BitsStored": str(clip.stored),
        "NumberOfFrames": str(clip.count),
        "Rows": str(clip.rows),
        "Columns": str(clip.columns),
        "TransferSyntax": UID(clip.syntax).name,
        "RegionSpatialFormat": _names(regions, "RegionSpatialFormat", _FORMATS),
        "RegionDataType": _names(regions, "RegionDataType", _TYPES),
    }
    for axis in "XY" if with_size else "":
        found[f"PhysicalDelta{axis}"] = ", ".join(
            sorted(
                {
                    f"{abs(float(region.get(f'PhysicalDelta{axis}') or 0)):.4g} cm"
                    for region in _images(header)
                    if region.get(f"PhysicalUnits{axis}Direction") == _CM
                }
            )
        )
    return {name: value for name, value in found.items() if value}


def identifiers(header: Any) -> tuple[str, str]:
    """(patient, video), both raw: hash them before anything is written.

    The patient is the ID and who issued it, or the name where there is no ID; empty if what is there says nothing, such
    as "anonymous". The video is the SOP instance UID.
    """
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
    """A text in one line; the first if there are several."""
    value = header.get(name)
    if isinstance(value, collections.abc.MutableSequence):
        value = value[0] if value else None
    return "" if value is None else " ".join("".join(filter(_is_shown, str(value))).split())


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter.isspace()


def _regions(header: Any) -> list[Any]:
    return list(header.get("SequenceOfUltrasoundRegions") or ())


def _images(header: Any) -> list[Any]:
    return [
        region
        for region in _regions(header)
        if region.get("RegionSpatialFormat") == _2D and region.get("RegionDataType") in _TISSUE_OR_FLOW
    ]


def _names(regions: list[Any], element: str, names: tuple[str, ...]) -> str:
    numbers = {region.get(element) for region in regions}
    return ", ".join(name for number, name in enumerate(names) if number in numbers)


def count_removed(*datasets: Any) -> dict[str, int]:
    """How much of each kind is in a file that is not taken over; elements without a value do not count."""
    counts: collections.Counter[str] = collections.Counter()
    for dataset in datasets:
        _count(dataset, counts, kept=TEXTS)
        for low, kind in ((0x5000, "curves and graphics"), (0x6000, "overlays")):
            groups = {tag.group for tag in list(dataset.keys())}  # each takes one of its own
            counts[kind] += sum(low <= group < low + 0x100 for group in groups)
        counts["declared burnt-in annotation"] += _text(dataset, "BurnedInAnnotation") == "YES"
    return dict(+counts)


def _count(dataset: Any, counts: collections.Counter[str], kept: tuple[str, ...] = ()) -> None:
    from pydicom.datadict import dictionary_VR, keyword_for_tag

    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)  # as it is in the file, without parsing its value
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
                counts["other identifiers"] += 1  # whatever it is
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
        # Those of the standard name classes and encodings, not things.
        text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
        return "" if text.startswith("1.2.840.10008.") else "UIDs"
    if tag.group == 0x0010 or vr in _IDENTIFIERS or keyword in _IDENTIFYING:
        return "other identifiers"
    return "free text" if vr in _TEXTS else ""
