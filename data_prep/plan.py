"""Plans a build before the first file is opened."""

import argparse
import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from data_prep.catalog.schema import Entry
from data_prep.find.files import Collection, printable
from usfmae_jax.errors import InputError

_CLASSES = 12  # up to this many folders may well be classes; more, with numbers in their names, are not
# The part of a path that names the patient: the top folder; the file name before the first _ or -, or before the last.
_PATTERNS = (
    "^(?P<patient>[^/]+)/",
    *(f"(?P<patient>[^/{one}]+){one}[^/]*$" for one in "_-"),
    "(?P<patient>[^/]+)[_-][^/]*$",
)
_LOOKED_AT = 10_000  # paths examined for a pattern
PHANTOM = {"patients": 500, "frames": 4, "seed": 0}


@dataclasses.dataclass
class Plan:
    """Everything a build will do.

    Attributes:
      entry: the catalogue entry.
      name: of the dataset.
      found: the files to build from; for phantoms, the items are patient numbers.
      make_work: given a folder, returns the function that writes the records of a part (a partial of
        `parts.write_part`); imports heavy libraries.
      arguments: everything that determines the content of the shards, and nothing about this machine.
      mask_colours: the meaning of numbers in masks: dicts with class, name and, for masks drawn in colours, colour.
      tip: advice on how to make unknown patients known.
      thin: whether near-identical neighbours in a clip are dropped.
      deduplicate: whether duplicates of other frames are dropped.
      salt: salt of the pseudonyms; empty if names are written unchanged.
    """

    entry: Entry
    name: str
    found: Collection
    make_work: Callable[[str], Any]
    arguments: dict[str, Any]
    mask_colours: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tip: str = ""
    thin: bool = False
    deduplicate: bool = False
    salt: bytes = b""


def plan_files(entry: Entry, source: str, args: argparse.Namespace) -> Plan:
    """The plan for a folder of files.

    Raises:
      InputError: the folder does not match the entry and the arguments, or arguments contradict each other.
    """
    from data_prep import find, identity

    root = pathlib.Path(source)
    found = find.collect(
        entry,
        root,
        labels=args.labels,
        include=tuple(filter(None, args.include.split(";"))),
        pattern=args.pattern,
        switches=tuple(filter(None, args.optional.split(","))),
        masks=args.masks,
    )
    colours = _mask_colours(args.mask_colours)
    private = entry.private or args.private
    salt = identity.load_salt(args.salt, args.output) if private else b""
    for_pretraining = not (entry.benchmark or args.labels)
    chosen = {flag: _chosen(getattr(args, flag), for_pretraining) for flag in ("thin", "deduplicate")}
    chosen["clean"] = _chosen(args.clean, for_pretraining or private)  # scanners burn names into pictures
    if private:
        found.warnings += _private_warnings(chosen["clean"], args, found.label_names)
    elif args.salt or args.linkage:
        raise InputError("--salt and --linkage are for private data; add --private, or leave them out")
    options = dataclasses.replace(found.options, **_overrides(args))
    # The folder of a user's own data is a good name for the dataset, unless it may be the name of a patient.
    name = args.name or (_safe_name(root.resolve().name) if entry.generic and not private else entry.name)
    anatomy = args.anatomy or entry.anatomy
    how = _storage(name, anatomy, args) | dict(
        clean=chosen["clean"],
        thin=chosen["thin"],
        mask_kind=found.mask_kind,
        mask_colours={tuple(bytes.fromhex(one["colour"][1:])): one["class"] for one in colours},
        masks_required=args.masks == "required",
        options=options,
        only_sectors=private and chosen["clean"] and not args.whole_frames,
        salt=salt,
    )
    hidden = {flag: getattr(args, flag) for flag in ("include", "pattern", "optional")}  # these may name a patient, too
    if private:
        hidden = {flag: value and identity.pseudonym(salt, "frame", value) for flag, value in hidden.items()}

    def digest(what: str, text: str) -> str:
        return identity.keyed_digest(salt, what, text) if private and text else text

    shown = dataclasses.asdict(options)
    if args.key:
        shown["key"] = digest("key", args.key)
    # Only values other than the default, so that datasets built by earlier versions stay up to date.
    masks = {
        "masks": "" if args.masks == "auto" else args.masks,
        "mask_colours": args.mask_colours,
        "masks_beside": found.beside,
    }
    arguments = _stored(entry, args, anatomy) | chosen | hidden | {key: one for key, one in masks.items() if one}
    arguments |= {
        "options": shown,
        "entry": digest("entry", entry.fingerprint),
        "whole_frames": args.whole_frames,
        "time_limit": args.time_limit,
        "labels": args.labels if args.labels in ("", "parent") else digest("labels", _sha256(args.labels)),
        "exclude": digest("exclude", _sha256(args.exclude)) if args.exclude else "",
        "salt": identity.salt_fingerprint(salt) if private else "",
    }
    changed = _with_data_files(found.fingerprint, root, found.items)
    return Plan(
        entry=entry,
        name=name,
        found=dataclasses.replace(found, fingerprint=digest("files", changed)),
        make_work=functools.partial(_for_files, str(root), how),
        arguments=arguments,
        mask_colours=colours,
        tip=_patient_tip(found.items, args.labels, private),
        thin=chosen["thin"],
        deduplicate=chosen["deduplicate"],
        salt=salt,
    )


def plan_phantoms(entry: Entry, args: argparse.Namespace) -> Plan:
    """The plan for simulated patients.

    Raises:
      InputError: the image size is too small for simulation, or 0.
    """
    from data_prep.phantom import CLASSES

    if not args.image_size:
        raise InputError("--image_size=0 keeps the size of files; give a size to simulate phantoms")
    if args.image_size < 32:
        raise InputError(f"--image_size={args.image_size} is too small to simulate phantoms; give 32 or more")
    chosen: dict[str, Any] = {
        flag: default if getattr(args, flag) is None else getattr(args, flag) for flag, default in PHANTOM.items()
    }
    several = args.lesions == "several"
    if several:  # the default is not recorded, so that datasets from before this option stay up to date
        chosen["lesions"] = args.lesions
    name = args.name or "phantom"
    how = _storage(name, args.anatomy, args)
    return Plan(
        entry=entry,
        name=name,
        found=Collection(list(range(chosen["patients"])), [] if several else list(CLASSES)),
        make_work=functools.partial(_for_phantoms, how, chosen),
        arguments=_stored(entry, args, args.anatomy) | chosen,
        mask_colours=[{"class": i, "name": one} for i, one in enumerate(CLASSES) if i] if several else [],
    )


def _storage(name: str, anatomy: str, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `work.Storage` that files and phantoms have in common."""
    size = {"image_size": args.image_size, "encoding": args.encoding, "quality": args.quality or 95}
    return {"dataset": name, "anatomy": anatomy} | size


def _for_files(root: str, how: dict[str, Any], folder: str) -> Any:
    from data_prep import work
    from data_prep.write import parts

    return functools.partial(
        parts.write_part,
        process=functools.partial(work.process, root=root, how=work.Storage(**how)),
        digest=functools.partial(work.digest, root=root),
        folder=folder,
        salt=how["salt"],
    )


def _for_phantoms(how: dict[str, Any], chosen: dict[str, Any], folder: str) -> Any:
    from data_prep import work
    from data_prep.write import parts

    process = functools.partial(
        work.simulate,
        how=work.Storage(**how),
        seed=chosen["seed"],
        frames=chosen["frames"],
        first_test=chosen["patients"] - chosen["patients"] // 5,
        several="lesions" in chosen,
    )
    return functools.partial(parts.write_part, process=process, folder=folder)


def _mask_colours(text: str) -> list[dict[str, Any]]:
    """Parses NAME=#RRGGBB,... to the rows of a table; classes are numbered from 1 in the order given."""
    rows = []
    for number, one in enumerate(filter(None, text.split(",")), 1):
        found = re.fullmatch(r"\s*([^=]+?)\s*=\s*(#[0-9a-fA-F]{6})\s*", one)
        if not found:
            raise InputError(f"--mask_colours: {one!r} is not NAME=#RRGGBB, as in lesion=#ff0000,cyst=#00ff00")
        rows.append({"class": number, "name": found[1], "colour": found[2].lower()})
    if len({row["colour"] for row in rows}) < len(rows):
        raise InputError(f"--mask_colours={text} gives one colour two names")
    return rows


def _patient_tip(items: list[Any], labels: str, private: bool) -> str:
    """Advice with a pattern that finds patients in these paths; if there is none, on how to specify patients."""
    if labels not in ("", "parent"):
        return "The table may have a column 'patient'"
    paths = [printable(item.path) for item in items if not item.patient][:_LOOKED_AT]
    folders = {path.split("/")[0] for path in paths if "/" in path}
    numbered = len(folders) > _CLASSES and all(re.search(r"\d", folder) for folder in folders)
    for pattern in _PATTERNS if numbered and not labels else _PATTERNS[1:]:
        found = [(path, match["patient"]) for path in paths if (match := re.search(pattern, path))]
        patients = {patient for _, patient in found}
        # Names without a number are classes or views.
        if 1 < len(patients) < len(found) == len(paths) and all(re.search(r"\d", patient) for patient in patients):
            example = "" if private else f" ({found[0][0]} -> patient {found[0][1]})"  # logs are passed on, too
            where = "folders are" if pattern == _PATTERNS[0] else "names of files begin with"
            return f"If {where} patients, add --pattern='{pattern}'{example}"
    return (
        "If their paths name patients, add --pattern='...', a regular expression with a group (?P<patient>...), "
        "or else give a table with the columns file,patient by --labels"
    )


def _private_warnings(clean: bool, args: argparse.Namespace, label_names: list[str]) -> list[str]:
    warnings = []
    if not clean:
        warnings.append("--clean=off: names that a scanner burnt into the pictures are in the shards")
    elif args.whole_frames:
        warnings.append("--whole_frames: what is written outside the tissue of frames without a sector is kept")
    if args.labels == "parent":
        warnings.append(f"--labels=parent: names of folders are written as classes: {', '.join(label_names)}")
    return warnings


def _with_data_files(fingerprint: str, root: pathlib.Path, items: list[Any]) -> str:
    """The fingerprint, extended to change with the data files beside .mhd and .nhdr headers, if there are any."""
    lines: list[str] = []
    folders: dict[pathlib.Path, dict[str, list[str]]] = {}  # lists each folder once, however many headers it has
    for item in items:
        if item.path.lower().endswith((".mhd", ".nhdr")):
            header = root / item.path
            if header.parent not in folders:
                folders[header.parent] = _by_beginning(header.parent)
            beside = [header.parent / name for name in sorted(folders[header.parent][header.stem])]
            lines += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in beside]
    text = "\n".join([fingerprint, *lines]).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest() if lines else fingerprint


def _by_beginning(folder: pathlib.Path) -> dict[str, list[str]]:
    """The names in a folder, grouped by every prefix that ends before a dot."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name in os.listdir(folder):
        for dot in re.finditer(r"\.", name):
            found[name[: dot.start()]].append(name)
    return found


def _chosen(flag: str | None, default: bool) -> bool:
    return default if flag is None else flag == "on"


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {flag: getattr(args, flag) for flag in ("stride", "max_frames", "axis", "flip", "key")}
    given["flip"] = "" if given["flip"] == "none" else given["flip"]
    return {flag: value for flag, value in given.items() if value is not None}


def _stored(entry: Entry, args: argparse.Namespace, anatomy: str) -> dict[str, Any]:
    chosen = {flag: getattr(args, flag) for flag in ("format", "encoding", "image_size")}
    chosen |= {"dataset": entry.name, "anatomy": anatomy}
    return chosen | ({"quality": args.quality or 95} if args.encoding == "jpeg" else {})


def _sha256(path: str) -> str:
    try:
        return f"sha256 {hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()}"
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _safe_name(name: str) -> str:
    """A folder name in the form that TensorFlow Datasets accepts: BUS-BRA becomes bus_bra."""
    safe = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_") or "images"
    return safe if safe[0].isalpha() else f"d_{safe}"
