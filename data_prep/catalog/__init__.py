"""The datasets, one small TOML file each: what they are, where to get them, and how to interpret their file paths.

Each file describes one dataset; `load_file` loads one of your own. Only `name`, `title` and `verified` are required,
and `include` in each layout. Unknown keys are refused.

    name, number, title, aliases, anatomy, licence, citation, homepage; version of the built dataset, "1.0.0"
    access = "open" | "account" | "request", and access_note: how to get access
    verified = "real files" | "layout fixture" | "documented only", and verification: what was checked
    benchmark: kept out of pretraining, not cleaned; private: ids are hashed; generic: a kind of file, not a dataset
    classes: names in the order of their numbers; expected: counts of files, frames, patients, videos and classes
    problems: known problems, in sentences for the user

    [[download]]  url, file, sha256, md5, bytes; extract = true, false or "nested" (also unpacks archives inside)
    [[layout]]    layouts are tried in order; the first that matches any file is used
      include, exclude   globs on paths below --input; `**/` is any number of folders; case-sensitive
      optional           switch = globs that are added by --optional=SWITCH
      suffixes           keep only included files with these suffixes, ignoring case; "*" = all that can be read
      content            "dicom": keep only included files that begin as DICOM does or have a DICOM suffix
      pattern            regular expression, searched for in the path; templates may use its groups
      patient, video, frame, split, label
                         templates such as "{split}/{patient}"; by default the group of that name, `cls` for the
                         label, `image` for the frame. If a group did not match, the value is empty: unknown
      splits, labels     what values of split and label mean: training_set = "train", Cov = "COVID-19"
      mask, mask_kind    template for the path of the mask, with `*` and `**/` if several may have to be joined;
                         and "image", "binary", "outline" or "polygons"
      reader             options of the readers: stride, max_frames, axis, flip, key, patient_key
      [[layout.table]]   a CSV, XLSX, XML, text or COCO JSON file whose values override those from the path
        file             globs; `columns` names the columns if there is no header
        key, match       a row belongs to a file if `key`, filled from the row, equals `match`, filled from the path,
                         ignoring file suffixes and leading zeros of numbers
        label, patient, video, split    templates over the columns
        spacing          likewise: pixel spacing in mm, one number, or two for down and across
      [[layout.folds]]   an official table of folds, written as splits/NAME.csv beside the shards
        name, file, key, match, fold    as above; `fold` is the number of the fold
        part, parts      template for train, val or test, and what other values mean; `pattern` is searched for in the
                         path of the table, and templates may use its groups
        others           instead of part: the row is in the test set of its own fold, and for every other fold the
                         column "valid_{fold}" gives its part: 1 = train, 0 = validation

Besides the groups, templates over paths may use {name}, {stem} and {ext} of the file, {dir}, its folder, and {up}, the
parent of that folder. Templates over rows may use the columns, {table}, the name of the table without its suffix, and
{folder}, the name of the folder that holds the table.
"""

import dataclasses
import difflib
import hashlib
import pathlib
import textwrap
import tomllib

from data_prep.catalog.schema import ACCESS, VERIFIED, Entry, check, parse
from usfmae_jax.errors import InputError

#: Switches that `--optional` accepts for every dataset.
SWITCHES = {"one_split": "everything in the train split", "no_masks": "masks are left out"}

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
    """Names of all datasets, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str) -> Entry:
    """The entry with that name or alias; case, and hyphens in place of underscores, do not matter.

    Raises:
      InputError: there is none; the message suggests the closest names.
    """
    wanted = name.lower().replace("-", "_")
    known = names()
    if wanted in known:
        return load_file(_FOLDER / f"{wanted}.toml")
    aliases = {alias: entry for entry in map(load, known) for alias in entry.aliases}
    if wanted in aliases:
        return aliases[wanted]
    near = difflib.get_close_matches(wanted, [*known, *aliases], n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"--dataset={name} is not in the catalogue: {guess}--list shows all")


def load_file(path: pathlib.Path) -> Entry:
    """Reads and checks an entry.

    Raises:
      InputError: the file cannot be read, or a key is missing, unknown or invalid; the message names file and key.
    """
    try:
        data = path.read_bytes()
        values = tomllib.loads(data.decode())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no TOML file: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be a catalogue entry") from error
    if "fingerprint" in values:
        raise InputError(f"{path.name}: fingerprint is not a key, it is computed")
    entry = dataclasses.replace(parse(values, Entry, path.name), fingerprint=hashlib.sha256(data).hexdigest())
    check(entry, path.name)
    if path.parent == _FOLDER and path.stem != entry.name:
        raise InputError(f"{path.name}: name {entry.name!r} must be that of the file")
    return entry


def listing(word: str = "") -> str:
    """The table of datasets, at most 120 columns wide: the rows of OpenUS-46 first, then the others.

    Args:
      word: lists only datasets with it in their name, aliases, title, anatomy, licence, access or `verified`; "" = all.

    Raises:
      InputError: no dataset matches.
    """
    entries = sorted(map(load, names()), key=lambda entry: (not entry.number, entry.generic, entry.number, entry.name))
    if word:
        entries = [entry for entry in entries if word.casefold() in _said(entry).casefold()]
    if not entries:
        raise InputError(f"--list={word}: no dataset has that in its name, title, anatomy or licence; --list shows all")
    lines = [f"{'':>2}  {'name':<26}{'anatomy':<23}{'licence':<39}{'access':<9}{'verified':<16}"]
    for entry in entries:
        anatomy, licence = entry.anatomy or "any", entry.licence or "that of your files"
        licence = textwrap.shorten(licence, 38, placeholder=" ...")
        lines.append(
            f"{entry.number or '':>2}  {entry.name:<26}{anatomy:<23}{licence:<39}{entry.access:<9}{entry.verified:<16}"
        )
    more = "More about one: python -m data_prep.build --dataset=NAME --output=data"
    if word:
        return "\n".join(line.rstrip() for line in [*lines, "", more])
    rows = [entry for entry in entries if entry.number]
    checked = ", ".join(f"{sum(one.verified == how for one in rows)} {how}" for how in VERIFIED)
    reach = ", ".join(f"{sum(one.access == how for one in rows)} {how}" for how in ACCESS)
    lines += [
        "",
        f"{len(rows)} rows of OpenUS-46: {checked}; {reach}.",
        "real files: files of the dataset went through; layout fixture: generated ones in the documented tree did.",
        more,
    ]
    return "\n".join(line.rstrip() for line in lines)


def _said(entry: Entry) -> str:
    words = (entry.name, *entry.aliases, entry.title, entry.anatomy, entry.licence, entry.access, entry.verified)
    return "\n".join(words)


def describe(entry: Entry) -> str:
    """Where to get a dataset, where to put it, its known problems and how to cite it."""
    where = "; ".join(dict.fromkeys(glob for layout in entry.layouts for glob in layout.include))
    switches = [switch for layout in entry.layouts for switch in layout.optional]
    facts = {
        "Access": ". ".join(filter(None, [entry.access, entry.access_note])),
        "Home": entry.homepage,
        "Download": ", ".join(one.file for one in entry.downloads) + " by --download" if entry.downloads else "",
        "Expects": where and f"below the folder that --input names: {where}",
        "Optional": f"--optional={','.join(dict.fromkeys(switches))}" if switches else "",
        "Verified": ": ".join(filter(None, [entry.verified, entry.verification])),
        "Benchmark": "keep it out of pretraining" if entry.benchmark else "",
        "Problems": " ".join(entry.problems),
        "Licence": entry.licence,
        "Cite": entry.citation,
    }
    lines = [f"{entry.title} ({entry.name})" + (f", row {entry.number} of OpenUS-46" if entry.number else "")]
    for name, text in facts.items():
        if text:
            lines += textwrap.wrap(
                text,
                118,
                initial_indent=f"  {name + ':':<11}",
                subsequent_indent=" " * 13,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)
