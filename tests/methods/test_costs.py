"""What an adapter adds: counted by phase before it is made, as it then trains, and told where it is too much."""

from __future__ import annotations

import warnings
from typing import Any

import psutil
import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from training import adapter_values
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from tuners import TUNERS

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig, costs, tuner
from peft_learners.config import PhasedConfig
from peft_learners.costs import PhaseCost
from peft_learners.layers.base import DeltaLayer
from peft_learners.learner import LearnerModel
from peft_learners.phases.report import in_units
from peft_learners.tuner import PhasedModel

CONFIGS: dict[str, Any] = {
    **{name: tuner.config for name, tuner in TUNERS.items()},
    "learner-ffn": lambda **settings: TUNERS["learner"].config(priming_modules="ffn", **settings),
    "nas-three-rounds": lambda **settings: NASLoRAConfig(r=4, rounds=3, parameter_budget=0.1, **settings),
    "nas-random": lambda **settings: NASLoRAConfig(r=4, criterion="random", **settings),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[PhaseCost]]:
    """What each adapter was said to cost before it was made."""
    found: list[list[PhaseCost]] = []
    monkeypatch.setattr(tuner, "warn_of_costs", lambda config, model, own: found.append(list(own)))
    return found


# -- the numbers are those of what trains -----------------------------------------------------------------------------


def in_training(model: PeftModel, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that are there for the adapter after an optimizer step, before its gradients go."""
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = sum(v.nbytes for name, v in adapter_values(model).items() if name not in trains)
    for parameter in trains.values():
        moments = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
        held += sum(value.nbytes for value in (parameter, parameter.grad, *moments))
    scores = (own for m in model.modules() for own in getattr(m, "nas_lora_scores", {}).values())
    return held + sum(value.nbytes for own in scores for value in own.values())


def in_file(model: PeftModel) -> int:
    return sum(value.nbytes for value in get_peft_model_state_dict(model).values())


def agree(said: PhaseCost, trained: int, held: int, saved: int) -> None:
    if said.at_most:
        assert trained <= said.trained and held <= said.in_training and saved <= said.file
    else:
        assert (said.trained, said.in_training, said.file) == (trained, held, saved)


@pytest.mark.parametrize("arch", ["distilbert", "llama", "mobilebert"])
@pytest.mark.parametrize("name", CONFIGS)
def test_phases_of_a_loop(name, arch, counted):
    """Parameters, bytes in training and bytes of the file are those of each phase of a real training."""
    model = get_peft_model(zoo.build(arch), CONFIGS[name](task_type=zoo.ZOO[arch].task_type)).train()
    (before,), batch, steps = counted, zoo.inputs_of(arch, model), 8
    assert before == model.base_model.costs_by_phase()
    by_phase = {cost.phase: cost for cost in before}
    assert list(by_phase) == model.peft_config["default"].phase_names
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    driven = model.base_model.set_schedule(total_steps=steps, steps_per_epoch=steps // 2, optimizer=optimizer)
    seen = []
    for step in range(1, steps + 1):
        seen += [start.phase for start in driven]
        model(**batch).loss.backward()
        optimizer.step()
        found = (
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            in_training(model, optimizer),
            in_file(model),
        )
        agree(by_phase[seen[-1]], *found)
        (now,) = (cost for cost in model.base_model.costs_by_phase() if cost.phase == seen[-1])
        assert not now.at_most
        agree(now, *found)  # known exactly by now
        optimizer.zero_grad()
        driven = model.base_model.update_and_allocate(step)
    assert seen == list(by_phase)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    """The head has the base model's type, and so has the adapter without `autocast_adapter_dtype`."""
    base = zoo.build("distilbert").to(torch.bfloat16)
    config = LearnerConfig(r=2, priming_epochs=1, task_type="SEQ_CLS")
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(total_steps=2, steps_per_epoch=1, optimizer=optimizer)
    for step, phase in enumerate(("priming", "learning"), 1):
        model(**zoo.inputs_of("distilbert", model)).loss.backward()
        optimizer.step()
        (cost,) = (cost for cost in model.base_model.costs_by_phase() if cost.phase == phase)
        assert (cost.in_training, cost.file) == (in_training(model, optimizer), in_file(model))
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)


@pytest.mark.parametrize("name", TUNERS)
def test_save_dtype(name):
    """The file's bytes follow `save_dtype`, which leaves the head alone."""
    without_scores = {"criterion": "random"} if name.startswith("nas") else {}
    config = TUNERS[name].config(save_dtype="bfloat16", task_type="SEQ_CLS", **without_scores)
    model = get_peft_model(zoo.build("distilbert"), config)
    assert model.base_model.costs_by_phase()[0].file == in_file(model)


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.parametrize("arch", [arch for arch in zoo.ZOO if arch not in ("distilbert", "llama", "mobilebert")])
def test_counted_as_made(name, arch, counted):
    """What is counted before an adapter is made is what it then has, beside another one too."""
    config = CONFIGS[name](task_type=zoo.ZOO[arch].task_type)
    model = get_peft_model(zoo.build(arch), config)
    model.add_adapter("second", TUNERS[name].config(task_type=zoo.ZOO[arch].task_type))
    first, second = counted
    assert first == model.base_model.costs_by_phase("default") == second == model.base_model.costs_by_phase("second")
    assert first[0].trained == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", ["learner", "far", "far-discard", "nas-unstructured", "nas-structured"])
def test_reloaded(name, tmp_path, counted):
    """An adapter that is loaded for more training counts as it did, in the phase that it is in."""
    model = get_peft_model(zoo.build("distilbert"), TUNERS[name].config(task_type="SEQ_CLS")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(total_steps=4, steps_per_epoch=2, optimizer=optimizer)
    for step in range(1, 5):
        model(**zoo.inputs_of("distilbert", model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path, is_trainable=True)
    assert counted[-1] == model.base_model.costs_by_phase() == loaded.base_model.costs_by_phase()
    assert counted[-1][-1].trained == loaded.get_nb_trainable_parameters()[0]


def test_architecture_used_again(counted):
    """An adapter in an architecture that was found before has one phase, of known size."""
    model = get_peft_model(zoo.build("distilbert"), NASLoRAConfig(r=4, criterion="random", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.base_model.set_schedule(total_steps=2, optimizer=optimizer)
    model.base_model.update_and_allocate(1)
    again = get_peft_model(zoo.build("distilbert", 1), NASLoRAConfig.from_architecture(model, task_type="SEQ_CLS"))
    (cost,) = counted[-1]
    assert (cost.phase, cost.trained, cost.at_most) == ("retraining", again.get_nb_trainable_parameters()[0], False)
    assert again.base_model.costs_by_phase() == [cost] and cost.file == in_file(again)


def small_llama() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
    with torch.device("meta"):
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
        return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize(
    "config",
    [
        LearnerConfig(r=4, priming_steps=1),
        LearnerConfig(r=4, priming_steps=1, priming_modules=[2]),
        LearnerConfig(r=4, priming_steps=1, after_priming="fold", fold_rank=2),
        FARConfig(priming_steps=1, selection="random"),
        NASLoRAConfig(r=4, search_steps=1, criterion="random"),
        BottleneckConfig(bottleneck_dim=4),
    ],
    ids=["learner", "learner-block", "learner-fold", "far", "nas", "bottleneck"],
)
def test_phases_on_meta(config, counted):
    """The phases of an adapter without data train what was counted."""
    model = get_peft_model(small_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    starts = model.base_model.set_schedule(total_steps=2, optimizer=optimizer)
    starts += model.base_model.update_and_allocate(1)
    assert [start.phase for start in starts] == [cost.phase for cost in counted[0]] == config.phase_names
    for start, cost in zip(starts, counted[0], strict=True):
        assert start.trained_after <= cost.trained if cost.at_most else start.trained_after == cost.trained


def test_printed(capsys):
    """PEFT's own line with the phase it is of, then one per phase of each active adapter, the present one marked."""
    model = get_peft_model(zoo.build("distilbert"), LearnerConfig(r=4, priming_steps=1, task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    line = capsys.readouterr().out.rstrip("\n") + " || in the phase 'priming'\n"
    d, h = 16, 32
    norms, biases, head = 2 * 2 * 2 * d, 2 * (5 * d + h), d * d + d + 2 * d + 2
    learning = 2 * 4 * (4 * 2 * d + 2 * (d + h)) + norms + biases + head
    priming = learning + 2 * 4 * d * d
    first = f"default, priming (now): trainable params: {priming:,} || in training: {16 * priming / 1e3:.1f} kB"
    last = f"learning: trainable params: {learning:,} || in training: {(12 * learning + 4 * priming) / 1e3:.1f} kB"
    model.base_model.print_trainable_parameters()
    file = f" || file: {4 * priming / 1e3:.1f} kB\n"
    assert capsys.readouterr().out == f"{line}{first}{file}default, {last}{file}"
    model.base_model.set_schedule(total_steps=2)
    model.base_model.update_and_allocate(1)
    model.base_model.print_trainable_parameters()
    out = capsys.readouterr().out
    assert out.startswith(f"trainable params: {learning:,} ||") and "|| in the phase 'learning'\n" in out
    assert [row.partition(": ")[0] for row in out.splitlines()] == [
        "trainable params",
        "default, priming",
        "default, learning (now)",
    ]
    nas = get_peft_model(zoo.build("distilbert"), NASLoRAConfig(r=4, parameter_budget=500, task_type="SEQ_CLS"))
    nas.base_model.print_trainable_parameters()
    assert f"default, retraining: trainable params: at most {500 + head:,} || in" in capsys.readouterr().out


# -- what is too much is told ----------------------------------------------------------------------------------------

D, FFN, KV, BLOCKS, VOCABULARY = 4096, 14336, 1024, 32, 128256
ATTENTION = BLOCKS * (2 * D * D + 2 * D * KV)
NORMS = BLOCKS * 2 * D
LOW_RANK_64 = 64 * BLOCKS * (2 * (D + D) + 2 * (D + KV) + 3 * (D + FFN))
WHOLE = ATTENTION + BLOCKS * 3 * D * FFN + NORMS + D + 2 * VOCABULARY * D


def llama_8b() -> nn.Module:
    """Llama-3.1-8B without data."""
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=FFN,
            num_hidden_layers=BLOCKS,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)


def adapted(base: nn.Module, config: Any) -> list[str]:
    """The warnings of costs when the adapter is put on the model."""
    with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
        warnings.simplefilter("always")
        get_peft_model(base, config)
    return [str(warning.message) for warning in caught if " to training, more than" in str(warning.message)]


def test_learner_on_llama():
    """A default Learner on an 8B model says what priming adds, and what lowers it."""
    (said,) = adapted(llama_8b(), LearnerConfig())
    trained = ATTENTION + LOW_RANK_64 + NORMS
    assert f"{16 * trained / 1e9:.1f}" == "24.2" and f"{4 * trained / 1e9:.2f}" == "6.04"
    assert said.startswith("LearnerConfig adds 24.2 GB to training, more than the base model's own 16.1 GB: 1,510 M")
    assert f"{trained / 1e6:,.0f}" == "1,510" and "the file has 6.04 GB" in said
    for field in ("priming_modules", "priming_epochs=0", "save_dtype"):
        assert field in said


def test_default_again():
    """A user's own object is as default on the next model as on the first; 'all-linear' names nothing."""
    config = LearnerConfig(target_modules="all-linear")
    assert len(adapted(llama_8b(), config)) == len(adapted(llama_8b(), config)) == 1


def test_far_on_llama():
    """FAR on an 8B model says that it trains all of it, and which of its fields lower that."""
    (said,) = adapted(llama_8b(), FARConfig())
    assert f"FARConfig adds {16 * WHOLE / 1e9:.0f} GB to training" in said and f"{WHOLE / 1e6:,.0f} M" in said
    assert (round(WHOLE / 1e6), round(16 * WHOLE / 1e9)) == (8030, 128)
    for field in ("train_embeddings=False", "layers_to_transform", "save_dtype", "LearnerConfig(priming_epochs=0)"):
        assert field in said


CHOSEN = [
    LearnerConfig(priming_modules=[30, 31]),
    LearnerConfig(priming_modules="attention", priming_epochs=0),
    LearnerConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    LearnerConfig(inference_mode=True),
    LearnerConfig(completed_phases=["priming"], inference_mode=True),
    NASLoRAConfig(),
    BottleneckConfig(mode="parallel"),
]


@pytest.mark.parametrize("config", CHOSEN, ids=lambda config: type(config).__name__)
def test_chosen_by_the_user(config):
    """What a user has narrowed himself, what is loaded for inference, and what costs little go without a word."""
    if isinstance(config, NASLoRAConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(llama_8b(), config)
    else:
        assert adapted(llama_8b(), config) == []


def minilm() -> nn.Module:
    """All-MiniLM-L6-v2's shapes."""
    return BertForSequenceClassification(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536))


@pytest.mark.parametrize("config", [LearnerConfig, FARConfig, NASLoRAConfig, BottleneckConfig])
@pytest.mark.parametrize("base", [lambda: DistilBertForSequenceClassification(DistilBertConfig()), minilm])
def test_small_models(base, config, monkeypatch):
    """On DistilBERT and MiniLM no default is too much, where there is memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(8 * 10**9))
    model = base()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*to training, more than")
        get_peft_model(model, config(task_type="SEQ_CLS"))


class Memory:
    def __init__(self, available: int) -> None:
        self.available = available


@pytest.mark.parametrize("name", TUNERS)
def test_more_than_is_free(name, monkeypatch, counted):
    """Anything that takes more memory than is free says so, before anything is made; what fits doesn't."""
    narrowed = {"learner": {"priming_modules": [0]}, "far": {"train_embeddings": False}}.get(name, {})
    config = TUNERS[name].config(task_type="SEQ_CLS", **narrowed)
    get_peft_model(zoo.build("distilbert"), config)
    most = max(cost.in_training for cost in counted[0])
    monkeypatch.setattr(tuner, "warn_of_costs", costs.warn_of_costs)
    base = zoo.build("distilbert")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(most - 1))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="of memory that are free"):
        warnings.filterwarnings("error", message=".*to training, more than")
        get_peft_model(base, config)
    assert not any(isinstance(module, DeltaLayer) for module in base.modules())
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(most))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*to training, more than")
        get_peft_model(zoo.build("distilbert"), config)


@pytest.mark.parametrize("primed", [True, False])
def test_phases_ahead(primed, monkeypatch, counted):
    """What is over costs nothing any more."""
    config = LearnerConfig(r=2, completed_phases=["priming"] if primed else [], task_type="SEQ_CLS")
    get_peft_model(zoo.build("distilbert"), config)
    monkeypatch.setattr(tuner, "warn_of_costs", costs.warn_of_costs)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(counted[0][1].in_training))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(zoo.build("distilbert"), config)
    assert any("of memory that are free" in str(warning.message) for warning in caught) != primed


def test_counted_without_a_rule(monkeypatch, counted):
    """A method whose config can't tell what a phase trains has at most all of the adapter in it."""
    monkeypatch.setattr(LearnerConfig, "trained_by_phase", PhasedConfig.trained_by_phase)
    monkeypatch.setattr(LearnerModel, "values_by_phase", vars(PhasedModel)["values_by_phase"])
    model = get_peft_model(zoo.build("distilbert"), LearnerConfig(r=2, task_type="SEQ_CLS"))
    every = model.get_nb_trainable_parameters()[0]
    assert [(cost.phase, cost.trained, cost.at_most) for cost in counted[0]] == [
        ("priming", every, True),
        ("learning", every, True),
    ]


def test_free_on_cuda(monkeypatch):
    """On a GPU free memory is what the device has, and what torch has reserved there and does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert costs._free_on(torch.device("cuda", 0)) == 850


def test_base_bytes():
    """The base model's bytes are its own, shared weights once, whatever adapters are on it."""
    for arch in zoo.ZOO:
        base = zoo.build(arch)
        own = sum(p.nbytes for p in base.parameters())
        assert costs.base_bytes(base) == own
        get_peft_model(base, FARConfig(task_type=zoo.ZOO[arch].task_type))
        assert costs.base_bytes(base) == own


@pytest.mark.parametrize(
    "count,text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"), (99_960, "100 kB"),
     (999_600, "1.00 MB"), (24.16e9, "24.2 GB"), (128.5e9, "128 GB"), (3e15, "3000 TB")],
)  # fmt: skip
def test_units(count, text):
    assert in_units(count) == text
