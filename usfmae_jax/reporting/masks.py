"""Masks as files: PNG with the class number of each pixel, and COCO JSON of the objects."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath

_LONGEST = 120  # characters of a name, which leaves room for suffixes


def safe_path(name: str) -> str:
    """Turns any name, with slashes, into a safe path below a folder; different names stay different."""
    return "/".join(_safe(part) for part in name.split("/") if part) or _safe(name)


def _safe(part: str) -> str:
    plain = re.sub(r"[^\w .+=@#,()-]", "_", part)[:_LONGEST].strip(" ")
    plain = "_" + plain[1:] if plain.startswith((".", "-")) else plain
    if plain and plain == part:
        return part
    return f"{plain}-{hashlib.sha256(part.encode(errors='surrogatepass')).hexdigest()[:8]}"


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Writes uint8 `[H, W]` (the class of each pixel) or RGB `[H, W, 3]` as PNG, atomically."""
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    _write(epath.Path(path), cv2.imencode(".png", pixels)[1].tobytes())


def _write(place: epath.Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.parent / (place.name + ".incomplete")
    partial.write_bytes(data)
    put(partial, place)


def put(partial: epath.Path, place: epath.Path) -> None:
    """Renames a finished file or folder to its final name, replacing whatever is there."""
    if place.is_dir():
        place.rmtree()
    elif partial.is_dir():
        place.unlink(missing_ok=True)
    partial.replace(place)


def areas(classes: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The connected areas of each class, as `evaluation.instances.Instance`: `class`, from 0, and `mask`.

    Args:
      classes: class of each pixel, uint8 `[H, W]`; 0 = background. Diagonal neighbours are connected.
      count: number of classes.
    """
    found = []
    for c in range(count):
        drawn = (classes == c + 1).astype(np.uint8)
        several, numbers = cv2.connectedComponents(drawn, connectivity=8)
        found += [{"class": c, "mask": encoded(numbers == number)} for number in range(1, several)]
    return found


def encoded(area: np.ndarray) -> dict[str, Any]:
    """A mask, bool `[H, W]`, as COCO run-length encoding for JSON."""
    from pycocotools import mask as run_lengths

    code = run_lengths.encode(np.asfortranarray(area.astype(np.uint8)))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


class Coco:
    """Annotations or detections of images as COCO JSON.

    Args:
      names: class names without the background; the category id is the position, from 1.
    """

    def __init__(self, names: Sequence[str]):
        self._categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, name: str, size: tuple[int, int], found: Sequence[Mapping[str, Any]]) -> None:
        """Adds an image.

        Args:
          name: name of its file.
          size: (height, width).
          found: its objects, from `areas` or as `evaluation.instances.Instance`; scores of detections are kept.
        """
        from pycocotools import mask as run_lengths

        image = len(self._images) + 1
        self._images.append({"id": image, "file_name": name, "width": size[1], "height": size[0]})
        for one in found:
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": one["class"] + 1,
                    "bbox": [int(side) for side in run_lengths.toBbox(one["mask"])],
                    "area": int(run_lengths.area(one["mask"])),
                    "iscrowd": 0,
                    "segmentation": one["mask"],
                    **({"score": one["score"]} if "score" in one else {}),
                }
            )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON atomically."""
        said = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        _write(epath.Path(path), (json.dumps(said) + "\n").encode())
