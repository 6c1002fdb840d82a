import importlib.metadata
import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement

from tests import licences

ROOT = pathlib.Path(__file__).parents[1]


def required(name: str) -> list[Requirement]:
    """What a requirement file and those that it includes name."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            found += required(line[3:].strip())
        elif line := line.partition("#")[0].strip():
            found.append(Requirement(line))
    return found


@pytest.mark.parametrize("version", ["3.11.7", "3.12.1"])
def test_what_the_requirement_files_name_is_locked_within_its_range(version):
    locked = licences.locked(version)
    names = ("dev", "interop", "tracking", "docs")
    for requirement in (one for name in names for one in required(f"requirements-{name}.txt")):
        if requirement.name != "torch":  # outside the locks
            name = re.sub("[-_.]+", "-", requirement.name).lower()
            assert name in locked, f"{name} is not locked: make lock"
            assert str(locked[name].specifier).removeprefix("==") in requirement.specifier, f"make lock: {requirement}"


def test_locks_name_no_host_and_no_path_and_hash_every_version():
    for lock in licences.LOCKS:
        text = (ROOT / lock).read_text()
        assert "/" not in text
        assert re.findall(r"^\w.*", text, re.M) == re.findall(r"^(\w.*)\n    --hash=sha256:[0-9a-f]{64}", text, re.M)


def test_a_dependency_with_an_unknown_licence_is_refused():
    assert licences.is_allowed("Apache-2.0 OR GPL-3.0-only AND MIT")
    assert not licences.is_allowed("GPL-3.0-only AND MIT")
    assert not licences.is_allowed("(MIT OR ISC) AND GPL-3.0-only")
    assert not licences.is_allowed("unknown")
    page = (ROOT / "docs" / "licences.md").read_text()
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", page, re.M))
    listed = {name for names in rows.values() for name in names.split(", ")}
    assert licences.locked().keys() <= listed, "docs/licences.md is old: make licences"
    for name, locked in licences.locked().items():
        try:
            if importlib.metadata.version(name) not in locked.specifier:
                continue  # at its lowest or newest, which may state its licence in other words
            stated = licences.licence(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of those for the comparisons with PyTorch
        assert licences.is_allowed(stated), f"{name}: {stated} is not among tests.licences.ALLOWED"
        if sys.version_info[:2] != (3, 11):
            continue  # the page is written there; another Python may take another version of a package
        assert name in rows.get(stated, "").split(", "), f"docs/licences.md has {name} elsewhere: make licences"
