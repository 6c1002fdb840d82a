"""Compute the features of images, from shards or a folder of image files, for use in other programs.

    python -m usfmae_jax.embed --checkpoint=runs/pretrain-tiny --data=data/bus_bra --output=bus_bra.npz
    python -m usfmae_jax.embed --checkpoint=DIR --data=FOLDER_OF_IMAGES --output=features.parquet --pool=cls
    python -m usfmae_jax.embed --checkpoint=DIR --data='data/*' --split=test --output=test.npz --pool=patches

The file has one row per frame: features, source, dataset, patient, video, frame and label (-1 = none).
Read it with numpy.load(FILE) or pandas.read_parquet(FILE). Exit codes: 0 done; 2 bad input.
"""

import collections
import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from usfmae_jax.errors import DONE, DamagedRecord, InputError, Parser, answer, leave, some, visible_output

#: Image files that are read from a folder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
#: The features of an image: the mean of its patch tokens, its class token, or all patch tokens.
POOLS = ("mean", "cls", "patches")
#: Columns beside `features`, in order.
COLUMNS = ("source", "dataset", "patient", "video", "frame", "label")


@visible_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = Parser("usfmae_jax.embed", __doc__ or "")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="workdir, checkpoint, encoder or classifier, or usfmae-tiny"
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="shards, or a folder with PNG, JPEG, BMP or TIFF files"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="ends in .npz or .parquet")
    parser.add_argument("--pool", default="mean", choices=POOLS, help="default: %(default)s")
    parser.add_argument("--split", default="", help="only shards of this TFDS split; default: all")
    parser.add_argument(
        "--batch_size", type=int, default=0, metavar="N", help="images per call; default: what suits the devices"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="that decode; default: %(default)s")

    def act() -> int:
        args = parser.parse_args(argv)
        from usfmae_jax import cli  # only once the options are known to be valid

        cli.in_huge_pages()
        embed(
            args.checkpoint, args.data, args.output, args.pool, split=args.split, batch_size=args.batch_size,
            threads=args.threads,
        )  # fmt: skip
        return DONE

    return answer(act)


def embed(
    checkpoint: str,
    data: str,
    output: str,
    pool: str = "mean",
    *,
    split: str = "",
    batch_size: int = 0,
    threads: int = 2,
) -> int:
    """Computes features and writes them.

    Args:
      checkpoint: see `interop.model.open_model`.
      data: shards (see `data.records.open_shards`; separate several with commas), or a folder of image files.
      output: `.npz` (features float32 `[N, D]`; patches float16 `[N, T, D]`) or `.parquet`.
      pool: 'mean', 'cls' or 'patches'.
      split: only shards of this TFDS split.
      batch_size: images per call, divisible by the number of devices; 0 = chosen for the devices.
      threads: decoding threads.

    Returns:
      N; unreadable images are named and left out.

    Raises:
      InputError: an argument is invalid.
    """
    suffix = os.path.splitext(output)[1]
    if suffix not in (".npz", ".parquet"):
        raise InputError(f"--output={output} must end in .npz or .parquet")
    if suffix == ".parquet" and pool == "patches":
        raise InputError("a table cannot hold patch tokens; use --output=FILE.npz with --pool=patches")
    try:
        pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={output} cannot be written: {error.strerror or error}") from error

    from usfmae_jax.interop.model import open_model
    from usfmae_jax.probing.features import extractor, image_format  # only once the flags are known to be valid
    from usfmae_jax.training.forward import fitting_batch
    from usfmae_jax.training.mesh import make_mesh

    weights = open_model(checkpoint)
    weights.encoder()
    mesh = make_mesh()
    batch_size = fitting_batch(batch_size, mesh, "--batch_size")
    items = _shard_items(data, split) or _file_items(data, split)
    size, channels = image_format(weights)
    columns: dict[str, list[Any]] = collections.defaultdict(list)
    images = _load(items, columns, size, channels, batch_size, threads)
    features = extractor(weights, pool, mesh=mesh, batch_size=batch_size)(images, items.total, "features")
    _write(output, features, columns, {"weights": weights.fingerprint, "pool": pool})
    print(f"features {list(features.shape)} of {len(features)} frames: {output}", file=sys.stderr)
    return len(features)


class _Items(NamedTuple):
    """The items to read: how many; by index, the record (or raises `DamagedRecord`) and a name for messages."""

    total: int
    read: Callable[[int], dict[str, Any]]
    name: Callable[[int], str]


def _shard_items(data: str, split: str) -> _Items | None:
    """The records of shards; None if there are no shards."""
    from usfmae_jax.data.records import NoShardsError, Shards, dataset_name, decode_record, open_shards

    paths: list[str] = []
    for path in data.split(","):
        try:
            paths += open_shards(path.strip(), split or None).paths
        except InputError as error:
            if isinstance(error, NoShardsError) and "," not in data and os.path.isdir(data):
                return None  # perhaps a folder of image files
            raise InputError(f"--data: {error}; give shards, or a folder with PNG, JPEG, BMP or TIFF files") from error
    shards = Shards(list(dict.fromkeys(paths)))

    def read(number: int) -> dict[str, Any]:
        record = decode_record(shards[number])
        return record | {"dataset": record["dataset"] or dataset_name(shards.locate(number)[0])}

    return _Items(len(shards), read, lambda number: "record number {1} of {0}".format(*shards.locate(number)))


def _file_items(data: str, split: str) -> _Items:
    """Image files as records."""
    import cv2

    from usfmae_jax.data.records import FIELDS

    root = pathlib.Path(data)
    paths: list[pathlib.Path] = []
    others: list[pathlib.Path] = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            (paths if path.suffix.lower() in SUFFIXES else others).append(path)
    if not paths:
        raise InputError(
            f"--data={data} holds neither shards nor PNG, JPEG, BMP or TIFF files; of other kinds, make shards: python "
            f"-m data_prep.build --dataset=folder --input={data} --output=data"
        )
    if split:
        raise InputError(f"--split={split} is for shards, and --data={data} holds picture files; leave it out")
    if others:
        count = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        names = some([path.relative_to(root).as_posix() for path in others])
        print(f"warning: {count} no PNG, JPEG, BMP or TIFF and passed over: {names}", file=sys.stderr)

    def name(number: int) -> str:
        return paths[number].relative_to(root).as_posix()

    def read(number: int) -> dict[str, Any]:
        try:
            image = paths[number].read_bytes()
        except OSError as error:
            raise DamagedRecord(str(error)) from error
        if paths[number].suffix.lower() in (".tif", ".tiff") and cv2.imcount(str(paths[number])) > 1:
            raise DamagedRecord("it has several pages; python -m data_prep.build makes shards of them")
        source = name(number)
        return FIELDS | {"image": image, "source": source, "frame": source, "dataset": root.resolve().name}

    return _Items(len(paths), read, name)


def _load(
    items: _Items, columns: dict[str, list[Any]], size: tuple[int, int], channels: int, batch_size: int, threads: int
) -> Iterator[np.ndarray]:
    """Yields batches uint8 `[n, H, W, C]`; fills the columns in the same order."""
    import cv2

    from usfmae_jax.data import augment
    from usfmae_jax.data.pipeline import decode_ahead
    from usfmae_jax.data.records import decode_image

    cv2.setNumThreads(1)  # the parallelism is over images

    def load(index: int) -> tuple[dict[str, Any], np.ndarray] | str:
        try:
            record = items.read(index)
            return record, augment.resize(decode_image(record["image"], channels), size)
        except DamagedRecord as error:
            return f"{items.name(index)} is left out: {error}"

    batch: list[np.ndarray] = []
    with contextlib.closing(decode_ahead(load, range(items.total), threads, 2 * batch_size)) as loaded:
        for item in loaded:
            if isinstance(item, str):
                print(f"warning: {item}", file=sys.stderr)
                continue
            record, image = item
            for name in COLUMNS:
                columns[name].append(record[name])
            batch.append(image)
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
    if batch:
        yield np.stack(batch)
    if not columns:
        raise InputError("none of the images can be read")


def _write(output: str, features: np.ndarray, columns: dict[str, list[Any]], notes: dict[str, str]) -> None:
    """Writes the file atomically."""
    partial = f"{output}.incomplete"
    try:
        if output.endswith(".npz"):
            table: dict[str, Any] = {
                name: np.asarray(columns[name], np.int64 if name == "label" else np.str_) for name in COLUMNS
            }
            with open(partial, "wb") as file:
                np.savez(
                    file, **({"features": features} | table | {name: np.str_(note) for name, note in notes.items()})
                )
        else:
            import pyarrow.parquet

            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), features.shape[1])
            written = pyarrow.table({"features": rows} | {name: columns[name] for name in COLUMNS})
            pyarrow.parquet.write_table(written.replace_schema_metadata(notes), partial)
        os.replace(partial, output)
    except OSError as error:
        raise InputError(f"--output={output} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    leave(main())
