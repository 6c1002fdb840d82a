"""What docs/mistakes.md says is answered to typical mistakes is what is answered."""

import importlib
import pathlib
import re
import shlex
import sys

import cv2
import pytest

from tests.helpers import frame, write_shards
from tests.interop import made

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "mistakes.md"
ROW = re.compile(r"^\| `(python -m [^`]+)` \| (.+) \|$", re.M)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
#: Doors that take their options from `sys.argv` and end the process.
CONFIGURED = ("main", "finetune", "evaluate")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with what the page says that there is."""
    home = tmp_path_factory.mktemp("home")
    for name in ("data/mine", "empty", "text", "pictures/a", "pictures/b"):
        (home / name).mkdir(parents=True)
    write_shards(home / "data/mine", count=48)
    for number in range(8):
        cv2.imwrite(str(home / f"pictures/{'ab'[number % 2]}/{number}.png"), frame(number, number % 2))
    (home / "text/note.png").write_text("no picture")
    (home / "text/table.csv").write_text("file\nnote.png\n")
    (home / "notes.txt").write_text("notes")
    (home / "labels.csv").write_text("image,class\na/0.png,benign\n")
    (home / "gone.csv").write_text("file,label\nc/9.png,benign\n")
    made.write(home / "weights.safetensors", made.tensors())
    return home


def typed(command: str, home: pathlib.Path, monkeypatch, capsys) -> tuple[int, str]:
    """The exit code of a command, and the sentence that it printed."""
    module, *arguments = shlex.split(command)[2:]
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    door = importlib.import_module(module)
    try:
        code = door.run() if module.rpartition(".")[2] in CONFIGURED else door.main(arguments)
    except SystemExit as end:
        code = int(str(end.code or 0))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return code, said[0].removeprefix("error: ").replace(f"{home}/", "")


@pytest.mark.parametrize(("command", "answer"), ROWS, ids=[command[10:] for command, _ in ROWS])
def test_a_mistake_is_answered_as_the_page_says(command, answer, home, monkeypatch, capsys):
    code, said = typed(command.replace("\\|", "|"), home, monkeypatch, capsys)
    assert (code, said) == (2, answer.replace("\\|", "|"))


def test_the_page_holds_forty_of_them():
    assert len(ROWS) >= 40
