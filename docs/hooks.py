"""The pages of the site that are made of the sources when it is built; mkdocs calls the functions named on_..."""

import ast
import importlib
import inspect
import io
import json
import pathlib
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

import data_prep.catalog as catalog
from data_prep.catalog.schema import Entry

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ("pretrain", "finetune", "segment", "evaluate", "suite")
#: Files of the repository that are pages as they are.
WHOLE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
}
#: The page of each file or folder of the repository that has one elsewhere; links name the file, which always exists.
PAGES = (
    WHOLE
    | {f"configs/{name}.py": f"configs/{name}.md" for name in CONFIGS}
    | {"data_prep/catalog": "datasets/index.md"}
)
#: What is documented from its docstrings: module, names (() = all of its functions), heading.
REFERENCE = (
    ("usfmae_jax.api", (), "Functions"),
    ("usfmae_jax.loading", ("Encoder", "Features"), "What `load_encoder` gives"),
    ("usfmae_jax.objectives", ("Objective",), "What is learnt without labels"),
    ("usfmae_jax.tasks", ("Task",), "What is learnt with labels"),
)
NOTEBOOKS = ROOT / "docs" / "notebooks"
_LIST = re.compile(r"^(\S.*)\n((?:  .*\n)+)", re.MULTILINE)
_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those that lie in docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links of the pages in docs/ lead to pages."""
    written = ROOT / "docs" / page.file.src_uri
    return linked(markdown, "docs") if written.exists() else markdown


def pages() -> dict[str, str]:
    """Every generated page, Markdown by its path below docs/."""
    made = {
        page: linked((ROOT / source).read_text(encoding="utf-8"), str(pathlib.PurePosixPath(source).parent))
        for source, page in WHOLE.items()
    }
    entries = [catalog.load(name) for name in catalog.names()]
    made["datasets/index.md"] = _datasets(entries)
    made |= {f"datasets/{entry.name}.md": sheet(entry) for entry in entries}
    made |= {f"configs/{name}.md": config_page(name) for name in CONFIGS}
    made |= {f"notebooks/{path.stem}.md": notebook(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    made["reference.md"] = reference()
    return made


def linked(text: str, folder: str) -> str:
    """A file of `folder` whose links lead to pages; those to other files of the repository become plain names."""

    def page(match: re.Match) -> str:
        mark, text, link = match.groups()
        path, _, anchor = link.partition("#")
        if ":" in link or not path:
            return match[0]
        target = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        if target.startswith("docs/") or target in PAGES:
            target = PAGES.get(target, target.removeprefix("docs/"))
            return f"{mark}[{text}]({target}{'#' * bool(anchor)}{anchor})"
        return f"`{text}`"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", page, text)


def notebook(path: pathlib.Path) -> str:
    """A notebook as a page: its text and its code, and a link to the file."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        shown = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", text)
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else shown)
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, f"*This page is a [notebook]({path.name}) to run.*", rest, *parts[1:]]) + "\n"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _datasets(entries: list[Entry]) -> str:
    rows: list[tuple[object, ...]] = [
        (
            f"[{entry.name}]({entry.name}.md)",
            entry.title,
            entry.anatomy or "any",
            entry.licence or "that of your files",
            entry.verified,
        )
        for entry in sorted(entries, key=lambda entry: (entry.generic, not entry.anatomy, entry.anatomy, entry.name))
    ]
    return f"""# Datasets

What `data_prep.build --list` knows, one sheet each, made from `data_prep/catalog/*.toml`. *Verified* says how far:
with real files of the dataset, with generated files in the documented layout, or by its documents only.

{_table(("name", "what it is", "anatomy", "licence", "verified"), rows)}
"""


def sheet(entry: Entry) -> str:
    """The data sheet of a dataset."""
    switches = dict.fromkeys(switch for layout in entry.layouts for switch in layout.optional)
    where = dict.fromkeys(glob for layout in entry.layouts for glob in layout.include)
    facts = {
        "Anatomy": entry.anatomy,
        "Row of OpenUS-46": entry.number or "",
        "Also called": ", ".join(entry.aliases),
        "Licence": entry.licence,
        "Access": ". ".join(filter(None, [entry.access, entry.access_note])),
        "Home": entry.homepage and f"<{entry.homepage}>",
        "Classes": ", ".join(entry.classes),
        "Expected": ", ".join(f"{count:,} {what}" for what, count in entry.expected.items()),
        "Masks": "yes" if any(layout.mask for layout in entry.layouts) else "",
        "Official folds": ", ".join(dict.fromkeys(folds.name for layout in entry.layouts for folds in layout.folds)),
        "Looked for": ", ".join(f"`{glob}`" for glob in where),
        "`--optional=`": ", ".join(f"`{switch}`" for switch in switches),
        "Verified": ": ".join(filter(None, [entry.verified, entry.verification])),
        "Benchmark": "kept out of pretraining, and not cleaned" if entry.benchmark else "",
        "Private": "names are written as keyed hashes" if entry.private else "",
    }
    command = f"python -m data_prep.build --dataset={entry.name} --output=data"
    if entry.name != "phantom":
        command += f" --input=raw/{entry.name}" + (" --download" if entry.downloads else "")
    parts = [
        f"# {entry.title}",
        f"```bash\n{command}\n```",
        _table(("", entry.name), [(name, text) for name, text in facts.items() if text]),
    ]
    if entry.problems:
        parts += ["## What to know", "\n".join(f"- {problem}" for problem in entry.problems)]
    if entry.downloads:
        rows: list[tuple[object, ...]] = [
            (
                f"[{one.file}]({one.url})",
                f"{one.bytes:,}" if one.bytes else "not known",
                one.sha256 or one.md5 or "none",
            )
            for one in entry.downloads
        ]
        parts += ["## Files", _table(("file", "bytes", "checksum"), rows)]
    parts += ["## Cite", entry.citation] if entry.citation else []
    return "\n\n".join(parts) + "\n"


def config_page(name: str) -> str:
    """Every field of a config, with its default and its meaning, and what each variant changes."""
    module = importlib.import_module(f"usfmae_jax.configs.{name}")
    defaults, told = fields(name), meanings(name)
    variants = {variant: fields(name, variant) for variant in module.VARIANTS}
    rows: dict[str, list[tuple[object, ...]]] = {"": []}
    known = {field for values in variants.values() for field in values}
    for field in [field for field in told if field in known] + sorted(known - told.keys()):
        meaning, only = told.get(field, ""), [variant for variant in variants if field in variants[variant]]
        if field not in defaults:
            meaning += f" (only {', '.join(f'`:{variant}`' for variant in only)})"
        value = defaults.get(field, variants[only[0]][field])
        rows.setdefault(field.rpartition(".")[0], []).append((f"`{field}`", f"`{value!r}`", meaning))
    about = _LIST.sub(_listed, module.__doc__ or "")
    parts = [f"# configs/{name}.py", about, "## Fields"]
    for group, lines in rows.items():
        if group:
            parts.append(f"### {group}" + (f"\n\n{_sentence(told[group])}" if told.get(group) else ""))
        parts.append(_table(("--config.", "default", "meaning"), lines))
    parts.append("## Variants")
    for variant, values in variants.items():
        said = inspect.getdoc(module.VARIANTS[variant]) or ""
        changed = [f"{field}={value!r}" for field, value in values.items() if defaults.get(field, ...) != value]
        parts.append(f"### :{variant}\n\n{said}" + ("\n\n```text\n" + "\n".join(changed) + "\n```" if changed else ""))
    return "\n\n".join(parts) + "\n"


def _listed(match: re.Match) -> str:
    """Variants or protocols, each a name, spaces and what it is, as a list."""
    items = re.sub(r"\n {4,}", " ", match[2])
    return f"**{match[1]}**\n\n" + re.sub(r"(?m)^  (:?\w+(?: :\w+)*) +", r"- **\1**: ", items)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")


def fields(name: str, variant: str = "") -> dict[str, Any]:
    """The values of a config's variant by field; "" = the one that it has when none is named."""
    module = importlib.import_module(f"usfmae_jax.configs.{name}")
    return _flat(module.get_config(*filter(None, [variant])).to_dict())


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def meanings(name: str) -> dict[str, str]:
    """What the comments beside and above the fields of a config say, by field and by group of fields.

    `get_config` counts first, then the functions of the variants, then the config that it starts from.
    """
    source = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, str] = {}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in sorted(functions, key=lambda node: node.name != "get_config"):
        for field, start, end in _fields(function):
            above = start - 1
            while above in comments and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            said = " ".join(comments[line] for line in range(above + 1, end + 1) if line in comments)
            found[field] = found.get(field) or said
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "usfmae_jax.configs":
            for base in node.names:
                found = meanings(base.name) | {field: said for field, said in found.items() if said}
    return found


def _fields(function: ast.FunctionDef) -> Iterator[tuple[str, int, int]]:
    """(field, first line, last line) of what a function assigns to its config; of a group the first line alone."""
    for node in function.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("config."):
            yield from _parts(ast.unparse(node.targets[0]).removeprefix("config."), node, node.value)


def _parts(field: str, node: ast.Assign | ast.keyword, value: ast.expr) -> Iterator[tuple[str, int, int]]:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict":
        yield field, node.lineno, node.lineno
        for keyword in value.keywords:
            yield from _parts(f"{field}.{keyword.arg}", keyword, keyword.value)
    else:
        yield field, node.lineno, node.end_lineno or node.lineno


def reference() -> str:
    """Functions and types for use from other programs, from their docstrings."""
    parts = ["# Reference", "Generated from the docstrings. For the options of a command, see its `--help`."]
    for module, names, heading in REFERENCE:
        found = importlib.import_module(module)
        parts.append(f"## {heading}\n\nIn `{module}`.")
        functions = [name for name, _ in inspect.getmembers(found, inspect.isfunction) if not name.startswith("_")]
        for name in names or functions:
            parts += _documented(getattr(found, name), f"### {name}")
    return "\n\n".join(parts) + "\n"


def _documented(thing: Any, heading: str) -> list[str]:
    source = textwrap.dedent(inspect.getsource(thing))
    (node,) = ast.parse(source).body
    about = _docstring(inspect.getdoc(thing) or "")
    if isinstance(node, ast.FunctionDef):
        return [heading, _signature(source, node), about]
    assert isinstance(node, ast.ClassDef)
    parts = [heading, about]
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and (not inner.name.startswith("_") or inner.name == "__call__"):
            parts.append(f"#### `{inner.name}` {{ #{node.name}-{inner.name} }}")
            parts += [_signature(source, inner), _docstring(ast.get_docstring(inner) or "")]
    return parts


def _signature(source: str, node: ast.FunctionDef) -> str:
    """A function's first lines as they are written; `node` is of the dedented source."""
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return "```python\n" + textwrap.dedent("\n".join(lines)) + "\n```"


def _docstring(text: str) -> str:
    """A docstring as Markdown, its sections as lists; a block of code is indented there, too."""
    done, section = [], ""
    for line in text.splitlines():
        item = re.match(r"  (\*{0,2}[\w, ]+): (.*)", line) if section in ("Args", "Attributes", "Raises") else None
        if head := _SECTION.fullmatch(line.strip()):
            section = head[1]
            done.append(f"**{section}**\n")
        elif section and item:
            done.append(f"- `{item[1]}`: {item[2]}")
        else:
            section = section if not line or line.startswith(" ") else ""
            done.append(line.strip() if section else line)
    return "\n".join(done)
