from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import zoo
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import peft_learners
from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.registry import methods


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
        ({"r": -3}, "`r` must be"),
        ({"r": 4.0}, "`r` must be"),
        ({"r": True}, "`r` must be"),
        ({"priming_epochs": -1}, "`priming_epochs` must be a number of at least 0"),
        ({"priming_epochs": "two"}, "`priming_epochs` must be .* got 'two'"),
        ({"priming_epochs": float("nan")}, "`priming_epochs` must be"),
        ({"priming_epochs": None}, "`priming_epochs` must be"),
        ({"priming_steps": -1}, "`priming_steps` must be"),
        ({"priming_steps": 1.5}, "`priming_steps` must be"),
        ({"priming_lr_scale": 0}, "`priming_lr_scale` must be a number above 0"),
        ({"priming_modules": 3}, "`priming_modules` must be"),
        ({"rank_pattern": {"q_lin": 0}}, "`rank_pattern` must be a dict of ranks"),
        ({"learner_dropout": 1.0}, r"`learner_dropout` must be a probability in \[0, 1\)"),
        ({"scaling": 0}, "`scaling` must be"),
        ({"train_biases": "yes"}, "`train_biases` must be True or False"),
        ({"save_dtype": "int8"}, "`save_dtype` must be None or one of"),
        ({"target_modules": 3}, "`target_modules` must be"),
        ({"layers_to_transform": -1}, "`layers_to_transform` must be"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
        ({"layers_pattern": "layer"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_bad_values(settings, words):
    """Bad values are named."""
    with pytest.raises(ValueError, match=words):
        LearnerConfig(**settings)


def test_unknown_fields():
    """Unknown fields are named, with the nearest."""
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'primming_epochs'\. Did you mean 'priming_epochs'"
    ):
        LearnerConfig(primming_epochs=2)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'\. It has: .*priming_epochs"):
        LearnerConfig(zzz=2)


FIELDS_OF_OTHERS = [
    (LearnerConfig, "lora_alpha", "Here it is `scaling`: scaling = lora_alpha / r."),
    (LearnerConfig, "lora_dropout", "Here it is `learner_dropout`."),
    (LearnerConfig, "use_dora", "It is a field of PEFT's LoraConfig, and LearnerConfig has none like it"),
    (LearnerConfig, "deltaT", "It is a field of PEFT's AdaLoraConfig, and"),
    (FARConfig, "lora_alpha", "FAR trains whole weights, not low-rank updates"),
    (NASLoRAConfig, "target_r", "Here it is `parameter_budget`"),
    (BottleneckConfig, "r", "Here it is `bottleneck_dim`."),
]


@pytest.mark.parametrize("config,name,words", FIELDS_OF_OTHERS)
def test_fields_of_other_methods(config, name, words):
    """A field of another PEFT method gets one line: what it is called here."""
    with pytest.raises(TypeError) as error:
        config(**{name: 1})
    assert f"unexpected keyword argument {name!r}. {words}" in str(error.value)
    assert len(str(error.value)) < 250  # no list of all fields


def test_lora_alpha_as_scaling():
    """`scaling = lora_alpha / r` is LoRA's update: the same factors give the same weight."""
    base = torch.nn.Sequential(torch.nn.Linear(6, 5))
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    config = LearnerConfig(r=2, scaling=3 / 2, target_modules=["0"], priming_epochs=0)
    ours = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for theirs, own in (("lora_A", "learner_P1"), ("lora_B", "learner_P2")):
            values = torch.randn_like(getattr(lora.base_model.model[0], theirs)["default"].weight)
            getattr(lora.base_model.model[0], theirs)["default"].weight.copy_(values)
            getattr(ours.base_model.model[0], own)["default"].weight.copy_(values)
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), lora(x))


def test_elsewhere():
    """What a config says of others' fields is about fields that it has not, and names some that it has."""
    for config in methods().values():
        own = {field.name for field in dataclasses.fields(config)}
        assert not own & set(config.elsewhere)
        assert all(set(re.findall(r"`(\w+)`", text)) <= own for text in config.elsewhere.values())


def test_public_names():
    """`dir()` shows what is imported late, too, and all that it shows is there."""
    assert {"PhaseCallback", "get_phased_scheduler", "LearnerConfig"} <= set(dir(peft_learners))
    assert all(hasattr(peft_learners, name) for name in dir(peft_learners))


def test_newer_version(tmp_path: Path):
    """A config of a newer version loads with a warning."""
    LearnerConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "field_of_the_future": 1}))
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


def test_round_trips(tmp_path: Path):
    config = LearnerConfig(
        r=3, priming_epochs=0.5, target_modules=["b", "a"], rank_pattern={"a": 2}, layers_to_transform=[1],
        completed_phases=["priming"], phase_first_steps={"priming": 0, "learning": 9}, save_dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LearnerConfig) and again.peft_type.value == "LEARNER"
    again.target_modules = set(again.target_modules)
    assert again == config
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)


def test_pickle_live_config():
    """The config of a live model is pickled."""
    model = get_peft_model(zoo.build("distilbert"), LearnerConfig(r=2, task_type="SEQ_CLS"))
    config = model.peft_config["default"]
    assert pickle.loads(pickle.dumps(config)) == config


def test_config_reused():
    """A config isn't changed for the next architecture."""
    config = LearnerConfig(r=2)
    first = get_peft_model(zoo.build("distilbert"), config)
    second = get_peft_model(zoo.build("gpt2"), config)
    assert "q_lin" in first.peft_config["default"].target_modules
    assert "c_attn" in second.peft_config["default"].target_modules
    assert first.peft_config["default"].priming_modules == ["k_lin", "out_lin", "q_lin", "v_lin"]


@pytest.mark.parametrize("over", [False, True])
def test_config_shared(over):
    """One config object serves two adapters of one model; once a phase of the first is over, the second is a clone."""
    config = LearnerConfig(r=2, priming_epochs=1)
    model = get_peft_model(zoo.build("distilbert"), config)
    model.base_model.set_schedule(4, 2)
    model.base_model.update_and_allocate(2 if over else 1)
    model.add_adapter("second", config)
    assert model.peft_config["default"] is not model.peft_config["second"]
    assert [own.completed_phases for own in model.peft_config.values()] == 2 * [["priming"] if over else []]
    first_steps = [own.phase_first_steps for own in model.peft_config.values()]
    assert first_steps == [{"priming": 0, "learning": 2}, {"priming": 0, "learning": 2} if over else None]


# -- told at injection ------------------------------------------------------------------------------------------------


def learner(model: nn.Module | None = None, **settings) -> PeftModel:
    return get_peft_model(model or zoo.build("distilbert"), LearnerConfig(**{"r": 2, **settings}))


@pytest.mark.parametrize("settings", [{}, {"train_norms": False}])
def test_unmatched_targets(settings):
    """Target names that match nothing are told."""
    with pytest.raises(
        ValueError, match=r"\{'nothing_like_it'\} not found in the base model\. Its linear layers are named k_lin, "
    ):
        learner(target_modules=["nothing_like_it"], **settings)


def test_unmatched_target_told():
    """One of several target names that matches nothing is told."""
    with pytest.warns(UserWarning, match=r"target_modules=\['query'\] match no module"):
        learner(target_modules=["q_lin", "query"])


def test_unsupported_targets():
    with pytest.raises(ValueError, match=r"word_embeddings \(Embedding\) is not supported"):
        learner(target_modules=["word_embeddings"])

    class WithMHA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)
            self.lin = nn.Linear(8, 8)

    with pytest.raises(ValueError, match="inside a torch.nn.MultiheadAttention"):
        learner(WithMHA(), target_modules=["out_proj"])
    assert learner(WithMHA(), target_modules="all-linear").base_model.targeted_module_names == ["lin"]


@pytest.mark.parametrize("modules", [["lin1"], ["q_lin", "nowhere"], "classifier", ["attention"]])
def test_priming_outside_targets(modules):
    """Priming modules outside the targets are refused."""
    with pytest.raises(ValueError, match="`priming_modules` must name linear layers among the targets, got '"):
        learner(target_modules=["q_lin", "v_lin"], priming_modules=modules)


def test_priming_modules():
    """Priming modules are given by name and by regex."""
    for asked in (["lin1"], r".*\.ffn\.lin1"):
        model = learner(priming_modules=asked)
        primed = [n for n, _ in model.named_parameters() if "learner_dense_delta" in n]
        assert len(primed) == 2 and all(".lin1." in n for n in primed)


def test_priming_not_floating():
    """Priming on weights that aren't floating point is refused."""

    class Int8Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 8
            self.weight = nn.Parameter(torch.randint(-9, 9, (8, 8), dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.to(x.dtype).t()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = Int8Linear(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.v(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x)

    with pytest.raises(ValueError, match=r"priming_epochs=2 adds a dense delta to attention.q, whose weights are not "
                                         r"a floating-point matrix \(got torch.int8\).*priming_epochs=0"):  # fmt: skip
        learner(Model())
    # low rank and biases do work there, and merging says what it can't do
    torch.manual_seed(0)
    base, x = Model(), torch.randn(3, 8)
    expected = base(x)
    model = learner(base, priming_epochs=0)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model.base_model.model.attention.q.learner_P2["default"].weight.grad.any()
    with pytest.raises(ValueError, match="stores torch.int8 values"):
        model.merge_adapter()


def test_narrowed_targets():
    """`layers_to_transform` and `exclude_modules` narrow what is found."""
    model = learner(layers_to_transform=[1])
    assert {n.split(".")[3] for n in model.base_model.targeted_module_names} == {"1"}
    assert len(model.base_model.targeted_module_names) == 8  # 6 linears, 2 norms
    model = learner(exclude_modules=["lin1", "sa_layer_norm"])
    names = {n.rpartition(".")[2] for n in model.base_model.targeted_module_names}
    assert names == {"q_lin", "k_lin", "v_lin", "out_lin", "lin2", "output_layer_norm"}


def test_rank_pattern():
    """`rank_pattern`, dropout and the switches do what they say."""
    model = learner(rank_pattern={"lin1": 5}, learner_dropout=0.5, train_biases=False, train_norms=False, scaling=3.0)
    names = [n for n, _ in model.named_parameters()]
    assert not [n for n in names if "learner_bias_delta" in n or "learner_layernorm_delta" in n]
    ffn = model.base_model.model.distilbert.transformer.layer[0].ffn
    assert ffn.lin1.learner_P1["default"].weight.shape == (5, 16) and ffn.lin2.learner_P1["default"].weight.shape == (
        2,
        32,
    )
    x = torch.randn(4, 16)
    with torch.no_grad():
        ffn.lin1.learner_P2["default"].weight.normal_()
    low = x @ ffn.lin1.learner_P1["default"].weight.t() @ ffn.lin1.learner_P2["default"].weight.t()
    model.eval()
    torch.testing.assert_close(ffn.lin1(x), ffn.lin1.base_layer(x) + 3.0 * low)
    model.train()
    assert not torch.allclose(ffn.lin1(x), ffn.lin1(x))


def test_pooler():
    """A bare backbone leaves its pooler out, and a task model doesn't."""
    import transformers as tf

    bare = tf.BertModel(tf.BertConfig(**zoo.SMALL))
    assert not [n for n in learner(bare).base_model.targeted_module_names if "pooler" in n]
    assert [n for n in learner(zoo.build("bert")).base_model.targeted_module_names if "pooler" in n]


def test_head_beside_backbone():
    """The head of a task model that holds its backbone directly is found."""
    import transformers as tf

    config = tf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10, classifier_proj_size=8,
    )  # fmt: skip
    model = learner(tf.WhisperForAudioClassification(config))
    assert set(model.peft_config["default"].modules_to_save) == {"projector", "classifier"}
    assert all(name.startswith("encoder.layers.") for name in model.base_model.targeted_module_names)


@pytest.mark.parametrize(("name", "better"), [("items", "items_1"), ("update", "update_1"), ("v1.2", "v1_2")])
def test_adapter_names(name, better):
    """Adapter names that torch's containers can't hold are refused."""
    with pytest.raises(ValueError, match=f"got '{name}'. Take another: '{better}'"):
        get_peft_model(zoo.build("bert"), LearnerConfig(r=2), name)
