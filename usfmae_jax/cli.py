"""Shared by all commands that take a config: flags, help, readable errors, exit codes.

Imports nothing heavy, so that `--help` and a mistyped flag answer at once.
"""

import ast
import difflib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from usfmae_jax.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    PREEMPTED,
    SCRIPTS,
    InputError,
    answer,
    as_started,
    at_home,
    leave,
    visible_output,
)

_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: By config name: the module of the command that the config is for, and a field that only its configs have.
_DOORS = {"pretrain": ("main", "objective"), "finetune": ("finetune", "mode"), "evaluate": ("evaluate", "protocol")}


@visible_output()
def run(
    doc: str, default_config: str, action: Callable[[ml_collections.ConfigDict, str, Any], int], trains: bool = False
) -> None:
    """Parses the command line, calls `action(config, workdir, flags)` and exits with the code that it returns.

    Args:
      doc: the command's docstring, shown by `--help`.
      default_config: the included config that `--help` shows when none is given.
      action: does its heavy imports itself.
      trains: whether there is a training step, which `--compile_for` compiles.
    """

    def act() -> int:
        parsed = parse(sys.argv, doc, default_config, trains)
        in_huge_pages()
        try:
            return action(parsed.config, parsed.workdir or default_workdir(parsed["config"].config_filename), parsed)
        except KeyboardInterrupt:  # before or after the loop, or a second time within it
            if not trains or _one_of_several():
                raise
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
            return PREEMPTED

    if trains:  # a scheduler restarts a job that exits with that code; the loop itself makes sure that it is saved
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    lost = False
    try:
        code = answer(act)
    except BaseException as error:
        if isinstance(error, SystemExit) or not _one_of_several():
            raise
        code, lost = 1, _say_why(error)
    if code not in (DONE, PREEMPTED) and _one_of_several():
        from usfmae_jax.training import mesh

        mesh.leave(code, at_once=lost)
    leave(code)


def _one_of_several() -> bool:
    jax = sys.modules.get("jax")  # not loaded if the command failed before it started anything
    return jax is not None and jax.distributed.is_initialized()


def _say_why(error: BaseException) -> bool:
    """Prints why a process of a job ends; returns whether it ends because another process did."""
    from usfmae_jax.training import mesh

    said = mesh.lost_another(error)
    if said:
        print(f"error: {said}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return bool(said)


def train(loop: Callable[[], bool], kept: str) -> int:
    """Runs a training loop that returns False when it was preempted; returns the exit code.

    Args:
      loop: see above.
      kept: the folder of its checkpoints, which the message names if the loss is NaN.
    """
    from usfmae_jax.training.monitor import DivergedError

    try:
        return DONE if loop() else PREEMPTED
    except DivergedError as error:
        print(
            f"error: {error}; the last good checkpoint is kept in {kept}. "
            "Try a lower --config.optimizer.learning_rate or --config.optimizer.clip_norm=1.0 in another --workdir.",
            file=sys.stderr,
        )
        return FAILED


def compile_for(loop: Callable[[str, list[Any]], dict[str, Any]], target: str, workdir: str) -> int:
    """Prints what a training step would need on other hardware, and writes it as JSON to the workdir.

    Args:
      loop: compiles the step for a target and its devices; returns the result of `training.hardware.fit`.
      target: see `training.hardware`.
      workdir: created if missing.

    Returns:
      the exit code: `BAD_INPUT` if the step does not fit.
    """
    from etils import epath

    from usfmae_jax import files
    from usfmae_jax.training import checks, hardware

    devices = hardware.devices_of(target)
    path = epath.Path(checks.make_workdir(workdir), f"compiled_for_{target.replace(':', '_')}.json")
    found = loop(target, devices)
    files.write(path, json.dumps(found, indent=2) + "\n")
    print(f"{hardware.describe(found)}\n{path}")
    return DONE if found["fits"] else BAD_INPUT


def parse(argv: Sequence[str], doc: str, default_config: str, trains: bool = False) -> Any:
    """Checks and parses the flags `--config`, `--config.field`, `--workdir` and those for distributed jobs.

    If `trains`, also `--compile_for`.

    Returns:
      the parsed absl flags.

    Raises:
      InputError: an unknown flag, variant or field (with the nearest names), or a value of the wrong type.
      SystemExit: after `--help`.
    """
    first = flags.FlagValues()
    first.set_gnu_getopt()  # parses flags even after arguments that it does not know
    flags.DEFINE_string("config", None, "FILE.py[:variant]", flag_values=first)
    argv = _read(first, at_home(argv), known_only=True)
    if not {"-h", "-help", "--help", "--helpfull", "--helpshort"}.isdisjoint(argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is not an error
        print(_help(doc, first.config or default_config, fields=first.config is not None, trains=trains))
        raise SystemExit(DONE)
    if first.config is None:
        bare = next((one for one in argv[1:] if one.partition(":")[0] in _shipped()), default_config)
        raise InputError(f"--config is missing; try --config={bare}")
    if not first.config:
        raise InputError(f"--config= is empty; its value follows without a blank, as in --config={default_config}")
    value = first.config.rstrip(":")
    file, *variant = value.split(":", 1)
    config = load_config(value)
    check_door(config, value, pathlib.PurePath(default_config).stem)
    fields = _fields(config)
    for one in argv[1:]:
        option = one.partition("=")[0]
        field = next((name for name in (option.lstrip("-"), f"{option.lstrip('-')}.path") if name in fields), "")
        if one.startswith("-") and field:
            raise InputError(f"{option} is no option, but --config.{field} is")
    for name in [found[1] for found in map(re.compile(r"--?(?:no)?config\.([^=]*)").match, argv[1:]) if found]:
        _check_field(name, fields, value)  # ml_collections would raise a KeyError with the whole config
    # ml_collections needs the path of a file, and needs it before the overrides
    argv = [argv[0], "--config=" + ":".join([find_config(file), *variant]), *(_listed(one, fields) for one in argv[1:])]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", "", "where the run lives", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "processes in the job", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "number of this process", flag_values=values)
    if trains:
        flags.DEFINE_string("compile_for", "", "hardware to compile for instead of training", flag_values=values)
    rest = _read(values, argv)
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is not understood; every option is --name=value, see --help")
    flags.FLAGS.mark_as_parsed()  # grain starts no worker processes until then
    return values


def check_door(config: ml_collections.ConfigDict, value: str, own: str) -> None:
    """Raises InputError if a config, called `value`, is for another command than the one whose own is called `own`."""
    if own in _DOORS and _DOORS[own][1] not in config:
        doors = [module for module, field in _DOORS.values() if field in config]
        other = f"is for python -m usfmae_jax.{doors[0]}" if doors else f"has no config.{_DOORS[own][1]}"
        raise InputError(f"--config={value} {other}; here try --config={own}")


def _listed(argument: str, fields: Mapping[str, Any]) -> str:
    """Quotes the names in an argument for a tuple: ml_collections would read /a,/b as an invalid expression."""
    name, sign, value = argument.partition("=")
    field = name.lstrip("-").removeprefix("config.")
    if not sign or not isinstance(fields.get(field), tuple) or value.lstrip()[:1] in ("(", "[", "'", '"'):
        return argument
    try:
        ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return f"{name}={tuple(part.strip() for part in value.split(','))!r}"
    return argument


def _read(values: flags.FlagValues, argv: Sequence[str], known_only: bool = False) -> list[str]:
    try:
        return values(argv, known_only)
    except flags.Error as error:
        raise InputError(_plain(str(error).replace("flag --", ""))) from error
    except (ValueError, TypeError) as error:
        raise InputError(_plain(str(error).strip().splitlines()[-1])) from error


#: Messages of libraries about an option or a value, and the same in words for people who do not write Python.
_WORDS = (
    (r"invalid literal for int\(\) with base 10: .*", "a whole number is wanted, in digits"),
    (r"could not convert string to float: .*", "a number is wanted, such as 0.5 or 1e-3"),
    (r"Unknown command line flag '(\S+)'\. Did you mean: (\S+) \?", r"--\1 is no option; nearest is --\2"),
    (r"Unknown command line flag '(\S+)'", r"--\1 is no option; --help shows them"),
    (r"\('Non-boolean argument to boolean flag', .*\)", "True or False is wanted"),
    (r"Missing value for (\S+)", r"--\1 has no value; type --\1=VALUE"),
    (r"Could not override .* to type <class 'int'>", "a whole number is wanted, in digits"),
    (r"Could not override .* to type <class 'float'>", "a number is wanted, such as 0.5 or 1e-3"),
    (r"Could not override .* to type <class 'str'>", "a text is wanted, in quotes"),
    (r"Could not override .* to type <class 'bool'>", "True or False is wanted"),
)


def _plain(said: str) -> str:
    for pattern, words in _WORDS:
        said = re.sub(pattern, words, said)
    return said


def command(module: str) -> str:
    """The command line as typed, for a report that shows how to repeat it; absolute paths become their last part."""
    from usfmae_jax.training.checks import public_paths

    words = ["python", "-m", module]
    for argument in sys.argv[1:]:
        name, sign, value = argument.partition("=")
        words.append(name + sign + public_paths(value) if sign else public_paths(name))
    return shlex.join(words)


def huge_pages() -> dict[str, str]:
    """Environment variables for a process that trains on a CPU: glibc then asks for huge pages for large blocks.

    XLA allocates hundreds of megabytes at every step and frees them again. The system hands out their pages anew each
    time, and they are 2 MB instead of 4 kB if it was asked for huge ones; that also spares the processor most of its
    look-ups of addresses. Small models train 1.3 times as fast, ViT-B 1.06 times, in no more memory.

    Returns:
      {} if there is nothing to set: on other systems than Linux with glibc 2.35 or later; if all get huge pages or
      none does; with accelerators; and if `GLIBC_TUNABLES` is set already.
    """
    accelerated = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")))
    if sys.platform != "linux" or accelerated or "GLIBC_TUNABLES" in os.environ:
        return {}
    try:
        library, asked_for = os.confstr("CS_GNU_LIBC_VERSION") or "", "[madvise]" in _HUGE_PAGES.read_text()
    except (OSError, ValueError):  # another C library, a system without huge pages
        return {}
    if not asked_for or tuple(map(int, re.findall(r"\d+", library)[:2])) < (2, 35):
        return {}
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def in_huge_pages() -> None:
    """Starts this command anew with `huge_pages`, which glibc reads only when a process starts; does so once.

    Does nothing if this process is not a command of the package but, for instance, runs tests.
    """
    added, place = huge_pages(), len(sys.orig_argv) - len(sys.argv)
    program = sys.orig_argv[place] if place > 0 else ""
    if added and (program.startswith("usfmae_jax.") or pathlib.PurePath(program).stem in SCRIPTS):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)


def start(flags: Any) -> None:
    """Joins the processes of a job and, on accelerators, caches compiled programs for the next start."""
    import jax

    from usfmae_jax.training import mesh

    mesh.initialize_distributed(flags.coordinator, flags.num_processes, flags.process_id)
    if jax.default_backend() != "cpu" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # A preempted job then compiles once, not at every restart. CPU code is specific to one machine: not cached.
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "usfmae_jax"))


@contextmanager
def alone_in(workdir: str) -> Iterator[None]:
    """Locks the workdir for this job, after `start`; see `training.lock.hold`."""
    from usfmae_jax.training import lock, mesh

    with ExitStack() as held:
        mesh.on_first_process(lambda: held.enter_context(lock.hold(workdir)))
        yield


def default_workdir(value: str) -> str:
    """`runs/<config>-<variant>` for `FILE.py[:variant]`."""
    file, _, variant = value.partition(":")
    return f"runs/{os.path.splitext(os.path.basename(file))[0]}-{variant or 'base'}"


def load_config(value: str) -> ml_collections.ConfigDict:
    """Calls `get_config` of `FILE.py[:variant]` or `NAME[:variant]`, see `find_config`.

    Raises:
      InputError: no such config, or no such variant (with the nearest names).
    """
    file, _, variant = value.partition(":")
    module = _load_module(file)
    variants = list(getattr(module, "VARIANTS", ()))
    if variant and variant not in variants:
        raise InputError(f"{file} has no variant {variant!r}{_nearest(variant, variants)}")
    return module.get_config(variant) if variant else module.get_config()


def override(config: ml_collections.ConfigDict, fields: Mapping[str, Any], name: str) -> None:
    """Sets config fields, groups being dicts; a single value stands for a tuple of one, as on the command line.

    Raises:
      InputError: there is no such field (with the nearest names), or a value has the wrong type.
    """
    known = _fields(config)
    for field, value in _flat(fields).items():
        _check_field(field, known, name)
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        value = value.item() if getattr(value, "shape", None) == () else value  # a number of NumPy
        if isinstance(value, bool) and type(known[field]) in (int, float):
            raise InputError(f"config.{field}={value}: a number is wanted")
        if value is None:
            raise InputError(f"config.{field}=None: leave the field out, or give it a value like {known[field]!r}")
        try:
            if isinstance(value, str):
                value = _listed(f"{field}={value}", known).partition("=")[2]
            if isinstance(known[field], tuple):
                value = tuple(value) if isinstance(value, list) else tuple_parser.TupleParser().parse(value)
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise InputError(f"config.{field}={value!r}: {_plain(str(error).splitlines()[-1])}") from error


def _flat(fields: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{parent}{name}.") if isinstance(value, Mapping) else {f"{parent}{name}": value}
    return found


def find_config(name: str) -> str:
    """The path of a config: `name` itself if there is such a file, else the included config of that name.

    Raises:
      InputError: there is neither; lists the included ones and names the nearest.
    """
    if os.path.isfile(name):
        return name
    shipped = _shipped()
    if name not in shipped:
        nearest = difflib.get_close_matches(pathlib.PurePath(name).stem, shipped, n=1, cutoff=0.4)
        hint = f"; nearest is --config={nearest[0]}" if nearest else ""
        raise InputError(f"config file {name!r} does not exist; shipped are {', '.join(shipped)}{hint}")
    return shipped[name]


def _shipped() -> dict[str, str]:
    """Paths of the configs in the package, by name; in a checkout, they are a link to configs/ at the top."""
    folder = pathlib.Path(__file__).parent / "configs"
    return {path.stem: str(path) for path in sorted(folder.glob("[!_]*.py"))}


def _load_module(name: str) -> ModuleType:
    file = find_config(name)
    module = ModuleType("config")
    module.__file__ = file
    SourceFileLoader("config", file).exec_module(module)
    return module


def _fields(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        found |= _fields(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def _check_field(field: str, known: Mapping[str, Any], config: str) -> None:
    """Raises InputError if a config has no such field, naming the nearest that it has, and a config that has this."""
    if field not in known:
        having = [name for name in _DOORS if field in _fields(load_config(find_config(name)))]
        has = f" ({' and '.join(having)} {'have' if having[1:] else 'has'} it)" if having else ""
        raise InputError(f"config.{field} is no field of {config}{has}{_nearest(field, known, 'config.')}")


def _nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    names = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.4)
    # The right name in the wrong group is as common a mistake as a misspelt name.
    names += [v for v in valid if v.rpartition(".")[2] == name.rpartition(".")[2] and v not in names]
    return f"; {'nearest' if names else 'valid'} are " + ", ".join(prefix + name for name in names or valid)


def _help(doc: str, value: str, fields: bool, trains: bool) -> str:
    name = value.partition(":")[0]
    if fields:
        defaults = _fields(load_config(value)).items()
        below = f"Fields of {value}:\n" + "\n".join(f"  --config.{field}={default!r}" for field, default in defaults)
    else:
        below = f"--config={value} --help lists its fields."
    shown = "\n".join("  " + line for line in (_load_module(name).__doc__ or "").strip().splitlines())
    compiles = (
        "\n  --compile_for=v5e:4x4     only say what a step needs on a TPU or GPU (h100:8) that is not here" * trains
    )
    return as_started(f"""{doc.strip()}

Flags:
  --config=NAME[:variant]   {", ".join(_shipped())}; or FILE.py[:variant]
  --config.FIELD=VALUE      overrides a field
  --workdir=DIR             default runs/<config>-<variant>; an interrupted run in it is continued
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                            a job of several processes; found automatically on Cloud TPU and Slurm{compiles}

{name}:
{shown}

{below}""")
