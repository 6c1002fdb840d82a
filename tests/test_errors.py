"""What doors print steers no terminal, whoever wrote it; too little memory is one sentence."""

import io
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from usfmae_jax import convert, embed, export
from usfmae_jax.errors import BAD_INPUT, answer, visible, visible_output

HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\x9b31m\u202e\u061c\ufeff\xad\u2028\u2029\U000e0041"


def test_characters_that_are_not_seen_become_codes_and_others_stay():
    assert visible("a\x1b[2J\u202eb\u2028") == r"a\u001b[2J\u202eb\u2028"
    assert visible(HOSTILE).isprintable()
    text = "Grüße, 超声\n\tقلب é 🩻 a\u00a0b"
    assert visible(text) == text
    assert visible("a\n\tb", one_line=True) == r"a\u000a\u0009b"


def test_whatever_is_printed_is_visible_but_bars_still_move(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with visible_output():
        print("name", HOSTILE, "name\rerror: none")
        sys.stderr.writelines([HOSTILE, "\n"])
        for _ in tqdm.tqdm(range(2), desc=HOSTILE):
            for _ in tqdm.tqdm(range(2)):
                pass
    assert sys.stdout is out
    assert out.getvalue() == f"name {visible(HOSTILE)} name\\u000derror: none\n"
    assert set("\x07\x9b\u202e\u2028") & set(err.getvalue()) == set()
    assert err.getvalue().replace("\x1b[A", "").count("\x1b") == 0
    assert "\r" in err.getvalue()


@pytest.mark.parametrize("door", ["convert", "embed", "export", "build", "audit"])
def test_no_door_prints_what_steers_a_terminal(door, capsys, tmp_path):
    from data_prep import audit, build

    path = str(tmp_path / HOSTILE)
    output = f"--output={tmp_path}/x.npz"
    status = {
        "convert": lambda: convert.main([f"--input={path}", output]),
        "embed": lambda: embed.main([f"--checkpoint={path}", f"--data={path}", output]),
        "export": lambda: export.main([f"--checkpoint={path}"]),
        "build": lambda: build.main(["--dataset=folder", f"--input={path}", output]),
        "audit": lambda: audit.main([f"--shards={path}"]),
    }[door]()
    printed = "".join(capsys.readouterr())
    assert status == 2
    assert "\\u001b[2J" in printed or "\\\\x1b" in printed or "\\x1b" in printed
    assert all(letter.isprintable() for letter in printed.replace("\n", ""))


@pytest.mark.parametrize("ask", [lambda: jnp.zeros(1 << 44), lambda: np.zeros(1 << 56)])
def test_too_little_memory_is_one_sentence(ask, capsys):
    assert answer(ask) == BAD_INPUT
    assert "there is not enough memory; smaller images or batches take less" in capsys.readouterr().err
