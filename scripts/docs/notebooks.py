"""Execute the notebooks and store them with their outputs.

    python -m scripts.docs.notebooks [NAME ...]

Each runs in an empty folder. An error in a cell ends the script, and that notebook stays as it was. What goes to
stderr (progress bars, warnings with local paths) is not stored.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs; it was run in `folder`.

    Raises:
        CellExecutionError: a cell failed.
    """
    return NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    ).execute()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks; default: all", metavar="NAME")
    names = parser.parse_args(argv).names
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(nbformat.read(path, nbformat.NO_CONVERT), Path(folder))
        for cell in notebook.cells:
            cell.get("outputs", [])[:] = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path.name}: executed and stored")


if __name__ == "__main__":
    main()
