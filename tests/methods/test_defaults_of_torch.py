"""torch's default device and default type, which people set for a whole program: the adapters' values don't follow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from zoo import logits_of

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig

NAS = {"r": 4, "search_steps": 2, "parameter_budget": 0.4}
FAR = {"retention_ratio": 0.25}
CONFIGS = {
    "learner": lambda: LearnerConfig(r=4, priming_steps=2, task_type="SEQ_CLS"),
    "learner, random": lambda: LearnerConfig(r=4, priming_steps=2, init_weights=False, task_type="SEQ_CLS"),
    "far": lambda: FARConfig(priming_steps=2, **FAR, task_type="SEQ_CLS"),
    "far, drawn": lambda: FARConfig(priming_steps=0, selection="random", **FAR, task_type="SEQ_CLS"),
    "nas": lambda: NASLoRAConfig(**NAS, task_type="SEQ_CLS"),
    "nas, structured": lambda: NASLoRAConfig(**NAS, granularity="structured", task_type="SEQ_CLS"),
    "nas, drawn": lambda: NASLoRAConfig(**NAS, criterion="random", task_type="SEQ_CLS"),
    "nas, drawn anew": lambda: NASLoRAConfig(**NAS, rewind="fresh", task_type="SEQ_CLS"),
    "bottleneck": lambda: BottleneckConfig(bottleneck_dim=8, task_type="SEQ_CLS"),
}
#: "meta" stands for an accelerator: what is made there without being asked for has no values.
DEFAULTS = {"device": "meta", "float64": torch.float64, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop(
        "device_context", None
    )  # torch 2.8's get_default_device() fails on its None
    torch.set_default_dtype(torch.float32)


def run(config, default, base, again, folder) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An adapter that is made, trained through its boundary, saved and loaded under torch's defaults."""
    inputs = zoo.inputs_of("bert", base)
    torch.manual_seed(5)
    if default is not None:
        (torch.set_default_device if default == "meta" else torch.set_default_dtype)(default)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(4, 4, optimizer=optimizer)
    model.train()
    for step in range(1, 5):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(folder)
    logits = logits_of(PeftModel.from_pretrained(again, folder), inputs)
    assert torch.equal(logits, logits_of(model, inputs))
    return model.state_dict(), logits


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*(moved nothing|never had a gradient)")
def test_same_bits(name, default, tmp_path):
    """All values are those of a run without, bit for bit, in the same types and places."""
    bases = [zoo.build("bert") for _ in range(4)]
    want, logits = run(CONFIGS[name](), None, *bases[:2], tmp_path / "plain")
    found, others = run(CONFIGS[name](), DEFAULTS[default], *bases[2:], tmp_path / "set")
    assert found.keys() == want.keys() and torch.equal(others, logits)
    for key, value in want.items():
        assert found[key].dtype == value.dtype and found[key].device == value.device
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("config", [LearnerConfig, FARConfig, NASLoRAConfig, BottleneckConfig])
def test_no_numbers_taken(config):
    """Looking at a model's structure draws nothing from torch's generator: an adapter of which no value is random
    leaves it as it is."""
    base = zoo.build("bert")
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    model = get_peft_model(base, config(task_type="SEQ_CLS"))
    drawn = sum(".learner_P1." in name or ".bottleneck_down." in name for name, _ in model.named_parameters())
    assert (torch.rand(1) == first).item() == (drawn == 0)
