"""The meaning of the records' masks: which classes there are, and the class of each pixel."""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from usfmae_jax.data.pipeline import decode_ahead
from usfmae_jax.data.provenance import read_manifest
from usfmae_jax.data.records import Record, decode_image
from usfmae_jax.data.table import Table, folders, read_row
from usfmae_jax.errors import DamagedRecord, InputError

_MOST = 32  # different values in masks: more of them make it an image, not a mask
_OTHER = 255  # in `Classes.codes`: a value that is not a class


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
    """The classes that masks distinguish.

    Attributes:
      names: names of the classes without the background, in order.
      codes: uint8 `[256]`, class of each mask value; 0 = background, `_OTHER` = not a class.
      by_label: whether a mask outlines one object, whose class is the label of the frame.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    by_label: bool = False

    def read(self, record: Record) -> np.ndarray:
        """Class of each pixel of a record that has a mask: uint8 `[H, W]`, as large as its image.

        Raises:
          DamagedRecord: the mask cannot be read, differs in size from the image, or has a value that is not a class.
        """
        mask = decode_image(record["mask"])[:, :, 0]
        if (record["height"], record["width"]) not in ((0, 0), mask.shape):
            raise DamagedRecord(f"its mask is {mask.shape[1]} x {mask.shape[0]} and its image another size")
        classes = self.codes[mask]
        if (classes == _OTHER).any():
            raise DamagedRecord(
                f"its mask has the number {mask[classes == _OTHER].max()}, which is none of the classes"
            )
        if not self.by_label:
            return classes
        if not 0 <= record["label"] < len(self.names):
            raise DamagedRecord("it has a mask and no label")
        return np.where(classes > 0, np.uint8(record["label"] + 1), np.uint8(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The contents of a table's masks.

    Attributes:
      there: bool `[N]`, rows that have a mask.
      pixels: int64 `[N, 256]`, number of pixels of each value; zeros without a mask.
    """

    there: np.ndarray
    pixels: np.ndarray


def survey(table: Table, threads: int = 2) -> Found:
    """Reads all masks of a table once.

    Raises:
      InputError: a mask is damaged, or differs in size from its image; the message names it.
    """

    def count(row: int) -> np.ndarray | None:
        try:
            record = read_row(table, row)
            if not record["mask"]:
                return None
            mask = decode_image(record["mask"])
        except DamagedRecord as error:
            raise _damaged(table, row, str(error)) from error
        if record["height"] and mask.shape[:2] != (record["height"], record["width"]):
            sizes = f"{mask.shape[1]} x {mask.shape[0]} and its image {record['width']} x {record['height']}"
            raise _damaged(table, row, f"its mask is {sizes}")
        return np.bincount(mask.ravel(), minlength=256)

    with contextlib.closing(decode_ahead(count, range(len(table)), threads, 64)) as counts:
        found = list(counts)
    there = np.array([one is not None for one in found], bool)
    nothing = np.zeros(256, np.int64)
    return Found(there, np.stack([nothing if one is None else one for one in found]).reshape(-1, 256))


def _damaged(table: Table, row: int, why: str) -> InputError:
    path, number = table.shards.locate(int(table.index[row]))
    return InputError(f"record number {number} of {path} cannot be used: {why}; rebuild the shards")


def classes(table: Table, found: Found, expected: Sequence[str] = ()) -> Classes:
    """The classes of a table's masks.

    They are the values named in the manifests beside the shards, else the values in the masks, in ascending order; a
    single one is called "foreground" unless it is given a name.

    Args:
      table: table of the frames.
      found: from `survey`.
      expected: class names without the background, in order; () = those found.

    Raises:
      InputError: there are no masks, or only empty ones; they have too many values to be classes, or values without a
        name; or sources name them differently.
    """
    if not found.there.any():
        raise InputError(
            f"config.data.path={table.path!r} has no masks in {len(table)} records; build it from images with masks"
        )
    numbers = np.flatnonzero(found.pixels[:, 1:].sum(axis=0)) + 1
    if not len(numbers):
        raise InputError(f"config.data.path={table.path!r}: all masks are empty, so that there is nothing to learn")
    if len(numbers) > _MOST:
        raise InputError(
            f"the masks of config.data.path={table.path!r} hold {len(numbers)} different numbers, too many to be "
            "classes: are they pictures, or soft edges? Build the shards again with masks of few numbers"
        )
    named = _named(table)
    if named:
        unknown = sorted(set(numbers.tolist()) - named.keys())
        if unknown:
            raise InputError(
                f"masks hold the number {unknown[0]}, which the manifest beside the shards does not name; its classes "
                f"are {_listed(named)}; build the shards again with --mask_colours"
            )
        numbers = np.array(sorted(named))
    names = tuple(expected) or tuple(named[number] for number in numbers.tolist() if named)
    if not names:
        names = ("foreground",) if len(numbers) == 1 else tuple(f"class {number}" for number in numbers.tolist())
    if len(names) != len(numbers):
        if expected and not named and numbers.max() <= len(names):  # a class that does not occur in this data
            numbers = np.arange(1, len(names) + 1)
        else:
            raise InputError(
                f"config.classes={','.join(expected)} names {len(names)} classes, and the masks hold the numbers "
                f"{', '.join(map(str, numbers.tolist()))}; name each of them, in this order"
            )
    if len(set(names)) < len(names) or "background" in names:
        raise InputError(f"config.classes={','.join(names)}: names must differ, and none is 'background'")
    codes = np.full(256, _OTHER, np.uint8)
    codes[0] = 0
    codes[numbers] = np.arange(1, len(numbers) + 1)
    return Classes(names, codes)


def of_labels(table: Table, found: Found, names: Sequence[str]) -> Classes:
    """Classes in which each mask has the class of its frame's label.

    Args:
      table: labelled frames.
      found: from `survey`.
      names: names of the labels, in order.

    Raises:
      InputError: masks already distinguish several classes, or there are no masks.
    """
    outlined = classes(table, found)
    if len(outlined.names) > 1:
        raise InputError(
            f"config.mask_classes=label is for masks of one thing, and these tell {', '.join(outlined.names)} apart"
        )
    return dataclasses.replace(outlined, names=tuple(names), by_label=True)


def _named(table: Table) -> dict[int, str]:
    """Class names by mask value, from the manifests beside the shards; {} if there are none."""
    found: dict[int, str] = {}
    for folder in folders(table):
        said = read_manifest(folder or ".").get("mask_colours") or ()
        try:
            names = {int(one["class"]): str(one.get("name") or f"class {one['class']}") for one in said}
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{folder or '.'}/manifest.json has mask_colours of another kind: build it again"
            ) from error
        if found and names and names != found:
            raise InputError(
                f"sources have masks of different classes: {_listed(found)} and {_listed(names)}; name one of them "
                "only in config.data.path, or build them with the same --mask_colours"
            )
        found = found or names
    return found


def _listed(named: dict[int, str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in sorted(named.items()))
