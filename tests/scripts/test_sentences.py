"""The decoder's task, and when a completion is right."""

from __future__ import annotations

import torch

from scripts.evidence import sentences


def test_rows_follow_from_the_seed():
    """Rows are the same in each call, all different, and none that is trained on is held out."""
    held_out = sentences.rows(30, seed=1)
    train = sentences.rows(200, seed=0, but=held_out)
    assert (train, held_out) == (sentences.rows(200, seed=0, but=held_out), sentences.rows(30, seed=1))
    completions = [row["completion"] for row in (*train, *held_out)]
    assert len({*completions}) == len(completions) == 230


def test_completion_says_what_the_prompt_asks():
    """By hand: two days later, the number in words, the plural."""
    for row in sentences.rows(100, seed=3):
        given = dict(word.split("=") for word in row["prompt"].split())
        days = [day[:3] for day in sentences.DAYS]
        later = sentences.DAYS[(days.index(given["day"]) + 2) % 7]
        number = {"2": "two", "9": "nine"}.get(given["n"], "")
        assert row["completion"].startswith(f"On {later} {given['to']} gets {number}")
        assert row["completion"].endswith(f" {sentences.GOODS[given['good']]} from {given['from']}.")


def test_exact_match_looks_at_completions_alone():
    """A wrong token of the prompt does not count, one of the completion does."""
    from scripts.evidence.causal import all_right

    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, 3, 4]])
    guessed = torch.tensor([[0, 3, 4, 0], [3, 3, 5, 0]])
    assert all_right(torch.nn.functional.one_hot(guessed, 6).float(), labels).tolist() == [True, False]
