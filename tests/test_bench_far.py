"""`scripts/bench_far.py` on a tiny BERT: bytes against hand counts, and the file it writes."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import bench_common
import bench_far

# The zoo's BERT: 2 layers, d = 16, h = 32; a quarter of the nodes is kept.
LAYERS, D, H, RATIO = 2, 16, 32, 0.25
BATCH, TOKENS = 3, 16
T, FLOAT = BATCH * TOKENS, 4
#: LayerNorms: two per layer, and the embeddings'. They keep weight and bias for backward, which in FAR are sums.
NORM_SUMS = (2 * LAYERS + 1) * 2 * D * FLOAT
#: Weights and biases of one layer's nodes that are not kept: h - k rows and biases of the first linear layer and
#: columns of the second; with output nodes d - k rows and biases of the second.
HIDDEN_REST = (H - 8) * (D + 1 + D)
OUTPUT_REST = (H - 8) * (D + 1) + (D - 4) * (H + 1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hidden-place") / "tiny-bert"
    zoo.build("bert").save_pretrained(folder)
    return folder


def run(model_dir: Path, out: Path, *more: str) -> dict:
    fixed = ["--model_name_or_path", str(model_dir), "--out", str(out), "--threads", "1", "--device", "cpu"]
    sizes = ["--batch_size", str(BATCH), "--tokens", str(TOKENS), "--retention_ratio", str(RATIO), "--rounds", "3"]
    return bench_far.main([*fixed, *sizes, *more])


@pytest.fixture(scope="module")
def results(model_dir, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("out") / "bench.json"
    returned = run(model_dir, out)
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(returned))
    assert str(model_dir.parent) not in out.read_text()
    return written


@pytest.fixture(scope="module")
def bytes_of(results) -> dict[str, dict[str, int]]:
    return {name: variant["bytes"] for name, variant in results["variants"].items()}


def test_variants_and_record(results):
    names = ["full", "far_priming", "far_after", "far_after_discard", "far_after_output_node"]
    assert list(results["variants"]) == names
    assert results["model"] == "tiny-bert" and results["device"]["threads"] == 1
    assert results["settings"]["retention_ratio"] == RATIO and results["settings"]["warmup_rounds"] > 0
    assert set(results["settings"]["dropout_in_config"].values()) == {0.0}
    assert results["versions"]["torch"] and results["date"]


def test_full_is_the_measure(results):
    full = results["variants"]["full"]
    assert set(full["bytes_ratios"].values()) == {1.0}
    assert all(set(quartiles.values()) == {1.0} for quartiles in full["time_ratios"].values())


def test_time_ratios_are_taken_round_by_round(results):
    own, full = (results["variants"][name] for name in ("far_after", "full"))
    for part in bench_common.TIMES:
        assert len(own["seconds"][part]) == 3
        each = [a / b for a, b in zip(own["seconds"][part], full["seconds"][part], strict=True)]
        found = own["time_ratios"][part]
        assert found["median"] == statistics.median(each)
        assert min(each) <= found["q1"] <= found["median"] <= found["q3"] <= max(each)


def test_quartiles():
    # Ratios 1, 2, 3, 4, 5, by hand: the middle one, and the middles of the halves that hold it too.
    assert bench_common.ratios([1, 4, 6, 4, 10], [1, 2, 2, 1, 2]) == {"q1": 2, "median": 3, "q3": 4}
    assert bench_common.ratios([3], [2]) == {"q1": 1.5, "median": 1.5, "q3": 1.5}


def test_stored_bytes_shrink_by_the_columns_that_backward_does_not_need(bytes_of):
    full = bytes_of["full"]["stored"]
    # The second linear layer of an FFN keeps k of the h columns of its input, T rows each.
    columns = LAYERS * T * (H - 8) * FLOAT
    assert bytes_of["far_after"]["stored"] == full - columns + NORM_SUMS
    assert bytes_of["far_after_discard"]["stored"] == full - columns + NORM_SUMS
    # In priming, and with output nodes, it needs its whole input.
    assert bytes_of["far_priming"]["stored"] == full + NORM_SUMS
    assert bytes_of["far_after_output_node"]["stored"] == full + NORM_SUMS


def test_parameters_gradients_and_optimizer_are_counted(results, bytes_of):
    model = zoo.build("bert")
    total, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    buffers = sum(b.nbytes for b in model.buffers())
    rest = {"far_priming": 0, "far_after": HIDDEN_REST, "far_after_discard": HIDDEN_REST}
    rest["far_after_output_node"] = OUTPUT_REST
    indices = {"far_priming": 0, "far_after_output_node": (8 + 4) * 8}  # int64, of both layers of an FFN
    for name in results["variants"]:
        trained = total - LAYERS * rest.get(name, 0)
        assert results["variants"][name]["trained_parameters"] == trained
        assert bytes_of[name]["gradients"] == trained * FLOAT
        # exp_avg, exp_avg_sq, and a step of one float per tensor
        assert bytes_of[name]["optimizer"] == (2 * trained + tensors) * FLOAT
        parameters = total * FLOAT + buffers
        if name != "full":  # the base's, with its head, beside the deltas and the trained head
            held = total if name != "far_after_discard" else trained
            parameters += held * FLOAT + LAYERS * indices.get(name, (8 + 8) * 8)
        assert bytes_of[name]["parameters"] == parameters, name
        kinds = ("stored", "parameters", "gradients", "optimizer")
        assert bytes_of[name]["total"] == sum(bytes_of[name][kind] for kind in kinds)


def test_file_sizes(results):
    sizes = {name: variant["adapter_file_bytes"] for name, variant in results["variants"].items()}
    assert sizes["full"] is None and sizes["far_priming"] is None
    # What is frozen lies in the file, unless it is discarded; the names of its tensors take some bytes too.
    less = sizes["far_after"] - sizes["far_after_discard"]
    assert 0 <= less - LAYERS * HIDDEN_REST * FLOAT < 2000
    values = sum(p.numel() for p in zoo.build("bert").parameters()) * FLOAT
    assert values < sizes["far_after_output_node"] < values + 20_000


def test_dropout_and_output_nodes_alone(model_dir, tmp_path, results):
    found = run(model_dir, tmp_path / "b.json", "--dropout", "0.1", "--granularity", "output_node", "--rounds", "1")
    assert set(found["settings"]["dropout_in_config"].values()) == {0.1}
    assert list(found["variants"]) == ["full", "far_priming", "far_after", "far_after_discard"]
    assert found["variants"]["far_after"]["settings"]["granularity"] == "output_node"
    # Masks of dropout are kept for backward.
    assert found["variants"]["full"]["bytes"]["stored"] > results["variants"]["full"]["bytes"]["stored"]


def test_more_tokens_than_positions(model_dir, tmp_path):
    with pytest.raises(ValueError, match="--tokens must be from 1 to 32 for this model, got 33"):
        run(model_dir, tmp_path / "b.json", "--tokens", "33")
