"""What is installed is the whole, works from any folder, and is what README and Dockerfile say."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

from tests.test_dependencies import required
from usfmae_jax import __version__
from usfmae_jax.errors import SCRIPTS

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COPIED = [name for line in re.findall("^COPY (.+) .+$", DOCKERFILE, re.M) for name in line.split()]


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_extras_are_what_the_requirement_files_name(extra):
    core = set(map(str, required("requirements.txt")))
    named = set(map(str, required(f"requirements-{extra}.txt"))) - core
    own = set(PROJECT["optional-dependencies"][extra])
    if "usfmae_jax[prep]" in own:
        own = own - {"usfmae_jax[prep]"} | set(PROJECT["optional-dependencies"]["prep"])
    assert {str(Requirement(one)) for one in own} == named


def test_the_core_names_neither_tensorflow_nor_pytorch():
    assert not {one.name for one in required("requirements.txt")} & {"tensorflow", "tensorflow-cpu", "torch"}


def test_scripts_open_the_doors_that_help_names():
    assert {script: target.partition(":")[0] for script, target in PROJECT["scripts"].items()} == SCRIPTS


def test_the_dockerfile_copies_what_is_there_and_runs_what_the_readme_says():
    assert all((ROOT / name).exists() for name in COPIED)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.M))
    steps = re.findall("^RUN (.+)$", DOCKERFILE, re.M)
    assert steps
    commands = [line.partition("  #")[0].strip() for line in (ROOT / "README.md").read_text().splitlines()]
    for step in steps:
        for name, value in arguments.items():
            step = step.replace(f"${{{name}}}", value)
        assert step in commands
    extras = {extra for one in re.findall(r"EXTRAS=(\w+(?:,\w+)*)", DOCKERFILE) for extra in one.split(",")}
    assert extras <= PROJECT["optional-dependencies"].keys()


def test_what_contributors_are_told_is_there():
    said = (ROOT / "CONTRIBUTING.md").read_text()
    named = [path for path in re.findall(r"[\w/.]+/[\w.]+\.(?:py|toml)", said) if "NAME" not in path]
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]
    targets = re.findall("^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z-]+)", said)) <= set(targets)


def test_the_citation_has_the_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_a_wheel_of_what_the_dockerfile_copies_works_from_an_empty_folder(tmp_path):
    try:
        old = int(importlib.metadata.version("setuptools").partition(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        old = True
    if old:
        pytest.skip("needs setuptools 77 or newer, which builds the wheel")
    source, home, empty = tmp_path / "source", tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    for name in COPIED:  # a link stays one: what it leads to is copied beside it
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source)
    packages = [source / "usfmae_jax", source / "data_prep"]
    expected = {
        os.path.relpath(os.path.join(folder, file), source)
        for package in packages
        for folder, _, files in os.walk(package, followlinks=True)
        for file in files
    }
    offline = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    _run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", f"--wheel-dir={tmp_path}", source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"usfmae_jax-{__version__}-py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected

    venv.create(home)
    bin_ = home / "bin"
    _run(sys.executable, "-m", "pip", f"--python={bin_ / 'python'}", "install", *offline, wheel)
    (there,) = home.glob("lib/*/site-packages")
    (there / "present.pth").write_text(sysconfig.get_path("purelib"))  # what it depends on
    assert sorted(path.name for path in bin_.glob("usfmae-*")) == sorted(SCRIPTS)
    assert "bus_bra" in _run(bin_ / "usfmae-data", "--list", cwd=empty)
    for script in SCRIPTS:
        assert f"    {script} --" in _run(bin_ / script, "--help", cwd=empty)
    assert "config.model.width=192" in _run(bin_ / "usfmae-pretrain", "--config=pretrain:tiny", "--help", cwd=empty)
    assert "config.suite" in _run(bin_ / "python", "-m", "usfmae_jax.evaluate", "--config=suite", "--help", cwd=empty)
    made = _run(bin_ / "usfmae-data", "--dataset=phantom", "--output=data/demo", "--patients=4", cwd=empty)
    assert "report.html" in made
    for part in ("usfmae_jax", "data_prep", "usfmae_jax.configs"):
        file = _run(bin_ / "python", "-c", f"import {part} as part; print(part.__file__)", cwd=empty)
        assert file.startswith(str(there))
    refused = subprocess.run([bin_ / "usfmae-pretrain", "--config=pretrain"], cwd=empty, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: config.data.path names no shards to train on.")


def _run(*command, cwd=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
