"""Bottleneck adapters: where they go, their config, and what they refuse."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from architectures import OTHERS
from bottlenecks import adapted
from console import refused
from peft import convert_to_lora, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from training import arguments, trainer
from transformers import ConvBertConfig, ConvBertModel
from zoo import logits_of

from peft_learners import BottleneckConfig
from peft_learners.export import to_lora
from peft_learners.structure.attention import attention_output_names
from peft_learners.structure.modules import linear_names

# -- places ---------------------------------------------------------------------------------------------------------

#: Output projections of attentions, counted by hand: blocks, twice for T5's and BART's decoders.
OUTPUTS = {
    "distilbert": (2, "out_lin"), "bert": (2, "attention.output.dense"), "roberta": (2, "attention.output.dense"),
    "mobilebert": (2, "attention.output.dense"), "albert": (1, "attention.dense"), "gpt2": (2, "attn.c_proj"),
    "llama": (2, "o_proj"), "t5": (6, "o"), "vit": (2, "o_proj"),
    "opt": (2, "out_proj"), "bart": (6, "out_proj"), "t5-gated": (6, "o"), "phi3-fused": (2, "o_proj"),
    "bloom": (2, "self_attention.dense"), "gptj": (2, "attn.out_proj"), "deberta": (2, "attention.output.dense"),
    "clip": (2, "out_proj"), "mamba": (0, ""),
}  # fmt: skip


@pytest.mark.parametrize("arch", list(OUTPUTS))
def test_output_projections(arch):
    """The output projections of attentions are found."""
    count, ending = OUTPUTS[arch]
    model = OTHERS[arch][0](OTHERS[arch][1]) if arch in OTHERS else zoo.build(arch)
    found = attention_output_names(model, linear_names(model))
    assert len(found) == count and all(name.endswith(f".{ending}") for name in found), found


@pytest.mark.parametrize(("arch", "mode", "count"), [
    ("bert", "sequential", 4), ("bert", "parallel", 2), ("mobilebert", "sequential", 2 + 4),
    ("mobilebert", "parallel", 4), ("t5", "sequential", 6 + 4), ("t5", "parallel", 4), ("albert", "sequential", 2),
])  # fmt: skip
def test_adapter_count(arch, mode, count):
    """There are as many adapters as attentions and networks."""
    model = adapted(arch, mode)
    assert len([n for n, _ in model.named_parameters() if n.endswith("bottleneck_up.default.weight")]) == count


def test_narrowed_places():
    """`layers_to_transform` and `exclude_modules` narrow the places."""

    def places(**settings: Any) -> set[str]:
        names = adapted("distilbert", train_norms=False, **settings).base_model.targeted_module_names
        return {name.removeprefix("distilbert.transformer.layer.") for name in names}

    assert places(mode="sequential") == {"0.attention.out_lin", "1.attention.out_lin", "0.ffn.lin2", "1.ffn.lin2"}
    assert places(mode="sequential", exclude_modules=["out_lin"], layers_to_transform=[1]) == {"1.ffn.lin2"}
    assert places(exclude_modules=["0.ffn.lin2"]) == {"1.ffn.lin2"}
    assert places(mode="sequential", target_modules=["q_lin"], layers_to_transform=[0]) == {"0.attention.q_lin"}
    assert len(places(mode="sequential", target_modules="all-linear")) == 12


def test_missing_place_told():
    """An attention or a network that isn't found is told."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"No output projection of an attention was found in the Sequential.*target"):
        assert get_peft_model(model, BottleneckConfig()).base_model.targeted_module_names == ["2"]


@pytest.mark.parametrize(("settings", "error", "said"), [
    ({"mode": "parallel", "target_modules": ["q_lin"]}, ValueError,
     r"lead out of a feed-forward network \(target_modules=\['lin2'\]\), got .*q_lin.*mode='sequential'"),
    ({"mode": "parallel", "target_modules": "all-linear"}, ValueError, r"target_modules=\['lin2'\]"),
    ({"exclude_modules": ["out_lin", "lin2"]}, NoMatchingPeftModuleError, "No attention or .* with {'exclude_modules"),
    ({"mode": "parallel", "modules_to_save": ["ffn"]}, NoMatchingPeftModuleError,
     r"No feed-forward network is left to adapt with \{'modules_to_save': \['ffn'\]\}"),
    ({"target_modules": ["word_embeddings"]}, ValueError, r"word_embeddings \(Embedding\) is not supported"),
])  # fmt: skip
def test_wrong_places(settings, error, said):
    """Wrong places are named."""
    with pytest.raises(error, match=said):
        get_peft_model(zoo.build("distilbert"), BottleneckConfig(**settings))


@pytest.mark.parametrize("given", ["dense", "output.dense"])
def test_proposed_names(given):
    """The names that an error proposes are the right ones. BERT's attentions have an `output.dense`, too."""
    with pytest.raises(ValueError, match="must name linear layers that lead out") as error:
        adapted("bert", target_modules=[given])
    found = re.search(r"\(target_modules=r'(.*?)'\)", str(error.value))
    assert found is not None
    places = adapted("bert", train_norms=False, target_modules=found[1]).base_model.targeted_module_names
    assert places == [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]


def test_nested_attention():
    """An attention within another has no output of its own. ConvBERT's `attention.self` ends in a layer that makes a
    part of what `attention.output` joins."""
    config = ConvBertConfig(**zoo.SMALL, embedding_size=16, head_ratio=1)
    model = ConvBertModel(config)
    found = attention_output_names(model, linear_names(model))
    assert "encoder.layer.0.attention.self.conv_out_layer" in linear_names(model)
    assert found == [f"encoder.layer.{i}.attention.output.dense" for i in range(config.num_hidden_layers)]


def test_norm_bias():
    """Norms have a bias delta if they have a bias."""
    for arch, count in (("llama", 0), ("distilbert", 4)):  # two blocks of two norms
        names = [name for name, _ in adapted(arch).named_parameters()]
        assert sum("bottleneck_layernorm_delta" in name for name in names) == 4
        assert sum("bottleneck_bias_delta" in name for name in names) == count


def test_no_place_refused():
    """A model without any place is refused."""
    with pytest.raises(NoMatchingPeftModuleError, match="No feed-forward network was found in the model. Name linear"):
        get_peft_model(nn.Sequential(nn.Linear(4, 2)), BottleneckConfig(mode="parallel"))


# -- the config -----------------------------------------------------------------------------------------------------


def test_paper_defaults():
    """Defaults are the papers'."""
    for mode, dim, scaling in (("sequential", 256, 1.0), ("parallel", 512, 4.0)):
        config = BottleneckConfig(mode=mode)
        assert (config.bottleneck_dim, config.scaling, config.non_linearity) == (dim, scaling, "relu")


@pytest.mark.parametrize(("settings", "said"), [
    ({"mode": "serial"}, r"`mode` must be one of \('sequential', 'parallel'\), got 'serial'"),
    ({"bottleneck_dim": 0}, "`bottleneck_dim` must be None or a whole number of at least 1, got 0"),
    ({"bottleneck_dim": 8.0}, "`bottleneck_dim` must be"),
    ({"non_linearity": "rellu"}, r"`non_linearity` must be .* got 'rellu'.*Config\(non_linearity='relu'\)"),
    ({"non_linearity": "prelu"}, "an activation without parameters .* got 'prelu'"),
    ({"non_linearity": None}, "`non_linearity` must be"),
    ({"scaling": 0}, "`scaling` must be None or a number other than 0, at most 1,000,000 in absolute value, got 0"),
    ({"scaling": float("inf")}, "`scaling` must be"),
    ({"dropout": 1.0}, r"`dropout` must be a probability in \[0, 1\), got 1.0"),
    ({"train_norms": 1}, "`train_norms` must be True or False, got 1"),
])  # fmt: skip
def test_bad_values(settings, said):
    """Bad values are named."""
    with pytest.raises(ValueError, match=said):
        BottleneckConfig(**settings)


def test_mode_defaults():
    """Defaults are those of the mode that the config was made with."""
    changed = dataclasses.replace(BottleneckConfig(), mode="parallel")
    assert (changed.bottleneck_dim, changed.scaling) == (256, 1.0)
    changed = dataclasses.replace(BottleneckConfig(), mode="parallel", bottleneck_dim=None, scaling=None)
    assert (changed.bottleneck_dim, changed.scaling) == (512, 4.0)


def test_unknown_field():
    """An unknown field is named, with the nearest."""
    with pytest.raises(TypeError, match="'bottleneck_size'. Did you mean 'bottleneck_dim'"):
        BottleneckConfig(bottleneck_size=8)


# -- what is not linear ---------------------------------------------------------------------------------------------


@pytest.mark.verb("convert_to_lora", tuners=["bottleneck"], no="refused, since no weight can hold what is not linear")
def test_no_lora_no_merge(tmp_path: Path):
    """It becomes no LoRA, and a layer isn't merged."""
    model = adapted("llama")
    inputs = zoo.inputs_of("llama", model)
    logits = logits_of(model, inputs)
    with pytest.raises(NotImplementedError, match="not linear"):
        to_lora(model, rank=4)
    with pytest.warns(UserWarning, match="not linear"), pytest.raises(TypeError, match="BottleneckLinear"):
        convert_to_lora(model, rank=4)
    assert not model.supports_lora_conversion()
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="not linear"):
            verb(adapter_names=["no such adapter"])
    for module in (
        model.base_model.model.model.layers[0].mlp.down_proj,
        model.base_model.model.model.layers[0].input_layernorm,
    ):
        with pytest.raises(NotImplementedError, match="not linear"):
            module.merge()
    model.save_pretrained(tmp_path / "adapter")
    wrong = refused("export", tmp_path / "adapter", tmp_path / "out")
    assert "can't become a LoRA adapter. A bottleneck adapter is not linear" in wrong
    assert torch.equal(logits_of(model, inputs), logits) and not (tmp_path / "out").exists()


@pytest.mark.verb(
    "add_weighted_adapter", tuners=["bottleneck"], no="refused: use the adapters together, which adds them up"
)
def test_weighted_sum_refused():
    """Weighted sums are refused, with a way out."""
    model = adapted("llama")
    model.add_adapter("two", BottleneckConfig(bottleneck_dim=3, task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match=r"not linear.*set_adapter\(\[\.\.\.\]\) adds them up"):
        model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "sum")
    assert list(model.peft_config) == ["default", "two"]


def test_callback(tmp_path: Path):
    """The callback has nothing to do: the same weights with it and without, to the bit."""
    ends = []
    for callbacks in ({}, {"callbacks": []}):
        torch.manual_seed(1)
        model = get_peft_model(zoo.build("distilbert"), BottleneckConfig(bottleneck_dim=4, task_type="SEQ_CLS"))
        run = trainer(model, arguments(tmp_path), **callbacks)
        run.train()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        if not callbacks:
            logged = {(log["phase"], log["trained_parameters"]) for log in run.state.log_history if "loss" in log}
            assert logged == {("training", model.get_nb_trainable_parameters()[0])}
            assert model.peft_config["default"].completed_phases == []
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
