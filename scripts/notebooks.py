"""Execute the notebooks and keep their outputs: `make notebooks`.

A cell that fails, or a notebook that takes longer than its limit, ends with an error; nothing is written then.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
LONGEST_S = 150


def execute(path: Path, limit_s: float = LONGEST_S) -> nbformat.NotebookNode:
    """A notebook with the outputs of a run in a kernel of its own.

    Args:
        path: the notebook.
        limit_s: how many seconds it may take.

    Raises:
        CellExecutionError: a cell failed.
        TimeoutError: it took longer.
    """
    notebook = nbformat.read(path, as_version=4)
    end = time.monotonic() + limit_s
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    with client.setup_kernel():
        for index, cell in enumerate(tqdm(notebook.cells, desc=path.stem, unit="cell")):
            client.timeout = max(1, int(end - time.monotonic()))
            try:
                client.execute_cell(cell, index)
            except CellTimeoutError as error:
                raise TimeoutError(
                    f"{path.name}: expected at most {limit_s} seconds, cell {index} runs longer"
                ) from error
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
        outputs = cell.get("outputs", [])
        # What is drawn again and again while it runs, and widgets, of which a page shows nothing.
        cell["outputs"] = [o for o in outputs if o.get("name") != "stderr"] if cell.cell_type == "code" else outputs
        if cell.cell_type != "code":
            cell.pop("outputs")
    return notebook


def main(argv: list[str] | None = None) -> int:
    """Execute the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="files; all by default")
    paths = parser.parse_args(argv).notebooks or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        start = time.monotonic()
        try:
            notebook = execute(path)
        except (CellExecutionError, TimeoutError) as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
