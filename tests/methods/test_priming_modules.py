"""What a Learner primes: a word, blocks, names or a regex, found once and saved by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zoo
from architectures import OTHERS
from peft import PeftModel, get_peft_model
from torch import nn

from peft_learners import LearnerConfig
from peft_learners.structure.attention import attention_names
from peft_learners.structure.feed_forward import feed_forwards
from peft_learners.structure.modules import linear_names


def primed_on(model: nn.Module, asked: Any, **settings: Any) -> tuple[list[str], LearnerConfig]:
    """Names of the primed layers, and the config that the adapter then has."""
    config = LearnerConfig(r=2, priming_epochs=1, **({} if asked is None else {"priming_modules": asked}), **settings)
    adapted = get_peft_model(model, config)
    ending = ".learner_dense_delta.default.weight"
    names = {name.partition(ending)[0] for name in adapted.base_model.model.state_dict() if ending in name}
    return sorted(names), adapted.peft_config["default"]


@pytest.mark.parametrize("arch", zoo.ZOO)
def test_words(arch):
    """The words stand for the attention, the feed-forward pairs and all targets; the default is the attention."""
    model = zoo.build(arch)
    every, attention = linear_names(model), attention_names(model, linear_names(model))
    pairs = [name for pair in feed_forwards(model) for name in pair.names]
    assert pairs and len(attention) == zoo.ZOO[arch].attention and not set(pairs) & set(attention)
    for asked, names in ((None, attention), ("attention", attention), ("ffn", pairs), ("all", every)):
        assert primed_on(zoo.build(arch), asked)[0] == sorted(names)


def test_words_on_distilbert():
    """The same by hand."""
    block = "distilbert.transformer.layer.1"
    ffn = [f"{block}.ffn.{name}" for name in ("lin1", "lin2")]
    attention = [f"{block}.attention.{name}_lin" for name in ("k", "out", "q", "v")]
    for asked, names in (("attention", attention), ("ffn", ffn), ("all", attention + ffn)):
        assert primed_on(zoo.build("distilbert"), asked, layers_to_transform=[1])[0] == sorted(names)


@pytest.mark.parametrize("arch", ["distilbert", "gpt2", "llama", "vit", "roberta", "mobilebert"])
def test_blocks(arch):
    """Indices stand for the attention of those blocks."""
    model = zoo.build(arch)
    attention = attention_names(model, linear_names(model))
    for asked in ([1], [0], (1, 0, 1)):
        names, config = primed_on(zoo.build(arch), asked)
        assert names == sorted(n for n in attention if any(f".{index}." in n for index in asked))
        assert len(names) == zoo.ZOO[arch].attention * len(set(asked)) // 2
        assert all(isinstance(name, str) for name in config.priming_modules)


def test_blocks_of_both_halves():
    """In an encoder and a decoder alike, and not those of the lists inside a block (T5's `layer`)."""
    names, _ = primed_on(zoo.build("t5"), [1])
    assert len(names) == 12 and all(name.startswith(("encoder.block.1.", "decoder.block.1.")) for name in names)


@pytest.mark.parametrize("asked", ["attention", "ffn", "all", [1], ["lin1"], r".*\.lin[12]"])
def test_saved_by_name(asked, tmp_path):
    """A file names what was found, and doesn't depend on how it is found again."""
    names, config = primed_on(zoo.build("distilbert"), asked)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["priming_modules"]
    assert saved not in ("attention", "ffn", "all") and all(isinstance(name, str) for name in saved)
    again = LearnerConfig.from_pretrained(tmp_path)
    assert primed_on(zoo.build("distilbert"), again.priming_modules)[0] == names


def test_loaded_elsewhere(tmp_path, monkeypatch):
    """A saved adapter is primed where it was, on a version that would find other layers."""
    model = get_peft_model(zoo.build("distilbert"), LearnerConfig(r=2, priming_epochs=1, priming_modules="ffn"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft_learners.learner.model.feed_forwards", lambda model: [])
    monkeypatch.setattr("peft_learners.learner.model.attention_names", lambda model, linears: [])
    loaded = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path)
    assert sum("learner_dense_delta" in name for name in loaded.state_dict()) == 4


@pytest.mark.parametrize("asked", ["attention", "ffn", [0]])
def test_config_reused(asked):
    """The user's own object serves the next architecture, and the first model keeps what was found."""
    config = LearnerConfig(r=2, priming_epochs=1, priming_modules=asked)
    first = get_peft_model(zoo.build("distilbert"), config)
    found = first.peft_config["default"].priming_modules
    second = get_peft_model(zoo.build("gpt2"), config)
    assert first.peft_config["default"].priming_modules == found
    assert found != second.peft_config["default"].priming_modules
    assert second.peft_config["default"].given("priming_modules") == asked


@pytest.mark.parametrize("asked", [3, None, [], "", [True], [-1], [0, "q_lin"], [0.5], {"q_lin": 1}])
def test_refused(asked):
    """What is no choice is refused by the field's check, which says what is one."""
    with pytest.raises(ValueError, match=r"`priming_modules` must be 'attention', 'ffn', 'all', a list of blocks'"):
        LearnerConfig(priming_modules=asked)


def test_blocks_that_are_not_there():
    with pytest.raises(ValueError, match=r"indices of blocks .*\(there are: from 0 to 1\), got 2\. .*'k_lin', 'lin1'"):
        primed_on(zoo.build("distilbert"), [0, 2])
    with pytest.raises(ValueError, match=r"\(there are: from 1 to 1\), got 0\."):
        primed_on(zoo.build("distilbert"), [0], layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"\(there are: none\), got 0\."):
        primed_on(zoo.build("distilbert"), [0], target_modules=["lin1"])


def test_no_feed_forward():
    """Where no pair is found, or none is targeted, the error says what to name."""
    build, config, *_ = OTHERS["mamba"]
    with pytest.raises(
        ValueError, match=r"can't be 'ffn'.*in the MambaModel\. Name the layers: .*\['dt_proj', 'in_pr"
    ):
        primed_on(build(config), "ffn", target_modules=["in_proj", "dt_proj"])
    with pytest.raises(ValueError, match=r"can't be 'ffn'.*in the DistilBert.*priming_modules=\['k_lin', 'q_lin'\]"):
        primed_on(zoo.build("distilbert"), "ffn", target_modules=["k_lin", "q_lin"])
