"""What every door with a config shares: flags, help, errors that talk to a person, exit codes.

Imports nothing heavy, so that `--help` and a mistyped flag answer at once.
"""

import ctypes
import difflib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from usfmae_jax.errors import InputError

#: Exit codes: done, bad input or config, stopped by preemption after a saved checkpoint.
DONE, BAD_INPUT, PREEMPTED = 0, 2, 75

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def run(doc: str, default_config: str, action: Callable[[ml_collections.ConfigDict, str, Any], int]) -> None:
    """Parses the command line, calls `action(config, workdir, flags)` and exits with the code that it returns.

    Args:
      doc: the door's docstring, shown by `--help`.
      default_config: FILE.py to show by `--help` when none is given.
      action: imports what is heavy itself.
    """
    keep_memory()
    try:
        parsed = parse(sys.argv, doc, default_config)
        code = action(parsed.config, parsed.workdir or default_workdir(sys.argv), parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code)


def keep_memory() -> None:
    """Tells glibc to keep freed memory instead of giving it back to the system; for JAX on a CPU under Linux.

    XLA frees and asks for the same hundreds of megabytes at every step. Given back, each page is faulted in anew: a
    third of a small model's training step. Must come before JAX starts its threads; memory stays at its peak.
    """
    accelerated = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")))
    if sys.platform != "linux" or accelerated:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def train(loop: Callable[[], bool], kept: str) -> int:
    """Runs a training loop that returns False when it was preempted; returns the exit code.

    Args:
      loop: see above.
      kept: the folder of its checkpoints, for what is said when the loss is no number any more.
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
        return 1


def parse(argv: Sequence[str], doc: str, default_config: str) -> Any:
    """Checks and parses the flags `--config`, `--config.field`, `--workdir` and those of a distributed job.

    Returns:
      the parsed absl flags.

    Raises:
      InputError: an unknown flag, variant or field (with the nearest names), or a value of the wrong type.
      SystemExit: after `--help`.
    """
    named = [value for value in map(_config_value, argv[1:], [*argv[2:], ""]) if value is not None]
    if any(argument in ("--help", "-h", "-help", "--helpfull", "--helpshort") for argument in argv[1:]):
        print(_help(doc, named[0] if named else default_config))
        raise SystemExit(DONE)
    if not named:
        raise InputError(f"--config is missing; try --config={default_config}")
    config = load_config(named[0])
    fields = dict(_fields(config))
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if argument.startswith("-") and name.startswith("config.") and name[7:] not in fields:
            raise InputError(f"{name} is no field of {named[0]}{_nearest(name[7:], fields, 'config.')}")
    # The file is loaded; what is left of it for absl are the overrides.
    argv = _without_config(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", "", "where the run lives", flag_values=values)
    flags.DEFINE_string("coordinator", "", "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "processes in the job", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "number of this process", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise InputError(str(error).replace("flag --", "")) from error
    except (ValueError, TypeError) as error:
        raise InputError(str(error).strip().splitlines()[-1]) from error
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is not understood; every option is --name=value, see --help")
    mark_flags_as_parsed()
    return values


def mark_flags_as_parsed() -> None:
    """Says that there are no other flags to wait for: grain starts no worker processes before that."""
    flags.FLAGS.mark_as_parsed()


def command(module: str) -> str:
    """What was typed to run a door, for a report that says how to repeat it; of absolute paths the last part."""
    arguments = [argument.partition("=") for argument in sys.argv[1:]]
    public = [name + sign + ",".join(map(public_path, value.split(","))) for name, sign, value in arguments]
    return shlex.join(["python", "-m", module, *public])


def public_path(path: str) -> str:
    """A path as artefacts may show it: of an absolute one only the last part, the rest tells who ran where."""
    path = path.strip()
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path


def start(flags: Any) -> None:
    """Joins the processes of a job, and on accelerators keeps compiled programs for the next start."""
    import jax

    from usfmae_jax.training.mesh import initialize_distributed

    initialize_distributed(flags.coordinator, flags.num_processes, flags.process_id)
    if jax.default_backend() != "cpu" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # A preempted job compiles once, not at every restart. CPU code is tied to the very machine: not cached.
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "usfmae_jax"))


def default_workdir(argv: Sequence[str]) -> str:
    """`runs/<config>-<variant>`."""
    value = next(v for v in map(_config_value, argv[1:], [*argv[2:], ""]) if v is not None)
    file, _, variant = value.partition(":")
    return f"runs/{os.path.splitext(os.path.basename(file))[0]}-{variant or 'base'}"


def load_config(value: str) -> ml_collections.ConfigDict:
    """Calls `get_config` of `FILE.py[:variant]`.

    Raises:
      InputError: no such file, or no such variant (with the nearest names).
    """
    file, _, variant = value.partition(":")
    module = _load_module(file)
    variants = list(getattr(module, "VARIANTS", ()))
    if variant and variant not in variants:
        raise InputError(f"{file} has no variant {variant!r}{_nearest(variant, variants)}")
    return module.get_config(variant) if variant else module.get_config()


def _load_module(file: str) -> ModuleType:
    if not os.path.isfile(file):
        raise InputError(f"config file {file!r} does not exist; run from the project's folder or give its path")
    spec = importlib.util.spec_from_file_location("usfmae_config", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _without_config(argv: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in argv:
        if not skip and _config_value(argument, "") is None:
            kept.append(argument)
        skip = argument in ("--config", "-config")  # its value is the next one
    return kept


def _config_value(argument: str, following: str) -> str | None:
    if argument in ("--config", "-config"):
        return following
    return argument.split("=", 1)[1] if argument.startswith(("--config=", "-config=")) else None


def _fields(config: ml_collections.ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            found += _fields(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _nearest(name: str, valid: Any, prefix: str = "") -> str:
    names = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.4)
    # A right name in the wrong group is as common a slip as a misspelt one.
    names += [v for v in valid if v.rpartition(".")[2] == name.rpartition(".")[2] and v not in names]
    if not names:
        return "; valid are " + ", ".join(prefix + v for v in valid)
    return "; nearest are " + ", ".join(prefix + v for v in names)


def _help(doc: str, value: str) -> str:
    lines = [doc.strip(), "", "Flags:"]
    lines += [
        f"  --config=FILE.py[:variant]     e.g. {value}",
        "  --config.FIELD=VALUE           overrides a field, see below",
        "  --workdir=DIR                  default runs/<config>-<variant>; an interrupted run in it is continued",
        "  --coordinator=HOST:PORT --num_processes=N --process_id=I",
        "                                 a job of several processes; found automatically on Cloud TPU, Slurm, GKE",
        "",
    ]
    file = value.partition(":")[0]
    module = _load_module(file)
    lines += [f"{file}:", *("  " + line for line in (module.__doc__ or "").strip().splitlines()), ""]
    lines += [f"Fields of {value}:"]
    lines += [f"  --config.{name}={value!r}" for name, value in _fields(load_config(value))]
    return "\n".join(lines)
