"""`scripts/bench/run.py` on a tiny BERT: its rows, with bytes and flops against hand counts."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo

from scripts.bench import measure as bench_common
from scripts.bench import rows as bench_rows
from scripts.bench import run as bench
from scripts.bench import settings as bench_settings
from scripts.glue import run_record

# The zoo's BERT: 2 layers, d = 16, h = 32, a pooler. A tenth of the nodes is kept.
LAYERS, D, H, R = 2, 16, 32, 2
BATCH, TOKENS, ROUNDS = 3, 12, 3
T, FLOAT, INT = BATCH * TOKENS, 4, 4
WEIGHTS = LAYERS * (4 * D * D + 2 * D * H)
IN_AND_OUT = LAYERS * (4 * (D + D) + 2 * (D + H))
HEAD = 2 * D + 2
#: LayerNorms: two per layer, and the embeddings'. They keep weight and bias for backward, which in FAR are sums.
NORM_SUMS = (2 * LAYERS + 1) * 2 * D * FLOAT
KEPT_HIDDEN, KEPT_OUT = 3, 2
#: Weights and biases of one layer's nodes that are not kept: h - k rows and biases of the first linear layer and
#: columns of the second; with output nodes d - k rows and biases of the second.
HIDDEN_REST = (H - KEPT_HIDDEN) * (D + 1 + D)
OUTPUT_REST = (H - KEPT_HIDDEN) * (D + 1) + (D - KEPT_OUT) * (H + 1)

SETTING = bench_settings.Setting("tiny", TOKENS, R, ROUNDS, batch=BATCH, config=lambda: zoo.bert().config)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    work = bench_settings.prepare(SETTING, None, torch.device("cpu"))
    path = tmp_path_factory.mktemp("out") / "tiny-cpu.jsonl"
    bench.measure_setting(work, bench.groups_of(SETTING), path)
    return path


@pytest.fixture(scope="module")
def rows(path) -> list[dict]:
    return bench_rows.read_rows(path)


@pytest.fixture(scope="module")
def found(rows) -> dict[str, dict]:
    """The first row of each method."""
    return {row["method"]: row for row in reversed(rows)}


def test_row_fields(path, rows, found):
    """A row says what was measured on what."""
    assert [path.name] == [file.name for file in path.parent.iterdir()]
    places = [(row["group"], row["method"]) for row in rows]
    assert places == [(group, name) for group, names in bench.GROUPS.items() for name in names]
    assert not [row for row in rows if "skipped" in row]
    for row in rows:
        assert row["schema_version"] == bench.SCHEMA_VERSION and row["versions"]["torch"] and row["date"]
        assert (row["device"]["type"], row["device"]["threads"]) == ("cpu", torch.get_num_threads())
        known = {"name": "tiny", "model": "bert from its config", "layers": LAYERS, "width": D, "batch": BATCH}
        known |= {"tokens": TOKENS, "rank": R, "rounds": ROUNDS, "dtype": "float32", "warmup_rounds": 2}
        assert known.items() <= row["setting"].items()
        assert set(row["setting"]["dropout"].values()) == {0.0}
    phases = {name: found[name]["phase"] for name in ("lora", "learner_priming", "learner_primed", "far_after")}
    assert list(phases.values()) == ["training", "priming", "learning", "reconfigured"]
    assert {found[name]["phase"] for name in found if name.startswith("nas_plain")} == {"search"}
    assert found["nas_retrain_structured"]["phase"] == "retraining" and found["inference_lora"]["phase"] == "inference"


def test_paired_ratios(rows):
    """Time ratios are taken round by round within the group."""
    by_place = {(row["group"], row["method"]): row for row in rows}
    for row in rows:
        parts = ["step"] if row["group"] == "inference" else list(bench_common.TIMES)
        assert list(row["seconds"]) == parts
        for reference, ratios in row["time_ratios"].items():
            other = by_place[row["group"], reference]
            for part in parts:
                assert len(row["seconds"][part]) == ROUNDS
                each = [a / b for a, b in zip(row["seconds"][part], other["seconds"][part], strict=True)]
                assert ratios[part]["median"] == statistics.median(each)
                assert min(each) <= ratios[part]["q1"] <= ratios[part]["median"] <= ratios[part]["q3"] <= max(each)
    peers = {name: next(r for r in rows if r["method"] == name)["references"] for name in ("far_after", "nas_search")}
    assert peers == {"far_after": ["full"], "nas_search": ["nas_plain", "lora", "full"]}
    base = by_place["inference", "inference_base"]
    assert base["tokens_per_second"] == pytest.approx(T / statistics.median(base["seconds"]["step"]))


def test_quartiles():
    # Ratios 1, 2, 3, 4, 5, by hand: the middle one, and the middles of the halves that hold it too.
    assert bench_common.ratios([1, 4, 6, 4, 10], [1, 2, 2, 1, 2]) == {"q1": 2, "median": 3, "q3": 4}
    assert bench_common.ratios([3], [2]) == {"q1": 1.5, "median": 1.5, "q3": 1.5}


@pytest.mark.parametrize("count", range(1, 8))
def test_orders_of_rounds_are_balanced(count):
    names = list("abcdefg"[:count])
    rounds = 2 * count
    orders = [bench_common.order_of(names, number) for number in range(-2, rounds - 2)]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(2 * names)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert pairs == {(a, b): 2 for a in names for b in names if a != b}


def test_round_order():
    """The next round has another order."""
    assert [bench_common.order_of("abcd", number) for number in (0, 1)] == [list("abdc"), list("bcad")]
    assert [bench_common.order_of("abc", number) for number in (0, 1)] == [list("abc"), list("acb")]


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(bench_common.time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float):
        def move(*_, **__) -> None:
            self.now += seconds

        return move


class Slow(torch.nn.Module):
    """A parameter, and a loss of which forward and backward take the clock's seconds."""

    def __init__(self, forward=lambda: None, backward=lambda *_: None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.spend, self.spend_backward, self.with_gradients = forward, backward, []

    def forward(self, input_ids):
        self.spend()
        self.with_gradients.append(torch.is_grad_enabled())
        loss = (self.weight * input_ids).sum()
        if loss.requires_grad:
            loss.register_hook(self.spend_backward)
        return SimpleNamespace(loss=loss)


def test_timed_step(monkeypatch):
    """All of a step is timed and nothing else."""
    clock = Clock(monkeypatch)

    @contextmanager
    def around():
        clock.passes(100_000)()
        yield
        clock.passes(100_000)()

    model = Slow(clock.passes(1), clock.passes(10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step, zero = optimizer.step, optimizer.zero_grad
    optimizer.step = lambda: (step(), clock.passes(100)())
    optimizer.zero_grad = lambda: (zero(), clock.passes(10_000)())
    seen = []

    def after() -> None:
        seen.append(model.weight.grad.tolist())
        clock.passes(1000)()

    variant = bench_common.Variant(model, optimizer, after_step=after, around=around)
    rows = {"input_ids": torch.arange(3.0)}
    for number in (1, 2):
        assert bench_common.take_step(variant, rows) == {"step": 11_111, "forward_backward": 11, "optimizer": 11_100}
        assert model.weight.grad is None and model.weight.tolist() == [1.0, 1.0 - number, 1.0 - 2 * number]
    assert seen == [[0, 1, 2]] * 2  # the second step's gradient is its own, and still there after the step
    bench_common.step_flops(variant, rows)
    assert model.weight.grad is None
    bench_common.measure_bytes(variant, rows)
    assert model.weight.grad is None and model.with_gradients == [True] * 4


def test_inference_takes_no_gradients(monkeypatch):
    clock = Clock(monkeypatch)
    model = Slow(clock.passes(1))  # its parameter would want one
    variant, rows = bench_common.Variant(model, None), {"input_ids": torch.arange(3.0)}
    assert bench_common.take_step(variant, rows) == {"step": 1}
    bench_common.step_flops(variant, rows)
    assert model.with_gradients == [False, False]


def test_save_and_load_times(monkeypatch):
    """Saving and loading are told apart."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(bench_common.PeftModel, "from_pretrained", clock.passes(10))
    variant = bench_common.Variant(SimpleNamespace(save_pretrained=clock.passes(1)), None, saves=True)
    found = bench_common.saving(variant, torch.nn.Linear(1, 1))
    assert (found["save_seconds"], found["load_seconds"]) == ([1] * 3, [10] * 3)


# -- flops ---------------------------------------------------------------------------------------------------------


def test_in_place_products():
    """Products that are added in place are counted."""
    m, k, n, b = 3, 5, 7, 2
    out, batched = torch.zeros(m, n), torch.zeros(b, m, n)

    def products() -> None:
        out.addmm_(torch.ones(m, k), torch.ones(k, n))
        torch.addmm(out, torch.ones(m, k), torch.ones(k, n), out=out)
        batched.baddbmm_(torch.ones(b, m, k), torch.ones(b, k, n))

    assert bench_common.count_flops(products) == {"matrix_products": 2 * 2 * m * k * n, "attention": 2 * b * m * k * n}


def forward_flops() -> int:
    """Two per multiplication; the pooler and the head see one token of each row."""
    return 2 * T * WEIGHTS + 2 * BATCH * (D * D + 2 * D)


def test_hand_counted_flops(found):
    """Flops are those counted by hand."""
    flops = {name: row["flops"] for name, row in found.items()}
    assert flops["inference_base"] == forward_flops()
    assert flops["full"] == 3 * forward_flops()
    # No gradient goes below the first block's query, key and value, and of weights only the head's has one.
    plain = 2 * forward_flops() - 2 * T * 3 * D * D + 2 * BATCH * 2 * D
    bound = plain + 4 * R * T * IN_AND_OUT + 4 * R * BATCH * (D + D)
    assert {row["bound_flops"] for row in found.values() if row["phase"] != "inference"} == {bound}
    # LoRA's forward takes 2 r (d + h) more per row, and no (g B) A in the first block's three layers.
    more = 2 * R * T * IN_AND_OUT + 2 * R * BATCH * (D + D) - 3 * 2 * R * T * D
    assert flops["lora"] == bound + more and found["lora"]["flops_to_bound"] == flops["lora"] / bound
    # A Learner forms W + B A by 2 r N forward, and again backward where the input's gradient is wanted.
    formed = 2 * R * WEIGHTS + 2 * R * (WEIGHTS - 3 * D * D) + 2 * R * BATCH * (D + D)
    for name in ("learner_unprimed", "learner_unprimed_no_norms"):
        assert bound < flops[name] <= bound + formed < flops["lora"]
    # BitFit trains the bias of the embeddings' norm too.
    assert flops["bitfit"] == plain + 2 * T * 3 * D * D


def test_attention_is_counted_apart(found):
    # Two products per layer, of T x d with d x TOKENS over all heads.
    layer = 2 * 2 * T * TOKENS * D
    assert found["inference_base"]["attention_flops"] == LAYERS * layer
    # Backward has five. None reaches the first layer's below a bottleneck adapter, and a prompt makes rows longer.
    backward = layer * 5 // 2
    others = dict.fromkeys(("adapter_sequential", "adapter_parallel"), LAYERS * layer + backward)
    others["prompt_tuning"] = LAYERS * (layer + backward) * (TOKENS + 20) ** 2 // TOKENS**2
    for name, row in found.items():
        if row["phase"] != "inference":
            assert row["attention_flops"] == others.get(name, LAYERS * (layer + backward)), name


@pytest.mark.parametrize("name,norms_cost", [("llama", True), ("bert", False)])
def test_flops_bound(name, norms_cost):
    """The bound holds without biases and with norms before the first layers."""
    entry = zoo.ZOO[name]
    setting = bench_settings.Setting(
        "tiny", TOKENS, R, 1, batch=BATCH, config=lambda: entry.build().config, task_type=entry.task_type
    )
    bound = bench.bounds(bench_settings.prepare(setting, None, torch.device("cpu")))
    # The norm before the first block's query, key and value (the zoo's are D wide) needs their inputs' gradient.
    assert bound["low_rank_norms"] - bound["low_rank"] == (3 * 2 * T * D * D if norms_cost else 0)
    if name == "llama":  # q k v o, gate up down, and the head over 64 words, whose weight is frozen
        weights, sums, words = LAYERS * (4 * D * D + 3 * D * H), LAYERS * (4 * (D + D) + 3 * (D + H)), 64
        assert bound["inference"] == pytest.approx(2 * T * (weights + words * D), rel=1e-3)  # rotary embedding aside
        activations = 2 * T * (2 * weights - 3 * D * D + 2 * words * D)
        assert bound["low_rank"] == activations + 4 * R * T * sums


# -- bytes ---------------------------------------------------------------------------------------------------------


class Halves(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6))
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, input_ids):
        first = input_ids * self.weight  # keeps its input: 6 floats
        second = first * self.weight  # keeps `first`, 6 floats, and the weight, which the model holds anyway
        third = (second * self.scale).exp()  # keeps the buffer, and its result: 6 floats
        return SimpleNamespace(loss=(third[:3] * third[3:]).sum())  # keeps both halves, which lie in that result


def test_hand_counted_bytes():
    """Stored bytes of a net by hand."""
    model = Halves()
    variant = bench_common.Variant(model, torch.optim.SGD(model.parameters(), momentum=0.9))
    counted = bench_common.measure_bytes(variant, {"input_ids": torch.rand(6)})
    sizes = {"stored": 3 * 6 * FLOAT, "parameters": 2 * 6 * FLOAT, "gradients": 6 * FLOAT, "optimizer": 6 * FLOAT}
    assert counted == {**sizes, "total": 7 * 6 * FLOAT}


def test_bytes_ratio(rows):
    """Bytes ratios are own over the reference's."""
    by_place = {(row["group"], row["method"]): row["bytes"] for row in rows}
    for row in rows:
        assert list(row["bytes_ratios"]) == list(row["time_ratios"])
        for reference, ratios in row["bytes_ratios"].items():
            other = by_place[row["group"], reference]
            assert ratios == {kind: row["bytes"][kind] / size for kind, size in other.items() if size}


def test_far_stored_bytes(found):
    """FAR stores less by the columns that backward does not need."""
    stored = {name: row["bytes"]["stored"] for name, row in found.items()}
    # The second linear layer of an FFN keeps k of the h columns of its input, T rows each.
    columns = LAYERS * T * (H - KEPT_HIDDEN) * FLOAT
    assert stored["far_after"] == stored["far_after_discard"] <= stored["full"] - columns + NORM_SUMS
    assert stored["full"] - columns <= stored["far_after"]
    # In priming, and with output nodes, it needs its whole input.
    assert stored["full"] <= stored["far_priming"] == stored["far_after_output_node"] <= stored["full"] + NORM_SUMS


def test_far_all_bytes(found):
    """FAR's parameters gradients and optimizer are counted."""
    model = zoo.build("bert")
    total, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    buffers = sum(b.nbytes for b in model.buffers())
    rest = {"full": 0, "far_priming": 0, "far_after": HIDDEN_REST, "far_after_discard": HIDDEN_REST}
    rest["far_after_output_node"] = OUTPUT_REST
    indices = {"far_priming": 0, "far_after_output_node": KEPT_HIDDEN + KEPT_OUT}  # int64, of an FFN's two layers
    for name in rest:
        trained, counted = total - LAYERS * rest[name], found[name]["bytes"]
        assert found[name]["trained_parameters"] == trained
        assert counted["gradients"] == found[name]["exchanged_bytes"] == trained * FLOAT
        # exp_avg, exp_avg_sq, and a step of one float per tensor
        assert counted["optimizer"] == (2 * trained + tensors) * FLOAT
        parameters = total * FLOAT + buffers
        if name != "full":  # the base's, with its head, beside the deltas and the trained head
            held = total if name != "far_after_discard" else trained
            parameters += held * FLOAT + LAYERS * indices.get(name, 2 * KEPT_HIDDEN) * 8
        assert counted["parameters"] == parameters, name
        kinds = ("stored", "parameters", "gradients", "optimizer")
        assert counted["total"] == sum(counted[kind] for kind in kinds)


def test_inference_keeps_parameters_alone(found):
    for name in bench.GROUPS["inference"]:
        counted = found[name]["bytes"]
        assert counted["total"] == counted["parameters"] > 0 == found[name]["exchanged_bytes"]
    assert found["inference_learner"]["bytes_ratios"]["inference_base"].keys() == {"parameters", "total"}


def test_file_sizes_and_seconds(found):
    sizes = {name: row["adapter_file_bytes"] for name, row in found.items()}
    without = {"full", "bitfit", "freeze_ffns", "learner_priming", "far_priming"}
    without |= {name for name in sizes if name.startswith(("inference", "nas_plain", "nas_search"))}
    assert {name for name, size in sizes.items() if size is None} == without
    for name, row in found.items():
        assert (row["load_seconds"] is None) == (row["save_seconds"] is None) == (name in without)
        assert name in without or min(row["save_seconds"] + row["load_seconds"]) > 0
    # What is frozen lies in the file, unless it is discarded; the names of its tensors take some bytes too.
    assert 0 <= sizes["far_after"] - sizes["far_after_discard"] - LAYERS * HIDDEN_REST * FLOAT < 2000
    for name in ("lora", "lora_mam", "lora_dora", "learner_unprimed", "nas_retrain_structured"):
        assert 0 < sizes[name] - found[name]["trained_parameters"] * FLOAT < 15_000, name
    for name in ("nas_retrain_unstructured", "u_bitfit_10"):  # with a position each
        assert 0 < sizes[name] - found[name]["settings"]["kept"] * (FLOAT + INT) - HEAD * FLOAT < 15_000, name


# -- files, and what can't be measured -----------------------------------------------------------------------------


def test_resumed_setting(path, tmp_path, monkeypatch, rows):
    """A setting that was cut off goes on."""
    begun = tmp_path / "tiny-cpu.jsonl"
    run_record.write_lines(begun.with_name(f"{begun.name}.part"), [row for row in rows if row["group"] == "learner"])
    measured = []
    monkeypatch.setattr(bench, "measure_group", lambda work, group, *_: measured.append(group) or [])
    groups = {name: bench.groups_of(SETTING)[name] for name in ("learner", "inference")}
    bench.measure_setting(bench_settings.prepare(SETTING, None, torch.device("cpu")), groups, begun)
    assert measured == ["inference"] and [file.name for file in tmp_path.iterdir()] == [begun.name]
    other = bench_settings.prepare(SETTING, None, torch.device("cpu"), seed=1)  # of which nothing is there
    run_record.write_lines(begun.with_name(f"{begun.name}.part"), rows)
    bench.measure_setting(other, groups, begun)
    assert measured == ["inference", "learner", "inference"]
    run_record.write_lines(begun.with_name(f"{begun.name}.part"), rows)
    work = bench_settings.prepare(SETTING, None, torch.device("cpu"))
    bench.measure_setting(work, groups, begun, again=True)
    assert measured[3:] == ["learner", "inference"]


@pytest.mark.parametrize("key,value", [("schema_version", 0), ("code", "abc-dirty"), ("threads", 7), ("name", "Z80")])
def test_foreign_rows(path, tmp_path, monkeypatch, capsys, rows, key, value):
    """What was begun elsewhere begins anew."""
    begun = tmp_path / "tiny-cpu.jsonl"
    old = [dict(row) for row in rows if row["group"] == "inference"]
    for row in old:
        row.update({key: value} if key in row else {"device": {**row["device"], key: value}})
    run_record.write_lines(begun.with_name(f"{begun.name}.part"), old)
    measured = []
    monkeypatch.setattr(bench, "measure_group", lambda work, group, *_: measured.append(group) or [])
    work = bench_settings.prepare(SETTING, None, torch.device("cpu"))
    assert bench.measure_setting(work, {"inference": bench.groups_of(SETTING)["inference"]}, begun) == []
    assert measured == ["inference"]
    assert f"is of another {key if key in rows[0] else 'device'}: it begins anew" in capsys.readouterr().out


def test_code_version(rows, monkeypatch):
    """Code is the commit and whether it has changes."""
    assert {row["code"] for row in rows} == {run_record.code()}
    answers = {"status": " M scripts/bench/run.py\n", "rev-parse": "abc\n"}

    def run(command, **_):
        return SimpleNamespace(stdout=next(text for word, text in answers.items() if word in command))

    monkeypatch.setattr(subprocess, "run", run)
    assert run_record.code.__wrapped__() == "abc-dirty"
    answers["status"] = ""
    assert run_record.code.__wrapped__() == "abc"

    def no_git(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_git)
    assert run_record.code.__wrapped__() is None


def test_unbuildable_method(tmp_path):
    """What can't be built has a row that says why."""
    setting = bench_settings.Setting(
        "tiny", TOKENS, R, 1, batch=BATCH, config=lambda: zoo.llama().config, task_type="CAUSAL_LM"
    )
    work = bench_settings.prepare(setting, None, torch.device("cpu"))
    some = dataclasses.replace(setting, methods=("u_bitfit_10", "learner_primed"))
    rows = bench.measure_setting(work, bench.groups_of(some), tmp_path / "rows")
    found = {row["method"]: row for row in rows}
    assert found["bitfit"]["skipped"] == "ValueError: The model has no biases."
    assert "biases" in found["u_bitfit_10"]["skipped"] and "seconds" not in found["u_bitfit_10"]
    assert found["lora"]["settings"]["bias"] == "none" and found["learner_primed"]["flops_to_bound"] >= 1


def test_failing_peer():
    """A method of others may fail in its first step."""
    work = bench_settings.prepare(SETTING, None, torch.device("cpu"))

    def failing(work):
        def fail():
            raise RuntimeError("not for\n  this type")

        variant = bench.METHODS["lora"](work)
        variant.after_step = fail
        return variant

    methods = {"full": bench.METHODS["full"], "odd": failing}
    full, odd = bench.measure_group(work, "peft", methods, bench.bounds(work))
    assert odd == {"group": "peft", "method": "odd", "skipped": "RuntimeError: not for this type"}
    assert list(full["time_ratios"]) == ["full"]
    with pytest.raises(RuntimeError, match="not for"):  # nothing of our own is passed over so
        bench.measure_group(work, "learner", methods, bench.bounds(work))


def test_rows_are_json_lines(path):
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
