"""Pseudonyms for patients and clips: keyed hashes that cannot be reversed without the key.

A plain hash would protect nothing. There are few patient numbers, a million with six digits: anyone who has the shards
could hash all of them in a second and look up who is who. HMAC-SHA256 (RFC 2104) includes a secret, the salt, in every
hash; without it no number can be tried. The salt stays on the machine that builds and is written nowhere else (a Beam
runner gets it with the pipeline). The same salt gives the same pseudonyms, so that patients common to two builds can be
found: keep it as long as the data.

Everything else that is written about private input is keyed in the same way, with one exception: `sha256` of a record
is that of the decoded pixels, so that copies of a picture can be found across datasets. It tells anyone who holds the
very same picture that it is in the dataset, and under which pseudonym; it reveals nothing about any other picture.
"""

import contextlib
import hashlib
import hmac
import os
import pathlib
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Mapping

from data_prep import locks
from usfmae_jax.data import cells
from usfmae_jax.errors import InputError

#: Environment variable that names a salt file to use instead of the default.
VARIABLE = "USFMAE_SALT"
#: What can have a pseudonym, and the prefix of its pseudonyms.
PREFIXES = {"patient": "p", "video": "v", "frame": "f"}

#: Facts that are free text, and the value that replaces unknown text.
FREE_TEXTS, OTHER = {"Manufacturer", "ManufacturerModelName", "TransducerType"}, "other"

_VENDORS = """
    acuson agilent aloka alpinion atl bk boston butterfly canon chison clarius echonous edan esaote exact fujifilm ge
    healcerion hitachi hologic hp interson konica kretz landwind medison mindray olympus pentax philips samsung
    shimadzu siemens signostics siui sonoace sonoscape sonosite sonostar supersonic telemed terason terumo toshiba
    ultrasonix verathon vinno vingmed visualsonics volcano welld wisonic zonare zoncare
"""
# Words in names of scanners and transducers, including defined terms of DICOM.
_MODELS = """
    accuvix acclarix affiniti aixplorer antares aplio applio artida aquilion arietta ascendus avius cypress doppler
    elite elegra epiq envisor essential evo expert famio fusion hivision imagepoint iq juniper logiq logic lumify
    lisendo mylab mobile nemio noblus omnia open platinum power preirus premium prime prosound pro redwood resona
    sequoia site sonoline sonos style sonix touch tablet ultrasound vision viamo vivid voluson vevo xario xvision
    helx evolution nanomaxx micromaxx edge titan turbo maxx system expression signature series dimension
    sector phased mech annular linear curved curvilinear convex single crystal split xtal cwd iv rot mirror endocav
    endocavity endo cla pa aa vector array probe matrix micro radial volume
"""
_SHORT = r"[A-Za-z]{0,3}\d{1,4}[A-Za-z]{0,3}|[A-Za-z]{1,2}"
_MOST_DIGITS = 4
_PHOTOMETRIC = "MONOCHROME[12]|RGB|PALETTE COLOR|YBR_(FULL(_422)?|PARTIAL_4(22|20)|ICT|RCT)"
_BYTES = 32
_NONCE, _TAG = 16, 32  # bytes
_COLUMNS = "pseudonym", "kind", "original"
_WAIT = 300  # seconds for other builds to write their rows
_LEAST_BYTES, _MOST_BYTES = 16, 4096
_LEAST_DIFFERENT = 8  # 16 random bytes have 12 or more


def load_salt(path: str = "", output: str = "") -> bytes:
    """Reads the salt, the secret behind all pseudonyms.

    Args:
      path: the file that holds it; by default the one that `USFMAE_SALT` names, or else ~/.config/usfmae_jax/salt,
        which is created from 32 random bytes on first use. No other file is created: a mistyped path must not silently
        become a new salt, which would give every patient a new pseudonym.
      output: folder that will be passed on, in which the secret must not be.

    Raises:
      InputError: missing, accessible to others than its owner, too short, too simple, in `output`, or not a regular
        file.
    """
    chosen = path or os.environ.get(VARIABLE, "")
    file = pathlib.Path(chosen) if chosen else pathlib.Path.home() / ".config" / "usfmae_jax" / "salt"
    if output and file.resolve().is_relative_to(pathlib.Path(output).resolve()):
        raise InputError(f"the salt {file} would be handed on with {output}; keep it somewhere else")
    try:
        if not chosen and not file.exists():
            _create(file)
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"the salt {file} is not a regular file; name one with {VARIABLE}")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise InputError(f"the salt {file} is open to others than its owner; close it with: chmod 600 {file}")
            salt = opened.read(_MOST_BYTES)
    except OSError as error:
        raise InputError(
            f"the salt {file} cannot be used: {error.strerror}; make one with: "
            f"(umask 077; head -c {_BYTES} /dev/urandom > {file})"
        ) from error
    for number, least, what in (
        (len(salt), _LEAST_BYTES, "bytes"),
        (len({*salt}), _LEAST_DIFFERENT, "different bytes"),
    ):
        if number < least:
            raise InputError(
                f"the salt {file} has {number} {what}, expected {least} or more; make one with: "
                f"(umask 077; head -c {_BYTES} /dev/urandom > {file})"
            )
    return salt


def _create(file: pathlib.Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The file appears only when it is complete, and the first of two concurrent builds wins.
    with tempfile.NamedTemporaryFile(dir=file.parent) as temporary:
        temporary.write(secrets.token_bytes(_BYTES))
        temporary.flush()
        os.fsync(temporary.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary.name, file)


def pseudonym(salt: bytes, kind: str, value: str) -> str:
    """The name under which a patient, video or frame may be written.

    64 bits: among a million patients, the probability that two share one is 3 in 100 million. Pseudonyms of different
    kinds cannot be linked, even if their values are equal.

    Args:
      salt: from `load_salt`.
      kind: one of `PREFIXES`.
      value: the identifier; not empty, since all unknown ones would otherwise get the same pseudonym.

    Returns:
      A letter for the kind and 16 hexadecimal digits.

    Raises:
      ValueError: the value is empty.
    """
    if not value:
        raise ValueError("an unknown id has no pseudonym")
    return PREFIXES[kind] + _hash(salt, kind, value)[:16]


def keyed_digest(salt: bytes, what: str, data: str) -> str:
    """A digest of input that may identify somebody; without the salt, the input cannot be recovered from it."""
    return f"hmac-sha256 {_hash(salt, what, data)}"


def salt_fingerprint(salt: bytes) -> str:
    """12 hexadecimal digits that may be written and that distinguish builds with different salts."""
    return _hash(salt, "salt", "")[:12]


def _hash(salt: bytes, kind: str, value: str) -> str:
    message = f"{kind}\0{value}".encode("utf-8", "surrogatepass")  # file names may not be valid text
    return hmac.new(salt, message, hashlib.sha256).hexdigest()


def seal(salt: bytes, text: str) -> bytes:
    """Encrypts text with the salt, for files that a killed build may leave in a folder that is passed on.

    HMAC-SHA256 keyed with the salt as a stream cipher in counter mode, with a random nonce, and a tag over nonce and
    ciphertext.
    """
    nonce = secrets.token_bytes(_NONCE)
    sealed = nonce + _cipher(salt, nonce, text.encode())
    return sealed + hmac.digest(salt, b"tag\0" + sealed, "sha256")


def unseal(salt: bytes, data: bytes) -> str:
    """The inverse of `seal`.

    Raises:
      ValueError: damaged, or sealed with another salt.
    """
    sealed, tag = data[:-_TAG], data[-_TAG:]
    if len(data) < _NONCE + _TAG or not hmac.compare_digest(tag, hmac.digest(salt, b"tag\0" + sealed, "sha256")):
        raise ValueError("damaged, or sealed with another salt")
    return _cipher(salt, sealed[:_NONCE], sealed[_NONCE:]).decode()


def _cipher(salt: bytes, nonce: bytes, data: bytes) -> bytes:
    blocks = -(-len(data) // _TAG)
    stream = b"".join(hmac.digest(salt, b"stream\0" + nonce + k.to_bytes(8), "sha256") for k in range(blocks))
    return (int.from_bytes(data) ^ int.from_bytes(stream[: len(data)])).to_bytes(len(data))


def public_facts(facts: Mapping[str, str], identifiers: Iterable[str]) -> dict[str, str]:
    """Restricts the facts about equipment, which may contain any text, to what a private build may write.

    A manufacturer is reduced to a known name. Model and transducer are kept if they consist of known words and short
    groups of letters and digits, with at most four digits, and contain no identifier. Anything else becomes "other".

    Args:
      facts: from the readers.
      identifiers: of the patient, clip and file.
    """
    ids = [letters for one in identifiers if len(letters := _letters(one)) > 2]
    shown = dict(facts)
    if not re.fullmatch(_PHOTOMETRIC, shown.get("PhotometricInterpretation", "RGB")):
        shown["PhotometricInterpretation"] = OTHER
    for name in FREE_TEXTS & facts.keys():
        value = facts[name]
        words = re.split(r"[^0-9A-Za-z]+", value.strip())
        named = any(one in _letters(value) or _letters(value) in one for one in ids)
        if name == "Manufacturer":
            known = [word for word in words if word.casefold() in _VENDORS.split()]
            shown[name] = known[0] if known and not named else OTHER
        elif named or not _is_model(value, words):
            shown[name] = OTHER
    return shown


def without_single(counts: Mapping[str, int]) -> dict[str, int]:
    """Number of files by value; values found in only one file, which may identify a person, are merged as "other"."""
    shown = {value: number for value, number in counts.items() if number > 1 or value == OTHER}
    single = len(counts) - len(shown)
    return shown | ({OTHER: shown.get(OTHER, 0) + single} if single else {})


def _is_model(value: str, words: list[str]) -> bool:
    names = {*_MODELS.split(), *_VENDORS.split()}
    known = all(word.casefold() in names or re.fullmatch(_SHORT, word) for word in words)
    digits = sum(map(str.isdecimal, value))
    return known and digits <= _MOST_DIGITS and value.isascii() and not re.search(r"[\^=@<>]", value)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def check_linkage(path: str, output: str) -> None:
    """Refuses a path for the linkage table that would be passed on with the data.

    Args:
      path: where to write the table.
      output: folder that the build writes to.

    Raises:
      InputError: the table would be in `output`, its own folder does not exist, or another kind of file is there.
    """
    file, folder = pathlib.Path(path).resolve(), pathlib.Path(output).resolve()
    if file.is_relative_to(folder):
        raise InputError(f"the linkage table {path} would be handed on with {output}; write it somewhere else")
    _read_linkage(file)
    if not file.parent.is_dir():
        raise InputError(f"the linkage table {path} needs a folder that exists: mkdir -p {pathlib.Path(path).parent}")


def write_linkage(path: str, rows: Iterable[tuple[str, str, str]], output: str) -> None:
    """Writes the table that maps pseudonyms to originals, readable only by its owner; extends an existing one.

    Args:
      path: of the CSV file.
      rows: (pseudonym, kind, original), in any order; repetitions do not matter.
      output: folder that the build writes to, in which the table must not be.

    Raises:
      InputError: as in `check_linkage`, or another build holds the table for too long.
    """
    check_linkage(path, output)
    target = pathlib.Path(path).resolve()
    taken = f"another build has been writing to {path} for {_WAIT} seconds; try again when it is done"
    with locks.hold(target.parent, taken, f".{target.name}.lock", wait=_WAIT):
        _add_linkage(target, rows)


def _add_linkage(target: pathlib.Path, rows: Iterable[tuple[str, str, str]]) -> None:
    rows = {*rows, *_read_linkage(target)}
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")  # mode 0600
    temporary = pathlib.Path(name)
    try:
        with os.fdopen(descriptor, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            cells.write(file, _COLUMNS, sorted(rows), lineterminator="\r\n")
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_linkage(target: pathlib.Path) -> list[tuple[str, str, str]]:
    if not target.exists():
        return []
    with target.open(newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = list(cells.read(file)) or [[]]
    if tuple(header) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
        raise InputError(f"{target.name} is there and is no linkage table; give another name")
    return [(name, kind, original) for name, kind, original in rows]
