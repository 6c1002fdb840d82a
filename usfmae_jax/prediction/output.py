"""The output folder of predictions: finished files are kept, whatever happens later.

prediction.json   which model, and how files were read
finished.jsonl    one line per finished file: its rows, and what was wrong with it
masks/ overlays/  per file, under its own name; a clip has a folder of masks, and a video of overlays
masks/coco.json   at the end: all masks as COCO JSON; instances with their scores
predictions.csv   at the end: one row per frame
skipped.csv       at the end: files and frames that could not be read, and why
"""

import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from usfmae_jax import files
from usfmae_jax.data import cells
from usfmae_jax.errors import InputError, install, some
from usfmae_jax.reporting.masks import Coco, put, safe_path, write_png
from usfmae_jax.reporting.segmentation import outlined

ABOUT, FINISHED = "prediction.json", "finished.jsonl"
#: What an output folder of predictions may hold.
WRITTEN = (ABOUT, FINISHED, "masks", "overlays", "predictions.csv", "skipped.csv", ".lock", ".reading")
_RATE = 25  # frames per second of a video


@dataclasses.dataclass
class Source:
    """A file, or a piece of a shard, that is completed as a whole.

    Attributes:
      name: name that identifies it.
      stamp: changes when the source does.
      rows: rows of predictions.csv, so far.
      problems: (file, reason) pairs.
      masks: for each frame with a mask, its `name` in the folder, its `size` and the instances that were `found`.
      film: whether the frames are a clip.
    """

    name: str
    stamp: str = ""
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    masks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    film: bool = False


class Folder:
    """An output folder of predictions.

    Args:
      path: path of the folder; created if missing.
      about: what made the predictions, JSON; includes `weights`.
      overlays: whether to draw outlines over the frames.

    Raises:
      InputError: it holds something else, or predictions made with other settings.
    """

    def __init__(self, path: str, about: Mapping[str, Any], overlays: bool):
        self._root, self._overlays = pathlib.Path(path), overlays
        self._films: dict[str, Film] = {}
        self.warnings: set[str] = set()
        check(path, about)
        self._root.mkdir(parents=True, exist_ok=True)
        files.write(self._root / ABOUT, json.dumps(about, indent=2) + "\n")
        self.finished = _read_finished(self._root / FINISHED)

    def is_finished(self, name: str, stamp: str) -> bool:
        """Whether a source has been predicted in its present state."""
        return name in self.finished and self.finished[name].stamp == stamp

    def add(self, source: Source, file: str, number: int, said: Mapping[str, Any]) -> None:
        """Adds the row of a frame; see `add_mask` for its mask."""
        source.rows.append({"file": file, "frame": number, **said})

    def add_mask(
        self,
        source: Source,
        where: str,
        number: int,
        mask: np.ndarray,
        picture: np.ndarray,
        found: Sequence[Mapping[str, Any]],
    ) -> dict[str, str]:
        """Writes the mask of a frame, and its outlines over the frame.

        Args:
          source: source of the frame.
          where: the path that the mask is named after.
          number: number of the frame.
          mask: class of each pixel, uint8 `[H, W]`.
          picture: the frame, RGB `[H, W, 3]`.
          found: the instances, see `evaluation.instances.Instance`.

        Returns:
          the cell that names the mask.
        """
        where = safe_path(where)
        masks, overlays = self._root / "masks", self._root / "overlays"
        called = f"{where}/{number:06d}.png" if source.film else f"{where}.png"
        source.masks.append({"name": called, "size": list(mask.shape), "found": list(found)})
        if not source.film:
            write_png(masks / f"{where}.png", mask)
            if self._overlays:
                write_png(overlays / f"{where}.png", outlined(picture, mask, None))
            return {"mask": f"masks/{called}"}
        first, name = not source.rows, f"{number:06d}.png"
        if first:
            shutil.rmtree(masks / f"{where}.incomplete", ignore_errors=True)
        write_png(masks / f"{where}.incomplete" / name, mask)
        if self._overlays:
            if first:
                overlays.joinpath(where).parent.mkdir(parents=True, exist_ok=True)
                self._films[where] = Film(overlays / where, picture.shape[:2])
            self._films[where].add(outlined(picture, mask, None))
        return {"mask": f"masks/{called}"}

    def finish(self, source: Source) -> None:
        """Renames the files of a source to their final names and, if it has rows, records it as finished."""
        if film := self._films.pop(safe_path(source.name), None):
            film.close()
            self.warnings |= film.warnings
        if source.film and source.rows and "mask" in source.rows[0]:
            place = self._root / "masks" / safe_path(source.name)
            put(epath.Path(place.with_name(place.name + ".incomplete")), epath.Path(place))
        if source.rows:
            with open(self._root / FINISHED, "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(source)) + "\n")
        self.finished[source.name] = source

    def write(
        self, order: Iterable[str], rejected: Sequence[tuple[str, str]], names: Sequence[str] = ()
    ) -> tuple[int, int]:
        """Writes predictions.csv, skipped.csv and, where there are masks, masks/coco.json.

        Args:
          order: names of the sources, in order.
          rejected: (file, reason) of files that were not even opened.
          names: class names of the masks.

        Returns:
          the number of predicted frames, and of skipped files or frames.
        """
        sources = [self.finished[name] for name in order if name in self.finished]
        rows = [row for source in sources for row in source.rows]
        skipped = [*rejected, *(tuple(problem) for source in sources for problem in source.problems)]
        if rows:
            self._table("predictions.csv", list(rows[0]), ([*row.values()] for row in rows))
        self._table("skipped.csv", ["file", "reason"], sorted(skipped))
        masks = [one for source in sources for one in source.masks]
        if masks:
            coco = Coco(names)
            for one in masks:
                coco.add(one["name"], tuple(one["size"]), one["found"])
            coco.write(self._root / "masks" / "coco.json")
        return len(rows), len(skipped)

    def _table(self, name: str, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
        text = io.StringIO(newline="")
        cells.write(text, header, rows)
        files.write(self._root / name, text.getvalue())


def check(path: str, about: Mapping[str, Any]) -> None:
    """Raises InputError unless a folder is empty or holds predictions made with the same settings."""
    root = pathlib.Path(path)
    if root.exists() and not root.is_dir():
        raise InputError(f"--output={path} is a file; name a new folder")
    there = {name.removesuffix(".incomplete") for name in os.listdir(root)} if root.is_dir() else set()
    others = sorted(there - set(WRITTEN))
    if not others and there - {".lock"}:
        try:
            before = files.parse((root / ABOUT).read_bytes())
            if before["weights"] != about["weights"]:
                raise InputError(f"--output={path} holds predictions of another checkpoint; name a new folder")
            for name, value in about["read"].items():
                if before["read"][name] != value:
                    raise InputError(
                        f"--output={path} holds predictions with --{name}={before['read'][name]}; say the same, or "
                        "name a new folder"
                    )
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            others = sorted(there)
    if others:
        raise InputError(f"--output={path} holds something else ({some(others)}); name a new folder")


def _read_finished(path: pathlib.Path) -> dict[str, Source]:
    """Finished sources by name; an incomplete last line is removed."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        with open(path, "r+b") as file:
            file.truncate(len(data))
    try:
        lines = [files.parse(line) for line in data.splitlines()]
        sources = [Source(**line) for line in lines if _is_source(line)]
    except (ValueError, TypeError):
        lines, sources = [None], []
    columns = {tuple(row) for source in sources for row in source.rows}
    if len(sources) < len(lines) or len(columns) > 1:
        raise InputError(f"{path} is damaged; remove it, and everything is predicted again")
    return {source.name: source for source in sources}


def _is_source(line: Any) -> bool:
    """Whether a line of finished.jsonl has what `Folder.write` needs."""

    def lists_of(name: str, check: Callable[[Any], bool]) -> bool:
        return isinstance(line.get(name, []), list) and all(map(check, line.get(name, [])))

    return (
        isinstance(line, dict)
        and isinstance(line.get("name"), str)
        and isinstance(line.get("stamp", ""), str)
        and lists_of("rows", _is_row)
        and lists_of("problems", lambda one: isinstance(one, list) and [type(part) for part in one] == [str, str])
        and lists_of("masks", _is_mask)
    )


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() >= {"file", "frame"}
        and all(isinstance(cell, str | int | float) for cell in row.values())
    )


def _is_mask(mask: Any) -> bool:
    try:
        whole = isinstance(mask["name"], str) and _is_size(mask["size"])
        coded = [(one["class"], one["mask"]["size"], one["mask"]["counts"]) for one in mask["found"]]
    except (TypeError, KeyError):
        return False
    return whole and all(type(c) is int and _is_size(s) and isinstance(code, str) for c, s, code in coded)


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and [type(side) for side in size] == [int, int] and min(size) > 0


class Film:
    """Writes images as an MP4, which appears when closed; without PyAV, as PNG files in a folder.

    Args:
      place: path without the suffix.
      size: (height, width) of all images, padded to even numbers.
    """

    def __init__(self, place: pathlib.Path, size: tuple[int, int]):
        self._place, self._size, self._count = place, size, 0
        self.warnings: set[str] = set()
        self._partial = place.with_name(place.name + ".mp4.incomplete")
        try:
            import av
        except ImportError:
            self.warnings.add(f"films need av ({install('prep')}); overlays of clips are PNG files now")
            self._partial, self._container = place.with_name(place.name + ".incomplete"), None
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._container = av.open(str(self._partial), "w", format="mp4")
        stream: Any = self._container.add_stream(codec, rate=_RATE)
        stream.height, stream.width = (side + side % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
        self._stream = stream

    def add(self, picture: np.ndarray) -> None:
        """Adds an image, RGB `[H, W, 3]`; one of another size is cropped or padded to `size`."""
        if self._container is None:
            write_png(self._partial / f"{self._count:06d}.png", picture)
            self._count += 1
            return
        import av

        (height, width), (most, across) = self._size, picture.shape[:2]
        picture = picture[:height, :width]
        down, right = self._stream.height - min(height, most), self._stream.width - min(width, across)
        whole = np.pad(picture, ((0, down), (0, right), (0, 0)))
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")):
            self._container.mux(packet)

    def close(self) -> None:
        """Finishes the video and gives it its final name."""
        suffix = ""
        if self._container is not None:
            for packet in self._stream.encode():
                self._container.mux(packet)
            self._container.close()
            suffix = ".mp4"
        put(epath.Path(self._partial), epath.Path(self._place.with_name(self._place.name + suffix)))
