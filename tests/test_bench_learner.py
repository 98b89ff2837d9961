"""`scripts/bench_learner.py` on a tiny BERT: flops against a hand count, and the file it writes."""

from __future__ import annotations

import json

import bench_learner
import pytest
import zoo

# The zoo's BERT: 2 layers, d = 16, h = 32, a pooler.
LAYERS, D, H, R = 2, 16, 32, 2
BATCH, TOKENS = 3, 16
T = BATCH * TOKENS


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("hidden-place") / "tiny-bert"
    zoo.build("bert").save_pretrained(folder)
    out = folder.parent / "bench.json"
    fixed = ["--model_name_or_path", str(folder), "--out", str(out), "--threads", "1", "--device", "cpu"]
    sizes = ["--batch_size", str(BATCH), "--tokens", str(TOKENS), "--rank", str(R), "--rounds", "3"]
    returned = bench_learner.main([*fixed, *sizes])
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(returned))
    assert str(folder.parent) not in out.read_text()
    return written


def test_flops_are_those_counted_by_hand(results):
    """In flops (two per multiplication): a block has four layers d -> d, one d -> h, one h -> d."""
    found = {name: variant["flops"] for name, variant in results["variants"].items()}
    sums, weights = LAYERS * (4 * (D + D) + 2 * (D + H)), LAYERS * (4 * D * D + 2 * D * H)
    gradients = 4 * R * T * sums + 4 * R * BATCH * (D + D)  # the pooler sees one token of a row
    plain = results["bound_flops"] - gradients
    # Forming W + B A takes 2 r N forward, and again backward where the input's gradient is wanted: everywhere but in
    # the first block's query, key and value. The pooler's three rows go through A and B: of the four products of the
    # gradients one, x A^T, is made forward already, and (x A^T) B^T and, backward, (g B) A come to it.
    formed = 2 * R * weights + 2 * R * (weights - 3 * D * D)
    pooler = 2 * R * BATCH * (D + D)
    assert found["learner_unprimed"] == found["learner_unprimed_no_norms"] == plain + gradients + formed + pooler
    # So does LoRA everywhere, without (g B) A in the first block's three layers.
    assert found["lora"] == plain + gradients + 2 * R * T * sums + pooler - 3 * 2 * R * T * D
    assert results["variants"]["lora"]["flops_to_bound"] == found["lora"] / results["bound_flops"]


def test_what_is_compared_trains_the_same(results):
    trained = {name: variant["trained_parameters"] for name, variant in results["variants"].items()}
    assert trained["lora"] == trained["learner_unprimed_no_norms"]
    norms = LAYERS * 2 * 2 * D
    assert trained["learner_unprimed"] == trained["learner_primed"] == trained["lora"] + norms
    assert trained["learner_priming"] == trained["learner_unprimed"] + LAYERS * 4 * D * D
    assert results["reference"] == next(iter(trained)) == "lora"
    assert results["variants"]["full"]["step_time_to_full"] == {"q1": 1.0, "median": 1.0, "q3": 1.0}


def test_a_learner_keeps_less_for_backward_than_lora(results):
    stored = {name: variant["bytes"]["stored"] for name, variant in results["variants"].items()}
    assert stored["learner_unprimed_no_norms"] < stored["lora"]
