"""The site: generated pages leave nothing out, no link is broken, and it is built without a warning."""

import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from data_prep import catalog
from usfmae_jax import api

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated(hooks):
    return hooks.pages()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py")))
def test_every_field_of_a_config_is_on_its_page_with_a_meaning(hooks, generated, name):
    rows = re.findall(r"^\| `([\w.]+)` \| `.*` \| (.*?)(?: ?\(only .*\))? \|$", generated[f"configs/{name}.md"], re.M)
    said = dict(rows)
    assert len(rows) == len(said)
    variants = importlib.import_module(f"usfmae_jax.configs.{name}").VARIANTS
    assert said.keys() == {field for variant in variants for field in hooks.fields(name, variant)}
    assert not [field for field, meaning in said.items() if not meaning], f"say in configs/{name}.py what they are"
    assert all(f"\n### :{variant}\n" in generated[f"configs/{name}.md"] for variant in variants)


def test_a_meaning_is_what_stands_beside_or_above_a_field(hooks):
    said = hooks.meanings("pretrain")
    assert said["mask.block"] == "side of the masked squares, in patches"
    assert said["data.exclude"].startswith("Names of evaluation sets")
    assert re.fullmatch('What to start from: .* wrote; "" starts from random weights', said["init"])
    assert hooks.meanings("segment")["augment.hflip"] == hooks.meanings("finetune")["augment.hflip"]
    assert hooks.meanings("segment")["classes"] != hooks.meanings("finetune")["classes"]


def test_every_dataset_has_a_sheet_with_what_one_has_to_know(generated):
    for name in catalog.names():
        entry, page = catalog.load(name), generated[f"datasets/{name}.md"]
        assert f"({name}.md)" in generated["datasets/index.md"]
        for fact in (entry.title, entry.licence, entry.citation, entry.verified, *entry.problems):
            assert fact.replace("|", "\\|") in page


def test_every_function_of_the_api_is_in_the_reference_with_its_arguments(generated):
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^###? |\Z)", generated["reference.md"], re.M | re.S))
    for name, function in inspect.getmembers(api, inspect.isfunction):
        if not name.startswith("_"):
            assert all(argument in sections[name] for argument in inspect.signature(function).parameters)
            assert inspect.getdoc(function).splitlines()[0] in sections[name]
    assert {"Encoder", "Objective", "Task"} <= sections.keys()


def test_no_link_within_the_pages_leads_nowhere(generated):
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    known = written | generated.keys()
    named = re.findall(r"'([\w./]+\.md)'", str(NAV))
    assert written <= set(named) <= known
    pages = {DOCS / name: (DOCS / name).read_text() for name in written}
    pages |= {ROOT / name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s#]+)", text):
            target = (page.parent / link).resolve()
            assert ":" in link or target.exists(), f"{page.name}: {link}"


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="needs what requirements-docs.txt names: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(catalog.names())
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="?(?:https?:)?//[^>]*', text)
        assert not re.findall(r'<link[^>]* rel="?(?:stylesheet|preconnect)[^>]*(?:https?:)?//[^>]*', text)
