"""Quantised bases: what trains on them, to what precision, and that what can't work says so before it begins."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import HEAD, KINDS, LINEARS, PackedLinear, base, float_base, inputs, skip_if_absent
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from training import arguments, take_steps, trainer
from transformers import set_seed
from tuners import TUNERS, refuses_to_merge
from zoo import logits_of

from peft_learners import FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.layers.base import DeltaLayer
from peft_learners.structure.modules import bias_names, linear_names
from peft_learners.structure.weights import float_weight, readable_weight

LOW_RANK = ("learner-unprimed", "nas-unstructured", "nas-structured")
STEPS = 6


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    skip_if_absent(request.param)
    return request.param


def adapted(model: nn.Module, tuner: str, seed: int = 1, **settings: Any) -> PeftModel:
    set_seed(seed)
    return get_peft_model(model, TUNERS[tuner].config(**{"task_type": "SEQ_CLS", **settings}))


def layer_of(model: nn.Module) -> Any:
    """An adapted layer of the model that is not square."""
    return next(m for n, m in model.named_modules() if n.endswith(("intermediate.dense", "up_proj")))


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """All that belongs to the base model, copied: packed values, scales, float parameters."""
    own = [tuner.prefix for tuner in TUNERS.values()]
    return {
        name.replace("base_model.model.", "").replace("base_layer.", "").replace("original_module.", ""): value.clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and ".modules_to_save." not in name and not any(f".{p}" in name for p in own)
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    def bits(value: Any) -> Tensor:  # packed values may be NaN as floats, and torch can't compare fp8
        value = value if type(value) is Tensor else value.dequantize()
        return value.contiguous().view(torch.uint8) if value.dim() else value

    return left.keys() == right.keys() and all(torch.equal(bits(left[name]), bits(right[name])) for name in left)


def updates(layer: Any, tuner: str) -> tuple[Tensor, Tensor, Tensor]:
    """`(A, B, db)` of a layer in float64, read from its parameters: the update is `B A`."""
    if tuner.startswith("learner"):
        a, b = (
            layer.learner_P1["default"].weight,
            layer.learner_P2["default"].weight * 2.0,
        )  # the scaling in tests/support/tuners.py
        bias = layer.learner_bias_delta["default"].bias
    else:
        a, b = layer.nas_lora_V["default"].weight.t(), layer.nas_lora_U["default"].weight
        bias = layer.nas_lora_bias_delta["default"].bias
    return a.detach().double(), b.detach().double(), bias.detach().double()


def test_linears_found(kind):
    """All linear layers of the base are found, and none passes for a float matrix."""
    model, original = base(kind), float_base()
    names = linear_names(model)
    assert len(names) == LINEARS
    modules = dict(model.named_modules())
    assert all(float_weight(modules[name]) is None for name in names)
    assert all(readable_weight(modules[name]) is None for name in names)
    assert float_weight(model.classifier) is not None
    assert len(bias_names(model)) == LINEARS + 5  # and the norms'
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out, expected = layer_of(model)(x), layer_of(original)(x)
    assert 1e-4 < (out - expected).norm() / expected.norm() < 0.2  # quantised, and still the same


@pytest.mark.parametrize("rows", [2, 200], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("tuner", LOW_RANK)
def test_quantised_output(kind, tuner, rows):
    """The output is that of the quantised layer plus the exact terms."""
    layer = layer_of(adapted(base(kind), tuner, init_weights=False).eval())
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(2))
    a, b, bias = updates(layer, tuner)
    with torch.no_grad():
        out = layer(x)
        expected = layer.base_layer(x).double() + x.double() @ a.t() @ b.t() + bias
    assert out.dtype == torch.float32
    assert (expected - layer.base_layer(x).double()).abs().max() > 0.1
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tuner", LOW_RANK)
def test_quantised_gradients(kind, tuner):
    """Gradients are exact, and reach the input through the quantised layer."""
    layer = layer_of(adapted(base(kind), tuner, init_weights=False).train())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, layer.in_features, generator=generator, requires_grad=True)
    g = torch.randn(50, layer.out_features, generator=generator)
    a, b, _ = updates(layer, tuner)
    (through_base,) = torch.autograd.grad(layer.base_layer(x), x, g)
    layer(x).backward(g)
    rows, g64 = x.detach().double(), g.double()
    factor = 2.0 if tuner.startswith("learner") else 1.0
    expected = {"dx": through_base.double() + g64 @ b @ a, "dbias": g64.sum(0)}
    found = {"dx": x.grad}
    if tuner.startswith("learner"):
        expected |= {"dA": (g64 @ b).t() @ rows, "dB": factor * g64.t() @ (rows @ a.t())}
        found |= {"dA": layer.learner_P1["default"].weight.grad, "dB": layer.learner_P2["default"].weight.grad}
        found["dbias"] = layer.learner_bias_delta["default"].bias.grad
    else:
        expected |= {"dA": rows.t() @ (g64 @ b), "dB": g64.t() @ (rows @ a.t())}
        found |= {"dA": layer.nas_lora_V["default"].weight.grad, "dB": layer.nas_lora_U["default"].weight.grad}
        found["dbias"] = layer.nas_lora_bias_delta["default"].bias.grad
    assert through_base.abs().max() > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("tuner", [*LOW_RANK, "bottleneck-parallel"])
def test_train_and_save(kind, tuner, tmp_path: Path):
    """The adapter trains, is saved, and leaves the base as it was. Training comes before any evaluation, which changes
    bitsandbytes' 4-bit layers on a CPU for good."""
    batch = inputs()
    before = base_values(base(kind))
    model = adapted(base(kind), tuner)
    assert same(base_values(model), before)
    losses, phases = take_steps(model, batch, STEPS)
    assert tuple(phases) == TUNERS[tuner].phases
    assert losses[2] < losses[0] and losses[-1] < losses[-3]  # in each phase
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert same(base_values(model), before)

    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} <= {
        torch.float32, torch.int32,
    }  # fmt: skip
    logits, original = logits_of(model, batch), logits_of(base(kind), batch)
    assert not torch.allclose(logits, original, atol=1e-2)
    for low in (False, True):
        again = PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits_of(again, batch), logits)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), original)
    assert torch.equal(logits_of(model, batch), logits)

    # what was trained on the quantised base can be merged into the one in float
    in_float = PeftModel.from_pretrained(float_base(), tmp_path)
    unmerged = logits_of(in_float, batch)
    if not refuses_to_merge(tuner, in_float):
        torch.testing.assert_close(logits_of(in_float.merge_and_unload(), batch), unmerged, rtol=1e-5, atol=1e-5)

    back = model.unload()
    assert not any(isinstance(module, DeltaLayer) for module in back.modules())
    assert torch.equal(logits_of(back, batch), original)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("tuner", ["learner-unprimed", "nas-structured"])
def test_merge_refused(kind, tuner, verb):
    """Merging refuses before anything is merged."""
    batch = inputs()
    model = adapted(base(kind), tuner, init_weights=False)
    logits = logits_of(model, batch)
    with pytest.raises(ValueError, match=r"to merge into is quantised.*PeftModel.from_pretrained\(float_model"):
        getattr(model, verb)()
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, DeltaLayer))
    assert torch.equal(logits_of(model, batch), logits)
    with pytest.raises(ValueError, match="to merge into is quantised"):
        layer_of(model).merge()


def test_trainer(kind, tmp_path: Path):
    """Trainer, which refuses quantised models without an adapter, trains on it."""
    tuner = "nas-unstructured"
    model = adapted(base(kind), tuner)
    run = trainer(model, arguments(tmp_path, max_grad_norm=1.0, num_train_epochs=2))
    run.train()
    phases = [entry["phase"] for entry in run.state.log_history if "phase" in entry]
    assert set(phases) == set(TUNERS[tuner].phases)
    run.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(kind), tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs()), logits_of(model, inputs()))


def test_biases_alone(kind):
    """Biases alone train, and merge exactly."""
    batch = inputs()
    set_seed(1)
    model = get_peft_model(base(kind), NASLoRAConfig(r=0, parameter_budget=0.5, task_type="SEQ_CLS"))
    losses, phases = take_steps(model, batch, STEPS)
    assert phases == ["search", "retraining"] and losses[2] < losses[0]
    layer = layer_of(model)
    assert torch.equal(layer.get_delta_weight("default"), torch.zeros(layer.out_features, layer.in_features))
    logits = logits_of(model, batch)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, DeltaLayer) for module in merged.modules())
    precision = KINDS[kind].precision
    torch.testing.assert_close(logits_of(merged, batch), logits, rtol=precision, atol=precision)
    assert not torch.allclose(logits, logits_of(base(kind), batch), atol=5e-2)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_priming_refused(kind, arch):
    """Priming a quantised attention is refused, with the call that works."""
    task = "SEQ_CLS" if arch == "bert" else "CAUSAL_LM"
    with pytest.raises(ValueError) as error:
        get_peft_model(base(kind, arch), LearnerConfig(r=4, task_type=task))
    assert "adds a dense delta to" in str(error.value) and f"(got {KINDS[kind].stored})" in str(error.value)
    assert "LearnerConfig(priming_epochs=0)" in str(error.value)
    get_peft_model(base(kind, arch), LearnerConfig(r=4, priming_epochs=0, task_type=task))


def test_float_layers_primed(kind):
    """What is in float can be primed, with the names that the error gives."""
    keep = (*HEAD, "query", "value")
    with pytest.raises(ValueError, match=r"and 3 more.*priming_modules=\['query', 'value'\]"):
        get_peft_model(base(kind, keep=keep), LearnerConfig(r=4, task_type="SEQ_CLS"))
    config = LearnerConfig(r=4, priming_epochs=1, priming_modules=["query", "value"], task_type="SEQ_CLS")
    set_seed(1)
    model = get_peft_model(base(kind, keep=keep), config)
    losses, phases = take_steps(model, inputs(), STEPS)
    assert phases == ["priming", "learning"] and losses[-1] < losses[0]
    primed = {n for n, m in model.named_modules() if "default" in getattr(m, "learner_dense_delta", ())}
    assert {name.rpartition(".")[2] for name in primed} == {"query", "value"} and len(primed) == 4
    with pytest.raises(ValueError, match="to merge into is quantised"):
        model.merge_and_unload()


def test_primed_adapter_refused(kind, tmp_path: Path):
    """A quantised base refuses a primed adapter."""
    model = adapted(float_base(), "learner")
    take_steps(model, inputs(), STEPS)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adds a dense delta to.*was primed on a base model in float"):
        PeftModel.from_pretrained(base(kind), tmp_path)


def test_far_refused(kind):
    """FAR is refused, with what works in its place."""
    with pytest.raises(ValueError) as error:
        get_peft_model(base(kind), FARConfig(task_type="SEQ_CLS"))
    assert "FAR adds a dense delta to" in str(error.value) and f"(got {KINDS[kind].stored})" in str(error.value)
    assert "LearnerConfig(priming_epochs=0) or NASLoRAConfig()" in str(error.value)
    get_peft_model(base(kind), NASLoRAConfig(task_type="SEQ_CLS"))


def test_far_float_layers(kind):
    """FAR trains and merges what is in float: FFNs in float, the attention and the pooler quantised and left out, as
    the error says."""
    keep = (*HEAD, *(f"bert.encoder.layer.{i}.{part}.dense" for i in range(2) for part in ("intermediate", "output")))
    with pytest.raises(ValueError, match=r"leave those out: FARConfig\(exclude_modules=\[") as error:
        get_peft_model(base(kind, keep=keep), FARConfig(task_type="SEQ_CLS"))
    names = ast.literal_eval(str(error.value).rpartition("exclude_modules=")[2].rstrip(")."))
    batch = inputs()
    model = adapted(base(kind, keep=keep), "far", exclude_modules=names)
    losses, phases = take_steps(model, batch, STEPS)
    assert tuple(phases) == TUNERS["far"].phases and losses[-1] < losses[0]
    logits = logits_of(model, batch)
    precision = KINDS[kind].precision
    torch.testing.assert_close(logits_of(model.merge_and_unload(), batch), logits, rtol=precision, atol=precision)


@pytest.mark.parametrize("tuner", ["learner-unprimed", "nas-structured"])
def test_quantised_head_refused(kind, tuner):
    """A quantised head is refused."""
    with pytest.raises(ValueError, match=r"classifier is trained whole.*skip_modules=\['classifier'\]"):
        adapted(base(kind, keep=()), tuner)


def test_autocast(kind):
    if not KINDS[kind].autocast:
        pytest.skip("its own kernels don't run under autocast on a CPU, without any adapter")
    model = adapted(base(kind), "learner-unprimed", init_weights=False).train()
    batch = inputs()
    full = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert not torch.equal(out.logits.float(), full)
    torch.testing.assert_close(out.logits.float(), full, rtol=0, atol=0.1)


@pytest.mark.parametrize("tuner", ["learner-unprimed", "nas-unstructured", "bottleneck-sequential"])
def test_kbit_checkpointing(kind, tuner):
    """Gradient checkpointing works on a model from `prepare_model_for_kbit_training`."""
    batch = inputs("llama")

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        peft_model = adapted(model, tuner, init_weights=False, task_type="CAUSAL_LM").train()
        peft_model(**batch).loss.backward()
        return {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad and p.grad is not None}

    plain = gradients(base(kind, "llama"))
    prepared = prepare_model_for_kbit_training(base(kind, "llama"), use_gradient_checkpointing=True)
    prepared.gradient_checkpointing_enable()  # PEFT knows transformers' own kinds only
    prepared.enable_input_require_grads()
    checkpointed = gradients(prepared)
    assert prepared.is_gradient_checkpointing
    assert plain.keys() == checkpointed.keys() and len(plain) >= 2 * (10 if tuner.startswith("bottleneck") else 12)
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_mixed_batch(kind):
    """Rows of a mixed batch have their own adapters."""
    batch = inputs()
    model = adapted(base(kind), "learner-unprimed", init_weights=False)
    set_seed(7)
    model.add_adapter("other", LearnerConfig(r=2, priming_epochs=0, init_weights=False, task_type="SEQ_CLS"))
    single = {"default": logits_of(model, batch)}
    with model.disable_adapter():
        single["__base__"] = logits_of(model, batch)
    model.set_adapter("other")
    single["other"] = logits_of(model, batch)
    names = ["other", "__base__", "default"]
    mixed = logits_of(model, {**batch, "adapter_names": names})
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row], rtol=1e-3, atol=1e-3)


def test_init_dtype(kind):
    """Initial values aren't rounded to the type that the base computes in."""
    model = adapted(base(kind, dtype=torch.bfloat16), "nas-unstructured")
    layer = layer_of(model)
    space = layer.nas_lora_space["default"]
    assert {p.dtype for n, p in model.named_parameters() if ".nas_lora_" in n} == {torch.float32}
    assert torch.equal(layer.nas_lora_U["default"].weight, space.initial("U"))
    assert not model.base_model.has_trained(model.base_model.model, "default", model.peft_config["default"])


class OpaqueLinear(PackedLinear):
    """Its kernel has no backward: it runs without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():  # as a kernel in C++ runs
        return x @ weight


_LIBRARY = torch.library.Library("peft_learners_tests", "DEF")
_LIBRARY.define("matmul(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.impl("matmul", _matmul, "CPU")


class OperatorLinear(PackedLinear):
    """Its kernel has no backward, and torch drops the gradient with no more than one warning."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.peft_learners_tests.matmul(x.double(), (self.packed * self.scale).double().t()).to(x.dtype)


@pytest.mark.parametrize("layer", [OpaqueLinear, OperatorLinear])
def test_no_gradient_refused(layer):
    """A layer that passes no gradient on is refused where that would matter."""
    model = nn.Sequential()
    model.first_linear, model.second_linear = nn.Linear(8, 8), layer(nn.Linear(8, 8, bias=False))
    config = LearnerConfig(r=2, priming_epochs=0, target_modules=["first_linear", "second_linear"])
    model = get_peft_model(model, config)
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert model(x).shape == (3, 8)
    with pytest.raises(RuntimeError, match=f"The {layer.__name__} passes no gradient on to its input"):
        model(x)


def test_packed_4bit_told():
    """Layers of 4 bits that bitsandbytes has packed for inference aren't trained in silence."""
    skip_if_absent("bnb-nf4")
    model, batch = adapted(base("bnb-nf4", "llama"), "learner-unprimed", task_type="CAUSAL_LM"), inputs("llama")
    model.train()
    model(**batch).loss.backward()
    logits_of(model, batch)
    if not getattr(layer_of(model).base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("needs a CPU with AVX512-BF16: bitsandbytes packs for no other")
    model.train()
    with pytest.raises(RuntimeError, match="The Linear4bit passes no gradient.*train before you evaluate"):
        model(**batch)
