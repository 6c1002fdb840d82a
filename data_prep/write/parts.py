"""Parts, the units of work of a build: a few sources, processed into one file of records and one index.

A part depends only on its sources and the settings, so it is the same whether it is made by a worker on this machine or
on a Beam cluster, before or after an interruption. Existing parts are not made again.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import identity, isolate
from data_prep.find.files import Rejected
from data_prep.readers import UnreadableError
from usfmae_jax.data.records import encode_record
from usfmae_jax.errors import InputError
from usfmae_jax.files import parse

_MOST = 64  # sources in a part; with few sources, there are about 64 parts, or parts of one source

KEPT = "the frames before the damage are kept"  # ends the reason if some frames of a file are kept

#: Converts a source to its records (`work.Stored`) and the reasons of dropped frames (str).
Process = Callable[[Any], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Sources that are processed together."""

    number: int
    sources: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of a part, without its image."""

    split: str
    size: int  # bytes
    channels: int
    label: int
    frame: str
    patient: str
    patient_known: bool
    video: str
    source: str
    sha256: str
    hash: str  # perceptual, hex; empty for none
    masked: bool = False


@dataclasses.dataclass
class Index:
    """The records of a part, in the order of its file, and what was left out and why."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cleaned: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    removed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    warnings: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # number of files
    technical: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    originals: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 of the source files
    unmasked: list[Rejected] = dataclasses.field(default_factory=list)  # files whose mask cannot be used
    mask_colours: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    number: int = 0  # of the part
    sha256: str = ""  # of its file


@dataclasses.dataclass
class Gathered:
    """The content of all parts, and which records are kept.

    Attributes:
      indices: of the parts.
      rows: of all parts, one per record.
      reasons: why each record is dropped, "" if it is kept.
      rejected: files that could not be used, or only in part.
      unmasked: files whose mask cannot be used.
      originals: rows of the linkage table: pseudonym, kind, original.
      private: whether to hide the order of the sources, which is that of their names.
    """

    indices: list[Index]
    rows: list[Row]
    reasons: list[str]
    rejected: list[Rejected]
    unmasked: list[Rejected]
    originals: list[tuple[str, str, str]]
    private: bool = False

    @functools.cached_property
    def mask_colours(self) -> collections.Counter[str]:
        """Number of files by colour, for masks whose colours have no class numbers yet."""
        return sum((index.mask_colours for index in self.indices), collections.Counter())

    @functools.cached_property
    def order(self) -> list[int]:
        """Indices of the records that are kept, in the order in which they are written.

        This is the order of the sources, but for private data that of the pseudonyms of clips: otherwise, a sorted list
        of names could be matched with the records. The frames of a clip stay together, in order.
        """
        positions = [position for position, reason in enumerate(self.reasons) if not reason]
        return sorted(positions, key=lambda position: self.rows[position].video) if self.private else positions

    @functools.cached_property
    def kept(self) -> list[Row]:
        """Rows of the records that are kept, in the order of `order`."""
        return [self.rows[position] for position in self.order]


def divide(sources: Sequence[Any]) -> list[Part]:
    """Divides the sources, in order, into parts of equal size; independent of the machine."""
    size = max(1, min(_MOST, len(sources) // 64))
    return [
        Part(number, tuple(sources[start : start + size])) for number, start in enumerate(range(0, len(sources), size))
    ]


def write_part(
    part: Part,
    given_up: Mapping[int, str],
    begin: Callable[[int], None],
    *,
    process: Process,
    folder: str,
    digest: Callable[[Any, Callable[[], None]], str] | None = None,
    salt: bytes = b"",
) -> int:
    """Processes the sources of a part into `folder`; returns the number of usable sources.

    Args:
      part: the part to process.
      given_up: numbers of sources in the part that must not be touched, with reasons.
      begin: called with the number of a source before it is touched, and again for each of its frames.
      process: see `Process`.
      folder: for the records and, once they are complete, the index.
      digest: computes the SHA-256 of a source; calls its second argument repeatedly as a sign of life.
      salt: if not empty, the index is encrypted with it, for private sources.
    """
    index, unusable, whole = Index(number=part.number), 0, hashlib.sha256()
    data_path, index_path = _paths(folder, part.number)
    with data_path.open("wb") as file:
        for number, source in enumerate(part.sources):
            name = getattr(source, "source", str(source))
            if number in given_up:
                index.rejected.append(Rejected(name, given_up[number]))
                unusable += 1
                continue
            begin(number)
            if digest:
                index.digests[name] = digest(source, functools.partial(begin, number))
            rows, last = len(index.rows), None
            try:
                for result in _guarded(process, source):
                    begin(number)
                    if isinstance(result, str):
                        index.dropped[result] += 1
                        continue
                    data = encode_record(result.record)
                    file.write(data)
                    whole.update(data)
                    index.rows.append(_row(result, len(data)))
                    index.cleaned.update({kind: int(pixels) for kind, pixels in result.cleaned.items()})
                    index.originals |= {name: (kind, original) for name, kind, original in result.originals}
                    last = result
            except UnreadableError as error:
                kept = len(index.rows) - rows
                reason = f"{error}; {KEPT}" if kept else str(error)
                index.rejected.append(Rejected(name, reason))
                unusable += not kept
            if last:
                _add_source(index, name, last)
        file.flush()
        os.fsync(file.fileno())
    index.sha256 = whole.hexdigest()
    _write_index(index_path, index, salt)
    return len(part.sources) - unusable


def _add_source(index: Index, name: str, stored: Any) -> None:
    """Counts what all frames of a source have in common, given one of them."""
    index.removed.update(stored.removed)
    index.warnings.update(stored.warnings)
    index.mask_colours.update(stored.mask_colours)
    if stored.mask_problem:
        index.unmasked.append(Rejected(name, stored.mask_problem))
    for fact, value in stored.facts.items():
        index.technical.setdefault(fact, collections.Counter())[value] += 1


def _guarded(process: Process, source: Any) -> Iterator[Any]:
    """`process(source)`, with any error of a reader converted to an UnreadableError that quotes nothing of the file."""
    try:
        yield from process(source)
    except (UnreadableError, InputError):  # the latter names a missing library
        raise
    except MemoryError as error:
        raise UnreadableError("needs more memory than there is") from error
    except Exception as error:
        raise UnreadableError(f"its reader failed ({type(error).__name__})") from error


def _row(stored: Any, size: int) -> Row:
    record = stored.record
    return Row(
        split=stored.split,
        size=size,
        channels=stored.channels,
        label=record["label"],
        frame=record["frame"],
        patient=record["patient"],
        patient_known=stored.patient_known,
        video=record["video"],
        source=record["source"],
        sha256=record["sha256"],
        hash="" if stored.hash is None else np.asarray(stored.hash, "<u8").tobytes().hex(),
        masked=bool(record["mask"]),
    )


def _paths(folder: str | os.PathLike[str], number: int) -> tuple[pathlib.Path, pathlib.Path]:
    # Not the suffix of a shard, so that nothing opens an unfinished build by mistake.
    return pathlib.Path(folder) / f"{number:06d}.part", pathlib.Path(folder) / f"{number:06d}.json"


def _write_index(path: pathlib.Path, index: Index, salt: bytes) -> None:
    content = vars(index) | {
        "rows": [dataclasses.astuple(row) for row in index.rows],
        "rejected": [dataclasses.astuple(one) for one in index.rejected],
        "unmasked": [dataclasses.astuple(one) for one in index.unmasked],
    }
    text = json.dumps(content | {"checksum": _checksum(content)})
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".index-", delete=False) as file:
        file.write(identity.seal(salt, text) if salt else text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def read_index(folder: str | os.PathLike[str], number: int, salt: bytes = b"") -> Index:
    """Reads the index of a finished part, written with this salt; raises ValueError if it is damaged."""
    data = _paths(folder, number)[1].read_bytes()
    content = parse(identity.unseal(salt, data) if salt else data)
    checksum = content.pop("checksum", None)  # parts of earlier versions have none, and fewer fields
    if checksum is not None and checksum != _checksum(content):
        raise ValueError("its checksum is wrong")
    counters = {name: collections.Counter(content[name]) for name in ("dropped", "cleaned", "removed", "warnings")}
    return Index(
        rows=[Row(*row) for row in content["rows"]],
        rejected=[Rejected(*one) for one in content["rejected"]],
        unmasked=[Rejected(*one) for one in content.get("unmasked", ())],
        mask_colours=collections.Counter(content.get("mask_colours", {})),
        technical={name: collections.Counter(values) for name, values in content["technical"].items()},
        digests=content["digests"],
        originals={name: (kind, original) for name, (kind, original) in content["originals"].items()},
        number=content.get("number", number),
        sha256=content.get("sha256", ""),
        **counters,
    )


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_records(
    folder: str | os.PathLike[str], indices: Sequence[Index], order: Iterable[int] | None = None
) -> Iterator[bytes]:
    """Yields the encoded records of the finished parts 0, 1, ....

    Args:
      folder: with the parts.
      indices: of the parts.
      order: indices into the rows of all parts; None = all, in order.
    """
    places = [
        (number, end - row.size, row.size)
        for number, index in enumerate(indices)
        for row, end in zip(index.rows, itertools.accumulate(row.size for row in index.rows), strict=True)
    ]
    wanted = places if order is None else [places[position] for position in order]
    for number, group in itertools.groupby(wanted, key=lambda place: place[0]):
        with _paths(folder, number)[0].open("rb") as file:
            for _, start, size in group:
                file.seek(start)
                yield file.read(size)


def finished(parts: Sequence[Part], folder: str | os.PathLike[str], salt: bytes = b"") -> dict[int, Index]:
    """Maps the numbers of complete parts to their indices, in order; damaged parts are left out, to be made again."""
    found = {}
    for part in parts:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            index = read_index(folder, part.number, salt)
            with _paths(folder, part.number)[0].open("rb") as file:
                size, whole = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
            same = index.number == part.number and index.sha256 in ("", whole)
            if same and size == sum(row.size for row in index.rows):
                found[part.number] = index
    return found


def run_here(
    parts: Sequence[Part], work: isolate.Work, workers: int, limit: float, preload: str
) -> Generator[tuple[Part, int], None, None]:
    """Makes parts in processes on this machine; yields each when finished, with its number of usable sources.

    Args:
      parts: the parts to make.
      work: a partial of `write_part`.
      workers: number of processes.
      limit: seconds without a sign of life after which a source is given up.
      preload: see `isolate.isolated_map`.
    """
    with contextlib.closing(isolate.isolated_map(work, parts, workers, limit=limit, preload=preload)) as results:
        for number, usable in results:
            yield parts[number], usable


def run_on_beam(parts: Sequence[Part], work: isolate.Work, limit: float, preload: str, options: Any) -> None:
    """Makes parts with an Apache Beam pipeline, whose workers must reach the folder of `work` under the same name.

    The workers must be allowed to start processes: on Dask, that is workers without a nanny.

    Args:
      parts: the parts to make.
      work: a partial of `write_part`.
      limit: as in `run_here`.
      preload: likewise.
      options: `apache_beam.options.pipeline_options.PipelineOptions`, including the choice of runner.
    """
    import apache_beam as beam

    # Each part still runs in a child process of the Beam worker: otherwise, a file that crashes its reader would be
    # tried four times and then end the pipeline.
    one = functools.partial(_run_one, work=work, limit=limit, preload=preload)
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(one)


def _run_one(part: Part, work: isolate.Work, limit: float, preload: str) -> int:
    ((_, usable),) = run_here([part], work, 1, limit, preload)
    return usable
