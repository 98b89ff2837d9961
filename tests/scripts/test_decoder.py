"""The task for the decoder, and the tables of its runs, of invented ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scripts.decoder import task
from scripts.docs import decoder


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


def _run(variant: str, lr: float, loss: float, **more) -> dict:
    return {
        "run": f"{variant}-{lr}",
        "variant": variant,
        "lr": lr,
        "train_loss": [2.0, 1.0, 0.5, 0.3],
        "held_out": [{"step": 2, "loss": 1.0, "exact_match": 0.25}, {"step": 4, "loss": loss, "exact_match": 0.5}],
        "file_bytes": 10_000_000,
        "optimizer_bytes": {"train": 20_000_000},
        **more,
    }


def test_table_of_the_better_rate(tmp_path: Path):
    """Each method stands at its better rate, and one that is not better than LoRA is named as such."""
    rows = [
        _run("lora", 3e-3, 0.5),
        _run("lora", 1e-3, 0.4),
        _run("unprimed", 1e-3, 0.2),
        _run("keep", 1e-3, 0.39),
        _run("fold", 1e-3, 0.8, kept_energy={"a": 0.9, "b": 0.95, "c": 0.99}),
    ]
    (tmp_path / "decoder.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = decoder.losses(tmp_path)
    lora = next(line for line in lines if "| LoRA |" in line)
    assert "| 1e-3 | 1.500, 0.400 | 1.000, 0.400 | 25 %, 50 % | 0.500 (3e-3) |" in lora
    assert any("90.0 % / 95.0 %" in line for line in lines)
    assert "no priming: +50%, better than LoRA" in lines[-1] and "folds: -100%, **worse than LoRA**" in lines[-1]
    assert "keeps: +3%, level with LoRA, **not better**" in lines[-1]


def test_no_runs_yet(tmp_path: Path):
    assert decoder.losses(tmp_path) == decoder.steps(tmp_path) == ["No finished runs yet."]
