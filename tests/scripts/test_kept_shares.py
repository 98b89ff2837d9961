"""`scripts/glue/kept_shares.py`: shares of U, V and biases from a checkpoint of a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo
from training import arguments, learner, nas, trainer

from scripts.glue import kept_shares


def test_shares_add_up_to_the_budget_and_follow_the_scores(tmp_path: Path):
    base = zoo.build("bert")
    base.save_pretrained(tmp_path / "base")
    for init in ("kaiming", "lora"):
        run = trainer(
            nas("bert", init=init), arguments(tmp_path / init, num_train_epochs=6, save_strategy="steps", save_steps=4)
        )
        run.train()
        out = tmp_path / f"{init}.json"
        command = [str(tmp_path / init / "checkpoint-4"), "--budgets", "0.25", "0.5", "--out", str(out)]
        record = kept_shares.main([*command, "--model_name_or_path", str(tmp_path / "base")])
        assert json.loads(out.read_text()) == record
        assert str(tmp_path) not in out.read_text()
        space = run.model.base_model.architecture().space
        for row in record["rows"]:
            assert row["parameters"] == int(row["budget"] * space)
            assert sum(part["parameters"] for part in row["kept"].values()) == row["parameters"]
    with pytest.raises(ValueError, match="saved in its search"):
        kept_shares.shares(tmp_path / "lora" / "checkpoint-8", zoo.build("bert"), 0.5)


def test_other_adapters_are_refused(tmp_path: Path):
    learner("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a NAS-LoRA adapter"):
        kept_shares.shares(tmp_path, zoo.build("bert"), 0.5)
