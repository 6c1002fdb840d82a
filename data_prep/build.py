"""Converts ultrasound files to shards that training reads and TensorFlow Datasets can open.

    python -m data_prep.build --list[=breast]
    python -m data_prep.build --dataset=folder --input=DIR --output=data --name=mine
    python -m data_prep.build --dataset=folder --input=DIR --output=data --labels=parent
    python -m data_prep.build --dataset=folder --input=DIR --output=data --labels=DIR/labels.csv
    python -m data_prep.build --dataset=bus_bra --input=DIR --output=data [--download]
    python -m data_prep.build --dataset=aul,hc,pocus --input=DIR --output=data --exclude=leaks.csv
    python -m data_prep.build --dataset=dicom --input=EXPORT --output=data --name=clinic

File formats are recognised by content: PNG, JPEG, TIFF, BMP; DICOM; video; NIfTI, MetaImage and NRRD volumes; MATLAB,
HDF5 and NumPy arrays. Writes to OUTPUT/NAME/VERSION/: the shards, manifest.json (what was kept, dropped and removed,
and why), report.html to look at, and rejected.csv and unmasked.csv if files or their masks had to be left out. An
interrupted build resumes when the same command is run again; a finished one is left unchanged.

With several datasets, each has its own folder below --input, named after it. If your own data identify patients, add
--private: ids and paths are then written only as salted hashes, as they always are for --dataset=dicom.

labels.csv (or .xlsx) has a header and the columns file,label,patient,video,split,mask,spacing, of which only `file`
is required: paths are relative to --input, splits are train, val and test, an empty label means none, an empty patient
(or NA, "Anonymous" and the like) is unknown, spacing is the pixel size in mm. Masks stored beside their images need no
table, see --masks.
"""

import argparse
import errno
import os
import pathlib
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

# OpenCV, grain and TensorFlow Datasets are imported where they are needed, so that --help and "up to date" are quick.
from data_prep import catalog
from data_prep.catalog.schema import Entry
from data_prep.plan import PHANTOM, plan_files, plan_phantoms
from data_prep.write.manifest import check_same, print_summary, put_back
from usfmae_jax.errors import STOPPED, InputError, Parser, as_started, check_guard, visible_output


@visible_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    try:
        args = parse(argv)
        if args.list is not None:
            print(as_started(catalog.listing(args.list)), flush=True)
            return 0
        return _run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        rest = "; make room, and the same command goes on from here" if full else ""
        print(f"error: {error.strerror or error}{where}{rest}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return STOPPED


def build_one(args: argparse.Namespace) -> pathlib.Path:
    """Builds the one dataset that the arguments from `parse` name; returns the folder of its version.

    Raises:
      InputError: an argument or an input file cannot be used.
    """
    return _build(_entry(args.dataset.strip()), args.input, args)


def _entry(name: str) -> Entry:
    return catalog.load_file(pathlib.Path(name)) if name.endswith(".toml") else catalog.load(name)


def _run(args: argparse.Namespace) -> int:
    """Builds the datasets one after another; the failure of one does not stop the others."""
    names = [name.strip() for name in args.dataset.split(",")]
    if len(names) == 1:
        build_one(args)
        return 0
    entries = [_entry(name) for name in names]
    sources = [_folder(args.input, name, entry) for name, entry in zip(names, entries, strict=True)]
    needed = [source for entry, source in zip(entries, sources, strict=True) if entry.name != "phantom"]
    missing = [source for source in needed if not os.path.isdir(source)]
    if missing and not args.download:
        raise InputError(f"--input={args.input} needs a folder for each dataset, and has no {missing[0]}")
    status, built = 0, []
    for entry, source in zip(entries, sources, strict=True):
        try:
            built.append(_build(entry, source, args))
        except InputError as error:
            print(f"error: {entry.name}: {error}", file=sys.stderr)
            status = 2
    if built:
        from data_prep.write import pages

        print(f"\nAll together: {pages.write_index(built, pathlib.Path(args.output) / 'index.html')}")
    return status


def _folder(parent: str, name: str, entry: Entry) -> str:
    """The folder of one of several datasets: below `parent`, under the name as typed or else its catalogue name."""
    if not parent:
        raise InputError("--input=DIR is missing, with a folder for each dataset")
    return os.path.join(parent, name if os.path.isdir(os.path.join(parent, name)) else entry.name)


def _build(entry: Entry, source: str, args: argparse.Namespace) -> pathlib.Path:
    """Builds what the arguments ask for unless it already exists; returns its folder."""
    downloaded = _download(entry, source, args) if args.download else []
    if entry.name != "phantom" and not os.path.isdir(source):
        if source:
            raise InputError(f"--input={source} is not a folder")
        raise InputError(f"--dataset={entry.name} needs --input=DIR\n{catalog.describe(entry)}")
    plan = plan_phantoms(entry, args) if entry.name == "phantom" else plan_files(entry, source, args)
    if downloaded:
        from data_prep.fetch import download

        plan.found.rejected += download.rejected_members(pathlib.Path(source))
    target = pathlib.Path(args.output) / plan.name / entry.version
    put_back(target)
    if not args.overwrite and target.exists():
        check_same(target, plan.arguments, plan.found.fingerprint)
        if args.linkage:
            raise InputError(f"{target} is up to date, and --linkage is written while it is built; add --overwrite")
        print(f"{target} is up to date")
        return target
    from data_prep.write import dataset

    check_guard()
    started = time.monotonic()
    manifest = dataset.build(plan, target, downloaded, args)
    print_summary(target, manifest, plan.found.warnings, plan.tip, time.monotonic() - started)
    return target


def _download(entry: Entry, source: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    from data_prep.fetch import download

    if not source:
        raise InputError("--download needs --input=DIR, the folder to download into")
    if not entry.downloads:
        raise InputError(f"{entry.name} cannot be downloaded from here\n{catalog.describe(entry)}")
    return download.fetch_all(entry.downloads, pathlib.Path(source))


class _Help(argparse.Action):
    """Makes --help fit one screen by listing only the names of the options."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.format_usage()}\n{(parser.description or '').strip()}\n\noptions (--help_all: what each does)")
        for group in parser._action_groups[2:]:  # after argparse's own two groups
            names = ", ".join(name for action in group._group_actions for name in action.option_strings)
            print(textwrap.fill(f"{group.title}: {names}", 98, initial_indent="  ", subsequent_indent="    "))
        parser.exit()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; raises InputError if it is not valid."""
    usage = as_started("python -m data_prep.build --dataset=NAME --input=DIR --output=DIR [options]")
    parser = Parser("data_prep.build", __doc__ or "", usage=usage, allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", nargs=0, action=_Help, help="show this on one screen and exit")
    parser.add_argument("--help_all", action="help", help="show this with what each option does and exit")
    _add_sources(parser.add_argument_group("what to build"))
    _add_reading(parser.add_argument_group("how files are read"))
    _add_cleaning(parser.add_argument_group("what is left out"))
    _add_storage(parser.add_argument_group("how it is stored"))
    args = parser.parse_args(argv)
    if args.list is None:
        _check(args)
    return args


def _add_sources(group: Any) -> None:
    add = group.add_argument
    about = "show all datasets, or those that match WORD (such as breast): licence, access, how far each was verified"
    add("--list", nargs="?", const="", metavar="WORD", help=about)
    add("--dataset", help="a name from --list (separate several with commas), or your own .toml file")
    add("--input", default="", help="folder with the source files")
    add("--output", help="folder that the dataset is written into, for example data")
    add("--name", help="name of the dataset; default: the catalogue's, or that of the input folder for your own files")
    add("--download", action="store_true", help="first download what needs no account into --input")
    add("--labels", default="", help="your own files: a table, see above, or 'parent': each file's folder is its label")
    add("--anatomy", default="", help="stored in every record, for example breast; default: the catalogue's")
    add("--include", default="", help="glob of files to take, for example '**/*.png'; separate several with semicolons")
    add(
        "--pattern",
        default="",
        help="regular expression for paths, such as '(?P<patient>[^/]+)/'; groups: patient, video, frame, cls",
    )
    add(
        "--masks",
        default="auto",
        choices=("auto", "required", "off"),
        help="auto: a frame whose mask cannot be used is kept without it, and with --dataset=folder files are masks if "
        "their names say so (x_mask.png or masks/x.png beside x.png); required: a frame whose mask cannot be used is "
        "left out; off: no masks, and every file is a frame; default: auto",
    )
    add("--mask_colours", default="", help="classes of coloured masks: NAME=#RRGGBB; separate several with commas")
    add("--optional", default="", help="parts of a dataset that are off by default; --dataset=NAME alone lists them")
    add("--patients", type=_at_least(1), help=f"phantom: number of patients; default: {PHANTOM['patients']}")
    add("--frames", type=_at_least(1), help=f"phantom: frames per patient; default: {PHANTOM['frames']}")
    add("--seed", type=_at_least(0), help=f"phantom: random seed; default: {PHANTOM['seed']}")
    add(
        "--lesions",
        choices=("one", "several"),
        help="phantom: several gives each patient zero to three lesions of three classes, with a mask; default: one",
    )


def _add_reading(group: Any) -> None:
    add = group.add_argument
    add("--stride", type=_at_least(1), help="every n-th frame of a clip or slice of a volume; default: the catalogue's")
    add(
        "--max_frames", type=_at_least(0), help="most frames per file, evenly spread; 0 = all; default: the catalogue's"
    )
    add("--axis", type=int, choices=(0, 1, 2), help="axis of (z, y, x) that arrays are sliced along; default: detected")
    add("--flip", choices=("none", "vertical", "horizontal", "both"), help="flip the slices of volumes")
    add("--key", help="name of the array in HDF5, MATLAB and npz files")
    add("--time_limit", type=_at_least(1), default=60, help="maximum number of seconds per frame; default: %(default)s")
    add("--workers", type=_at_least(1), default=os.cpu_count() or 1, help="number of processes; default: one per core")
    add("--runner", default="local", choices=("local", "beam"), help="what runs the workers; default: %(default)s")
    add(
        "--beam_pipeline_options",
        default="",
        help="options for Apache Beam, for example runner=FlinkRunner,flink_master=HOST:PORT; its workers must see "
        "--input and --output under the same paths",
    )


def _add_cleaning(group: Any) -> None:
    add, on_off = group.add_argument, {"choices": ("on", "off")}
    add(
        "--clean",
        **on_off,
        help="crop to the imaged sector, blank what is outside, and remove burnt-in annotations; default: off for "
        "benchmarks and with --labels unless the data are private, otherwise on",
    )
    add(
        "--thin",
        **on_off,
        help="drop near-identical neighbours in clips; default: off for benchmarks and with --labels",
    )
    add("--deduplicate", **on_off, help="drop copies and near copies of other frames; default: likewise")
    add("--exclude", default="", help="list of frames to leave out, written by python -m data_prep.audit")
    add(
        "--whole_frames",
        action="store_true",
        help="private: keep frames without a visible sector, such as cropped ones",
    )
    add("--private", action="store_true", help="write ids and paths as salted hashes only")
    add("--salt", default="", help="file with the secret for the hashes; default: ~/.config/usfmae_jax/salt")
    add("--linkage", default="", help="private: file for a table that maps hashes to ids; an existing one is extended")


def _add_storage(group: Any) -> None:
    add = group.add_argument
    add(
        "--format",
        default="array_record",
        choices=("array_record", "tfrecord"),
        help="of the shards; default: %(default)s",
    )
    add(
        "--encoding",
        default="jpeg",
        choices=("jpeg", "png", "raw"),
        help="encoding of the images; default: jpeg, which takes 60%% of the space of png, decodes more than twice as "
        "fast and changes grey levels by less than one on average; png and raw (uncompressed BMP) are lossless",
    )
    add("--quality", type=_at_least(1, 100), help="JPEG quality; default: 95")
    add(
        "--image_size", type=_at_least(0), default=256, help="short side in pixels; 0 = unchanged; default: %(default)s"
    )
    add("--overwrite", action="store_true", help="replace an existing dataset")


def _check(args: argparse.Namespace) -> None:
    """Refuses combinations of arguments that make no sense."""
    if not args.dataset:
        raise InputError("--dataset is missing; --list shows what there is, --dataset=folder takes any folder of files")
    if not args.output:
        raise InputError("--output is missing: the folder to write into, for example --output=data")
    if "://" in args.output:
        raise InputError(f"--output={args.output} is not local: build into a folder and copy it")
    if args.encoding != "jpeg" and args.quality:
        raise InputError(f"--quality is for --encoding=jpeg, not {args.encoding}")
    if args.beam_pipeline_options and args.runner != "beam":
        raise InputError("--beam_pipeline_options is for --runner=beam")
    foreign = {
        "phantom": (
            *("input", "labels", "download", "include", "pattern", "optional", "exclude", "private", "mask_colours"),
        ),
    }.get(args.dataset, (*PHANTOM, "lesions"))
    for flag in foreign:
        if getattr(args, flag) not in (None, "", False):
            raise InputError(f"--{flag} has no meaning for --dataset={args.dataset}; leave it out")
    for flag in ("exclude", "salt"):
        if getattr(args, flag) and not os.path.isfile(getattr(args, flag)):
            raise InputError(f"--{flag}={getattr(args, flag)} is not a file")
    single = [flag for flag in ("name", "labels", "include", "pattern", "optional") if getattr(args, flag)]
    if "," in args.dataset and single:
        raise InputError(f"--{single[0]} is for one dataset; build them one by one")
    if args.name and not re.fullmatch("[a-zA-Z][a-zA-Z0-9_]*", args.name):
        raise InputError(f"--name={args.name} must be a letter followed by letters, digits and underscores")


def _at_least(low: int, high: int = 1 << 31) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in the range from {low} to {high}")
        return value

    number.__name__ = "number"  # argparse says "invalid number value"
    return number


if __name__ == "__main__":
    sys.exit(main())
