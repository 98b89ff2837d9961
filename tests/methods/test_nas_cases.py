"""NAS-LoRA in odd company: files of other ranks and steps, loops that resume, modules that are not called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from searches import adam, search, searched, train
from torch import Tensor, nn
from trained import trained_once
from training import adapter_values, nas
from zoo import logits_of

from peft_learners import NASLoRAConfig, ScheduleError


def test_other_rank(tmp_path: Path):
    """A file of another rank means the same, or is refused."""
    model, _, _ = search("bert", r=4, parameter_budget=0.3)
    model.save_pretrained(tmp_path)
    inputs = zoo.inputs_of("bert", model)
    larger, smaller = nas("bert", r=8), nas("bert", r=2)
    larger.load_adapter(tmp_path, "default")
    assert torch.equal(logits_of(larger, inputs), logits_of(model, inputs))
    with pytest.raises(ValueError, match="positions of U of .* from 0 to 31, got 37"):
        smaller.load_adapter(tmp_path, "default")


class Idle(nn.Module):
    """A layer that is called, and one whose weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight.t()


@pytest.mark.parametrize("granularity", ["structured", "unstructured"])
def test_no_gradient_pruned(granularity):
    """What never had a gradient is pruned first, and named."""
    torch.manual_seed(0)
    model = get_peft_model(Idle(), NASLoRAConfig(r=2, granularity=granularity, parameter_budget=0.5))
    optimizer = adam(model)
    model.base_model.set_schedule(total_steps=8, optimizer=optimizer)
    for step in range(4):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            with pytest.warns(UserWarning, match=r"\d updates .*(U|V|bias) of read.* never had a gradient"):
                model.base_model.update_and_allocate(step + 1)
        else:
            model.base_model.update_and_allocate(step + 1)
    rows = model.base_model.architecture().rows()
    assert {row["module"] for row in rows if row["parameters"]} == {"called"}
    assert sum(row["parameters"] for row in rows) == 30


@pytest.mark.parametrize("biases", [True, False])
def test_torch_encoder_layers(biases):
    """torch's own encoder layers are called in eval too."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2).eval()
    config = NASLoRAConfig(r=2, train_biases=biases, target_modules=["linear1", "linear2"])
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = encoder(x)
        model = get_peft_model(encoder, config)
        ours = model.train()(x)
        torch.testing.assert_close(model.eval()(x), ours)
        assert not torch.allclose(ours, plain, atol=1e-3)


def test_wrapped_attributes():
    """Models read attributes of what is wrapped."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64,
             "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 10, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    model = get_peft_model(WhisperForConditionalGeneration(WhisperConfig(**small)), NASLoRAConfig(r=2))
    out = model(input_features=torch.randn(2, 8, 20), labels=torch.ones(2, 4, dtype=torch.long))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_batch_norm():
    """Batch norms are left alone."""
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 2))
    model = get_peft_model(base, NASLoRAConfig(r=0))
    assert {row["module"] for row in model.base_model.architecture().rows()} == {"0", "3"}


@pytest.mark.parametrize("saved_at", [2, 3, 4, 6, 7])
def test_resume_any_round(saved_at, tmp_path: Path):
    """A loop resumes in any round, by weights loaded into a fresh adapter, and by `from_pretrained`; with AdamW's
    state."""
    config: dict[str, Any] = {"rounds": 2, "parameter_budget": 0.1}
    inputs = zoo.inputs_of("bert", nas("bert"))

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
        model.base_model.set_schedule(total_steps=9, global_step=first, optimizer=optimizer)
        train(model, inputs, steps, optimizer, first=first)

    whole = nas("bert", **config)
    optimizer = adam(whole)
    run(whole, optimizer, 0, saved_at)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(whole, inputs, 9 - saved_at, optimizer, first=saved_at)
    loaded = nas("bert", **config)
    loaded.load_adapter(tmp_path, "default", is_trainable=True)
    from_file = PeftModel.from_pretrained(zoo.build("bert"), tmp_path, is_trainable=True)
    for again in (loaded, from_file):
        again.base_model.prepare_optimizer()
    for own in (loaded.base_model.model, from_file.base_model.model):  # the same first head, as a seed would give it
        own.classifier.original_module.load_state_dict(whole.base_model.model.classifier.original_module.state_dict())
    for again in (loaded, from_file):
        own_optimizer = torch.optim.AdamW(
            [p for p in again.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
        )
        own_optimizer.load_state_dict(copy.deepcopy(state))
        run(again, own_optimizer, saved_at, 9 - saved_at)
        expected, ours = adapter_values(whole), adapter_values(again)
        assert all(torch.equal(ours[name], value) for name, value in expected.items() if value.numel())
        assert again.base_model.architecture().kept == whole.base_model.architecture().kept


def test_earlier_step_refused(tmp_path: Path):
    """A file of an earlier step is refused."""
    model = nas("bert", rounds=2, parameter_budget=0.1)
    optimizer = adam(model)
    model.base_model.set_schedule(total_steps=9, optimizer=optimizer)
    train(model, zoo.inputs_of("bert", model), 4, optimizer)
    model.save_pretrained(tmp_path)
    again = nas("bert", rounds=2, parameter_budget=0.1)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(ScheduleError, match="saved at an earlier step"):
        again.base_model.set_schedule(total_steps=9, global_step=7)


def test_record_follows_load(tmp_path: Path):
    """The record follows what is loaded."""
    small, whole = search("bert", parameter_budget=0.2)[0], nas("bert")
    small.save_pretrained(tmp_path / "small")
    whole.save_pretrained(tmp_path / "whole")
    target = nas("bert", parameter_budget=0.2)
    config = target.peft_config["default"]
    target.load_adapter(tmp_path / "small", "default")
    assert (config.pruned_rounds, config.completed_phases, config.phases_complete) == (1, ["search"], True)
    target.load_adapter(tmp_path / "whole", "default")
    assert (config.architecture, config.completed_phases, config.phases_complete) == (None, [], False)


def test_pruned_memory():
    """What is pruned away holds no memory."""
    model, _, _ = search("bert", parameter_budget=10)
    own = searched(model)
    assert sum(p.untyped_storage().nbytes() for p in own.values()) == 4 * 10


def test_config_without_its_file(tmp_path: Path):
    """A trained adapter's config on a fresh one does not say which units are kept: told by the first forward pass that
    uses them, and right once the values are loaded."""
    run = trained_once("nas-unstructured", "bert")
    run.model.save_pretrained(tmp_path)
    config = NASLoRAConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(copy.deepcopy(run.base), config)
    with pytest.raises(ValueError, match="holds an architecture, but not which entries of bert.*from_architecture"):
        logits_of(model, run.inputs)
    with model.disable_adapter():
        logits_of(model, run.inputs)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits_of(model, run.inputs), run.logits)
