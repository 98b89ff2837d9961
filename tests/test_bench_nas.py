"""`scripts/bench_nas.py` on a tiny BERT: bytes against hand counts, who gathers importance, and the file it writes."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import zoo
from peft.tuners.lora import LoraLayer
from torch.optim import optimizer as torch_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import bench_common
import bench_nas

from peft_learners.nas_lora.importance import Gatherer

# The zoo's BERT: 2 layers, d = 16, h = 32. Low-rank updates on query, key, the attention's output and both layers of
# the FFN; biases on these, the value, the pooler and the norms (2 per layer, and the embeddings').
LAYERS, D, H, R = 2, 16, 32, 16
BATCH, TOKENS, ROUNDS = 3, 16, 3
T, FLOAT, INT = BATCH * TOKENS, 4, 4
LINEARS, NORMS, BIASED = 5 * LAYERS, 2 * LAYERS + 1, 6 * LAYERS + 1 + 2 * LAYERS + 1
IN_AND_OUT = LAYERS * (3 * (D + D) + 2 * (D + H))  # of the low-rank updates, per rank
BIASES = LAYERS * (5 * D + H + 2 * D) + D + D
HEAD, HEAD_TENSORS = 2 * D + 2, 2
#: A norm keeps its bias for backward, which with a delta is a sum.
NORM_SUMS = NORMS * D * FLOAT


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hidden-place") / "tiny-bert"
    zoo.build("bert").save_pretrained(folder)
    return folder


def arguments(model_dir: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--model_name_or_path", str(model_dir), "--out", str(out), "--threads", "1", "--device", "cpu"]
    return [*fixed, "--batch_size", str(BATCH), "--tokens", str(TOKENS), "--rounds", str(ROUNDS), *more]


@pytest.fixture(scope="module")
def results(model_dir, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("out") / "bench.json"
    returned = bench_nas.main(arguments(model_dir, out))
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(returned))
    assert str(model_dir.parent) not in out.read_text()
    return written


@pytest.fixture(scope="module")
def found(results) -> dict[str, dict]:
    """What was found of each variant, searches' without the name of the search space."""
    comparisons = results["comparisons"].items()
    return {f"{title}/{name}": variant for title, c in comparisons for name, variant in c["variants"].items()}


@pytest.fixture
def bench(model_dir) -> bench_nas.Bench:
    args, device = bench_common.parse(bench_nas.BenchArguments, None, arguments(model_dir, Path("unused")))
    config = bench_common.load_config(args)
    model = bench_common.load_model(args, config, device)
    return bench_nas.Bench(args, model, bench_common.random_rows(args, config, device))


def test_comparisons_and_record(results, found):
    comparisons = results["comparisons"]
    targets = {"search_u_mam": 1.03, "search_s_mam": 1.03, "search_u_bitfit": 1.03}
    targets |= {"retraining_bitfit": 1.0, "retraining_lora": None}
    assert {name: c["target"] for name, c in comparisons.items()} == targets
    references = ["plain", "plain", "plain", "bitfit", "lora"]
    assert [c["reference"] for c in comparisons.values()] == references
    assert [next(iter(c["variants"])) for c in comparisons.values()] == references
    assert results["model"] == "tiny-bert" and results["device"]["threads"] == 1 and results["versions"]["torch"]
    assert results["settings"]["batch_size"] == BATCH and results["settings"]["tokens"] == TOKENS
    assert set(results["settings"]["dropout_in_config"].values()) == {0.0}
    for name, variant in found.items():
        assert all(len(seconds) == ROUNDS for seconds in variant["seconds"].values())
        if name.rpartition("/")[2] in references:
            assert all(set(quartiles.values()) == {1.0} for quartiles in variant["time_ratios"].values())


def hooks_in_rounds(bench: bench_nas.Bench, variants: dict[str, bench_common.Variant]) -> dict[str, list[int]]:
    """How many hooks on all optimizers of the process there are in each step of each variant."""
    seen: dict[str, list[int]] = {name: [] for name in variants}
    for name, variant in variants.items():
        variant.optimizer.register_step_pre_hook(
            lambda *_, name=name: seen[name].append(len(torch_optimizer._global_optimizer_pre_hooks))
        )
    bench_common.take_rounds(variants, bench.rows, ROUNDS)
    return seen


def test_only_the_search_gathers_and_only_for_itself(bench, monkeypatch):
    calls: Counter[int] = Counter()
    gather, steps = Gatherer.__call__, bench_common.WARMUP_ROUNDS + ROUNDS

    def counting(self, optimizer):
        calls[id(optimizer)] += 1
        gather(self, optimizer)

    monkeypatch.setattr(Gatherer, "__call__", counting)
    for space in bench_nas.SPACES:
        variants = bench.variants(f"search_{space}")
        calls.clear()  # both have taken a step to begin with
        assert hooks_in_rounds(bench, variants) == {"plain": [0] * steps, "search": [1] * steps}
        assert calls == {id(variants["search"].optimizer): steps}
    for name in ("retraining_bitfit", "retraining_lora"):
        assert all(seen == [0] * steps for seen in hooks_in_rounds(bench, bench.variants(name)).values())


def test_the_search_and_its_reference_differ_in_importance_alone(bench):
    for space in bench_nas.SPACES:
        variants = bench.variants(f"search_{space}")
        before = {name: p.clone() for name, p in variants["plain"].model.named_parameters() if p.requires_grad}
        first = [score.clone() for score in scores_of(variants["plain"].model)]
        bench_common.take_rounds(variants, bench.rows, ROUNDS)
        plain, search = (dict(variants[name].model.named_parameters()) for name in ("plain", "search"))
        assert plain.keys() == search.keys()
        assert all(torch.equal(value, search[name]) for name, value in plain.items())
        assert {n for n, p in search.items() if p.requires_grad} == before.keys()
        assert not any(torch.equal(value, search[name]) for name, value in before.items())
        gathered, kept = (scores_of(variants[name].model) for name in ("search", "plain"))
        assert len(first) == len(gathered) == len(kept) > 0
        assert all(torch.equal(score, before_it) for score, before_it in zip(kept, first, strict=True))
        assert not any(torch.equal(score, before_it) for score, before_it in zip(gathered, first, strict=True))


def scores_of(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if hasattr(module, "nas_lora_scores")]
    return [score for layer in layers for score in layer.nas_lora_scores["default"].values()]


def test_what_trains(found):
    trained = {name: variant["trained_parameters"] for name, variant in found.items()}
    for name in ("plain", "search"):
        assert trained[f"search_u_mam/{name}"] == R * IN_AND_OUT + BIASES + HEAD
        assert trained[f"search_s_mam/{name}"] == R * IN_AND_OUT + BIASES + HEAD
        assert trained[f"search_u_bitfit/{name}"] == BIASES + HEAD
    assert trained["retraining_bitfit/bitfit"] == BIASES + HEAD
    assert trained["retraining_bitfit/u_bitfit_10"] == BIASES // 10 + HEAD
    assert trained["retraining_bitfit/u_bitfit_1"] == BIASES // 100 + HEAD
    assert trained["retraining_lora/lora"] == R // 2 * IN_AND_OUT + BIASES + HEAD
    assert trained["retraining_lora/u_mam_half"] == (R * IN_AND_OUT + BIASES) // 2 + HEAD
    kept = found["retraining_lora/s_mam_half"]["settings"]["kept"]
    assert trained["retraining_lora/s_mam_half"] == kept + HEAD
    # No more than half; a column or a bias vector less at most.
    assert -2 * H < kept - (R * IN_AND_OUT + BIASES) // 2 <= 0
    assert found["retraining_lora/s_mam_half"]["settings"]["search_space"] == R * IN_AND_OUT + BIASES


def test_lora_is_on_the_same_linears(bench):
    variants = bench.variants("retraining_lora")
    lora = {name.removeprefix("base_model.model.") for name in modules_of(variants["lora"].model, LoraLayer)}
    counts = variants["u_mam_half"].model.base_model.architecture().counts
    assert lora == {name for name, parts in counts.items() if "U" in parts} and len(lora) == LINEARS


def modules_of(model: torch.nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def test_stored_bytes(found):
    stored = {name: variant["bytes"]["stored"] for name, variant in found.items()}
    lora, bitfit = stored["retraining_lora/lora"], stored["retraining_bitfit/bitfit"]
    # LoRA keeps its inputs times A, and NAS-LoRA none of that. A norm of which nothing is kept needs no sum.
    middles = LINEARS * T * (R // 2) * FLOAT
    assert 0 <= stored["retraining_lora/s_mam_half"] - (lora - middles) <= NORM_SUMS
    # Single entries are put into U and V in full, where any are left.
    full = R * IN_AND_OUT * FLOAT
    assert 0 <= stored["retraining_lora/u_mam_half"] - (lora - middles + full) <= NORM_SUMS
    assert stored["retraining_bitfit/u_bitfit_10"] <= bitfit + NORM_SUMS
    assert stored["retraining_bitfit/u_bitfit_1"] <= bitfit + NORM_SUMS
    for space in bench_nas.SPACES:
        assert stored[f"search_{space}/search"] == stored[f"search_{space}/plain"]
    assert stored["search_u_bitfit/plain"] == bitfit + NORM_SUMS


def test_gradients_and_optimizer(found):
    tensors = {"search_u_mam": 2 * LINEARS + BIASED, "search_s_mam": 2 * LINEARS + BIASED, "search_u_bitfit": BIASED}
    tensors |= {"retraining_bitfit/bitfit": BIASED, "retraining_lora/lora": 2 * LINEARS + BIASED}
    for name, variant in found.items():
        trained, counted = variant["trained_parameters"], variant["bytes"]
        assert counted["gradients"] == trained * FLOAT
        # exp_avg, exp_avg_sq, and a step of one float per tensor; of what is pruned away, nothing.
        steps = counted["optimizer"] // FLOAT - 2 * trained
        expected = tensors.get(name, tensors.get(name.partition("/")[0]))
        if expected is not None:
            assert steps == expected + HEAD_TENSORS
        else:
            assert HEAD_TENSORS < steps <= 2 * LINEARS + BIASED + HEAD_TENSORS


def test_file_sizes(found):
    sizes = {name: variant["adapter_file_bytes"] for name, variant in found.items()}
    assert all((sizes[name] is not None) == name.startswith("retraining") for name in sizes if "/bitfit" not in name)
    assert sizes["retraining_bitfit/bitfit"] is None
    for name in ("retraining_bitfit/u_bitfit_10", "retraining_bitfit/u_bitfit_1", "retraining_lora/u_mam_half"):
        values = found[name]["settings"]["kept"] * (FLOAT + INT) + HEAD * FLOAT  # with a position each
        assert 0 < sizes[name] - values < 15_000  # names and shapes
    for name in ("lora", "s_mam_half"):
        values = found[f"retraining_lora/{name}"]["trained_parameters"] * FLOAT
        assert 0 < sizes[f"retraining_lora/{name}"] - values < 15_000


def test_gradients_are_clipped(bench, monkeypatch):
    clipped = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clipped.append(args[1]) or clip(*args))
    variants = bench.variants("retraining_bitfit")
    clipped.clear()
    bench_common.take_rounds(variants, bench.rows, 1)
    assert clipped == [bench_nas.MAX_GRAD_NORM] * 3 * (bench_common.WARMUP_ROUNDS + 1)


def test_dropout_and_one_comparison(model_dir, tmp_path, results):
    more = ["--dropout", "0.1", "--comparisons", "retraining_bitfit", "--rounds", "1"]
    alone = bench_nas.main(arguments(model_dir, tmp_path / "b.json", *more))
    assert set(alone["settings"]["dropout_in_config"].values()) == {0.1}
    assert list(alone["comparisons"]) == ["retraining_bitfit"]
    # Masks of dropout are kept for backward.
    bitfit, without = (r["comparisons"]["retraining_bitfit"]["variants"]["bitfit"]["bytes"] for r in (alone, results))
    assert bitfit["stored"] > without["stored"]


def test_unknown_comparison(model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_nas.main(arguments(model_dir, tmp_path / "b.json", "--comparisons", "search_far"))
    assert "invalid choice: 'search_far'" in capsys.readouterr().err
