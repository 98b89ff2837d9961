"""Counted flops and stored bytes of one layer, against the formulas of the docstrings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training
import zoo
from problems import call, make, stored_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peft_learners.nas_lora.layer import NASLoRALinear
from peft_learners.ops.cut import cut_linear
from peft_learners.ops.delta_linear import (
    effective_linear,
    linear_with_updates,
    separate_linear,
    wants_effective_weight,
)
from peft_learners.ops.terms import Entries

AB = frozenset({"x", "a0", "b0"})


def addmm_flops(out: Any, left: Any, right: Any, **_: Any) -> int:
    """Of `addmm_`, which torch's counter passes over."""
    return 2 * left[0] * left[1] * right[1]


def flops(run: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        result = run()
    return counter.get_total_flops(), result


def forward_and_backward(path: Callable[..., Tensor], problem: Any, **options: Any) -> tuple[int, int]:
    forward, out = flops(lambda: call(path, problem, **options))
    inputs = [problem.tensors[name] for name in problem.trained()]
    backward, _ = flops(lambda: torch.autograd.grad(out, inputs, torch.ones_like(out)))
    return forward, backward


@pytest.mark.parametrize("rank", [2, 15, 16, 20])
@pytest.mark.parametrize("rows", [3, 22, 23, 100])  # 22 = out_features: (g B) A is added up to there
def test_flops_effective(rows, rank):
    """The effective path costs what its formula says."""
    d, h = 20, 22
    n, t, r, rho_n = d * h, rows, rank, rank * (d + h)
    forward = 2 * t * n + 2 * r * n
    by_products, by_dense = 4 * rho_n * t, 2 * t * n + 4 * r * n  # dA and dB from g and x, or from g^T x
    # where g B is there, (g B) A may be cheaper than forming W' again
    again = 2 * r * n if t > h or by_dense < by_products else 2 * t * r * d
    low = min(by_products, by_dense)
    problem = make(0, (rows,), d, h, (rank,), trains=AB)
    assert forward_and_backward(effective_linear, problem) == (forward, 2 * t * n + again + low)
    problem = make(0, (rows,), d, h, (rank,), trains={"a0", "b0"})
    assert forward_and_backward(effective_linear, problem) == (forward, low)
    problem = make(0, (rows,), d, h, (rank,), 1, trains=AB | {"D0"})  # D trains: dW once, dA and dB from it
    assert forward_and_backward(effective_linear, problem) == (forward, 4 * t * n + 2 * r * n + 4 * r * n)
    problem = make(0, (rows,), d, h, (rank,), 1, trains=AB)  # D is frozen
    assert forward_and_backward(effective_linear, problem) == (forward, 2 * t * n + 2 * r * n + low)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rank", [2, 15, 16, 20])
@pytest.mark.parametrize("rows", [3, 32, 33])  # up to 32 rows D is multiplied by itself
def test_flops_separate(rows, rank, dropout):
    """The separate path costs what its formula says."""
    d, h = 20, 22
    n, t, rho_n = d * h, rows, rank * (d + h)
    forward, dx, low = 2 * t * n + 2 * rho_n * t, 2 * t * n + 2 * rho_n * t, 2 * t * rho_n
    problem = make(0, (rows,), d, h, (rank,), trains=AB)
    assert forward_and_backward(separate_linear, problem, dropout=dropout) == (forward, dx + low)
    more = 2 * t * n if rows <= 32 else 0
    problem = make(0, (rows,), d, h, (rank,), 1, trains=AB)
    assert forward_and_backward(separate_linear, problem, dropout=dropout) == (forward + more, dx + low + more)
    problem = make(0, (rows,), d, h, (rank,), 1, trains=AB | {"D0"})
    assert forward_and_backward(separate_linear, problem, dropout=dropout) == (
        forward + more,
        dx + low + more + 2 * t * n,
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rest", [False, True])
def test_flops_cut(axis, rest):
    """A cut layer costs what its formula says."""
    t, d, h, k = 40, 20, 22, 3
    x, weight = torch.randn(t, d, requires_grad=True), torch.randn(h, d)
    values = torch.randn((k, d) if axis == 0 else (h, k), requires_grad=True)
    others = torch.randn((h - k, d) if axis == 0 else (h, d - k)) if rest else None
    forward, out = flops(lambda: cut_linear(x, weight, None, values, others, None, None, torch.arange(k), axis))
    backward, _ = flops(lambda: torch.autograd.grad(out.sum(), [x, values]))
    assert forward == 2 * t * d * h
    assert backward == 2 * t * d * h + 2 * t * k * (d if axis == 0 else h)


SHAPES = [(rows, d, h) for d, h in ((8, 8), (8, 24), (24, 8)) for rows in (1, 3, 4, 5, 6, 7, 8, 23, 24, 25, 60)]


def test_path():
    """The path depends on shape alone."""
    # d h / (d + h) = 192 at 384 x 384
    assert not wants_effective_weight(192, 384, 384)
    assert wants_effective_weight(193, 384, 384)


def test_cheaper_path():
    """The path taken forward is the cheaper one."""
    paths = (linear_with_updates, separate_linear, effective_linear)
    for rows, d, h in SHAPES:
        problem = make(0, (rows,), d, h, (2,), trains=AB)
        taken, separate, effective = (flops(lambda p=path, m=problem: call(p, m))[0] for path in paths)
        assert taken == min(separate, effective), (rows, d, h)


@pytest.mark.parametrize("trains", ["x a0 b0", "x a0", "x b0", "x", "x bias"])
def test_cheaper_backward(trains):
    """Backward of the effective path gets the gradient of x the cheaper way. `g W'` for `2 r N`; or `g W + (g B) A`
    for `2 T r d`, and `2 T r h` more where A's gradient doesn't need g B."""
    names = trains.split()
    counted, wanted = {}, {}
    for t, d, h in SHAPES:
        n, r = d * h, 2
        low = 2 * t * r * (d + h) * (("a0" in names) + ("b0" in names))
        by_sum = 2 * t * r * d + (0 if "a0" in names else 2 * t * r * h)
        wanted[t, d, h] = 2 * t * n + min(2 * r * n, by_sum) + low
        counted[t, d, h] = forward_and_backward(effective_linear, make(0, (t,), d, h, (r,), trains=names))[1]
    assert counted == wanted


def test_flops_without_dx():
    """Low-rank gradients without that of x cost what they need."""
    t, d, h, r = 6, 20, 22, 2
    for trains in ({"a0"}, {"b0"}):
        for path in (separate_linear, effective_linear):
            backward = forward_and_backward(path, make(0, (t,), d, h, (r,), trains=trains))[1]
            most = 2 * t * r * (d + h)
            assert backward == (2 * t * r * h if (path, trains) == (separate_linear, {"b0"}) else most)


# -- stored bytes ----------------------------------------------------------------------------------------------------

T, D_IN, D_OUT, R = 50, 8, 6, 3
X_BYTES, MIDDLE_BYTES = T * D_IN * 4, T * R * 4


def stored_by(path: Callable[..., Tensor], problem: Any, **options: Any) -> int:
    """Beside parameters and positions; x is counted."""
    known = [tensor for name, tensor in problem.tensors.items() if name != "x"]
    return stored_bytes(lambda: call(path, problem, **options), *known, *problem.at.values())


@pytest.mark.parametrize("entries", [(), ("a0",), ("a0", "b0")])
@pytest.mark.parametrize("dense", [0, 1])
def test_stored(entries, dense):
    """Stored are x and, on the separate path, its product with A."""
    problem = make(0, (T,), D_IN, D_OUT, (R,), dense, entries=entries, dtype=torch.float32)
    assert stored_by(effective_linear, problem) == X_BYTES
    assert stored_by(separate_linear, problem) == X_BYTES + MIDDLE_BYTES
    assert stored_by(separate_linear, problem, dropout=0.5) == X_BYTES + MIDDLE_BYTES + T * D_IN


@pytest.mark.parametrize("path", [separate_linear, effective_linear])
@pytest.mark.parametrize("trains", ["x", "x bias", "bias"])
@pytest.mark.parametrize("dense", [0, 1])
def test_stored_frozen(path, trains, dense):
    """Nothing is stored that no gradient needs. A frozen linear layer keeps its weight alone, whether its bias trains
    or not."""
    x, weight = torch.randn(T, D_IN, requires_grad=True), torch.randn(D_OUT, D_IN)
    plain = stored_bytes(lambda: F.linear(x, weight, torch.randn(D_OUT, requires_grad=True)), weight)
    assert plain == 0
    for ranks in ((), (R,)):
        problem = make(0, (T,), D_IN, D_OUT, ranks, dense, dtype=torch.float32, trains=trains.split())
        assert stored_by(path, problem) == 0


def test_stored_product():
    """The product with A is stored for the gradient of B alone."""
    problem = make(0, (T,), D_IN, D_OUT, (R,), dtype=torch.float32, trains={"x", "a0"})
    assert stored_by(separate_linear, problem) == X_BYTES


@pytest.mark.parametrize("axis", [0, 1])
def test_stored_frozen_cut(axis):
    """A frozen cut layer stores nothing."""
    x, weight, kept = torch.randn(T, D_IN, requires_grad=True), torch.randn(D_OUT, D_IN), torch.tensor([0, 2])
    values = torch.randn((2, D_IN) if axis == 0 else (D_OUT, 2))
    run = lambda: cut_linear(x, weight, None, values, None, None, None, kept, axis)  # noqa: E731
    assert stored_bytes(run, weight, values, kept) == 0


def test_stored_entries():
    """Entries of a large factor are stored as entries. Four entries of A and B of 2 x 1000 numbers: x, and their few
    values and positions."""
    x, weight = torch.randn(40, 1000, requires_grad=True), torch.randn(1000, 1000)
    at = torch.tensor([0, 5, 999, 1200], dtype=torch.int32)
    values = [torch.randn(4, requires_grad=True) for _ in range(2)]
    pair = (Entries(values[0], at, 2, 1000), Entries(values[1], at, 2, 1000, turned=True), 1.0)
    for path, middle in ((effective_linear, 0), (separate_linear, 40 * 2 * 4)):
        own = stored_bytes(lambda path=path: path(x, weight, None, [pair]), weight)
        assert own == 40 * 1000 * 4 + middle + (2 + 1) * 16  # both values, one storage of positions


def stored_by_model(model: torch.nn.Module) -> int:
    inputs = {key: torch.cat([value] * 3) for key, value in zoo.inputs_of("distilbert", model).items()}
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    return stored_bytes(lambda: model.train()(**inputs).loss, *known)


@pytest.mark.parametrize("rows", [1, 3])
def test_stored_norms(rows):
    """Norms and biases of a Learner store no activation. By hand: each of 4 norms keeps a sum for its weight and one
    for its bias, of 16 numbers; biases keep nothing."""
    settings = {"priming_epochs": 0, "train_biases": False, "train_norms": False}
    plain = stored_by_model(training.learner(**settings))
    biases = stored_by_model(training.learner(**{**settings, "train_biases": True}))
    norms = stored_by_model(training.learner(**{**settings, "train_norms": True}))
    assert plain > 10**4
    assert biases == plain
    assert norms - plain <= 4 * 2 * 16 * 4


def pruned_nas_layer(positions: dict[str, list[int]]) -> Any:
    model = training.nas("distilbert", granularity="unstructured")
    layer = next(module for module in model.modules() if isinstance(module, NASLoRALinear))
    every = {part: torch.tensor(positions.get(part, []), dtype=torch.long) for part in ("U", "V", "bias")}
    layer.set_kept("default", every)
    return layer


def test_stored_pruned():
    """A pruned NAS-LoRA layer stores no dense factor. x of 60 rows, values and positions of 3 entries; (r, d) and (h,
    r) would be 4 * 16 numbers each."""
    layer = pruned_nas_layer({"U": [0, 3], "V": [1], "bias": [2]})
    x = torch.randn(60, 16, requires_grad=True)
    assert stored_bytes(lambda: layer(x), *layer.parameters(), *layer.buffers()) == 60 * 16 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 60])
def test_stored_bias_alone(rows, dtype):
    """A NAS-LoRA layer of which a bias is left stores no activation."""
    layer = pruned_nas_layer({"bias": [2, 5]})
    layer.get_base_layer().to(dtype)
    x = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    known = [*layer.parameters(), *layer.buffers()]
    assert stored_bytes(lambda: layer.get_base_layer()(x), *known) == 0
    # but 16 numbers of a bias, of which the sum is made
    assert stored_bytes(lambda: layer(x), *known) <= 16 * 4
