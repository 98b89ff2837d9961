"""The task for the decoder, and the tables of results/fold, of invented runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scripts.decoder import task
from scripts.docs.fold import Fold


def test_rows_follow_from_the_seed():
    """Rows are the same in each call, all different, and none that is trained on is held out."""
    train, held_out = task.splits(200, 30)
    assert (train, held_out) == task.splits(200, 30) and task.splits(50, 30)[1] == held_out
    sentences = [row["completion"] for row in (*train, *held_out)]
    assert len({*sentences}) == len(sentences) == 230


def test_completion_says_what_the_prompt_asks():
    """By hand: two days later, the number in words, the plural."""
    for row in task.rows(100, seed=3):
        given = dict(word.split("=") for word in row["prompt"].split())
        days = [day[:3] for day in task.DAYS]
        later = task.DAYS[(days.index(given["day"]) + 2) % 7]
        number = {"2": "two", "9": "nine"}.get(given["n"], "")
        assert row["completion"].startswith(f"On {later} {given['to']} gets {number}")
        assert row["completion"].endswith(f" from {given['from']}.") and task.GOODS[given["good"]] in row["completion"]


def test_exact_match_looks_at_completions_alone():
    """A wrong token of the prompt does not count, one of the completion does."""
    from scripts.decoder.run import all_right

    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, 3, 4]])
    guessed = torch.tensor([[0, 3, 4, 0], [3, 3, 5, 0]])
    assert all_right(torch.nn.functional.one_hot(guessed, 6).float(), labels).tolist() == [True, False]


def _run(variant: str, lr: str, held_out: float, dev: float, **more) -> dict:
    def score(value: float) -> dict:
        return {"matthews_correlation": value}

    return {
        "run": f"cola-r64-{variant}-lr{lr}-seed0",
        "holdout": score(held_out),
        "epochs": [{f"eval_{k}": v for k, v in score(dev).items()}],
        "final": {f"eval_{k}": v for k, v in score(dev).items()},
        "adapter_bytes": 10_000_000,
        "optimizer_bytes": {"train": 20_000_000},
        **more,
    }


def test_table_of_the_better_rate(tmp_path: Path):
    """The rate is chosen on held-out rows, not on dev; a method that is not better than LoRA is named as such."""
    rows = [
        _run("lora", "0.0003", 0.1, 0.3),
        _run("lora", "0.001", 0.2, 0.25),
        _run("unprimed", "0.001", 0.3, 0.29),
        _run("keep", "0.001", 0.3, 0.26),
        _run("fold", "0.001", 0.3, 0.2, kept_energy={"a": 0.9, "b": 0.95, "c": 0.99}),
    ]
    (tmp_path / "minilm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = Fold(tmp_path).scores()
    lora = next(line for line in lines if "LoRA" in line)
    assert "| 1e-3 | 25.0 | 20.0 | 10.0 (3e-4) |" in lora
    assert any("90.0 % / 95.0 %" in line for line in lines)
    assert "no priming: +4.0, better than LoRA" in lines[-3] and "folds: -5.0, **worse than LoRA**" in lines[-3]
    assert "keeps: +1.0, level with LoRA, **not better**" in lines[-3]
    assert "CoLA, r = 64, 5 of 8; CoLA, r = 16, 0 of 8" in lines[-1]
    assert Fold(tmp_path).rewarm() == Fold(tmp_path).losses() == ["No finished runs yet."]
