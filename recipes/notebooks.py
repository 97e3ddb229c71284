"""Runs the recipes' notebooks and stores them with their outputs: `python -m recipes.notebooks`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = ("bert", "gpt", "vit")


def run_notebook(
    path: Path, *, options: Sequence[str] | None = None, folder: Path, timeout_s: int = 3600
) -> nbformat.NotebookNode:
    """Runs a notebook in `folder` and returns it with its outputs.

    Args:
        options: replaces the options in the cell tagged `parameters`; None keeps them.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook: nbformat.NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    if options is not None:
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
        cell.source = f"options = {list(options)!r}"
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # wall-clock times, which differ each time
    return notebook


def main() -> None:
    """Runs the named notebooks, by default all, and stores them in place."""
    for name in sys.argv[1:] or NAMES:
        path = FOLDER / f"{name}.ipynb"
        notebook = run_notebook(path, folder=FOLDER.parent)
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
        print(path.name)


if __name__ == "__main__":
    main()
