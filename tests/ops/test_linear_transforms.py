"""Function transforms and checkpointing: vmap, torch.func, functional_call on adapted models, forward mode."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import training
import zoo
from peft import PeftModel
from problems import PATHS, call, make, reference
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from peft_learners.ops.cut import cut_linear
from peft_learners.ops.delta_linear import linear_with_updates, separate_linear

PROBLEMS = {
    "low rank": make(4, (3,), 4, 5, (2,)),
    "wide": make(4, (3,), 4, 5, (17,)),
    "low rank and dense": make(4, (3,), 4, 5, (2,), 1),
    "many rows and dense": make(4, (40,), 4, 5, (2,), 1),
    "dense": make(4, (3,), 4, 5, (), 1),
    "entries": make(4, (3,), 4, 5, (2,), entries={"a0", "b0"}),
    "no update": make(4, (3,), 4, 5, ()),
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_path = pytest.mark.parametrize("path", PATHS)


def stacked(tensor: Tensor, count: int = 3) -> Tensor:
    """Copies of other values: (count, ...)."""
    factors = torch.arange(1.0, count + 1, dtype=tensor.dtype).view(-1, *[1] * tensor.dim())
    return (tensor.detach() * factors).cos()


@each_path
@each_problem
def test_vmap_one(name, path):
    """vmap over any one of the tensors is a loop."""
    problem = PROBLEMS[name]
    for key, tensor in problem.tensors.items():
        many = stacked(tensor)
        run = lambda one, key=key: call(path, problem, {**problem.tensors, key: one})  # noqa: E731
        expected = torch.stack([run(one) for one in many])
        torch.testing.assert_close(vmap(run)(many), expected, rtol=1e-12, atol=1e-12)
        if tensor.dim() == 2:  # the batch as the last dimension: slices aren't contiguous
            torch.testing.assert_close(vmap(run, in_dims=2)(many.movedim(0, 2)), expected, rtol=1e-12, atol=1e-12)


@each_path
@each_problem
def test_vmap_all(name, path):
    """vmap over all of them at once is a loop, gradients included. Model ensembling: each has tensors of its own."""
    problem = PROBLEMS[name]
    many = {key: stacked(tensor) for key, tensor in problem.tensors.items()}
    gradients = grad(lambda tensors: call(path, problem, tensors).pow(2).sum())
    got = vmap(gradients)(many)
    for i in range(3):
        tensors = {key: value[i].clone().requires_grad_() for key, value in many.items()}
        wanted = torch.autograd.grad(call(path, problem, tensors).pow(2).sum(), list(tensors.values()))
        for key, exact in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(got[key][i], exact, rtol=1e-11, atol=1e-11)


@each_path
@each_problem
def test_per_sample_gradients(name, path):
    problem = PROBLEMS[name]
    many = stacked(problem.tensors["x"])
    shared = {key: value.detach() for key, value in problem.tensors.items() if key != "x"}
    got = vmap(grad(lambda own, x: call(path, problem, {"x": x, **own}).sin().sum()), in_dims=(None, 0))(shared, many)
    for i, x in enumerate(many):
        leaves = {key: value.clone().requires_grad_() for key, value in shared.items()}
        wanted = torch.autograd.grad(call(path, problem, {"x": x, **leaves}).sin().sum(), list(leaves.values()))
        for key, exact in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(got[key][i], exact, rtol=1e-11, atol=1e-11)


@each_path
@each_problem
def test_hessian(name, path):
    """Jacobians of Jacobians are those of the plain formula."""
    problem = PROBLEMS[name]
    fixed = {key: value.detach() for key, value in problem.tensors.items()}
    for key in [key for key in fixed if key not in ("weight", "bias")]:
        value = fixed[key] if len(fixed["x"]) < 10 or key != "x" else fixed[key][:2]
        own = lambda one, key=key: call(path, problem, {**fixed, key: one}).pow(2).mean()  # noqa: E731
        plain = lambda one, key=key: reference(problem, {**fixed, key: one}).pow(2).mean()  # noqa: E731
        torch.testing.assert_close(jacrev(own)(value), jacrev(plain)(value), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(jacrev(jacrev(own))(value), jacrev(jacrev(plain))(value), rtol=1e-10, atol=1e-12)


@each_path
@each_problem
def test_batched_upstream(name, path):
    """A batch of upstream gradients is a loop over them. What `torch.autograd.functional.jacobian(vectorize=True)`
    does: backward under vmap, forward not."""
    problem = PROBLEMS[name]
    out, inputs = call(path, problem), list(problem.tensors.values())
    many = stacked(out)
    got = torch.autograd.grad(out, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(many):
        for ours, exact in zip(got, torch.autograd.grad(out, inputs, g, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [*PATHS, linear_with_updates])
def test_forward_mode(path):
    """Forward mode says that it isn't there."""
    problem = make(4, (3,), 4, 5, (2,))
    fixed = {key: value.detach() for key, value in problem.tensors.items()}
    run = lambda x: call(path, problem, {**fixed, "x": x})  # noqa: E731
    with pytest.raises(NotImplementedError, match="jvp.*forward mode"):
        torch.func.jvp(run, (fixed["x"],), (fixed["x"],))
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        hessian(lambda x: run(x).pow(2).sum())(fixed["x"])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp.*forward mode"):
        run(forward_ad.make_dual(fixed["x"], fixed["x"]))


# -- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["x", "a0", "b0"])
def test_vmap_dropout(key):
    """Dropout under vmap draws as asked. As `F.dropout`, whichever of the tensors carries the batch."""
    problem = make(4, (20,), 8, 5, (2,))
    fixed = {name: value.detach() for name, value in problem.tensors.items()}
    same = fixed[key].expand(3, *fixed[key].shape)
    run = lambda one: call(separate_linear, problem, {**fixed, key: one}, dropout=0.5)  # noqa: E731
    one, two, three = vmap(run, randomness="same")(same)
    assert torch.equal(one, two) and torch.equal(two, three)
    with pytest.raises(RuntimeError, match="random"):
        vmap(run)(same)
    one, two, three = vmap(run, randomness="different")(same)
    assert not torch.equal(one, two) and not torch.equal(two, three)


# -- cut -------------------------------------------------------------------------------------------------------------


def cut_case(axis: int, rest: bool) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(axis)
    h, d, kept = 5, 4, torch.tensor([0, 2])
    shapes = {"x": (3, d), "weight": (h, d), "bias": (h,), "values": (2, d) if axis == 0 else (h, 2)}
    shapes["bias_values"] = (2,) if axis == 0 else (h,)
    if rest:
        shapes["rest"] = (h - 2, d) if axis == 0 else (h, d - 2)
        if axis == 0:
            shapes["bias_rest"] = (h - 2,)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}, kept


def run_cut(t: dict[str, Tensor], kept: Tensor, axis: int) -> Tensor:
    parts = (t[name] if name in t else None for name in ("values", "rest", "bias_values", "bias_rest"))
    return cut_linear(t["x"], t["weight"], t["bias"], *parts, kept, axis)


@pytest.mark.parametrize(
    "axis,rest,key",
    [(axis, rest, key) for axis in (0, 1) for rest in (False, True) for key in cut_case(axis, rest)[0]],
)
def test_vmap_cut(axis, rest, key):
    """vmap over any part of a cut layer is a loop."""
    tensors, kept = cut_case(axis, rest)
    many = stacked(tensors[key])
    run = lambda one: run_cut({**tensors, key: one}, kept, axis)  # noqa: E731
    expected = torch.stack([run(one) for one in many])
    torch.testing.assert_close(vmap(run)(many), expected, rtol=1e-12, atol=1e-12)
    wrt = "values" if key != "values" else "x"
    gradients = lambda one: grad(lambda own: run_cut({**tensors, key: one, wrt: own}, kept, axis).sin().sum())(  # noqa: E731
        tensors[wrt]
    )
    expected = torch.stack([gradients(one) for one in many])
    torch.testing.assert_close(vmap(gradients)(many), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_cut_hessian(axis):
    """Second derivatives of a cut layer mix x and values. d/dx of the gradient of the values; with axis 1 it goes
    through the kept columns of x."""
    tensors, kept = cut_case(axis, True)

    def plain(x: Tensor, values: Tensor) -> Tensor:
        full = torch.zeros_like(tensors["weight"]).index_copy(axis, kept, values)
        others = torch.tensor([i for i in range(full.shape[axis]) if i not in (0, 2)])
        full = full.index_copy(axis, others, tensors["rest"]) + tensors["weight"]
        return (x @ full.t()).sin().sum()

    def own(x: Tensor, values: Tensor) -> Tensor:
        fixed = {**tensors, "x": x, "values": values, "bias": torch.zeros(5, dtype=torch.float64)}
        fixed = {k: torch.zeros_like(v) if k.startswith("bias_") else v for k, v in fixed.items()}
        return run_cut(fixed, kept, axis).sin().sum()

    at = (tensors["x"], tensors["values"])
    got, wanted = (jacrev(jacrev(f, argnums=1), argnums=0)(*at) for f in (own, plain))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


# -- adapted models --------------------------------------------------------------------------------------------------


def adapted(tuner: str) -> PeftModel:
    make_one = {"learner": training.learner, "far": training.far, "nas": training.nas}[tuner]
    model = make_one("distilbert").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("tuner", ["learner", "far", "nas"])
def test_ensemble(tuner):
    """Stacked adapters of one base run as an ensemble. Three adapters' values stacked, the base shared: outputs, and
    gradients per adapter, are those of a loop."""
    model = adapted(tuner)
    inputs = zoo.inputs_of("distilbert", model)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    base = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    many = {n: torch.stack([p, p * 1.5, p * -0.5]) for n, p in own.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**base, **values}, (), inputs).logits.sin().sum()

    got, out = vmap(torch.func.grad_and_value(loss))(many)
    for i in range(3):
        gradients, value = torch.func.grad_and_value(loss)({n: p[i] for n, p in many.items()})
        torch.testing.assert_close(out[i], value, rtol=1e-5, atol=1e-6)
        for n, g in gradients.items():
            torch.testing.assert_close(got[n][i], g, rtol=1e-3, atol=1e-5, msg=n)


def test_stacked_models():
    """Whole models can be stacked."""
    models = [adapted("learner") for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(0.9)
    params, buffers = stack_module_state(models)
    inputs = {k: v for k, v in zoo.inputs_of("distilbert", models[0]).items() if k != "labels"}
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (), inputs).logits)(params, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(out[i], model(**inputs).logits, rtol=1e-5, atol=1e-6)


# -- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 40])
def test_checkpointing(rows, dropout, autocast, reentrant):
    """Checkpointed gradients are the same bits."""
    problem = make(5, (rows,), 6, 7, (2,), 1, dtype=torch.float32)
    inputs, results = list(problem.tensors.values()), []
    for again in (False, True):
        torch.manual_seed(11)
        run = lambda *t: call(  # noqa: E731
            linear_with_updates, problem, dict(zip(problem.tensors, t, strict=True)), dropout=dropout
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = checkpoint(run, *inputs, use_reentrant=reentrant) if again else run(*inputs)
        torch.randn(5)  # the generator goes on
        out.float().pow(2).sum().backward()
        results.append([out.detach(), *(t.grad.clone() for t in inputs)])
        for t in inputs:
            t.grad = None
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_cut_checkpointing(axis, reentrant):
    """Those of cut layers too."""
    tensors, kept = cut_case(axis, True)
    results = []
    for again in (False, True):
        t = {k: v.clone().requires_grad_(k in ("x", "values", "bias_values")) for k, v in tensors.items()}
        run = lambda *own, t=t: run_cut(dict(zip(t, own, strict=True)), kept, axis)  # noqa: E731
        out = checkpoint(run, *t.values(), use_reentrant=reentrant) if again else run(*t.values())
        out.pow(2).sum().backward()
        results.append([out.detach(), *(v.grad for v in t.values() if v.requires_grad)])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
