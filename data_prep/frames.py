"""Frames to records: eight bits, the stored size, the stored encoding, and the ids.

The functions here run in worker processes, one source at a time; they get plain values and give plain values back.
"""

import dataclasses
import os

import cv2
import numpy as np

from data_prep import phantom
from data_prep.items import Item, Rejected, printable
from data_prep.readers import UnreadableError, read_frames, read_mask
from usfmae_jax.data.records import Record, pixel_hash

_WINDOW = 0.1, 99.9  # percentiles
_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "raw": ".bmp"}


@dataclasses.dataclass(frozen=True)
class Storage:
    """How frames are stored.

    Attributes:
      dataset: name that goes into every record.
      anatomy: likewise; may be empty.
      image_size: of the short side in pixels; smaller frames stay as they are, 0 keeps all.
      encoding: "jpeg", "png" or "raw", which is an uncompressed BMP.
      quality: of JPEG, 1 to 100.
    """

    dataset: str
    anatomy: str = ""
    image_size: int = 256
    encoding: str = "jpeg"
    quality: int = 95


@dataclasses.dataclass(frozen=True)
class Stored:
    """A finished record and what the summary wants to know about it."""

    record: Record
    split: str
    channels: int
    patient_known: bool = True


def process(item: Item, root: str, how: Storage) -> list[Stored] | Rejected:
    """The records of one source file, or why there are none."""
    try:
        mask = read_mask(os.path.join(root, item.mask)) if item.mask else None
    except UnreadableError as error:
        return Rejected(item.source, f"mask {printable(item.mask)}: {error}")
    ids = {"patient": item.patient or item.source, "video": item.video or item.source, "source": item.source}
    stored = []
    try:
        for frame in read_frames(os.path.join(root, item.path)):
            pixels, number = frame.pixels, frame.number
            if mask is not None and mask.shape[:2] != pixels.shape[:2]:
                return Rejected(item.source, f"mask is {_extent(mask)} pixels, the image {_extent(pixels)}")
            ids["frame"] = f"{item.source}#{number}" if number else item.source
            record = make_record(pixels, mask, how, label=item.label, **ids)
            stored.append(Stored(record, item.split, pixels.shape[2], bool(item.patient)))
    except UnreadableError as error:
        return Rejected(item.source, str(error))
    return stored


def simulate(patient: int, how: Storage, seed: int, frames: int, first_test: int) -> list[Stored]:
    """The records of one simulated patient; from patient number `first_test` on they belong to the test split."""
    split = "test" if patient >= first_test else "train"
    stored = []
    for one in phantom.simulate_patient(patient, seed=seed, image_size=how.image_size, frames=frames):
        ids = {"patient": one.patient, "video": one.video, "frame": one.frame, "source": f"{one.patient}/{one.frame}"}
        record = make_record(one.image[:, :, None], one.mask, how, label=one.label, **ids)
        stored.append(Stored(record, split, channels=1))
    return stored


def make_record(pixels: np.ndarray, mask: np.ndarray | None, how: Storage, *, label: int, **ids: str) -> Record:
    """A frame as it is stored.

    Args:
      pixels: uint8 or uint16 `[H, W, C]` as read, C = 1 or 3 (RGB).
      mask: uint8 `[H, W]`, or None.
      how: size and encoding.
      label: class number, -1 for none.
      **ids: `patient`, `video`, `frame` and `source`.
    """
    image = shrink(to_uint8(pixels), how.image_size, cv2.INTER_AREA)
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
        "sha256": pixel_hash(pixels),
        **ids,
    }


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Maps 16 bits to 8 by a window from the 0.1st to the 99.9th percentile of the frame; 8 bits stay as they are.

    Scanners fill 16 bits to very different extents; the percentiles leave out a few saturated pixels, and one window
    for all channels keeps colours.
    """
    if pixels.dtype == np.uint8:
        return pixels
    low, high = np.percentile(pixels, _WINDOW)
    if low == high:  # almost all of one value
        low, high = pixels.min(), pixels.max()
    scale = 255 / max(float(high) - float(low), 1.0)
    return np.clip(np.rint((pixels.astype(np.float32) - low) * scale), 0, 255).astype(np.uint8)


def shrink(pixels: np.ndarray, image_size: int, interpolation: int) -> np.ndarray:
    """Resizes `[H, W]` or `[H, W, C]` to a short side of `image_size`; never enlarges, 0 keeps."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not image_size or short <= image_size:
        return pixels
    size = round(width * image_size / short), round(height * image_size / short)
    return cv2.resize(pixels, size, interpolation=interpolation).reshape(size[1], size[0], *pixels.shape[2:])


def encode(pixels: np.ndarray, encoding: str, quality: int = 95) -> bytes:
    """Encodes uint8 `[H, W]`, `[H, W, 1]` or RGB `[H, W, 3]` as JPEG, PNG or BMP ("raw")."""
    options = []
    if encoding == "jpeg":
        # Full-resolution chroma: where colour is kept, it is thin Doppler signal.
        options = [
            cv2.IMWRITE_JPEG_QUALITY,
            quality,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ]
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(_SUFFIXES[encoding], pixels, options)[1].tobytes()


def _extent(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
