"""The notebooks run with tiny settings, and are stored with the outputs of a real run."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

from recipes.notebooks import FOLDER, NAMES, run_notebook

TINY = [
    *("--model.width", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--model.feedforward-width", "32", "--batch-size", "4", "--max-steps", "9"),
    *("--validation-batches", "2", "--accelerator", "cpu"),
]
SMALL = {
    "bert": ["--model.num-classes", "600", "--model.num-positions", "20"],
    "gpt": ["--model.num-classes", "600", "--model.num-positions", "20"],
    "vit": ["--model.image-size", "16", "--model.patch-size", "8"],
}


def outputs(notebook: nbformat.NotebookNode) -> str:
    return str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])


# The notebooks differ in the name of the recipe and in what they show at the end.
@pytest.mark.parametrize(
    "name", ["gpt", *(pytest.param(name, marks=pytest.mark.proof) for name in ("bert", "vit"))]
)
def test_a_notebook_runs_and_shows_its_parts(
    name: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{a} times {b} is {a * b}\n" for a in range(60) for b in range(20)))
    data = [] if name == "vit" else ["--data", str(text)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), *sys.path[1:]]))
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path / "cache"))
    options = [*TINY, *SMALL[name], *data, "--out", str(tmp_path / "runs")]
    notebook = run_notebook(FOLDER / f"{name}.ipynb", options=options, folder=tmp_path)
    shown = outputs(notebook)
    assert "Total params" in shown
    assert "step 9/9" in shown
    assert "image/png" in shown
    assert "to beat" in shown


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_holds_the_outputs_of_a_whole_run(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    shown = outputs(notebook)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    assert cell.source.startswith('options = ["--devices", "1"]')
    assert "validation loss" in shown
    assert "image/png" in shown
    assert "Traceback" not in shown
    assert str(Path.home()) not in shown
