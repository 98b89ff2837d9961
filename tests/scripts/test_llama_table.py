"""The tables of what adapters add to large models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_learners import FARConfig, LearnerConfig, NASLoRAConfig
from scripts.docs import llama_table

BLOCKS = 8


def small() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": BLOCKS, "vocab_size": 64}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).to(torch.bfloat16)


@pytest.mark.parametrize("name", llama_table.settings(BLOCKS))
def test_settings(name):
    """Each line's numbers are those of the parameters that train as the phases run."""
    config = llama_table.settings(BLOCKS)[name]
    counted = [cost.trained for cost in llama_table.costs_of(small(), config)]
    if isinstance(config, LoraConfig):
        model = get_peft_model(small(), config)
        assert counted == [sum(p.numel() for p in model.parameters() if p.requires_grad)]
        return
    if isinstance(config, LearnerConfig) and config.primes:
        config = replace(config, priming_steps=1)
    elif isinstance(config, FARConfig):
        config = replace(config, priming_steps=1, selection="random")
    elif isinstance(config, NASLoRAConfig):
        config = replace(config, search_steps=1, criterion="random")
    model = get_peft_model(small(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    starts = model.base_model.set_schedule(total_steps=2, optimizer=optimizer)
    starts += model.base_model.update_and_allocate(1)
    trained = [start.trained_after for start in starts]
    if isinstance(config, NASLoRAConfig):
        assert counted[0] == trained[0] and counted[1] - trained[1] in (0, 1)  # a budget of whole units
    else:
        assert counted == trained


@pytest.mark.parametrize("size,count", [("1b", 1_235_814_400), ("8b", 8_030_261_248)])
def test_shapes(size, count):
    """The models have as many parameters as Llama-3.2-1B and Llama-3.1-8B."""
    assert sum(p.numel() for p in llama_table.llama(size).parameters()) == count


@pytest.mark.slow
def test_up_to_date(tmp_path: Path):
    """The page's tables are those of the code; one that isn't is told, and mended."""
    llama_table.main(["--check"])
    shutil.copy(llama_table.PAGE, tmp_path)
    page = tmp_path / llama_table.PAGE.name
    good = page.read_text()
    page.write_text(good.replace("| 24.2 GB |", "| 23.9 GB |"))
    assert page.read_text() != good
    with pytest.raises(SystemExit, match=r"Not up to date: llm\.md\. Run: python -m scripts\.docs\.llama_table"):
        llama_table.main(["--check", "--page", str(page)])
    llama_table.main(["--page", str(page)])
    assert page.read_text() == good


def test_no_markers():
    with pytest.raises(ValueError, match=r"must hold <!-- costs:1b -->"):
        llama_table.with_table("a page")
