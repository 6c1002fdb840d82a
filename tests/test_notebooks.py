"""The notebooks: every cell runs, in order, in a new process and an empty folder; no results are stored in them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from usfmae_jax import weights
from usfmae_jax.interop.model import save_model
from usfmae_jax.probing.build import untrained

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

#: What Jupyter does, without it: the cells one after the other, with one set of names.
RUN = """
import json, sys
cells = [cell for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells, 1):
    print(f"--- cell {number} of {len(cells)}", flush=True)
    exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
"""


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == ["dicom", "export", "look", "probe", "segment"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_run_is_stored(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, tmp_path):
    pytest.importorskip("matplotlib", reason="notebooks show pictures with matplotlib")
    if path.stem == "dicom":
        pytest.importorskip("pydicom", reason="pydicom is optional")
    if not (weights.FOLDER / "usfmae-tiny/model.safetensors").exists():  # a folder of that name comes first
        save_model(str(tmp_path / "usfmae-tiny"), untrained("tiny", 0))
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parents[1])}
    environment |= {"XLA_FLAGS": "", "PYTHONWARNINGS": "ignore:FigureCanvasAgg is non-interactive"}
    command = [sys.executable, "-c", RUN, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("--- cell") == path.read_text(encoding="utf-8").count('"cell_type": "code"')
