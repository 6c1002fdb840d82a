"""Predict on files with a trained model: a table and, for segmentation, masks and outlines drawn over the images.

    python -m usfmae_jax.predict --checkpoint=runs/finetune-busbra --data=EXPORT --output=predictions
    python -m usfmae_jax.predict --checkpoint=runs/segment-busbra/members/MEMBER --data=clip.dcm --output=clip
    python -m usfmae_jax.predict --checkpoint=runs/segment-busbra --data=data/mine --output=mine --overlays=off

Reads DICOM, video, volumes, images and arrays, as files or in folders, and shards. The members of a run are averaged;
the column `uncertainty` is their disagreement. The same command resumes after an interruption. Files keep their names;
text burnt into a frame stays in its overlay. Exit codes: 0 done; 2 bad input. For research only.
"""

import contextlib
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from usfmae_jax import __version__
from usfmae_jax.errors import DONE, DamagedRecord, InputError, Parser, answer, check_guard, visible_output

if TYPE_CHECKING:
    import numpy as np

    from usfmae_jax.interop.model import Model
    from usfmae_jax.prediction.kinds import Kind
    from usfmae_jax.prediction.output import Folder, Source

_PIECE = 64  # records of a shard that are completed together


@visible_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser("usfmae_jax.predict", __doc__ or "")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="workdir of a fine-tuning run, one member, or a classifier/")
    add("--data", required=True, nargs="+", action="extend", metavar="PATH", help="files, folders or shards")
    add("--output", required=True, metavar="DIR", help="a new folder, or the one of an earlier start")
    add("--overlays", default="on", choices=["on", "off"], help="outlines over the frames; default: %(default)s")
    add("--flip", default="off", choices=["on", "off"], help="the mean of a frame and its mirror; default: %(default)s")
    add("--stride", type=int, default=1, metavar="N", help="every N-th frame of a clip or slice of a volume")
    add("--max_frames", type=int, default=0, metavar="N", help="at most N of a file, evenly spread; default: all")
    add("--batch_size", type=int, default=0, metavar="N", help="images per call; default: what fits into memory")
    add("--workers", type=int, default=2, metavar="N", help="processes that read files; default: %(default)s")

    def act() -> int:
        args = parser.parse_args(argv)
        from usfmae_jax import cli  # only once the options are known to be valid

        cli.in_huge_pages()
        predict(
            args.checkpoint,
            args.data,
            args.output,
            overlays=args.overlays == "on",
            flip=args.flip == "on",
            stride=args.stride,
            max_frames=args.max_frames,
            batch_size=args.batch_size,
            workers=args.workers,
        )
        return DONE

    return answer(act)


def predict(
    checkpoint: str,
    data: Sequence[str],
    output: str,
    *,
    overlays: bool = True,
    flip: bool = False,
    stride: int = 1,
    max_frames: int = 0,
    batch_size: int = 0,
    workers: int = 2,
) -> int:
    """Predicts on files or shards; for the files written see `prediction.output`.

    Args:
      checkpoint: a fine-tuning run, whose members are averaged, or what `interop.model.open_model` accepts.
      data: files and folders for the readers of `data_prep`, or shards.
      output: folder; files that an earlier start finished are kept.
      overlays: for segmentation, draw the outlines over the frames.
      flip: average the predictions for each frame and its mirror image, as `config.evaluate.flip` of a run does.
      stride: read every n-th frame of a clip.
      max_frames: maximum number of frames per file; 0 = all.
      batch_size: images per call, divisible by the number of devices; 0 = as many as fit into memory.
      workers: number of processes that read files.

    Returns:
      the number of predicted frames, including those of earlier starts.

    Raises:
      InputError: an argument is invalid, or no file can be read.
    """
    if stride < 1 or max_frames < 0 or workers < 1:
        raise InputError("--stride and --workers must be 1 or more, --max_frames 0 or more")

    from usfmae_jax.interop.model import output_names  # only once the flags are known to be valid
    from usfmae_jax.prediction import output as writing
    from usfmae_jax.prediction.kinds import kind_of
    from usfmae_jax.training import lock
    from usfmae_jax.training.checks import public_paths
    from usfmae_jax.training.mesh import make_mesh

    models = open_members(checkpoint)
    name, kind = kind_of(models[0], checkpoint)
    if flip and kind.mirror is None:
        raise InputError("--flip=on: what queries find on a mirrored frame has another order; leave it off")
    about = {
        "kind": name,
        "checkpoint": public_paths(checkpoint),
        "weights": [model.fingerprint for model in models],
        "read": {"flip": "on" if flip else "off", "stride": stride, "max_frames": max_frames},
        "code": f"usfmae_jax {__version__}",
    }
    writing.check(output, about)
    found = _shards(data)
    if found is None:
        found = _files(data, output, workers, stride, max_frames)
        learnt = [one for stage in models[0].lineage[-1:] for one in stage.get("data", ())]
        if any(one.get("cleaned") for one in learnt):
            print(
                "warning: the model was trained on frames from which text and graphics were removed, and files are "
                "predicted as they are; python -m data_prep.build --clean=on makes shards of them for --data",
                file=sys.stderr,
            )
    run = _Ensemble(models, kind, make_mesh(), batch_size, flip)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.hold(output, "--output"))
            folder = writing.Folder(output, about, overlays)
        except OSError as error:
            raise InputError(f"--output={output} cannot be written: {error.strerror or error}") from error
        _run(found, run, folder)
        frames, skipped = folder.write(found.names, found.rejected, output_names(models[0].description))
    for warning in sorted(folder.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    if skipped:
        count = "1 file or frame is" if skipped == 1 else f"{skipped} files or frames are"
        print(f"warning: {count} left out: {os.path.join(output, 'skipped.csv')} says why", file=sys.stderr)
    if not frames:
        raise InputError("none of the files can be read")
    print(f"predictions of {frames} frames: {os.path.join(output, 'predictions.csv')}", file=sys.stderr)
    return frames


def open_members(checkpoint: str) -> "list[Model]":
    """The models to average: the trained members of a run, or the single model at a path.

    For a run of several label fractions, only the members of the largest: the others learnt from fewer labels.

    Raises:
      InputError: there are none, or they differ in kind.
    """
    from usfmae_jax.interop.model import members, open_model

    found = members(checkpoint)
    most = max(map(_fraction, found), default=0.0)
    models = [open_model(path) for path in found if _fraction(path) == most] or [open_model(checkpoint)]
    same = [({**one.description, "scale": None}, one.preprocessing) for one in models]  # each has its own scale
    for one in same[1:]:
        if one != same[0]:
            raise InputError(f"the members of --checkpoint={checkpoint} are different models; choose one of them")
    return models


def _fraction(folder: str) -> float:
    """The label fraction of a member in percent, from its name; see `finetuning.members.plan_members`."""
    name = re.search(r"-fraction-(\d[\d.e-]*)$", folder)
    return float(name[1]) if name else 100.0


class _Frame(NamedTuple):
    """A frame to predict: its file and number, the path its mask is named after, its pixels and their size in mm."""

    file: str
    number: int
    where: str
    load: Callable[[], bytes]
    spacing: tuple[float, float]


class _Found(NamedTuple):
    """The sources to predict.

    Attributes:
      names: name of each source, in order.
      stamps: stamp of each, which changes when the source does.
      rejected: (file, reason) of files that are not even opened.
      open: yields the sources of the given indices, with their frames.
      sizes: size of each source in the progress bar.
    """

    names: list[str]
    stamps: list[str]
    rejected: list[tuple[str, str]]
    open: "Callable[[list[int]], Iterator[tuple[Source, list[_Frame]]]]"
    sizes: list[int]


def _shards(data: Sequence[str]) -> _Found | None:
    """Shards, in pieces of up to `_PIECE` records; None if there are none."""
    from usfmae_jax.data.records import (
        NoShardsError,
        Shards,
        dataset_name,
        decode_record,
        nearest_path,
        open_shards,
    )
    from usfmae_jax.prediction.output import Source

    paths: list[str] = []
    for one in [path.strip() for given in data for path in ([given] if os.path.exists(given) else given.split(","))]:
        try:
            paths += open_shards(one).paths
        except NoShardsError as error:
            if not paths and all(map(os.path.exists, data)):
                return None  # not shards but other files
            if "://" in one or glob.has_magic(one) or os.path.exists(one):
                raise InputError(f"--data: {error}") from error
            near = nearest_path(one)
            raise InputError(f"--data: {one!r} is not there" + (f"; did you mean {near}?" if near else "")) from error
        except InputError as error:
            raise InputError(f"--data: {error}") from error
    shards = Shards(list(dict.fromkeys(paths)))
    if len(set(map(os.path.basename, shards.paths))) < len(shards.paths):
        raise InputError("--data holds shards of the same name in several folders; predict one after the other")
    pieces: list[list[int]] = []
    for number in range(len(shards)):
        if not pieces or len(pieces[-1]) == _PIECE or shards.locate(number)[1] == 0:
            pieces.append([])
        pieces[-1].append(number)

    def name(piece: list[int]) -> str:
        path, first = shards.locate(piece[0])
        return f"{os.path.basename(path)}#{first}"

    def read(number: int, shard: str, place: int) -> _Frame:
        record = decode_record(shards[number])
        called = record["frame"] or record["source"]
        file = record["source"] or f"{dataset_name(shard)}#{place}"
        spacing = tuple(record.get("spacing") or (0.0, 0.0))
        tail = called.rpartition("#")[2]
        within = int(tail) if "#" in called and tail.isdecimal() and len(tail) < 10 else 0
        called = called.replace("/", "_")
        return _Frame(file, within, f"{shard}/{place:06d}-{called}", lambda: record["image"], spacing)  # type: ignore

    def opened(numbers: list[int]) -> "Iterator[tuple[Source, list[_Frame]]]":
        for number in numbers:
            source, frames = Source(names[number], stamps[number]), []
            for record in pieces[number]:
                path, place = shards.locate(record)
                try:
                    frames.append(read(record, os.path.basename(path), place))
                except DamagedRecord:  # its message is not repeated: it may contain a path of this machine
                    source.problems.append((f"{os.path.basename(path)}#{place}", "the record cannot be read"))
            yield source, frames

    names = [name(piece) for piece in pieces]
    stamps = [f"{len(piece)}-{_changed(shards.locate(piece[0])[0])}" for piece in pieces]
    return _Found(names, stamps, [], opened, [len(piece) for piece in pieces])


def _changed(path: str) -> int:
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0  # not checked for a bucket


def _files(data: Sequence[str], output: str, workers: int, stride: int, max_frames: int) -> _Found:
    """Files of any kind that the readers support."""
    from data_prep import frames as files
    from data_prep.readers import Options
    from usfmae_jax.prediction.output import Source

    check_guard()  # before locking the output: the process that started this one holds that lock
    found, rejected, others = files.find(data, output)
    if not found:
        said = f": {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
        raise InputError(f"--data={' '.join(data)} holds no file that can be read{said}")
    files.check_libraries(found)
    if others:
        print(f"warning: {others}", file=sys.stderr)

    def opened(numbers: list[int]) -> "Iterator[tuple[Source, list[_Frame]]]":
        chosen = [found[number] for number in numbers]
        place = os.path.join(output, ".reading")
        with contextlib.closing(files.read(chosen, place, workers, Options(stride, max_frames))) as every:
            for number, held, reason in every:
                file = chosen[number]
                problems = [(file.name, reason)] if reason else []
                source = Source(file.name, file.stamp, problems=problems, film=len(held) > 1)
                yield source, [_Frame(file.name, one.number, file.name, one.load, one.spacing) for one in held]

    return _Found([file.name for file in found], [file.stamp for file in found], rejected, opened, [1] * len(found))


class _Ensemble:
    """Members that predict together."""

    def __init__(self, models: "list[Model]", kind: "Kind", mesh: Any, batch_size: int, flip: bool):
        import jax

        from usfmae_jax.training.forward import fitted, model_function, with_mirror
        from usfmae_jax.training.mesh import replicated

        self.kind, self.image_format, self._mesh = kind, models[0].image_format, mesh
        self.descriptions = [model.description for model in models]
        functions = [model_function(model, kind.apply) for model in models]
        self._variables = [jax.device_put(variables, replicated(mesh)) for _, variables in functions]
        size, channels = self.image_format
        function = functions[0][0]  # the same for all members
        if flip and kind.mirror:
            function = with_mirror(function, kind.mirror)
        self._program, self.batch_size = fitted(
            function, self._variables[0], (*size, channels), mesh, batch_size, "--batch_size"
        )

    def ask(self, images: "list[np.ndarray]") -> list[Any]:
        """Starts the members' predictions for at most `batch_size` images; see `hear`."""
        import numpy as np

        from usfmae_jax.training.mesh import global_batch

        batch = np.zeros((self.batch_size, *images[0].shape), np.uint8)
        batch[: len(images)] = images
        there = global_batch(self._mesh, batch)
        return [self._program(variables, there) for variables in self._variables]

    def hear(self, said: list[Any]) -> "dict[str, np.ndarray]":
        """Waits for predictions started by `ask`: arrays `[M, batch_size, ...]` by name."""
        import numpy as np

        return {name: np.stack([np.asarray(one[name]) for one in said]) for name in said[0]}


def _run(found: _Found, run: _Ensemble, folder: "Folder") -> None:
    """Predicts on unfinished sources; the devices compute one batch while the previous one is written."""
    from tqdm import tqdm

    from usfmae_jax.data.augment import resize
    from usfmae_jax.data.records import decode_image

    left = [n for n, name in enumerate(found.names) if not folder.is_finished(name, found.stamps[n])]
    done = len(found.names) - len(left)
    if done:
        print(f"{done} of {len(found.names)} {_unit(found)}s were finished before", file=sys.stderr)
    if not left:
        return
    (size, channels), sizes = run.image_format, dict(zip(found.names, found.sizes, strict=True))
    waiting: list[tuple[Source, _Frame, bytes] | Source] = []
    images: list[np.ndarray] = []
    asked: list[tuple[list[Any], list[Any]]] = []

    def write(keep: int) -> None:
        while len(asked) > keep:
            said, items = asked.pop(0)
            values, place = run.hear(said) if said else {}, 0
            for item in items:
                if not isinstance(item, tuple):
                    folder.finish(item)
                    bar.update(sizes[item.name])
                    continue
                source, frame, image = item
                _answer(run, folder, source, frame, image, {name: value[:, place] for name, value in values.items()})
                place += 1

    def ask() -> None:
        asked.append((run.ask(images) if images else [], list(waiting)))
        waiting.clear()
        images.clear()
        write(1)

    unit = _unit(found)
    total = sum(found.sizes[number] for number in left)
    with tqdm(total=total, unit=unit, desc="predict", file=sys.stderr, mininterval=0.5, delay=2.0, leave=False) as bar:
        with contextlib.closing(found.open(left)) as sources:  # type: ignore[type-var]
            for source, frames in sources:
                for frame in frames:
                    try:
                        image = frame.load()
                        images.append(resize(decode_image(image, channels), size))
                    except DamagedRecord as error:
                        source.problems.append((frame.file, f"frame {frame.number}: {error}"))
                        continue
                    waiting.append((source, frame, image))
                    if len(images) == run.batch_size:
                        ask()
                waiting.append(source)
        ask()
        write(0)


def _unit(found: _Found) -> str:
    return "file" if set(found.sizes) == {1} else "frame"


def _answer(
    run: _Ensemble, folder: "Folder", source: "Source", frame: _Frame, image: bytes, said: "dict[str, np.ndarray]"
) -> None:
    """Writes the prediction for one frame."""
    from usfmae_jax.data.records import decode_image

    picture = decode_image(image, 3)
    found = run.kind.answer(run.descriptions, said, picture.shape[:2], frame.spacing)
    beside = {}
    if found.mask is not None:
        beside = folder.add_mask(source, frame.where, frame.number, found.mask, picture, found.found)
    folder.add(source, frame.file, frame.number, found.cells | beside)


if __name__ == "__main__":
    sys.exit(main())
