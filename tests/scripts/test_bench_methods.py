"""The methods that `scripts/bench/run.py` compares, on a tiny BERT: what trains, and who gathers importance."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from peft import AdaLoraModel
from peft.tuners.lora import LoraLayer

from peft_learners.far import FARModel
from peft_learners.learner import LearnerModel
from peft_learners.nas_lora import NASLoRAModel
from peft_learners.nas_lora.budget import Gatherer
from scripts.bench import measure as bench_common
from scripts.bench import methods as bench_methods
from scripts.bench import settings as bench_settings
from scripts.bench.methods import GROUPS, METHODS

# The zoo's BERT: 2 layers, d = 16, h = 32. NAS-LoRA's low-rank updates of rank 16 are on query, key, the attention's
# output and both layers of the FFN; biases on these, the value, the pooler and the norms (2 per layer, and the
# embeddings').
LAYERS, D, H, R, SEARCH_R = 2, 16, 32, 2, 16
BATCH, TOKENS, ROUNDS = 3, 12, 3
T, FLOAT = BATCH * TOKENS, 4
STEPS = bench_common.WARMUP_ROUNDS + ROUNDS
ALL_SIZES = LAYERS * (4 * (D + D) + 2 * (D + H)) + D + D  # d + h of all linear layers, the pooler too
ALL_BIASES = LAYERS * (5 * D + H) + D
NORMS = LAYERS * 2 * 2 * D
LINEARS, IN_AND_OUT = 5 * LAYERS, LAYERS * (3 * (D + D) + 2 * (D + H))
BIASES = LAYERS * (5 * D + H + 2 * D) + D + D
BIASED = 6 * LAYERS + 1 + 2 * LAYERS + 1
HEAD, HEAD_TENSORS = 2 * D + 2, 2
#: A norm keeps its bias for backward, which with a delta is a sum.
NORM_SUMS = (2 * LAYERS + 1) * D * FLOAT


@pytest.fixture(scope="module")
def work() -> bench_settings.Workload:
    setting = bench_settings.Setting("tiny", TOKENS, R, ROUNDS, batch=BATCH, config=lambda: zoo.bert().config)
    return bench_settings.prepare(setting, None, torch.device("cpu"))


def build(work: bench_settings.Workload, *names: str) -> dict[str, bench_common.Variant]:
    variants = {}
    for name in names:
        torch.manual_seed(0)
        variants[name] = METHODS[name](work)
    return variants


@pytest.fixture(scope="module")
def all_trained(work) -> dict[str, dict[str, int]]:
    """Number of trained parameters of each method, and bytes of its step."""
    found = {}
    for name in METHODS:
        (variant,) = build(work, name).values()
        trained = sum(parameter.numel() for parameter in bench_common.trained_parameters(variant.model))
        found[name] = {"trained": trained, **bench_common.measure_bytes(variant, work.rows)}
    return found


def test_virtual_tokens_need_positions():
    """A model whose positions the rows fill: the benchmark leaves the method out, and says so."""
    config = zoo.bert().config
    config.max_position_embeddings = TOKENS + 19
    setting = bench_settings.Setting("tiny", TOKENS, R, 1, batch=BATCH, config=lambda: config)
    work = bench_settings.prepare(setting, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="31 positions, too few for 20 tokens more"):
        METHODS["prompt_tuning"](work)


def test_every_method_has_a_group():
    assert set(METHODS) == {name for names in GROUPS.values() for name in names}
    for group, names in GROUPS.items():
        wanted = {other for name in names for other in bench_methods.references_of(name)}
        assert wanted - {*names} == ({"lora"} if group == "far" else set())  # there, full is compared with itself


def test_same_trained(all_trained):
    """What is compared trains the same."""
    trained = {name: entry["trained"] for name, entry in all_trained.items()}
    low_rank = R * ALL_SIZES + ALL_BIASES + HEAD
    assert trained["lora"] == trained["learner_unprimed_no_norms"] == low_rank
    assert trained["learner_unprimed"] == trained["learner_primed"] == low_rank + NORMS
    assert trained["learner_priming"] == low_rank + NORMS + LAYERS * 4 * D * D
    assert trained["shira"] == R * ALL_SIZES + HEAD
    assert trained["freeze_ffns"] == LAYERS * 4 * D * D + ALL_BIASES + NORMS + HEAD
    assert trained["prompt_tuning"] == 20 * D + HEAD
    # Of the width 4 R twice per block, or 8 R once.
    assert trained["adapter_sequential"] == LAYERS * 2 * (2 * D * 4 * R + 4 * R + D) + NORMS + HEAD
    assert trained["adapter_parallel"] == LAYERS * (2 * D * 8 * R + 8 * R + D) + NORMS + HEAD
    # A magnitude per output, and a scale per rank.
    assert trained["lora_dora"] == low_rank + LAYERS * (5 * D + H) + D
    assert trained["adalora"] == low_rank + R * (6 * LAYERS + 1)
    assert trained["full"] == sum(parameter.numel() for parameter in zoo.bert().parameters())
    for space in ("", "_s_mam"):
        assert trained[f"nas_plain{space}"] == trained[f"nas_search{space}"] == SEARCH_R * IN_AND_OUT + BIASES + HEAD
    assert trained["nas_plain_u_bitfit"] == trained["nas_search_u_bitfit"] == trained["bitfit"] == BIASES + HEAD
    assert trained["lora_mam"] == SEARCH_R // 2 * IN_AND_OUT + BIASES + HEAD
    assert trained["nas_retrain_unstructured"] == (SEARCH_R * IN_AND_OUT + BIASES) // 2 + HEAD
    # No more than half; a column or a bias vector less at most.
    assert -2 * H < trained["nas_retrain_structured"] - trained["nas_retrain_unstructured"] <= 0
    assert trained["u_bitfit_10"] == BIASES // 10 + HEAD


def test_stored_bytes(all_trained):
    stored = {name: entry["stored"] for name, entry in all_trained.items()}
    assert stored["learner_unprimed_no_norms"] < stored["lora"]
    # LoRA keeps its inputs times A, and NAS-LoRA none of that. A norm of which nothing is kept needs no sum.
    middles = LINEARS * T * (SEARCH_R // 2) * FLOAT
    # The embeddings' norm, whose bias alone trains, keeps no input, mean and deviation.
    first_norm = T * (D + 1 + 1) * FLOAT
    assert 0 <= stored["nas_retrain_structured"] - (stored["lora_mam"] - middles - first_norm) <= NORM_SUMS
    assert stored["u_bitfit_10"] <= stored["bitfit"] + NORM_SUMS
    for space in ("", "_s_mam", "_u_bitfit"):
        assert stored[f"nas_search{space}"] == stored[f"nas_plain{space}"]


def test_gradients_and_optimizer(all_trained):
    tensors = dict.fromkeys(("nas_plain", "nas_search_s_mam", "lora_mam"), 2 * LINEARS + BIASED + HEAD_TENSORS)
    tensors |= dict.fromkeys(("nas_search", "nas_plain_s_mam"), tensors["nas_plain"])
    tensors |= dict.fromkeys(("bitfit", "nas_plain_u_bitfit", "nas_search_u_bitfit"), BIASED + HEAD_TENSORS)
    # In a search, a score of each entry; whole ranks are scored by one of their two factors.
    scores = {"nas_search": SEARCH_R * IN_AND_OUT + BIASES, "nas_search_u_bitfit": BIASES}
    scores["nas_search_s_mam"] = SEARCH_R * IN_AND_OUT // 2 + BIASES
    for name, entry in all_trained.items():
        if name.startswith("inference"):
            continue
        assert entry["gradients"] == entry["trained"] * FLOAT
        # exp_avg, exp_avg_sq, and a step of one float per tensor
        if name in tensors:
            assert entry["optimizer"] == (2 * entry["trained"] + tensors[name] + scores.get(name, 0)) * FLOAT
    # Of what is pruned away, nothing.
    steps = all_trained["nas_retrain_structured"]["optimizer"] // FLOAT
    steps -= 2 * all_trained["nas_retrain_structured"]["trained"]
    assert HEAD_TENSORS < steps <= 2 * LINEARS + BIASED + HEAD_TENSORS


def test_adalora_masks(work):
    """AdaLoRA's averages are counted and a mask is applied after each step."""
    variants = build(work, "adalora")
    adalora = variants["adalora"]
    before = bench_common.measure_bytes(adalora, work.rows)["optimizer"]
    bench_common.take_rounds(variants, work.rows, ROUNDS)
    allocator = adalora.model.base_model.rankallocator
    matrices = R * (ALL_SIZES + 6 * LAYERS + 1)  # A, B and a scale per rank
    assert bench_common.measure_bytes(adalora, work.rows)["optimizer"] == before + 3 * matrices * FLOAT
    assert len(allocator.ipt) == 3 * (6 * LAYERS + 1)
    assert adalora.after_step is not None and next(iter(allocator.ipt.values())).abs().sum() > 0


def test_adalora_masks_after_each_step(work):
    """Ranks that it takes away are zero, which none is that AdamW has just changed."""
    (adalora,) = build(work, "adalora").values()
    scales = [p for name, p in adalora.model.named_parameters() if "lora_E" in name]
    for _ in range(ROUNDS):
        bench_common.take_step(adalora, work.rows)
        assert 0 < sum(int((scale == 0).sum()) for scale in scales) < R * len(scales)


def test_shira_s_positions_are_parameters(all_trained):
    model = zoo.bert()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    # The head is there twice, as in the base and as it trains; a position has a row and a column.
    assert all_trained["shira"]["parameters"] == held + HEAD * FLOAT + R * ALL_SIZES * (FLOAT + 2 * 4)


@pytest.mark.parametrize(
    "name,calls",
    [
        *((name, 1) for name in ("learner_primed", "learner_priming", "far_priming", "far_after", "nas_search")),
        *((name, 1) for name in ("nas_retrain_structured", "nas_retrain_unstructured", "adalora")),
        *((name, 0) for name in ("lora", "full", "learner_unprimed", "inference_learner", "freeze_ffns")),
    ],
)
def test_driver_work(work, monkeypatch, name, calls):
    """Steps have their driver's work."""
    seen = []
    for tuner in (LearnerModel, FARModel, NASLoRAModel, AdaLoraModel):
        original = tuner.update_and_allocate

        def counting(self, step, *rest, original=original, **more):
            seen.append(step)
            return original(self, step, *rest, **more)

        monkeypatch.setattr(tuner, "update_and_allocate", counting)
    (variant,) = build(work, name).values()
    seen.clear()
    bench_common.take_step(variant, work.rows)
    assert len(seen) == calls


def test_inference_methods(work):
    """Inference is of what its name says."""
    names = ("inference_learner", "inference_learner_unprimed", "inference_learner_merged")
    variants = build(work, "inference_base", "inference_lora", *names)
    merged, primed, flops = {}, {}, {}
    for name, variant in variants.items():
        assert variant.optimizer is None and not variant.model.training
        assert not any(parameter.requires_grad for parameter in variant.model.parameters())
        flops[name] = bench_common.step_flops(variant, work.rows)["matrix_products"]
        if name in names:
            primed[name] = variant.model.peft_config["default"].completed_phases
            layers = [module for module in variant.model.modules() if hasattr(module, "learner_P1")]
            merged[name] = {bool(layer.merged_adapters) for layer in layers}
    assert list(primed.values()) == [["priming"], [], ["priming"]]
    assert list(merged.values()) == [{False}, {False}, {True}]
    assert flops["inference_learner_merged"] == flops["inference_base"] < flops["inference_learner"]


def linears_of(model: torch.nn.Module, kind: type) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if isinstance(module, kind)
    }


def test_lora_targets(work):
    """LoRAs are on the layers of their peers."""
    variants = build(work, "lora", "lora_mam", "nas_retrain_unstructured")
    assert linears_of(variants["lora"].model, LoraLayer) == set(bench_methods.linear_layers(work))
    assert len(bench_methods.linear_layers(work)) == zoo.ZOO["bert"].linears
    counts = variants["nas_retrain_unstructured"].model.base_model.architecture().counts
    lora = linears_of(variants["lora_mam"].model, LoraLayer)
    assert lora == {name for name, parts in counts.items() if "U" in parts} and len(lora) == LINEARS


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_heads(name):
    """DistilBERT's is of two linear layers, and the name of one ends in that of the other."""
    entry = zoo.ZOO[name]
    setting = bench_settings.Setting("tiny", TOKENS, R, 1, batch=BATCH, config=lambda: entry.build().config)
    work = bench_settings.prepare(setting, None, torch.device("cpu"))
    trained = {}
    for method, variant in build(work, "lora", "learner_unprimed_no_norms").items():
        parameters = variant.model.named_parameters()
        trained[method] = sum(p.numel() for n, p in parameters if p.requires_grad)
    assert trained["lora"] == trained["learner_unprimed_no_norms"]
    assert len(bench_methods.linear_layers(work)) == entry.linears


# -- the search ----------------------------------------------------------------------------------------------------


def hooks_in_rounds(work, variants: dict[str, bench_common.Variant]) -> dict[str, list[int]]:
    """How many hooks of ours its optimizer has in each step of each variant."""
    seen: dict[str, list[int]] = {name: [] for name in variants}
    for name, variant in variants.items():
        variant.optimizer.register_step_pre_hook(
            lambda optimizer, *_, name=name: seen[name].append(len(optimizer._optimizer_step_pre_hooks) - 1)
        )
    bench_common.take_rounds(variants, work.rows, ROUNDS)
    return seen


def test_search_gathers(work, monkeypatch):
    """Only the search gathers and only for itself."""
    calls: Counter[int] = Counter()
    gather = Gatherer.__call__

    def counting(self, optimizer):
        calls[id(optimizer)] += 1
        gather(self, optimizer)

    monkeypatch.setattr(Gatherer, "__call__", counting)
    for group in ("nas_search", "nas_search_more"):
        variants = build(work, *GROUPS[group])
        calls.clear()  # all searches have taken a step to begin with
        hooks = {name: [int(name.startswith("nas_search"))] * STEPS for name in GROUPS[group]}
        assert hooks_in_rounds(work, variants) == hooks
        gathering = [variants[name] for name in GROUPS[group] if name.startswith("nas_search")]
        assert calls == {id(variant.optimizer): STEPS for variant in gathering}
    retraining = hooks_in_rounds(work, build(work, *GROUPS["nas_retrain"]))
    assert all(seen == [0] * STEPS for seen in retraining.values())


def test_search_reference(work):
    """The search and its reference differ in importance alone."""
    for space in ("", "_s_mam", "_u_bitfit"):
        names = [f"nas_plain{space}", f"nas_search{space}"]
        variants = build(work, *names)
        models = [variants[name].model for name in names]
        before = {name: p.clone() for name, p in models[0].named_parameters() if p.requires_grad}
        first = [score.clone() for score in scores_of(models[1])]
        bench_common.take_rounds(variants, work.rows, ROUNDS)
        plain, search = (dict(model.named_parameters()) for model in models)
        assert plain.keys() == search.keys()
        assert all(torch.equal(value, search[name]) for name, value in plain.items())
        assert {n for n, p in search.items() if p.requires_grad} == before.keys()
        assert not any(torch.equal(value, search[name]) for name, value in before.items())
        kept, gathered = (scores_of(model) for model in models)
        assert kept == [] and len(first) == len(gathered) > 0
        assert not any(torch.equal(score, before_it) for score, before_it in zip(gathered, first, strict=True))


def scores_of(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if hasattr(module, "nas_lora_scores")]
    return [score for layer in layers for score in layer.nas_lora_scores.get("default", {}).values()]
