"""Masks as files: PNG with the number of each pixel's class, and COCO JSON of the areas of each class."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath

_LONGEST = 120  # letters of a name, so that there is room for what comes behind it


def safe_path(name: str) -> str:
    """A name with slashes as a path below a folder, whatever is in it; different names stay different."""
    return "/".join(_safe(part) for part in name.split("/") if part) or _safe(name)


def _safe(part: str) -> str:
    plain = re.sub(r"[^\w .+=@#,()-]", "_", part)[:_LONGEST].strip(" ")
    plain = "_" + plain[1:] if plain.startswith((".", "-")) else plain
    if plain and plain == part:
        return part
    return f"{plain}-{hashlib.sha256(part.encode(errors='surrogatepass')).hexdigest()[:8]}"


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Writes uint8 `[H, W]` (the class of each pixel) or RGB `[H, W, 3]`; the file appears whole or not at all."""
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    _write(epath.Path(path), cv2.imencode(".png", pixels)[1].tobytes())


def _write(place: epath.Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.parent / (place.name + ".incomplete")
    partial.write_bytes(data)
    put(partial, place)


def put(partial: epath.Path, place: epath.Path) -> None:
    """Renames a finished file or folder to its name, in place of whatever is there."""
    if place.is_dir():
        place.rmtree()
    elif partial.is_dir():
        place.unlink(missing_ok=True)
    partial.replace(place)


class Coco:
    """Masks as COCO JSON: each connected area of a class is an annotation, with its outline as run lengths.

    Args:
      names: of the classes beside the background, whose category is their place in here, from 1.
    """

    def __init__(self, names: Sequence[str]):
        self._categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, name: str, classes: np.ndarray) -> None:
        """Adds an image.

        Args:
          name: of its file.
          classes: of each pixel, uint8 `[H, W]`; 0 = background.
        """
        from pycocotools import mask as run_lengths

        height, width = classes.shape
        image = len(self._images) + 1
        self._images.append({"id": image, "file_name": name, "width": width, "height": height})
        for category in self._categories:
            drawn = (classes == category["id"]).astype(np.uint8)
            count, areas, boxes, _ = cv2.connectedComponentsWithStats(drawn, connectivity=8)
            for area in range(1, count):
                left, top, across, down, pixels = map(int, boxes[area])
                code = run_lengths.encode(np.asfortranarray(areas == area, dtype=np.uint8))
                self._annotations.append(
                    {
                        "id": len(self._annotations) + 1,
                        "image_id": image,
                        "category_id": category["id"],
                        "bbox": [left, top, across, down],
                        "area": pixels,
                        "iscrowd": 0,
                        "segmentation": {"size": [height, width], "counts": code["counts"].decode("ascii")},
                    }
                )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON; the file appears whole or not at all."""
        said = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        _write(epath.Path(path), (json.dumps(said) + "\n").encode())
