"""Converts frames to records: cleans them, converts them to 8 bits, resizes and encodes them, and adds the ids.

These functions run in worker processes, one source at a time; they take and return plain values.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping

import cv2
import numpy as np

from data_prep import identity, masks, phantom
from data_prep.clean.inpainting import clean_frame
from data_prep.clean.sector import Sector, find_sector
from data_prep.find.files import Item, known_patient, printable
from data_prep.readers import DEFAULTS, UNKNOWN_SPACING, Frame, Options, UnreadableError, read_frames
from data_prep.readers.clips import look_ahead
from usfmae_jax.data import fingerprints
from usfmae_jax.data.records import Record, pixel_hash, to_uint8

_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "raw": ".bmp"}
_BLOCK = 16 << 20  # bytes
_LIGHT = 100  # grey levels: scanner screens are darker, paper is lighter
_HEAD = 8  # frames of a clip that are used to find its sector

Original = tuple[str, str, str]  # pseudonym, kind and original

NO_SECTOR = "no imaged sector found, and the whole frame may name the patient (--whole_frames takes it)"
THINNED = "near-identical to the frame before it"


@dataclasses.dataclass(frozen=True)
class Storage:
    """How frames are read and stored.

    Attributes:
      dataset: name written to every record.
      anatomy: likewise; may be empty.
      image_size: length of the short side in pixels; smaller frames are not enlarged, 0 keeps all sizes.
      encoding: "jpeg", "png" or "raw", which is uncompressed BMP.
      quality: of JPEG, 1 to 100.
      clean: crop to the imaged sector, blank what is outside, remove burnt-in annotations.
      thin: drop a frame of a clip that is near-identical to the last one kept.
      mask_kind: of mask files, see `masks.read_mask_as`.
      mask_colours: class number by colour, for masks drawn in colours; if empty, they are stored in colours.
      masks_required: whether a file whose mask cannot be used counts as unreadable.
      options: options of the readers.
      only_sectors: drop frames in which no imaged sector is found, since the whole frame may name the patient.
      salt: secret for hashing ids and paths; if empty, they are written unchanged.
    """

    dataset: str
    anatomy: str = ""
    image_size: int = 256
    encoding: str = "jpeg"
    quality: int = 95
    clean: bool = False
    thin: bool = False
    mask_kind: str = "image"
    mask_colours: masks.Colours = dataclasses.field(default_factory=dict)
    masks_required: bool = False
    options: Options = DEFAULTS
    only_sectors: bool = False
    salt: bytes = b""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A finished record and what the build needs to know about it.

    Attributes:
      record: as it is written.
      split: of the dataset.
      channels: 1 or 3.
      patient_known: False if the patient's identity is not known.
      hash: `fingerprints.perceptual_hash` of the stored pixels.
      cleaned: number of pixels removed, by kind.
      facts: technical values of the source.
      removed: number of items in the source that were not kept, by kind.
      warnings: of the reader about the source, so far.
      originals: pseudonym, kind and original, for the linkage table.
      mask_colours: colours of a mask that is stored in colours because they have no numbers yet.
      mask_problem: why the mask of the file cannot be used; "" if it can.
    """

    record: Record
    split: str
    channels: int
    patient_known: bool = True
    hash: np.ndarray | None = None
    cleaned: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    removed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    originals: tuple[Original, ...] = ()
    mask_colours: tuple[str, ...] = ()
    mask_problem: str = ""


def process(item: Item, root: str, how: Storage) -> Iterator[Stored | str]:
    """Yields a record for every frame of one source file, or the reason if the frame is dropped.

    Raises:
      UnreadableError: the file cannot be used, or its mask cannot, if one is required.
    """
    frames = read_frames(os.path.join(root, item.path), how.options)
    head, rest = look_ahead(frames, lambda first: len(first) == _HEAD)
    # The frames of a clip share one sector; frames of other files may differ in size.
    sectors: dict[tuple[int, int], Sector] = {}
    drawn: dict[tuple[int, int], tuple[np.ndarray | None, str]] = {}
    last, video, warnings = None, "", set[str]()
    for frame in itertools.chain(head, rest):
        warnings |= set(frame.warnings)  # also of a frame that is dropped
        pixels, cleaned = to_uint8(frame.pixels), None
        shape = pixels.shape[:2]
        if shape not in drawn:
            drawn[shape] = _mask(item, root, how, shape)
        mask, problem = drawn[shape]
        if how.clean:
            if shape not in sectors:
                alike = [to_uint8(one.pixels) for one in head if one.pixels.shape[:2] == shape]
                sectors[shape] = find_sector(alike or [pixels], frame.boxes)
            if how.only_sectors and not _is_scan(pixels, sectors[shape]):
                yield NO_SECTOR
                continue
            cleaned = clean_frame(pixels, sectors[shape])
            pixels = cleaned.pixels
            if mask is not None:
                left, top, right, bottom = cleaned.box
                mask = mask[top:bottom, left:right]
        if how.thin:
            thumbnail = fingerprints.thumbnail(pixels)
            if last is not None and frame.video == video and fingerprints.near_identical(last, thumbnail):
                yield THINNED
                continue
            last, video = thumbnail, frame.video
        ids, known, originals = _ids(item, frame, how)
        spacing, shown = item.spacing if any(item.spacing) else frame.spacing, pixels.shape
        pixels = shrink(pixels, how.image_size, cv2.INTER_AREA)
        spacing = stretched(spacing, shown, pixels.shape)
        if how.salt:  # all digits could identify an examination
            spacing = float(f"{spacing[0]:.4g}"), float(f"{spacing[1]:.4g}")
        sha256 = pixel_hash(frame.pixels)
        yield Stored(
            record=make_record(pixels, mask, how, label=item.label, spacing=spacing, sha256=sha256, **ids),
            split=item.split,
            channels=pixels.shape[2],
            patient_known=known,
            hash=fingerprints.perceptual_hash(pixels),
            cleaned=cleaned.removed if cleaned else {},
            facts=identity.public_facts(frame.facts, _known_ids(item, frame)) if how.salt else frame.facts,
            removed=frame.removed,
            warnings=tuple(sorted(warnings)),
            originals=originals,
            mask_colours=tuple(masks.colours_of(mask)) if mask is not None and mask.ndim == 3 else (),
            mask_problem=problem,
        )


def _is_scan(pixels: np.ndarray, found: Sector) -> bool:
    """Whether a frame has a sector on a dark background; a scanned page has text on a light one."""
    outside = pixels[found.mask == 0]
    return found.kind != "whole" and (outside.size == 0 or float(np.median(outside)) < _LIGHT)


def digest(item: Item, beat: Callable[[], None], root: str) -> str:
    """SHA-256 of a source file, empty if it cannot be read; calls `beat` repeatedly as a sign of life."""
    whole = hashlib.sha256()
    try:
        with open(os.path.join(root, item.path), "rb") as file:
            while block := file.read(_BLOCK):
                whole.update(block)
                beat()
    except OSError:
        return ""
    return whole.hexdigest()


def _mask(item: Item, root: str, how: Storage, shape: tuple[int, int]) -> tuple[np.ndarray | None, str]:
    """The masks of a file joined into one (None if there are none), and why they cannot be used ("" = they can)."""
    found = []
    for path in item.masks:
        try:
            found.append(
                masks.read_mask_as(how.mask_kind, os.path.join(root, path), shape, how.mask_colours, item.path)
            )
        except UnreadableError as error:
            if how.masks_required:
                # A path may be an identifier.
                raise UnreadableError(f"mask{'' if how.salt else ' ' + printable(path)}: {error}") from error
            return None, f"mask: {error}"  # none of the others is used either: part of a mask would be wrong
    return (masks.join(found) if found else None), ""


def _known_ids(item: Item, frame: Frame) -> list[str]:
    name = os.path.splitext(os.path.basename(item.path))[0]
    return [item.patient, item.video, name, frame.video, *frame.patient.removesuffix(")").split(" (")]


def _ids(item: Item, frame: Frame, how: Storage) -> tuple[dict[str, str], bool, tuple[Original, ...]]:
    """Ids as stored, whether the patient is known, and the originals of pseudonyms."""
    # Everything named "unknown" is not one single patient or clip.
    patient, video = item.patient or known_patient(frame.patient), item.video or known_patient(frame.video)
    source = item.source
    originals: list[Original] = []

    def stored(kind: str, value: str) -> str:
        if not how.salt or not value:
            return value
        originals.append((identity.pseudonym(how.salt, kind, value), kind, value))
        return originals[-1][0]

    known, source = bool(patient), stored("frame", source)
    video = stored("video", video) or source
    # The frames of a clip belong to one patient, whoever that is.
    patient = stored("patient", patient) or video
    name = item.frame if item.frame and not how.salt else source
    ids = {
        "patient": patient,
        "video": video,
        "source": source,
        "frame": f"{name}#{frame.number}" if frame.number else name,
    }
    return ids, known, tuple(originals)


def simulate(
    patient: int, how: Storage, seed: int, frames: int, first_test: int, several: bool = False
) -> Iterator[Stored]:
    """Yields the records of one simulated patient; patients from number `first_test` on are in the test split."""
    split = "test" if patient >= first_test else "train"
    for one in phantom.simulate_patient(patient, seed=seed, image_size=how.image_size, frames=frames, several=several):
        ids = {"patient": one.patient, "video": one.video, "frame": one.frame, "source": f"{one.patient}/{one.frame}"}
        pixels = one.image[:, :, None]
        sha256, spacing = pixel_hash(pixels), UNKNOWN_SPACING
        record = make_record(pixels, one.mask, how, label=one.label, spacing=spacing, sha256=sha256, **ids)
        yield Stored(record, split, channels=1)


def make_record(
    pixels: np.ndarray,
    mask: np.ndarray | None,
    how: Storage,
    *,
    label: int,
    spacing: tuple[float, float],
    **ids: str,
) -> Record:
    """Makes the record of a frame.

    Args:
      pixels: uint8 `[H, W, C]`, C = 1 or 3 (RGB), in the original size or already in the stored one.
      mask: uint8 `[H, W]` or RGB `[H, W, 3]` in the original size, or None.
      how: size and encoding.
      label: class number, -1 for none.
      spacing: spacing of `pixels` in mm, down and across; 0 = not known.
      **ids: `patient`, `video`, `frame`, `source`, and `sha256` of the pixels as read.
    """
    image = shrink(pixels, how.image_size, cv2.INTER_AREA)
    if mask is not None:
        mask = shrink(mask, how.image_size, cv2.INTER_NEAREST_EXACT)
    return {
        "image": encode(image, how.encoding, how.quality),
        "height": image.shape[0],
        "width": image.shape[1],
        "dataset": how.dataset,
        "anatomy": how.anatomy,
        "label": label,
        "mask": b"" if mask is None else encode(mask, "png"),
        "spacing": stretched(spacing, pixels.shape, image.shape),
        **ids,
    }


def shrink(pixels: np.ndarray, image_size: int, interpolation: int) -> np.ndarray:
    """Resizes `[H, W]` or `[H, W, C]` to a short side of `image_size`; never enlarges, 0 keeps the size."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not image_size or short <= image_size:
        return pixels
    size = round(width * image_size / short), round(height * image_size / short)
    return cv2.resize(pixels, size, interpolation=interpolation).reshape(size[1], size[0], *pixels.shape[2:])


def stretched(spacing: tuple[float, float], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[float, float]:
    """Pixel spacing in mm, down and across, after resizing from shape `before` `[H, W, ...]` to `after`."""
    down, across = spacing
    return down * before[0] / after[0], across * before[1] / after[1]


def encode(pixels: np.ndarray, encoding: str, quality: int = 95) -> bytes:
    """Encodes uint8 `[H, W]`, `[H, W, 1]` or RGB `[H, W, 3]` as JPEG, PNG or BMP ("raw")."""
    options = []
    if encoding == "jpeg":
        # Full-resolution chroma, since colour that is kept may be thin Doppler signal.
        options = [
            cv2.IMWRITE_JPEG_QUALITY,
            quality,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ]
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(_SUFFIXES[encoding], pixels, options)[1].tobytes()
