"""A module of the user's own around a transformers model: what is new in it is trained whole and saved."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
import zoo
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from tuners import TUNERS
from zoo import logits_of

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig

METHODS = ["learner", "far", "nas-structured", "bottleneck-parallel"]
KINDS = {"learner": LearnerConfig, "far": FARConfig, "nas-structured": NASLoRAConfig}
KINDS["bottleneck-parallel"] = BottleneckConfig


class Net(nn.Module):
    """A BERT and a linear layer, as people write them."""

    def __init__(self, head: str = "out", seed: int = 1) -> None:
        super().__init__()
        self.bert = zoo.build("bert").bert
        torch.manual_seed(seed)
        self.head = head
        setattr(self, head, nn.Linear(16, 2))

    def forward(self, input_ids, attention_mask, labels=None):
        logits = getattr(self, self.head)(self.bert(input_ids, attention_mask).last_hidden_state[:, 0])
        return SequenceClassifierOutput(F.cross_entropy(logits, labels) if labels is not None else None, logits)


class Pair(Net):
    """Two transformers models and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.other = zoo.build("bert", seed=1).bert


class Nested(nn.Module):
    """A language model inside, and new parts at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.lm = zoo.build("llama")
        self.inner.proj = nn.Linear(16, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 2), nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 1))])


class Loose(Net):
    """A parameter that no module holds, a layer that shares the backbone's table, another name for a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.decoder = nn.Linear(16, 64)
        self.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.table = self.bert.embeddings


class Blocks(nn.Module):
    """No transformers model: blocks and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.out = nn.Linear(8, 2)


def trained(model: PeftModel, steps: int = 6) -> PeftModel:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(steps, steps // 2, optimizer=optimizer)
    model.train()
    for step in range(1, steps + 1):
        model(**zoo.inputs_of("bert", model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    return model


def warned(base: nn.Module, config) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(base, config)
    return [str(w.message) for w in caught if "peft_learners" in w.filename]


@pytest.mark.parametrize("tuner", METHODS)
@pytest.mark.parametrize("given", [None, ["out"]])
@pytest.mark.filterwarnings("ignore:.*(moved nothing|never had a gradient)")  # BERT's pooler, which Net does not use
def test_new_head(tuner, given, tmp_path):
    """The head trains whole, is in the file, and comes back over another draw of it, named or not."""
    base = Net()
    first = base.out.weight.detach().clone()
    model = trained(get_peft_model(base, TUNERS[tuner].config(modules_to_save=given)))
    assert model.peft_config["default"].modules_to_save == ["out"]
    assert not torch.equal(base.out.modules_to_save["default"].weight, first)
    assert torch.equal(base.out.original_module.weight, first)
    model.save_pretrained(tmp_path)
    logits = logits_of(model, zoo.inputs_of("bert", model))
    back = PeftModel.from_pretrained(Net(seed=2), tmp_path)
    assert torch.equal(logits_of(back, zoo.inputs_of("bert", model)), logits)


@pytest.mark.parametrize("tuner", ["learner", "far", "nas-structured", "bottleneck-sequential"])
def test_mixed_batch(tuner):
    """Rows of several adapters, each with its head. `dropout` ends like `out`, too, and is left as it was."""
    base = Net()
    torch.manual_seed(2)
    model = get_peft_model(base, TUNERS[tuner].config(init_weights=False))
    model.add_adapter("other", TUNERS[tuner].config(init_weights=False))
    assert type(base.bert.embeddings.dropout) is nn.Dropout
    inputs, names = zoo.inputs_of("bert", model), ["default", "other", "__base__"]
    rows = logits_of(model, {**inputs, "adapter_names": names})
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(rows[row], logits_of(model, inputs)[row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[2], logits_of(Net(), inputs)[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tuner", METHODS)
def test_targets_are_the_backbones(tuner):
    """An adapter is put where it is on the transformers model alone, its head and LM head told as there."""
    model = get_peft_model(Nested(), TUNERS[tuner].config())
    alone = get_peft_model(zoo.build("llama"), TUNERS[tuner].config())
    assert model.targeted_module_names == [f"inner.lm.{name}" for name in alone.targeted_module_names]
    assert sorted(model.peft_config["default"].modules_to_save) == ["heads.0", "heads.1", "inner.proj"]
    assert not alone.peft_config["default"].modules_to_save


@pytest.mark.parametrize("prefix", ["", "encoder"])
def test_own_pretrained_class(prefix):
    """A `PreTrainedModel` of one's own, with and without the backbone's name in its class."""

    class Mine(tf.PreTrainedModel):
        config_class = tf.BertConfig
        base_model_prefix = prefix

        def __init__(self, config):
            super().__init__(config)
            self.encoder, self.out = tf.BertModel(config, add_pooling_layer=False), nn.Linear(16, 2)
            self.post_init()

        def forward(self, input_ids):
            return self.out(self.encoder(input_ids).last_hidden_state[:, 0])

    config = tf.BertConfig(**zoo.SMALL, attn_implementation="eager")
    model = get_peft_model(Mine(config), LearnerConfig(r=2))
    assert model.peft_config["default"].modules_to_save == ["out"]
    assert all(name.startswith("encoder.") for name in model.targeted_module_names)


def test_task_model_inside():
    """The new head of a task model inside is new too."""
    base = nn.Module()
    base.encoder, base.extra = zoo.build("distilbert"), nn.Linear(2, 2)
    model = get_peft_model(base, LearnerConfig(r=2))
    saved = model.peft_config["default"].modules_to_save
    assert saved == ["encoder.pre_classifier", "encoder.classifier", "extra"]


@pytest.mark.parametrize("tuner", METHODS)
def test_several_models(tuner):
    """With several transformers models a warning has the call, and the call saves the head."""
    config = TUNERS[tuner].config()
    text = rf"holds 2 transformers models \(bert, other\).*{type(config).__name__}\(modules_to_save=\['out'\]\)"
    with pytest.warns(UserWarning, match=text):
        get_peft_model(Pair(), config)
    base = Pair()
    assert warned(base, TUNERS[tuner].config(modules_to_save=["out"])) == []
    assert base.out.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize("tuner", ["learner", "bottleneck-parallel"])
def test_loose_parameters(tuner):
    """What can't be copied is named; what belongs to the backbone is not."""
    found = warned(Loose(), TUNERS[tuner].config())
    assert len(found) == 1 and "frozen and unsaved: scale, decoder.bias, of no module" in found[0]


@pytest.mark.parametrize(
    "tuner,name,hit",
    [
        ("learner", "output", "bert.encoder.layer.0.attention.output"),
        ("learner", "P1", "learner_P1"),
        ("far", "rest", "far_bias_rest"),
        ("nas-structured", "delta", "nas_lora_bias_delta"),
        ("bottleneck-parallel", "up", "bottleneck_up"),
    ],
)
def test_head_of_a_taken_name(tuner, name, hit):
    """A head whose name others end in is named, with another name that is found by itself."""
    kind = KINDS[tuner].__name__
    (text,) = warned(Net(name), TUNERS[tuner].config())
    assert f"{name} is outside the pretrained model, but it stays frozen and unsaved" in text
    assert hit in text and f"(self.new_{name})" in text
    base = Net(f"new_{name}")
    assert warned(base, TUNERS[tuner].config()) == []
    assert hasattr(getattr(base, f"new_{name}"), "modules_to_save")
    assert f"{kind}(exclude_modules={name!r})" in text
    assert warned(Net(name), TUNERS[tuner].config(exclude_modules=name)) == []


@pytest.mark.parametrize("tuner", METHODS)
def test_own_containers_refused(tuner):
    """An entry that would match the adapter's own modules is refused before anything changes, with one that fits."""
    layer = {"learner": "learner_P2", "far": "far_kept", "nas-structured": "nas_lora_U"}.get(tuner, "bottleneck_down")
    name = layer.rpartition("_")[2]
    deep, kind = Net(), KINDS[tuner].__name__
    deep.heads = nn.ModuleDict({name: nn.Linear(16, 2)})
    before = dict(deep.named_modules())
    text = rf"{kind}: `modules_to_save` must match no module of the adapter's own, got '{name}'.*"
    with pytest.raises(ValueError, match=rf"{text}'{layer}'.*modules_to_save=\['heads\.{name}'\]"):
        get_peft_model(deep, TUNERS[tuner].config(modules_to_save=[name]))
    assert dict(deep.named_modules()) == before
    assert warned(deep, TUNERS[tuner].config(modules_to_save=[f"heads.{name}"])) == []
    assert deep.heads[name].modules_to_save["default"].weight.requires_grad
    with pytest.raises(ValueError, match=rf"{text}\(self\.new_{name}\), modules_to_save=\['new_{name}'\]"):
        get_peft_model(Net(name), TUNERS[tuner].config(modules_to_save=[name]))
    with pytest.raises(ValueError, match="got 'layer'.*'base_layer'.*'encoder.layer'"):
        get_peft_model(Net(), TUNERS[tuner].config(modules_to_save=["layer"]))


@pytest.mark.parametrize("tuner", METHODS)
def test_no_modules_but_parameters(tuner):
    """A tuner's layer holds no module by whose name a head may be called, as dropout and activations would be."""
    model = get_peft_model(zoo.build("bert"), TUNERS[tuner].config(task_type="SEQ_CLS"))
    prefix = TUNERS[tuner].prefix
    ends = {name.rpartition(prefix)[2] for name, _ in model.named_modules() if prefix in name.rpartition(".")[2]}
    assert ends and not any(end.endswith(word) for end in ends for word in ("out", "head", "ion", "fier", "score"))


def test_parts_of_the_users_choice():
    """What the config names, or excludes, is left to it; what was frozen by hand is named."""
    config = LearnerConfig(r=2, modules_to_save=["heads.1.1"])
    get_peft_model(Nested(), config)
    assert config.modules_to_save == ["heads.1.1", "inner.proj", "heads.0"]
    config = LearnerConfig(r=2, target_modules=["q_proj", "inner.proj"])
    assert "inner.proj" in get_peft_model(Nested(), config).targeted_module_names
    assert config.modules_to_save == ["heads.0", "heads.1"]
    base = Nested()
    base.inner.proj.requires_grad_(False)
    (text,) = warned(base, LearnerConfig(r=2))
    assert r"frozen before the adapter was added: inner.proj." in text
    assert r"LearnerConfig(exclude_modules='inner\\.proj')" in text
    base = Nested()
    base.inner.proj.requires_grad_(False)
    config = LearnerConfig(r=2, exclude_modules="inner\\.proj")
    assert warned(base, config) == [] and config.modules_to_save == ["heads.0", "heads.1"]
    assert not base.inner.proj.weight.requires_grad


def test_plain_model():
    """Without a transformers model inside, a layer behind the blocks that nothing trains is named."""
    (text,) = warned(Blocks(), BottleneckConfig(mode="parallel"))
    assert "not in the adapter's file: out of the Blocks" in text and "(modules_to_save=['out'])" in text
    assert warned(Blocks(), BottleneckConfig(mode="parallel", modules_to_save=["out"])) == []
    assert warned(Blocks(), BottleneckConfig(target_modules=["2"])) == []  # the user's choice
    assert warned(Blocks(), LearnerConfig(priming_epochs=0)) == []  # it is adapted
