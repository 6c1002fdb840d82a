"""The command line: quick help, and errors that name the nearest right thing."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from usfmae_jax import cli
from usfmae_jax.errors import SCRIPTS, InputError, Parser

CONFIG = "--config=configs/pretrain.py"


def _parse(*argv):
    return cli.parse(["main", *argv], "doc", "configs/pretrain.py")


def test_a_tilde_is_the_home_folder_as_shells_leave_it_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = _parse(f"{CONFIG}:tiny", "--workdir=~/runs", "--config.data.path=~/a,~/b~,c/~d")
    assert (values.workdir, values.config.data.path) == ("/home/me/runs", "/home/me/a,/home/me/b~,c/~d")
    parser = Parser("data_prep.build", "")
    parser.add_argument("--input")
    assert parser.parse_args(["--input=~"]).input == "/home/me"
    assert parser.parse_args(["--input=~other/x"]).input == "~other/x"


def test_overrides_reach_the_config():
    values = _parse(
        f"{CONFIG}:tiny",
        "--config.data.weights=(0.7, 0.3)",
        "--config.mask.fan_aware",
        "--config.train.batch_size=32",
        "--config.augment.crop_scale=(0.5,1.0)",
        "--workdir=w",
    )
    assert values.config.train.batch_size == 32
    assert tuple(values.config.augment.crop_scale) == (0.5, 1.0)
    assert values.config.model.width == 192
    assert values.config.data.weights == (0.7, 0.3)
    assert values.config.mask.fan_aware
    assert values.workdir == "w"


@pytest.mark.parametrize(("value", "size"), [("112", (112, 112)), ("(112,160)", (112, 160)), ("112,160", (112, 160))])
def test_images_are_square_or_not(value, size):
    from usfmae_jax.training.checks import square

    assert square(_parse(f"{CONFIG}:tiny", f"--config.model.image_size={value}").config.model.image_size) == size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/a/b,random,pixels", ("/a/b", "random", "pixels")),
        ("hc=/a b/t.csv#head circumference, x=y", ("hc=/a b/t.csv#head circumference", "x=y")),
        ("/a", ("/a",)),
        ("'/a','b'", ("/a", "b")),
        ("a,b", ("a", "b")),
        ("()", ()),
    ],
)
def test_names_for_a_tuple_need_no_quotes(value, expected):
    values = cli.parse(["main", "--config=configs/suite.py", f"--config.suite.checkpoints={value}"], "", "suite")
    assert tuple(values.config.suite.checkpoints) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--config is missing; try --config=configs/pretrain.py"),
        (["--config=nowhere.py"], "'nowhere.py' does not exist"),
        ([f"{CONFIG}:dmeo"], "no variant 'dmeo'; nearest are demo"),
        ([f"{CONFIG}:zzz"], "no variant 'zzz'; valid are base, paper, demo, tiny, small, large, huge"),
        ([CONFIG, "--config.optimizer.learning_rat=1"], "nearest are config.optimizer.learning_rate"),
        ([CONFIG, "--config.batch_size=1"], "config.train.batch_size"),
        ([CONFIG, "--config.split.only=1"], "is no field of configs/pretrain.py (finetune and evaluate have it)"),
        ([CONFIG, "--config.optimizer.muon=yes"], "config.optimizer.muon=yes: True or False is wanted"),
        ([CONFIG, "--config.train.batch_size=many"], "config.train.batch_size=many: a whole number is wanted"),
        ([CONFIG, "--wrkdir=x"], "--wrkdir is no option; nearest is --workdir"),
        ([CONFIG, "stray"], "'stray' is not understood"),
        ([CONFIG, "--noconfig.model.scam"], "nearest are config.model.scan"),
    ],
)
def test_mistakes_are_answered_with_what_to_type(argv, message):
    with pytest.raises(InputError) as error:
        _parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("configs/pretrain.py:tiny", "runs/pretrain-tiny"), ("configs/pretrain.py", "runs/pretrain-base")],
)
def test_the_workdir_is_named_after_the_config(value, expected):
    assert cli.default_workdir(value) == expected


def test_the_config_may_be_two_words_and_stand_behind_what_it_is_overridden_with():
    values = _parse("--config.train.batch_size=32", "--noconfig.model.scan", "--config", "configs/pretrain.py:tiny")
    assert values.config.train.batch_size == 32
    assert values.config.model.width == 192
    assert not values.config.model.scan
    assert values["config"].config_filename == "configs/pretrain.py:tiny"


def test_only_doors_that_train_compile_for_other_hardware(capsys):
    argv = ["main", f"{CONFIG}:tiny", "--compile_for=v5e:4x4"]
    assert cli.parse(argv, "doc", "configs/pretrain.py", trains=True).compile_for == "v5e:4x4"
    with pytest.raises(InputError, match="compile_for"):
        cli.parse(argv, "doc", "configs/pretrain.py")
    for trains in (True, False):
        with pytest.raises(SystemExit):
            cli.parse(["main", "--help"], "doc", "configs/pretrain.py", trains)
        assert ("--compile_for=v5e:4x4" in capsys.readouterr().out) == trains


def test_what_was_typed_is_shown_without_where_it_was(monkeypatch):
    monkeypatch.setattr(cli.sys, "argv", ["main", "--config", "/home/me/a.py:tiny", "--config.data.path=/data/b,c/d"])
    assert cli.command("door") == "python -m door --config a.py:tiny --config.data.path=b,c/d"


@pytest.mark.parametrize(("value", "width"), [("pretrain", 768), ("pretrain:tiny", 192)])
def test_a_shipped_config_is_named_from_any_folder(value, width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = _parse(f"--config={value}", "--config.train.batch_size=32")
    assert (values.config.model.width, values.config.train.batch_size) == (width, 32)
    assert cli.default_workdir(values["config"].config_filename) == cli.default_workdir(value)


@pytest.mark.parametrize("name", ["evaluate", "finetune", "pretrain", "segment", "suite"])
def test_every_config_is_shipped_and_a_copy_of_it_works_elsewhere(name, tmp_path, monkeypatch):
    copy = shutil.copy(f"configs/{name}.py", tmp_path / "mine.py")
    expected = cli.load_config(f"configs/{name}.py").to_dict()
    monkeypatch.chdir(tmp_path)
    assert cli.load_config(name).to_dict() == cli.load_config(str(copy)).to_dict() == expected


def test_a_file_comes_before_the_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite").mkdir()
    assert cli.load_config("suite").protocol == "suite"  # a folder is no config
    (tmp_path / "segment").write_text("import ml_collections\nget_config = lambda: ml_collections.ConfigDict({'a': 1})")
    assert cli.load_config("segment").a == 1


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("pretain:demo", "; nearest is --config=pretrain"),
        ("configs/finetune.py", "; nearest is --config=finetune"),
        ("zz", ""),
    ],
)
def test_a_config_that_is_not_there_is_answered_with_those_that_are(value, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        _parse(f"--config={value}")
    name = value.partition(":")[0]
    shipped = "shipped are evaluate, finetune, pretrain, segment, suite"
    assert str(error.value) == f"config file {name!r} does not exist; {shipped}{hint}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_screen_shows_commands_and_calls_the_door_as_it_was_started(script, capsys, monkeypatch):
    module = importlib.import_module(SCRIPTS[script])
    monkeypatch.setenv("COLUMNS", "100")
    for started, called in ((f"bin/{script}", script), ("module.py", f"python -m {SCRIPTS[script]}")):
        monkeypatch.setattr(cli.sys, "argv", [started, "--help"])
        with pytest.raises(SystemExit) as end:
            (module.run if hasattr(module, "run") else module.main)()
        shown = capsys.readouterr().out
        assert not end.value.code
        assert sum(max(1, -(-len(line) // 100)) for line in shown.splitlines()) <= 60
        assert shown.count(f"    {called} ") >= 3
        assert started == "module.py" or "python -m" not in shown


@pytest.mark.parametrize(
    ("door", "given", "nearest"),
    [
        ("usfmae_jax.predict", ["--checkpoint=c", "--data=d", "--output=o", "--overlay_=off"], "--overlays"),
        ("usfmae_jax.embed", ["--checkpoint=c", "--data=d", "--output=o.npz", "--thraeds=1"], "--threads"),
        ("usfmae_jax.convert", ["--input=i", "--output=o", "--imagesize=9"], "--image_size"),
        ("usfmae_jax.export", ["--checkpoint=c", "--fromat=hf"], "--format"),
        ("data_prep.build", ["--dataset=folder", "--output=o", "--workrs=3"], "--workers"),
        ("data_prep.audit", ["--shards=d", "--agains=e"], "--against"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_in_one_line(door, given, nearest, capsys):
    assert importlib.import_module(door).main(given) == 2
    said = f"error: unrecognized arguments: {given[-1]}; nearest is {nearest}; --help shows examples\n"
    assert capsys.readouterr().err == said


def test_help_shows_the_config_and_its_fields_without_importing_jax():
    script = (
        "import sys; sys.argv[1:] = ['--config=pretrain', '--help']; import runpy; "
        "runpy.run_module('usfmae_jax.main', run_name='__main__')"
    )
    code = f"try:\n  {script}\nexcept SystemExit as e:\n  assert e.code == 0 and 'jax' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for text in ("--workdir", "--config.mask.ratio=0.75", ":demo", "continue an interrupted run"):
        assert text in shown.stdout


@pytest.mark.parametrize(("number", "trains", "code"), [("SIGTERM", 1, 75), ("SIGINT", 1, 75), ("SIGINT", 0, 130)])
def test_what_is_stopped_outside_its_loop_says_so_and_may_be_started_again(number, trains, code):
    stop = f"lambda *_: signal.raise_signal(signal.{number}) or time.sleep(60)"
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # what runs in the background may not hear it
    door = f"import signal, time; from usfmae_jax import cli; {heard}; cli.run('', 'pretrain', {stop}, trains={trains})"
    done = subprocess.run([sys.executable, "-c", door, "--config=pretrain:demo"], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("stopped")


def test_a_mistake_exits_2_without_a_traceback():
    done = subprocess.run([sys.executable, "-m", "usfmae_jax.main", f"{CONFIG}:dmeo"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "door", ["main --config=pretrain:tiny --config.data.path=x", "evaluate --config=evaluate --config.data.path=x"]
)
def test_devices_that_are_not_there_are_asked_for_in_vain_in_one_sentence(door):
    command = [sys.executable, "-m", *f"usfmae_jax.{door}".split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2
    assert "error: JAX_PLATFORMS=cuda asks for devices that JAX does not find here" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def huge_pages_when_asked_for(monkeypatch, tmp_path):
    """A system with glibc 2.35 that gives huge pages to those who ask."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.35", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "_HUGE_PAGES", tmp_path / "enabled")
    cli._HUGE_PAGES.write_text("always [madvise] never\n")


def test_huge_pages_are_asked_for_where_that_helps(huge_pages_when_asked_for, monkeypatch):
    asking = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert cli.huge_pages() == asking
    for libc, expected in (("glibc 2.34", {}), (None, {}), ("glibc 2.100", asking), ("glibc 3.0", asking)):
        monkeypatch.setattr(os, "confstr", lambda name, libc=libc: libc)
        assert cli.huge_pages() == expected
    for enabled in ("[always] madvise never", "always madvise [never]"):
        cli._HUGE_PAGES.write_text(enabled)
        assert cli.huge_pages() == {}
    cli._HUGE_PAGES.unlink()
    assert cli.huge_pages() == {}


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(importlib.util, "find_spec", lambda name: name == "libtpu" or None), (sys, "platform", "darwin")],
)
def test_huge_pages_are_not_asked_for_on_accelerators_and_other_systems(
    huge_pages_when_asked_for, monkeypatch, module, name, value
):
    monkeypatch.setattr(module, name, value)
    assert cli.huge_pages() == {}


def test_settings_of_glibc_that_are_there_already_stay(huge_pages_when_asked_for, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert cli.huge_pages() == {}


@pytest.mark.parametrize(
    ("started", "typed", "again"),
    [
        (["python3", "-W", "error", "-m", "usfmae_jax.main", "--x=1"], ["/a/main.py", "--x=1"], True),
        (["python3", "/b/usfmae-predict", "--x", "1"], ["/b/usfmae-predict", "--x", "1"], True),
        (["python3", "-m", "pytest", "usfmae_jax.main"], ["/c/pytest/__main__.py", "usfmae_jax.main"], False),
        (["python3", "mine.py", "usfmae_jax.main"], ["mine.py", "usfmae_jax.main"], False),
        (["python3"], [""], False),
        (["python3", "-c", "code"], ["-c"], False),
    ],
)
def test_only_commands_start_again_and_as_they_were_typed(
    huge_pages_when_asked_for, monkeypatch, started, typed, again
):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", typed)
    cli.in_huge_pages()
    assert [call[:2] for call in calls] == ([(sys.executable, [sys.executable, *started[1:]])] if again else [])
    assert all(call[2] == {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} for call in calls)


def test_a_command_runs_in_huge_pages_and_starts_again_once(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (tmp_path / "sitecustomize.py").write_text(  # every start of Python runs it
        "import os\nwith open(os.environ['STARTS'], 'a') as file:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES', ''), file=file)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "STARTS": str(tmp_path / "starts")}
    command = [
        sys.executable,
        "-m",
        "usfmae_jax.main",
        CONFIG,
        f"--workdir={tmp_path}/run",
        "--config.data.path=absent",
    ]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, "no shards match" in ended.stderr) == (2, True), ended.stderr
    (process, *before), *after = (line.split() for line in (tmp_path / "starts").read_text().splitlines())
    asked = cli.huge_pages().get("GLIBC_TUNABLES")  # this machine may not need it
    assert (before, after) == ([], [[process, asked]] if asked else [])
