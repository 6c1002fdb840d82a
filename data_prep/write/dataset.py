"""Builds a dataset from a plan: makes the parts, then drops duplicates and writes the shards in a single pass."""

import argparse
import collections
import contextlib
import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from data_prep import exclusions, identity, masks, work
from data_prep.find.files import Rejected
from data_prep.plan import Plan
from data_prep.write import pages, parts, shards
from data_prep.write.manifest import write_manifest, write_rejected
from data_prep.write.shards import UnusableInputError
from usfmae_jax import __version__
from usfmae_jax.data import cells, fingerprints
from usfmae_jax.data.records import decode_image, decode_record, encode_record
from usfmae_jax.errors import InputError, install

SPLITS = ("train", "validation", "test")
_PRELOAD = "data_prep.work"  # what the worker processes run


def build(
    plan: Plan, target: pathlib.Path, downloaded: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    """Builds a dataset into `target`; returns its manifest.

    Args:
      plan: what to build; warnings are added to it.
      target: folder NAME/VERSION, which appears once the dataset is complete.
      downloaded: files that were fetched for it, for the manifest.
      args: arguments of the command.

    Raises:
      InputError: too much of the input is unusable, or an argument cannot be used.
    """
    if args.linkage:
        identity.check_linkage(args.linkage, args.output)
    excluded = exclusions.read(pathlib.Path(args.exclude)) if args.exclude else None
    key = json.dumps([plan.arguments, plan.found.fingerprint, __version__], sort_keys=True)
    with shards.workplace(target, hashlib.sha256(key.encode()).hexdigest()) as folder:
        divided = parts.divide(plan.found.items)
        _make(divided, plan, str(folder), args)
        gathered = _gather(divided, plan, folder, excluded)
        finished = folder / "stage"
        shutil.rmtree(finished, ignore_errors=True)  # left by an interrupted build
        finished.mkdir()
        sizes = _write_dataset(finished, gathered, plan, target.name, args.format)
        _write_splits(finished, plan, gathered.kept)
        write_rejected(finished / "rejected.csv", gathered.rejected)
        write_rejected(finished / "unmasked.csv", gathered.unmasked)
        manifest = write_manifest(finished, plan, gathered, sizes, downloaded)
        pages.write_page(finished)
        if args.linkage:
            identity.write_linkage(args.linkage, gathered.originals, args.output)
        shards.publish(finished, target, args.overwrite)
    return manifest


def _gather(
    divided: list[parts.Part], plan: Plan, folder: pathlib.Path, excluded: exclusions.Exclusions | None
) -> parts.Gathered:
    """Reads the indices of all parts and decides which records to keep."""
    indices = list(parts.finished(divided, folder, plan.salt).values())
    rejected = plan.found.rejected + [one for index in indices for one in index.rejected]
    _check_usable(rejected, len(plan.found.items) + len(plan.found.rejected), plan.salt)
    if len(indices) != len(divided):
        raise InputError(
            f"{len(divided) - len(indices)} of {len(divided)} parts are missing in {folder}; do all workers of the "
            "runner reach it under that name?"
        )
    originals = [(name, *one) for index in indices for name, one in index.originals.items()]
    unmasked = plan.found.unmasked + [one for index in indices for one in index.unmasked]
    if plan.salt:
        hidden = {one.source: identity.pseudonym(plan.salt, "frame", one.source) for one in rejected + unmasked}
        rejected = [Rejected(hidden[one.source], one.reason) for one in rejected]
        unmasked = [Rejected(hidden[one.source], one.reason) for one in unmasked]
        originals += [(name, "frame", source) for source, name in hidden.items()]
    rows = [row for index in indices for row in index.rows]
    reasons, warnings = _choose(rows, plan, excluded)
    plan.found.warnings += warnings
    gathered = parts.Gathered(indices, rows, reasons, rejected, unmasked, originals, private=bool(plan.salt))
    if not gathered.kept:
        raise UnusableInputError("no frame is left: all are excluded, duplicates or unreadable")
    expected, found = plan.entry.expected.get("frames"), len(rows) + sum(index.dropped.total() for index in indices)
    if expected and found != expected:
        plan.found.warnings.append(f"{found:,} frames were found, {expected:,} are in the whole dataset")
    return gathered


def _write_dataset(
    folder: pathlib.Path, gathered: parts.Gathered, plan: Plan, version: str, file_format: str
) -> dict[str, int]:
    """Writes shards, in the order of `gathered`, and metadata; returns the size of the records by split, in bytes.

    Masks that are still in colours are converted to numbers, which depend on the colours of all masks.
    """
    numbers = {colour: number for number, colour in enumerate(sorted(gathered.mask_colours), 1)}
    writers: dict[str, shards.SplitWriter] = {}
    records = parts.read_records(folder.parent, gathered.indices, gathered.order)
    for row, data in zip(gathered.kept, records, strict=True):
        if row.split not in writers:
            writers[row.split] = shards.SplitWriter(folder, plan.name, row.split, file_format)
        writers[row.split].write(_with_numbers(data, numbers) if numbers else data)
    ordered = [writers[split] for split in SPLITS if split in writers]
    for writer in ordered:
        writer.close()
    shards.write_metadata(
        ordered,
        version,
        plan.found.label_names,
        channels=max(row.channels for row in gathered.kept),
        description=f"{plan.entry.title}: ultrasound frames, prepared with python -m data_prep.build.",
        citation=plan.entry.citation,
        homepage=plan.entry.homepage,
    )
    return {writer.split: writer.size for writer in ordered}


def _make(divided: list[parts.Part], plan: Plan, folder: str, args: argparse.Namespace) -> None:
    """Makes the parts that do not exist yet."""
    complete = parts.finished(divided, folder, plan.salt).keys()
    missing = [part for part in divided if part.number not in complete]
    done = len(plan.found.items) - sum(len(part.sources) for part in missing)
    if done:
        print(f"{plan.name}: going on after {done:,} of {len(plan.found.items):,} sources")
    make = plan.make_work(folder)
    if args.runner == "beam":
        parts.run_on_beam(missing, make, args.time_limit, _PRELOAD, _beam_options(args))
        return
    total, unusable = len(plan.found.items) + len(plan.found.rejected), len(plan.found.rejected)
    made = parts.run_here(missing, make, args.workers, args.time_limit, _PRELOAD)
    unit = "patient" if plan.entry.name == "phantom" else "file"
    with (
        contextlib.closing(made),
        tqdm.tqdm(total=len(plan.found.items), initial=done, desc=plan.name, unit=unit) as bar,
    ):
        for part, usable in made:
            bar.update(len(part.sources))
            unusable += len(part.sources) - usable
            if 2 * unusable > total:
                break  # `_check_usable` reports it, with an example


def _beam_options(args: argparse.Namespace) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(f"--runner=beam needs Apache Beam: {install('beam')}") from error
    return PipelineOptions([f"--{option}" for option in args.beam_pipeline_options.split(",") if option])


def _check_usable(rejected: list[Rejected], total: int, salt: bytes) -> None:
    useless = [one for one in rejected if not one.reason.endswith(parts.KEPT)]
    if 2 * len(useless) > total:
        first = useless[0]
        name = identity.pseudonym(salt, "frame", first.source) if salt else first.source  # logs are passed on, too
        which = "the only file" if total == 1 else f"more than half of the {total:,} files"
        raise UnusableInputError(
            f"{which} cannot be used, for example {name!r} ({first.reason}); is --input the right folder?"
        )


def _choose(rows: list[parts.Row], plan: Plan, excluded: exclusions.Exclusions | None) -> tuple[list[str], list[str]]:
    """The reason why each record is dropped ("" = it is kept), and warnings."""
    reasons = ["" if excluded is None else excluded.reason(plan.name, row.frame, row.sha256) for row in rows]
    if plan.thin:
        for position in _repeated(rows):
            reasons[position] = reasons[position] or work.THINNED
    # Excluded frames are compared too: their duplicates under other names must be excluded as well.
    looked_at = [position for position, reason in enumerate(reasons) if reason != work.THINNED]
    found, warnings = exclusions.duplicates_within([rows[position] for position in looked_at])
    copies = across = 0
    for position, (reason, of) in found.items():
        here, kept = looked_at[position], reasons[looked_at[of]]
        if reasons[here]:
            continue  # left out anyway
        if kept or plan.deduplicate:
            reasons[here] = kept or reason
            across += not kept and rows[here].split != rows[looked_at[of]].split
        else:
            copies += 1
    if across:
        warnings.append(f"frames that were dropped because another split has them: {across:,}")
    if copies:
        warnings.append(f"frames that are there more than once: {copies:,}; --deduplicate=on would drop them")
    return reasons, warnings


def _repeated(rows: list[parts.Row]) -> Iterator[int]:
    """Indices of frames near-equal to the last one kept, in clips that are stored as one file per frame.

    Frames within a file were already compared when it was read, by more than their hashes.
    """
    last, last_code = None, np.zeros((0, 0), np.uint64)
    for position, row in enumerate(rows):
        if not row.hash:
            continue
        code = np.frombuffer(bytes.fromhex(row.hash), "<u8")[None]
        neighbours = last and (row.video, row.split) == (last.video, last.split) and row.source != last.source
        if neighbours and (fingerprints.distances(last_code, code) <= fingerprints.SAME).any():
            yield position
        else:
            last, last_code = row, code


def _with_numbers(data: bytes, numbers: dict[str, int]) -> bytes:
    """A record with the colours of its mask replaced by class numbers."""
    record = decode_record(data)
    if not record["mask"]:
        return data
    mask = decode_image(record["mask"], channels=3)
    mask = mask if np.ptp(mask, axis=2).any() else mask[:, :, 0]
    return encode_record(record | {"mask": work.encode(masks.numbered(mask, numbers), "png")})


def _write_splits(folder: pathlib.Path, plan: Plan, rows: list[parts.Row]) -> None:
    """Writes the official tables of folds for the frames of the dataset, under their names in the dataset."""
    kept: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        kept[re.sub(r"#\d+$", "", row.frame)].append(row.frame)
    stored = {}  # names in the tables: pseudonyms
    if plan.salt and plan.found.splits:
        stored = {
            one.frame or one.source: identity.pseudonym(plan.salt, "frame", one.source) for one in plan.found.items
        }
    for name, table in plan.found.splits.items():
        path = folder / "splits" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = ([frame, *rest] for one, *rest in table for frame in kept[stored.get(one, one)])
            # In private data, the original order would reveal which frame is which.
            cells.write(file, ("frame", "fold", "part"), sorted(lines) if plan.salt else lines)
