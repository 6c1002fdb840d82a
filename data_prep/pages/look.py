"""What the records of a dataset show: a contact sheet, and their size and brightness."""

import base64
import collections
import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from usfmae_jax.data import records
from usfmae_jax.errors import DamagedRecord
from usfmae_jax.reporting import markup

_SAMPLE = 2000  # frames that are measured
_SHEET = 60  # frames that are shown
_THUMBNAIL = 176  # pixels of the long side
_BLACK = 5  # of 255: what counts as black
_SPLIT = re.compile(r"-([^-./]+)\.(?:array_record|tfrecord)")


@dataclasses.dataclass
class Look:
    """What the records show, measured on a sample."""

    records: int = 0
    damaged: int = 0
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # width, height
    means: list[float] = dataclasses.field(default_factory=list)  # grey level of a frame, 0 to 255
    blacks: list[float] = dataclasses.field(default_factory=list)  # share of a frame, percent
    groups: dict[tuple[str, int], list[int]] = dataclasses.field(default_factory=dict)  # (split, label): records
    anatomies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    masks: int = 0


def measure(shards: records.Shards) -> Look:
    """Looks at a sample of the records, evenly drawn."""
    look = Look(records=len(shards))
    for index in np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _SAMPLE)).round().astype(int)).tolist():
        try:
            record = records.decode_record(shards[index])
            short = min(record["height"], record["width"])
            reduction = next((by for by in (8, 4, 2) if short >= 128 * by), 1)
            pixels = records.decode_image(record["image"], reduction=reduction)
        except DamagedRecord:
            look.damaged += 1
            continue
        size = (record["width"], record["height"]) if short else (pixels.shape[1], pixels.shape[0])
        look.sizes.append(size)
        look.means.append(float(pixels.mean()))
        look.blacks.append(100 * float((pixels <= _BLACK).mean()))
        look.anatomies[record["anatomy"] or "not stated"] += 1
        look.masks += bool(record["mask"])
        split = _SPLIT.search(os.path.basename(shards.locate(index)[0]))
        look.groups.setdefault((split[1] if split else "", record["label"]), []).append(index)
    return look


def contact_sheet(shards: records.Shards, look: Look, manifest: Mapping[str, Any]) -> str:
    """Frames of every split and label, evenly over the records."""
    order = {"train": 0, "validation": 1, "test": 2}
    by_size = sorted(look.groups.items(), key=lambda one: (len(one[1]), one[0]))
    groups = sorted(by_size, key=lambda one: (order.get(one[0][0], 3), one[0]))
    shares, left = {}, _SHEET
    for number, (key, indices) in enumerate(by_size):
        shares[key] = min(len(indices), left // (len(groups) - number))  # small groups leave room to large ones
        left -= shares[key]
    figures: dict[str, str] = collections.defaultdict(str)
    for key, indices in groups:
        for i in np.linspace(0, len(indices) - 1, shares[key]).round().astype(int):
            figures[key[0]] += _figure(records.decode_record(shards[indices[i]]), _label(manifest, key[1]))
    sheet = "".join(
        f'<h3>{markup.escape(split)}</h3><div class="sheet">{inside}</div>' for split, inside in figures.items()
    )
    says = f"{sum(shares.values()):,} of {look.records:,}, evenly drawn." + " Outlines are masks." * (look.masks > 0)
    return f'<p class="soft">{says}</p>{sheet}'


def _figure(record: records.Record, label: str) -> str:
    pixels = records.decode_image(record["image"], channels=3)
    scale = min(1, _THUMBNAIL / max(pixels.shape[:2]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    with contextlib.suppress(DamagedRecord):
        if record["mask"]:
            mask = cv2.resize(records.decode_image(record["mask"]), size, interpolation=cv2.INTER_NEAREST)
            outlines, _ = cv2.findContours((mask > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            pixels = cv2.drawContours(pixels, outlines, -1, (255, 176, 59), 1)
    data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()
    name = record["frame"] or record["source"] or "without a name"
    short = name if len(name) <= 44 else f"...{name[-41:]}"  # what tells files apart is at the end
    return (
        f'<figure title="{markup.escape(f"{name} {label}")}"><img width="{size[0]}" height="{size[1]}" '
        f'alt="Ultrasound frame {markup.escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption><b>{markup.escape(label)}</b>{markup.escape(short)}</figcaption></figure>"
    )


def charts(found: Look) -> str:
    """The section about size and brightness."""
    if not found.means:
        return ""
    drawn = "All frames" if len(found.means) == found.records else f"{len(found.means):,} frames, evenly drawn"
    page = markup.scatter(found.sizes)
    page += markup.histogram(
        "Brightness", "Mean grey level of a frame, from 0 (black) to 255 (white)", found.means, 255
    )
    page += markup.histogram(
        "Black", f"Percent of a frame that is black (grey level {_BLACK} or less)", found.blacks, 100
    )
    return f'<p class="soft">{drawn}, as they are stored.</p><div class="charts">{page}</div>'


def _label(manifest: Mapping[str, Any], label: int) -> str:
    names = manifest.get("label_names") or ()
    if label < 0:
        return "no label" if names else ""
    return str(names[label]) if label < len(names) else f"label {label}"
