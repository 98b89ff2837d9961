"""torch.compile: whole graphs, and no compilation more than the adapters' forms need.

The graphs are those that every backend gets. They are run as they are ("eager"), or, where gradients count, through
AOTAutograd ("aot_eager"); one slow test runs what inductor makes of them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from torch._dynamo.utils import counters
from trained import train
from tuners import TUNERS
from verb_cases import config_of, many, switched
from zoo import logits_of

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of BERT and Llama: compiling takes long."""
    monkeypatch.setitem(zoo.SMALL, "num_hidden_layers", 1)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model: torch.nn.Module, **settings: Any) -> Any:
    return torch.compile(model, **{"fullgraph": True, "backend": "eager", **settings})


def two_adapters(tuner: str, arch: str) -> tuple[PeftModel, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A trained adapter and one in its first phase; their logits, from a copy that was not called before."""
    run = train(tuner, arch)
    torch.manual_seed(3)
    run.model.add_adapter("other", config_of(tuner, arch))
    eager, inputs = copy.deepcopy(run.model), many(run.inputs)
    return run.model, inputs, {name: switched(eager, name, inputs) for name in ("default", "other")}


def saved_with_other_values(model: PeftModel, out: Path) -> PeftModel:
    """A copy of the model whose active adapter has other values in the same places; its adapter's file."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    twin.save_pretrained(out)
    return twin


@pytest.mark.verb("torch.compile, inference")
@pytest.mark.verb("torch.compile, then set_adapter")
@pytest.mark.verb("torch.compile, then load_adapter in place")
@pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured", "bottleneck-parallel"])
def test_compiled_once(tuner, tmp_path: Path):
    """Each form of an adapter is compiled once."""
    model, inputs, own = two_adapters(tuner, "bert")
    twin = saved_with_other_values(model, tmp_path)
    run = compiled(model.eval())
    for count, name in enumerate(("default", "other"), start=1):
        torch.testing.assert_close(switched(model, name, inputs), own[name], rtol=1e-5, atol=1e-5)
        model.set_adapter(name)
        for _ in range(2):  # a flag that is set by the first call would show in the second
            torch.testing.assert_close(logits_of(run, inputs), own[name], rtol=1e-5, atol=1e-5)
        assert graphs() == count
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            torch.testing.assert_close(logits_of(run, inputs), own[name], rtol=1e-5, atol=1e-5)
        model.load_adapter(tmp_path, "default")
        reloaded = logits_of(run, inputs)
    torch.testing.assert_close(reloaded, logits_of(twin, inputs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(reloaded, own["default"], atol=1e-3)


@pytest.mark.verb("torch.compile, inference")
@pytest.mark.parametrize(
    ("tuner", "arch"),
    [
        ("learner", "llama"),
        ("far-output-node", "gpt2"),
        ("bottleneck-parallel", "llama"),
        ("bottleneck-sequential", "gpt2"),
    ],
)
def test_other_architectures(tuner, arch):
    """Other architectures are one graph too."""
    run = train(tuner, arch)
    inputs, fresh = many(run.inputs), copy.deepcopy(run.model).eval()
    torch.testing.assert_close(logits_of(compiled(fresh), inputs)[:3], run.logits, rtol=1e-5, atol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize("names", [["gate_proj"], ["down_proj"], ["gate_proj", "down_proj"], ["act_fn"]])
def test_layers_compiled_apart(names):
    """Parallel bottleneck adapters work where layers are compiled one by one. What goes into a network comes to its
    end whichever of its layers are compiled."""
    run = train("bottleneck-parallel", "llama")
    for block in run.model.base_model.model.model.layers:
        for name in names:
            getattr(block.mlp, name).compile(backend="eager")
    torch.testing.assert_close(logits_of(run.model, run.inputs), run.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.verb("torch.compile, inference")
@pytest.mark.parametrize("tuner", ["far", "nas-structured"])
def test_disabled_and_merged(tuner):
    """A compiled model follows disabling and merging, and does not go on with what it was compiled with."""
    run = train(tuner, "bert")
    model, inputs = run.model.eval(), many(run.inputs)
    call = compiled(model)
    assert not torch.allclose(logits_of(call, inputs)[:3], run.base_logits, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(call, inputs)[:3], run.base_logits, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(call, inputs)[:3], run.logits, rtol=1e-5, atol=1e-5)
    assert graphs() == 3
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(call, inputs)[:3], run.logits, rtol=1e-5, atol=1e-5)
    assert graphs() == 3


@pytest.mark.verb("torch.compile, training")
@pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured", "bottleneck-parallel"])
def test_compiled_training(tuner):
    """Compiled training is the eager one, across the boundary. A boundary compiles once more, since parts freeze or
    shrink; no step between does."""
    ends, counts = [], []
    for compile_it in (False, True):
        base = zoo.build("bert")
        inputs = many(zoo.inputs_of("bert", base))
        base.config.problem_type = "single_label_classification"  # else the first call writes it
        torch.manual_seed(4)
        model = get_peft_model(base, TUNERS[tuner].config(task_type="SEQ_CLS"))
        call = compiled(model, backend="aot_eager") if compile_it else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.base_model.set_schedule(total_steps=4, steps_per_epoch=2, optimizer=optimizer)
        model.train()
        losses = []
        for step in range(1, 5):
            loss = call(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.base_model.update_and_allocate(step)
            losses.append(loss.detach())
            counts.append(graphs())
        ends.append((torch.stack(losses), logits_of(model, inputs)))
    assert counts == [0, 0, 0, 0, 1, 1, *[len(TUNERS[tuner].phases)] * 2]
    for eager, ours in zip(*ends, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.verb("torch.compile, adapter_names=", limit="not with `fullgraph=True`, as with LoRA")
@pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured", "bottleneck-parallel"])
def test_mixed_batch(tuner):
    """Mixed batches go through a compiled model."""
    model, inputs, own = two_adapters(tuner, "bert")
    mixed = {**inputs, "adapter_names": ["default", "other", "default"] * 3}
    expected = torch.stack([own[name][row] for row, name in enumerate(mixed["adapter_names"])])
    out = logits_of(compiled(model.eval(), fullgraph=False), mixed)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    # PEFT's own `_enable_peft_forward_hooks` registers hooks inside the call, and so does ours.
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logits_of(compiled(model), mixed)


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's own calls of the compiler fail in a folder with a space")
@pytest.mark.verb("torch.compile, inference", tuners=["FAR"])
@pytest.mark.verb("torch.compile, training", tuners=["FAR"])
def test_inductor():
    """FAR has the most arithmetic of its own: a linear layer, a pair that was cut, and norms."""
    run = train("far", "bert")
    inputs, gradients = many(run.inputs), []
    for compile_it in (False, True):
        model = copy.deepcopy(run.model)
        block = model.base_model.model.bert.encoder.layer[0]
        for part in (block.attention.output, block.intermediate, block.output):
            if compile_it:
                part.compile(backend="inductor", fullgraph=True)
        torch.testing.assert_close(logits_of(model, inputs)[:3], run.logits, rtol=1e-4, atol=1e-5)
        model.train()(**inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("tuner", ["learner", "far", "nas-structured", "bottleneck-parallel"])
def test_adapter_on_compiled(tuner):
    """An adapter goes on the model that was compiled, not on what torch.compile returned: the error says so."""
    base = zoo.build("bert")
    with pytest.raises(ValueError, match=r"is compiled \(a OptimizedModule.*torch\.compile\(get_peft_model\(model"):
        get_peft_model(compiled(base), TUNERS[tuner].config(task_type="SEQ_CLS"))
    assert not hasattr(base, "peft_config")
    base.compile(backend="eager")  # in place, names and modules stay as they are
    model = get_peft_model(base, TUNERS[tuner].config(task_type="SEQ_CLS", init_weights=False))
    apart = get_peft_model(zoo.build("bert"), TUNERS[tuner].config(task_type="SEQ_CLS"))
    apart.load_state_dict(model.state_dict())
    inputs = zoo.inputs_of("bert", base)
    assert torch.equal(logits_of(model, inputs), logits_of(apart, inputs))
