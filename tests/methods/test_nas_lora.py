"""NAS-LoRA: scores, pruning to a budget, rewinding, architectures; against replays that use nothing of the package."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from searches import Record, adam, search, searched, train
from torch import Tensor, nn
from training import adapter_values, nas
from zoo import logits_of

from peft_learners import Architecture, NASLoRAConfig, ScheduleError

SPACES: dict[str, dict[str, Any]] = {
    "U-MaM": {"granularity": "unstructured"},
    "S-MaM": {"granularity": "structured"},
    "U-BitFit": {"granularity": "unstructured", "r": 0},
    "S-BitFit": {"granularity": "structured", "r": 0},
    "U-LoRA": {"granularity": "unstructured", "train_biases": False},
    "S-LoRA": {"granularity": "structured", "train_biases": False},
}


def replayed(record: Record, granularity: str, budget: int) -> set[tuple[str, str, int]]:
    """The kept units by the rule in words, in Python's own numbers, from recorded values and gradients."""
    units = []
    sizes = {key: steps[0][0].shape for key, steps in record.items()}
    for (module, part), steps in record.items():
        score = sum(-(theta.double() * gradient.double()) for theta, gradient in steps)
        assert isinstance(score, Tensor)
        if granularity == "unstructured":
            units += [
                (value, 1, (module, part, i))
                for i, value in enumerate((score.t() if score.dim() == 2 else score).flatten().tolist())
            ]
        elif part == "U":
            cost = sizes[module, "U"][0] + sizes[module, "V"][0]
            units += [(value, cost, (module, part, i)) for i, value in enumerate(score.sum(0).tolist())]
        elif part == "bias":
            units.append((score.sum().item(), score.numel(), (module, part, 0)))
    units = [unit for unit in units if unit[1] <= budget]
    units.sort()
    while sum(cost for _, cost, _ in units) > budget:
        units.pop(0)
    return {unit for _, _, unit in units}


def kept_units(model: nn.Module) -> set[tuple[str, str, int]]:
    positions = model.base_model.architecture().positions
    return {(module, part, int(i)) for module, parts in positions.items() for part, own in parts.items() for i in own}


@pytest.mark.parametrize("budget", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("space", SPACES)
def test_replay(space, budget):
    """A replay from the same gradients keeps the same set."""
    config = {"parameter_budget": budget, **SPACES[space]}
    model, record, _ = search(**config)
    parameters = math.floor(budget * model.base_model.architecture().space)
    assert kept_units(model) == replayed(record, config["granularity"], parameters)


@pytest.mark.parametrize("criterion,averaging", [("importance", "last"), ("magnitude", "last"), ("magnitude", "mean")])
def test_ablations(criterion, averaging):
    """The ablations score as they say."""
    model, record, _ = search(criterion=criterion, averaging=averaging, parameter_budget=0.3)
    if criterion == "magnitude":  # |theta| = -theta * (-sign(theta))
        record = {key: [(theta, -theta.sign()) for theta, _ in steps] for key, steps in record.items()}
    if averaging == "last":
        record = {key: steps[-1:] for key, steps in record.items()}
    parameters = math.floor(0.3 * model.base_model.architecture().space)
    assert kept_units(model) == replayed(record, "unstructured", parameters)


def test_random_pruning():
    """Random pruning follows the seed."""
    kept = [kept_units(search(criterion="random", init_seed=seed)[0]) for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("space", SPACES)
def test_budgets(space, tmp_path: Path):
    """Budgets hold, from the smallest unit to the whole space."""
    config = SPACES[space]
    structured = config["granularity"] == "structured"
    whole = nas("bert", **config).base_model.architecture()
    # BERT with 16 features, 32 hidden ones: columns cost 16 + 16 or 16 + 32, biases 16 or 32
    smallest = {"S-MaM": 16, "S-BitFit": 16, "S-LoRA": 32}.get(space, 1)
    largest = {"S-MaM": 48, "S-BitFit": 32, "S-LoRA": 48}.get(space, 1)
    for budget in (smallest, smallest + 1, whole.space // 3, whole.space - 1, whole.space):
        model, _, optimizer = search("bert", steps=2, parameter_budget=budget, **config)
        train(model, zoo.inputs_of("bert", model), 1, optimizer, first=2)
        kept = model.base_model.architecture().kept
        assert budget - largest < kept <= budget if structured else kept == budget
        head = 16 * 2 + 2
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == kept + head
        state = optimizer.state
        assert set(state) == set(trained)
        assert sum(values["exp_avg"].numel() for values in state.values()) == kept + head
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(v.numel() for v in saved.values() if v.is_floating_point()) == kept + head
        positions = sum(v.numel() for v in saved.values() if not v.is_floating_point())
        assert positions <= kept if structured else positions == kept


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rounds", [1, 2])
def test_rewind(space, rounds):
    """What is kept is rewound bit for bit, and the head too."""
    model = nas("distilbert", rounds=rounds, parameter_budget=0.3, **SPACES[space])
    before = {key: p.detach().clone() for key, p in searched(model).items()}
    head = {n: p.detach().clone() for n, p in model.named_parameters() if "modules_to_save" in n}
    optimizer = adam(model)
    model.base_model.set_schedule(total_steps=2 * (rounds + 1), optimizer=optimizer)
    inputs = zoo.inputs_of("distilbert", model)
    train(model, inputs, 2 * rounds, optimizer)
    assert not optimizer.state
    architecture = model.base_model.architecture()
    for (module, part), value in searched(model).items():
        positions = architecture.positions[module].get("U" if part == "V" and space[0] == "S" else part)
        first = before[module, part]
        if positions is None:
            assert value.numel() == 0
        elif space[0] == "U":
            assert torch.equal(value, (first.t() if part != "bias" else first).flatten()[positions.long()])
        else:
            assert torch.equal(value, first if part == "bias" else first[:, positions.long()])
    for name, parameter in model.named_parameters():
        assert name not in head or torch.equal(parameter, head[name])


@pytest.mark.parametrize("space", SPACES)
def test_retraining(space, tmp_path: Path):
    """Retraining a rewound adapter is training a fresh one of its architecture."""
    model, _, optimizer = search("distilbert", parameter_budget=0.3, **SPACES[space])
    model.save_pretrained(tmp_path)
    inputs = zoo.inputs_of("distilbert", model)
    sources = [tmp_path, model, model.base_model.architecture()]
    train(model, inputs, 3, optimizer, first=3)
    for source in sources:
        again = get_peft_model(zoo.build("distilbert"), NASLoRAConfig.from_architecture(source, task_type="SEQ_CLS"))
        again.load_state_dict({k: v for k, v in nas("distilbert").state_dict().items() if "classifier" in k}, False)
        own = adam(again)
        starts = again.base_model.set_schedule(total_steps=3, optimizer=own)
        assert [start.phase for start in starts] == ["retraining"]
        train(again, inputs, 3, own)
        ours, theirs = adapter_values(again), {k: v for k, v in adapter_values(model).items() if v.numel()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_reinitialize():
    """Fresh values are other ones of the same kind."""
    model, _, _ = search("distilbert", rewind="fresh", parameter_budget=1.0)
    first = nas("distilbert", rewind="fresh", parameter_budget=1.0)
    ours, theirs = adapter_values(model), adapter_values(first)
    for name, value in theirs.items():
        if "bias_delta" in name:
            assert not ours[name].any()
        elif "classifier" in name:
            assert torch.equal(ours[name].flatten().sort().values, value.flatten().sort().values)
            assert value.numel() < 3 or not value.any() or not torch.equal(ours[name], value)
        else:
            assert not torch.equal(ours[name].flatten(), value.flatten())
            assert 0.5 < ours[name].std() / value.std() < 2


def test_init_seed():
    """Initial values depend on the seed and the name alone."""
    torch.manual_seed(123)
    one = adapter_values(nas("distilbert", seed=3))
    torch.manual_seed(456)
    two, other = adapter_values(nas("distilbert", seed=4)), adapter_values(nas("distilbert", init_seed=1))
    names = [name for name in one if "nas_lora_U" in name]
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in names)
    assert len({one[name].sum().item() for name in names}) == len(names)


def gradients(init: str, m: int, n: int, samples: int) -> tuple[float, float]:
    """Mean squares of the entries of dU and dV, for one dW of independent entries with variance 1."""
    squares = [0.0, 0.0]
    layer_type = nn.Sequential
    for seed in range(samples):
        base = layer_type(nn.Linear(n, m))
        model = get_peft_model(base, NASLoRAConfig(r=4, init=init, init_seed=seed, target_modules=["0"]))
        layer = model.base_model.model[0]
        dw = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
        (model(torch.eye(n)) * dw.t()).sum().backward()  # y = W'^T, so that dW' is dw
        for i, container in enumerate((layer.nas_lora_U, layer.nas_lora_V)):
            squares[i] += container["default"].weight.grad.square().mean().item() / samples
    return squares[0], squares[1]


def test_kaiming_balance():
    """Squares of both factors' gradients agree under Kaiming's values, and not under LoRA's."""
    # dU = dW V: n terms of variance 1/n; dV = dW^T U: m terms of variance 1/m. Both are 1 in expectation.
    du, dv = gradients("kaiming", m=24, n=120, samples=60)
    assert du == pytest.approx(1, rel=0.05) and dv == pytest.approx(1, rel=0.05)
    du, dv = gradients("lora", m=24, n=120, samples=10)
    assert du == pytest.approx(1, rel=0.1) and dv == 0


def test_column_scores():
    """Per column the sums of U dU and V dV agree."""
    _, record, _ = search("bert", steps=2, granularity="structured")
    modules = {module for module, part in record if part == "U"}
    assert modules
    for module in modules:
        for (u, du), (v, dv) in zip(record[module, "U"], record[module, "V"], strict=True):
            torch.testing.assert_close((u * du).sum(0), (v * dv).sum(0), rtol=1e-3, atol=1e-7)


def test_roberta_large_space():
    """RoBERTa-large has the paper's search space."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    with torch.device("meta"):
        base = RobertaForSequenceClassification(config)
    head_biases = 1024 + 2  # our head is trained whole, and outside the search space
    biases = get_peft_model(copy.deepcopy(base), NASLoRAConfig.u_bitfit()).base_model.architecture()
    assert biases.space == 272_386 - head_biases
    both = get_peft_model(base, NASLoRAConfig.s_mam()).base_model.architecture()
    assert both.space == 6_563_842 - head_biases


def test_architecture(tmp_path: Path):
    """The architecture is there as data."""
    model, _, _ = search("bert", granularity="structured", parameter_budget=0.4)
    architecture = model.base_model.architecture()
    rows = architecture.rows()
    assert sum(row["parameters"] for row in rows) == architecture.kept <= architecture.budget
    assert sum(row["of"] for row in rows) == architecture.space
    assert sum(row["share"] for row in rows) == pytest.approx(architecture.kept / architecture.budget)
    low_rank = [row for row in rows if row["kind"] == "low_rank"]
    # per block: query, key, attention.output.dense, intermediate.dense, output.dense
    assert len(low_rank) == 2 * 5 and {row["of"] for row in low_rank} == {4 * 32, 4 * 48}
    assert all(row["parameters"] == row["rank"] * row["of"] // 4 for row in low_rank)
    model.save_pretrained(tmp_path)
    again = Architecture.from_pretrained(str(tmp_path))
    assert again.rows() == rows and again.settings == architecture.settings
    for module, parts in architecture.positions.items():
        for part, own in parts.items():
            assert torch.equal(again.positions[module][part], own)


def test_architecture_reused(tmp_path: Path):
    """An architecture found on one task serves another."""
    model, _, _ = search("bert", parameter_budget=200)
    torch.manual_seed(1)
    base = zoo.tf.BertForTokenClassification(zoo.build("bert").config)
    with pytest.warns(UserWarning, match="keeps something of bert.pooler.dense"):
        other = get_peft_model(base, NASLoRAConfig.from_architecture(model, task_type="TOKEN_CLS", init_seed=5))
    assert kept_units(other) == {unit for unit in kept_units(model) if unit[0] != "bert.pooler.dense"}
    with pytest.raises(ValueError, match="none of its other modules is"):
        get_peft_model(zoo.build("distilbert"), NASLoRAConfig.from_architecture(search("bert", r=0)[0]))
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        get_peft_model(zoo.build("gpt2"), NASLoRAConfig.from_architecture(model))
    between = nas("bert", rounds=2, criterion="random")
    between.base_model.set_schedule(total_steps=6, optimizer=adam(between))
    between.base_model.update_and_allocate(2)
    between.save_pretrained(tmp_path)
    for source in (nas("bert"), between):
        with pytest.raises(ValueError, match="no NAS-LoRA adapter 'default' whose search is over"):
            NASLoRAConfig.from_architecture(source)
    with pytest.raises(ValueError, match="whose search is not over"):
        NASLoRAConfig.from_architecture(tmp_path)
    with pytest.raises(TypeError, match="parameter_budget follow from the architecture"):
        NASLoRAConfig.from_architecture(model, parameter_budget=5)


def test_architecture_no_positions(tmp_path: Path):
    """A config with an architecture but no positions is refused."""
    model, _, _ = search("bert", parameter_budget=50)
    model.save_pretrained(tmp_path)
    config = NASLoRAConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    other = get_peft_model(zoo.build("bert"), config)
    with pytest.raises(ScheduleError, match="from_architecture"):
        other.base_model.set_schedule(total_steps=4)


def test_scores_saved(tmp_path: Path):
    """Scores are in the file during a search, and in none after it."""
    model = nas("bert")
    optimizer = adam(model)
    model.base_model.set_schedule(total_steps=6, optimizer=optimizer)
    inputs = zoo.inputs_of("bert", model)
    train(model, inputs, 2, optimizer)
    model.save_pretrained(tmp_path / "search")
    in_search = load_file(tmp_path / "search" / "adapter_model.safetensors")
    scores = {k: v for k, v in in_search.items() if k.endswith("_scores")}
    assert sum(v.numel() for v in scores.values()) == model.base_model.architecture().space
    for train_more in (True, False):
        again = PeftModel.from_pretrained(zoo.build("bert"), tmp_path / "search", is_trainable=train_more)
        assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
        held = [m for m in again.modules() if getattr(m, "nas_lora_scores", {})]
        assert bool(held) == train_more
    model.train()
    train(model, inputs, 2, optimizer, first=2)
    model.save_pretrained(tmp_path / "end")
    assert not [k for k in load_file(tmp_path / "end" / "adapter_model.safetensors") if k.endswith("_scores")]


@pytest.mark.parametrize("space", ["U-MaM", "S-MaM", "S-BitFit"])
def test_load_onto_other_form(space, tmp_path: Path):
    """Adapters of any form load onto those of another."""
    config = {"parameter_budget": 0.3, **SPACES[space]}
    fresh = nas("bert", **config)
    fresh.base_model.set_schedule(total_steps=2, optimizer=adam(fresh))
    inputs = zoo.inputs_of("bert", fresh)
    models = {"whole": fresh, "small": search("bert", **config)[0], "other": search("bert", steps=2, **config)[0]}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    target = nas("bert", **config)
    for name in ("small", "whole", "other", "small", "other", "whole"):
        target.load_adapter(tmp_path / name, "default")
        assert torch.equal(logits_of(target, inputs), logits_of(models[name], inputs))
        ours, theirs = target.base_model.architecture(), models[name].base_model.architecture()
        assert ours.counts == theirs.counts


def test_wrong_positions_refused(tmp_path: Path):
    """Positions outside the space are refused."""
    from safetensors.torch import save_file

    model, _, _ = search("bert", parameter_budget=50)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    name = next(key for key in values if key.endswith("bias_positions"))
    values[name][-1] = 10_000
    save_file(values, file)
    target = nas("bert")
    before = adapter_values(target)
    with pytest.raises(ValueError, match="positions of bias .* from 0 to 15, got 10000"):
        target.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, before[name]) for name, value in adapter_values(target).items())


def test_bad_values():
    """Bad input is refused, with what would be right."""
    for fields, message in (
        ({"parameter_budget": 0}, "parameter_budget. must be a whole number .* got 0"),
        ({"parameter_budget": 1.5}, "parameter_budget. must be .* fraction above 0 and at most 1, got 1.5"),
        ({"parameter_budget": -3}, "parameter_budget"),
        ({"parameter_budget": True}, "parameter_budget"),
        ({"r": 0, "train_biases": False}, "leave nothing to search"),
        ({"r": -1}, "`r` must be"),
        ({"granularity": "blocks"}, "granularity. must be one of"),
        ({"search_epochs": 1, "search_steps": 3}, "in one unit"),
        ({"search_epochs": 0}, "search_epochs"),
        ({"rounds": 0}, "rounds"),
        ({"init_seed": -1}, "init_seed"),
        ({"criterion": "gradient"}, "criterion"),
    ):
        with pytest.raises(ValueError, match=message):
            NASLoRAConfig(**fields)
    space = nas("bert").base_model.architecture().space
    with pytest.raises(ValueError, match=f"{space:,} parameters"):
        nas("bert", parameter_budget=space + 1)
    with pytest.raises(ValueError, match="none in its backbone"):
        nas("llama", r=0)
    with pytest.raises(ScheduleError, match="cheapest unit .* costs 16 "):
        nas("bert", granularity="structured", parameter_budget=15).base_model.set_schedule(total_steps=10)
    for fields, steps in (({"search_epochs": 5}, 10), ({"search_steps": 11}, 10), ({"rounds": 3}, 3)):
        with pytest.raises(ScheduleError, match=r"leaves none of the training's \d+ optimizer steps to retrain"):
            nas("bert", **fields).base_model.set_schedule(total_steps=steps, steps_per_epoch=2)
    with pytest.raises(ScheduleError, match="search_steps"):
        nas("bert").base_model.set_schedule(total_steps=None)


def test_missing_optimizer():
    """A search that no optimizer took part in is refused."""
    model = nas("bert")
    model.base_model.set_schedule(total_steps=4, optimizer=adam(model))
    with pytest.raises(ScheduleError, match="gathered no scores"):
        model.base_model.update_and_allocate(2)


def test_restart_phases(tmp_path: Path):
    """Restarted phases begin with the whole space again."""
    model, _, _ = search("bert", parameter_budget=40)
    model.save_pretrained(tmp_path)
    for again in (model, PeftModel.from_pretrained(zoo.build("bert"), tmp_path, is_trainable=True)):
        again.base_model.restart_phases()
        assert again.base_model.architecture().kept == again.base_model.architecture().space
        fresh = adapter_values(nas("bert"))
        ours = adapter_values(again)
        assert ours.keys() == fresh.keys()
        assert all(torch.equal(v, fresh[n]) for n, v in ours.items() if "classifier" not in n)
        optimizer = adam(again)
        again.base_model.set_schedule(total_steps=4, optimizer=optimizer)
        train(again, zoo.inputs_of("bert", again), 2, optimizer)
        assert again.base_model.architecture().kept == 40


def test_default_targets():
    """Default targets are all linear layers of the blocks but the values'."""
    targets = {
        "bert": {"query", "key", "attention.output.dense", "intermediate.dense", "output.dense"},
        "distilbert": {"q_lin", "k_lin", "out_lin", "lin1", "lin2"},
        "llama": {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "gpt2": {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"},
    }
    for arch, expected in targets.items():
        model = nas(arch, init_weights=True)
        modules = {r["module"] for r in model.base_model.architecture().rows() if r["kind"] == "low_rank"}
        per_block = len(modules) // 2
        assert per_block == len(expected)
        assert all(any(m.endswith(f".{e}") for e in expected) for m in modules)
