"""`scripts/glue/export_quality.py`: what exports of a trained adapter cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_learners import LearnerConfig
from scripts.glue import export_quality


@pytest.mark.slow
def test_errors_fall_with_the_rank_and_at_full_rank_nothing_changes(model_dir, data_dir, tmp_path: Path):
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    get_peft_model(base, LearnerConfig(r=2, init_weights=False, task_type="SEQ_CLS")).save_pretrained(tmp_path / "a")
    command = [str(tmp_path / "a"), "--task", "mrpc", "--data_dir", str(data_dir), "--max_length", "32"]
    out = tmp_path / "quality.json"
    record = export_quality.main([*command, "--ranks", "1", "4", "0.9", "1.0", "--out", str(out)])
    assert json.loads(out.read_text()) == record and str(tmp_path) not in out.read_text()
    one, four, most, full = record["exports"]
    assert record["rows"] == 24 and {row["cut_modules"] for row in record["exports"]} == {4}  # one layer's attention
    assert one["largest_error"] > four["largest_error"] > full["largest_error"] < 1e-5
    assert four["ranks_of_cut_modules"] == [4] * 4 and max(most["ranks_of_cut_modules"]) < 16
    # an error of e leaves 1 - e^2 of the energy
    assert most["largest_error"] ** 2 <= 0.1
    assert one["parameters"] < four["parameters"] and one["bytes"] < four["bytes"]
    assert full["changed_predictions"] == 0 and full["dev"] == record["adapter"]["dev"]
    assert full["largest_logit_difference"] < 1e-5 < one["largest_logit_difference"]
