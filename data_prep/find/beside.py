"""Finds masks stored beside their images by name alone: x.png and x_mask.png, images/x and masks/x."""

import collections
import posixpath
import re
from collections.abc import Iterable

_MASK = r"masks?|segs?|segmentations?|labels?|gts?|ground[ _-]?truths?"
_NAME = re.compile(rf"(?P<stem>.+?)[ _.-]+(?:{_MASK})(?:[ _-]?\(?\d+\)?)?", re.IGNORECASE)
_FOLDER = re.compile(rf"(?:^|(?<=/)|[ _-])(?:{_MASK})(?=$|[ _/-])", re.IGNORECASE)
_IMAGES = re.compile(r"(?:^|(?<=/)|[ _-])(?:images?|imgs?)(?=$|[ _/-])", re.IGNORECASE)


def without_images(path: str) -> str:
    """The path of an image without the innermost folders called "images" or the like, which are not informative."""
    folder, name = posixpath.split(path)
    while folder and _IMAGES.fullmatch(posixpath.basename(folder)):
        folder = posixpath.dirname(folder)
    return posixpath.join(folder, name)


def find_masks(files: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Maps every image that has masks to their paths, sorted by name.

    A file is a mask if its name ends like that of a mask, or a folder above it is named so, and if, without that, its
    path is that of exactly one other file. A file without such a partner remains an image.

    Args:
      files: paths that may be images or masks, with forward slashes.
    """
    groups: dict[tuple[str, str], dict[int, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in files:
        folder, name = posixpath.split(path)
        stem = re.sub(r"(\.nii\.gz|\.[^.]*)$", "", name, flags=re.IGNORECASE)
        called = _NAME.fullmatch(stem)
        plain, marks = _FOLDER.subn("", folder)
        plain = re.sub(r"/+", "/", _IMAGES.sub("", plain)).strip("/")
        groups[plain, called["stem"] if called else stem][marks + bool(called)].append(path)
    found = {}
    for levels in groups.values():
        (image, *others), *masks = (sorted(levels[level]) for level in sorted(levels))
        if masks and not others:
            found[image] = tuple(path for level in masks for path in level)
    return found
