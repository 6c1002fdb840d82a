"""The licences of all locked dependencies as a table, from what the installed packages say of themselves.

python -m tests.licences > docs/licences.md
"""

import collections
import importlib.metadata
import pathlib
import platform
import re

from packaging.requirements import Requirement

LOCKS = "requirements.lock", "requirements-interop.lock", "requirements-docs.lock"

#: What may stand beside Apache-2.0 in a program: permissive licences, and the MPL, which asks nothing of other files.
ALLOWED = {
    *("Apache-2.0", "MIT", "MIT-0", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "BSD", "0BSD", "ISC", "Zlib", "CC0-1.0"),
    *("PSF-2.0", "CNRI-Python", "MPL-2.0"),
}

#: Names other than SPDX's, by a pattern of their beginning.
NAMES = {
    "Apache": "Apache-2.0",
    "MIT License": "MIT",
    "(3-Clause|New|Modified) BSD|BSD[- ]3": "BSD-3-Clause",
    "FreeBSD": "BSD-2-Clause",
    "BSD License$|BSD$": "BSD",  # does not say which one
    "ISC": "ISC",
    "Mozilla Public License 2.0": "MPL-2.0",
    "Python Software Foundation|PSF$": "PSF-2.0",
}

HEAD = """# Licences of the dependencies

Written by `make licences`: every package in the locks that is installed on Linux, by the licence that it states. All of
them may be used in and with an Apache-2.0 program; a test refuses a new dependency under a licence that it does not
know. This project distributes none of them: pip fetches them from their authors.

Three things that a package's own licence does not tell you:

- Some wheels contain other people's libraries. `av` contains FFmpeg (LGPL 3) with x264 and x265 (GPL 2),
  `opencv-python-headless` contains FFmpeg (LGPL 2.1), and NumPy and SciPy contain libgfortran (GPL 3 with its exception
  for libraries). Anyone who distributes a container image with them must meet these licences too; `av` is needed only
  for video.
- Not in the locks: PyTorch (BSD-3-Clause), whose build depends on the machine; gcsfs (BSD-3-Clause); `jax[cuda13]` and
  `jax[tpu]`, which bring NVIDIA's and Google's own libraries under terms of their own.
- Weights and data are not dependencies; their licences are in `lineage.json` and the model card.

| licence | packages |
|---|---|"""


def locked(version: str = platform.python_version()) -> dict[str, Requirement]:
    """Every locked package that such a Python takes on this platform, by its name."""
    root = pathlib.Path(__file__).parents[1]
    lines = [line for lock in LOCKS for line in (root / lock).read_text().splitlines() if re.match(r"\w", line)]
    found = [Requirement(line.rstrip("\\ ")) for line in lines]
    python = {"python_full_version": version, "python_version": version.rpartition(".")[0]}
    return {package.name: package for package in found if package.marker is None or package.marker.evaluate(python)}


def licence(package: str) -> str:
    """The licence as an SPDX expression, or what the package says where that cannot be told.

    Raises:
      PackageNotFoundError: it is not installed.
    """
    about = importlib.metadata.metadata(package)
    if expression := about.get("License-Expression"):
        return str(expression)
    classifiers = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License")]
    stated = [name for name in classifiers if name != "OSI Approved"] or [(about.get("License") or "").strip()]
    # Of several classifiers it is not said whether one may choose: all of them count.
    return " AND ".join(dict.fromkeys(_spdx(name) for name in stated))


def _spdx(name: str) -> str:
    first = name.splitlines()[0].strip() if name else "unknown"
    return next((spdx for pattern, spdx in NAMES.items() if re.match(pattern, first)), first)


def is_allowed(expression: str) -> bool:
    """Whether a licence expression can be met with the allowed licences alone; one with brackets is for a person."""
    return any(ALLOWED.issuperset(choice.split(" AND ")) for choice in expression.split(" OR "))


def main() -> None:
    """Prints the page."""
    packages: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(locked()):
        packages[licence(name)].append(name)
    print(HEAD)
    for expression, names in sorted(packages.items(), key=lambda item: -len(item[1])):
        print(f"| {expression} | {', '.join(names)} |")


if __name__ == "__main__":
    main()
