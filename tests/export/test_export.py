"""Export to plain LoRA: exact where it can be, else as near as the rank lets it come, and loaded by stock PEFT."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from console import refused
from forks import Warm
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_model
from trained import Trained
from training import adapted, far, learner, nas
from tuners import TUNERS
from verb_cases import trained
from zoo import logits_of

from peft_learners import LearnerConfig
from peft_learners.export import save_as_lora, to_lora
from peft_learners.structure.targets import rank_patterns, saved_names, target_names

FILE = "adapter_model.safetensors"
EXACT = ("learner-unprimed", "nas-unstructured", "nas-structured")


def error_of(run: Trained, folder: Path) -> float:
    """Largest difference of the logits of a loaded export, relative to the largest logit."""
    model = PeftModel.from_pretrained(copy.deepcopy(run.base), folder)
    assert isinstance(model.peft_config["default"], LoraConfig)
    return float((logits_of(model, run.inputs) - run.logits).abs().max() / run.logits.abs().max())


@pytest.mark.parametrize("arch", ["bert", "mobilebert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("tuner", EXACT)
def test_exact(tuner, arch, tmp_path: Path):
    """Unprimed Learners and NAS-LoRA are exact."""
    run = trained(tuner, arch)
    export = save_as_lora(tmp_path, run.model)
    assert export.exact and all(module.error == 0 for module in export.modules)
    assert error_of(run, tmp_path) < 1e-6


@pytest.mark.parametrize("tuner", ["learner", "far", "far-output-node", "far-discard"])
@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])  # t5: FAR's embeddings are shared by four modules
def test_full_rank(tuner, arch, tmp_path: Path):
    """Dense updates at full rank are exact to rounding."""
    run = trained(tuner, arch)
    export = save_as_lora(tmp_path, run.model, rank=1.0)
    assert not export.exact and 0 < export.worst.error < 1e-5
    assert error_of(run, tmp_path) < 5e-6


def test_factors(tmp_path: Path):
    """Factors are taken over bit for bit."""
    run = trained("learner-unprimed", "bert")
    run.model.save_pretrained(tmp_path / "own")
    save_as_lora(tmp_path / "lora", run.model)
    own, lora = load_file(tmp_path / "own" / FILE), load_file(tmp_path / "lora" / FILE)
    layers = [name.removesuffix(".learner_P1.weight") for name in own if name.endswith(".learner_P1.weight")]
    assert len(layers) == zoo.ZOO["bert"].linears
    for name in layers:
        assert torch.equal(lora[f"{name}.lora_A.weight"], own[f"{name}.learner_P1.weight"])
        # scaling=2 in tuners.py; in lora_alpha it would multiply the bias, too
        assert torch.equal(lora[f"{name}.lora_B.weight"], 2 * own[f"{name}.learner_P2.weight"])
        assert torch.equal(lora[f"{name}.lora_B.bias"], own[f"{name}.learner_bias_delta.bias"])


def test_pruned_entries(tmp_path: Path):
    """Pruned entries give the product of the sparse factors: U and V put together from the adapter's file alone, by
    hand: positions count one column after the other."""
    run = trained("nas-unstructured", "bert")
    run.model.save_pretrained(tmp_path / "own")
    save_as_lora(tmp_path / "lora", run.model)
    own, lora = load_file(tmp_path / "own" / FILE), load_file(tmp_path / "lora" / FILE)
    ranks = []
    for name in (n.removesuffix(".lora_A.weight") for n in lora if n.endswith(".lora_A.weight")):
        a, b = lora[f"{name}.lora_A.weight"].double(), lora[f"{name}.lora_B.weight"].double()
        full = {"U": np.zeros((4, len(b))), "V": np.zeros((4, a.shape[1]))}  # transposed: r=4 in tuners.py
        for part, value in full.items():
            for position, entry in zip(
                own.get(f"{name}.nas_lora_{part}_positions", torch.empty(0)).tolist(),
                own.get(f"{name}.nas_lora_{part}.weight", torch.empty(0)).tolist(),
                strict=True,
            ):
                value[position // value.shape[1], position % value.shape[1]] = entry
        np.testing.assert_allclose((b @ a).numpy(), full["U"].T @ full["V"], rtol=0, atol=1e-15)
        ranks.append(len(a))
    assert min(ranks) >= 1 and max(ranks) <= 4


def delta_by_hand(own: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """`P2 P1 + 0.5 theta` in float64 (scaling 1, priming_lr_scale=0.5 in tuners.py)."""
    part = {key: own[f"{name}.learner_{key}.weight"].double().numpy() for key in ("P1", "P2", "dense_delta")}
    return part["P2"] @ part["P1"] + 0.5 * part["dense_delta"]


@pytest.mark.parametrize("rank", [3, 0.9])
def test_nearest_rank(rank, tmp_path: Path):
    """Primed layers become the nearest update of their rank."""
    run = trained("learner", "bert")
    run.model.save_pretrained(tmp_path / "own")
    export = save_as_lora(tmp_path / "lora", run.model, rank=rank)
    own, lora = load_file(tmp_path / "own" / FILE), load_file(tmp_path / "lora" / FILE)
    primed = {m.name: m for m in export.modules if not m.exact}
    assert len(primed) == zoo.ZOO["bert"].attention
    for name, module in primed.items():
        delta = delta_by_hand(own, f"base_model.model.{name}")
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        kept = rank if isinstance(rank, int) else int(np.argmax(np.cumsum(squares) >= rank * squares.sum())) + 1
        assert module.rank == kept
        assert module.error == pytest.approx(np.sqrt(squares[kept:].sum() / squares.sum()), rel=1e-4)
        product = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
        assert np.linalg.norm(product.numpy() - delta) / np.linalg.norm(delta) == pytest.approx(module.error, rel=1e-4)
    report = json.loads((tmp_path / "lora" / "export_report.json").read_text())
    assert {m["name"]: m["error"] for m in report["modules"] if not m["exact"]} == {
        name: module.error for name, module in primed.items()
    }
    low, high = error_of(run, tmp_path / "lora"), error_of(run, _at_rank(run, 1, tmp_path))
    assert 0 < low < high


def _at_rank(run: Trained, rank: int, folder: Path) -> Path:
    save_as_lora(folder / f"rank{rank}", run.model, rank=rank)
    return folder / f"rank{rank}"


def test_rank_required():
    """Dense updates need a rank."""
    run = trained("learner", "bert")
    with pytest.raises(ValueError, match=r"8 of the 13 linear layers .* rank=64 .* rank=0.99"):
        to_lora(run.model)
    for wrong in (0, -1, 1.5, 0.0, True, "4"):
        with pytest.raises(ValueError, match="rank must be"):
            to_lora(run.model, rank=wrong)
    assert to_lora(run.model, rank=np.int64(4)).worst.rank == 4


LOADER = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_learners":
            raise ImportError("this process must do without peft_learners")
sys.meta_path.insert(0, Refuse())
import torch, zoo
from peft import PeftModel
from safetensors.torch import load_file, save_file
out = {}
for arch, folder, base in json.loads(sys.argv[1]):
    model = zoo.build(arch)
    model.load_state_dict(load_file(base))
    inputs = zoo.inputs_of(arch, model)
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        out[folder] = model(**inputs).logits
        merged = model.merge_and_unload(safe_merge=True).eval()
        out[folder + " merged"] = merged(**inputs).logits
assert "peft_learners" not in sys.modules
save_file(out, sys.argv[2])
"""


@pytest.mark.slow
def test_without_package(warm: Warm, tmp_path: Path):
    """Exports load and merge in a process without this package."""
    jobs, expected = [], {}
    for tuner, arch, rank in (
        ("learner-unprimed", "bert", None),
        ("nas-unstructured", "bert", None),
        ("nas-structured", "llama", None),
        ("learner", "distilbert", 1.0),
        ("far", "bert", 1.0),
    ):
        run = trained(tuner, arch)
        folder, base = tmp_path / tuner, tmp_path / f"{tuner}.safetensors"
        save_as_lora(folder, run.model, rank=rank)
        save_model(run.base, str(base))
        jobs.append((arch, str(folder), str(base)))
        expected[str(folder)] = run.logits
    warm.python(LOADER, json.dumps(jobs), str(tmp_path / "out.safetensors"), log=tmp_path / "log")
    found = load_file(tmp_path / "out.safetensors")
    for folder, logits in expected.items():
        torch.testing.assert_close(found[folder], logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[f"{folder} merged"], logits, rtol=1e-5, atol=1e-5)


# -- strict serving --------------------------------------------------------------------------------------------------


def test_strict_serving_refused():
    """Strict serving says what would be lost."""
    with pytest.raises(ValueError) as error:
        to_lora(trained("learner-unprimed", "bert").model, strict_serving=True)
    # 8 x 16 (attention) + 2 x 32 + 2 x 16 (FFN) + 16 (pooler) biases; 4 norms of 2 x 16, a head of 2 x 16 + 2
    assert "biases of linear layers (240 parameters in 13" in str(error.value)
    assert "what is stored whole (162 parameters in 5 modules" in str(error.value)
    assert "LearnerConfig(train_biases=False, train_norms=False)" in str(error.value)


@pytest.mark.parametrize("tuner", ["learner-unprimed", "nas-structured", "nas-unstructured"])
def test_strict_serving(tuner, tmp_path: Path):
    """Strict serving has one rank, and nothing but A and B."""
    base = zoo.build("llama")
    inputs = zoo.inputs_of("llama", base)
    settings = {"train_biases": False, **({"train_norms": False} if tuner == "learner-unprimed" else {})}
    model = get_peft_model(copy.deepcopy(base), TUNERS[tuner].config(task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(total_steps=4, steps_per_epoch=2, optimizer=optimizer)
    for step in range(1, 5):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    logits = logits_of(model, inputs)
    export = save_as_lora(tmp_path, model, strict_serving=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["modules_to_save"] or config["lora_bias"])
    scaling = 2 if tuner == "learner-unprimed" else 1  # in tuners.py
    assert config["lora_alpha"] == scaling * config["r"] and isinstance(config["target_modules"], list)
    values = load_file(tmp_path / FILE)
    assert {name.rpartition(".lora_")[2] for name in values} == {"A.weight", "B.weight"}
    assert {min(value.shape) for value in values.values()} == {config["r"]}
    assert export.exact
    again = logits_of(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs)
    torch.testing.assert_close(again, logits, rtol=1e-6, atol=1e-6)


# -- what an author may not think of ---------------------------------------------------------------------------------


def test_similar_module_names(tmp_path: Path):
    """Modules whose names end alike have ranks of their own."""

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 8))
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), inner)

    config = LearnerConfig(
        r=4, init_weights=False, priming_epochs=0, target_modules=r"0|2\.0|2\.2", rank_pattern={"^0": 2}
    )
    model, x = get_peft_model(base(), config).eval(), torch.randn(3, 8)
    export = save_as_lora(tmp_path, model)
    assert {m.name: m.rank for m in export.modules} == {"0": 2, "2.0": 4, "2.2": 4}
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(x), model(x), rtol=1e-6, atol=1e-6)


def test_half_precision_told():
    """What a half-precision base rounds away is said. Deltas of 1.5e-3 on norms of weight 1: bfloat16 has steps of
    2^-7 there, so that all of them are lost."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**zoo.SMALL, num_key_value_heads=2, max_position_embeddings=32)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(base, LearnerConfig(r=2, priming_epochs=0, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "layernorm_delta" in name:
            parameter.data.fill_(1.5e-3)
    export = to_lora(model)
    norms = [module for module in export.modules if module.kind == "whole"]
    assert len(norms) == 4 and all(module.error == pytest.approx(1, abs=1e-3) for module in norms)
    assert not export.exact and "rounded to the base model's type" in export.notes[0]


def test_torch_encoder_refused():
    """torch's encoder layers are refused where a stock LoRA has no effect."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = torch.nn.Sequential(
        torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.nn.Linear(8, 2)
    )
    adapter = get_peft_model(model, LearnerConfig(r=2, priming_epochs=0, train_norms=False, init_weights=False))
    with pytest.raises(ValueError, match="TransformerEncoderLayer.*merge_and_unload"):
        to_lora(adapter)


def test_no_overwrite(tmp_path: Path):
    """An export doesn't overwrite the adapter it is made of."""
    model = learner("bert", priming_epochs=0, init_weights=False)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match="holds an adapter of type LEARNER"):
        save_as_lora(tmp_path, model)
    assert (tmp_path / "adapter_config.json").read_text() == before
    save_as_lora(tmp_path / "lora", model)
    save_as_lora(tmp_path / "lora", model)  # an earlier export may be replaced


def test_offloaded_refused():
    """Offloaded weights are refused."""
    from accelerate import cpu_offload

    model = learner("bert", priming_epochs=0, init_weights=False)
    cpu_offload(model.base_model.model.bert, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded, or on meta"):
        to_lora(model)


def test_strict_serving_fresh():
    """Strict serving takes biases that never moved."""
    model = learner("gpt2", priming_epochs=0, train_norms=False, modules_to_save=None)
    export_of = get_peft_model(_gpt2_lm(), LearnerConfig(r=4, priming_epochs=0, task_type="CAUSAL_LM"))
    export = to_lora(export_of, strict_serving=True)  # fresh: biases and norms are there, and zero
    assert not export.config.lora_bias and not export.config.modules_to_save
    assert not any("bias" in name for name in export.state_dict)
    with pytest.raises(ValueError, match="what is stored whole"):  # a head
        to_lora(model, strict_serving=True)


def _gpt2_lm() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))


def test_biases_alone(tmp_path: Path):
    """Biases alone become zeros of rank one with a bias."""
    model = nas("bert", r=0, init_weights=False)
    inputs = zoo.inputs_of("bert", model)
    export = save_as_lora(tmp_path, model)
    low = [m for m in export.modules if m.kind == "low_rank"]
    assert len(low) == zoo.ZOO["bert"].linears and {m.rank for m in low} == {1} and all(m.bias for m in low)
    assert not any(v.any() for n, v in export.state_dict.items() if n.endswith(("lora_A.weight", "lora_B.weight")))
    again = PeftModel.from_pretrained(zoo.build("bert"), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-6, atol=1e-6)


def test_norms_alone(tmp_path: Path):
    """Norms alone get a target that changes nothing."""
    model = adapted(LearnerConfig(target_modules=["LayerNorm"], init_weights=False, task_type="SEQ_CLS"), "bert")
    inputs = zoo.inputs_of("bert", model)
    export = save_as_lora(tmp_path, model)
    assert [m.kind for m in export.modules].count("low_rank") == 1
    again = PeftModel.from_pretrained(zoo.build("bert"), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-6, atol=1e-6)


def test_some_biases(tmp_path: Path):
    """Layers without a bias stand beside layers with one. Qwen2's query, key and value have biases, its other layers
    none."""
    import transformers

    config = transformers.Qwen2Config(**zoo.SMALL, num_key_value_heads=2, max_position_embeddings=32)
    torch.manual_seed(0)
    base = transformers.Qwen2ForCausalLM(config).eval()
    inputs = zoo.inputs_of("llama", base)
    model = get_peft_model(
        copy.deepcopy(base), LearnerConfig(r=4, priming_epochs=0, init_weights=False, task_type="CAUSAL_LM")
    )
    export = save_as_lora(tmp_path, model)
    assert "PEFT can't merge" in export.notes[0]
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("verb", ["inject", "second adapter", "half precision", "in search", "in priming"])
def test_sources(verb, tmp_path: Path):
    """Other ways to have an adapter are exported too."""
    settings = {"r": 4, "priming_epochs": 0, "init_weights": False, "task_type": "SEQ_CLS"}
    base, rank, name = zoo.build("distilbert"), None, "default"
    if verb == "inject":
        model = copy.deepcopy(base)
        model.add_adapter(LearnerConfig(**settings))
    elif verb == "in search":
        model = nas("distilbert")
    elif verb == "in priming":
        model, rank = learner("distilbert", init_weights=False), 1.0
    else:
        model = get_peft_model(copy.deepcopy(base), LearnerConfig(**settings))
    if verb == "second adapter":
        model.add_adapter("other", LearnerConfig(**{**settings, "r": 3}))
        model.set_adapter("other")
        name = "other"
    elif verb == "half precision":
        base = base.to(torch.bfloat16)
        model = get_peft_model(copy.deepcopy(base), LearnerConfig(**settings))
    inputs = zoo.inputs_of("distilbert", model)
    save_as_lora(tmp_path, model, rank, adapter_name=name)
    again = PeftModel.from_pretrained(base, tmp_path)
    tolerance = 0.02 if verb == "half precision" else 1e-6
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=tolerance, atol=tolerance)


def test_wrong_adapters_refused():
    """Merged, unknown and foreign adapters are refused."""
    model = learner("bert", init_weights=False)
    with pytest.raises(ValueError, match=r"one of this package's adapters in the model \['default'\], got 'mine'"):
        to_lora(model, adapter_name="mine")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        to_lora(model, rank=4)
    lora = get_peft_model(zoo.build("bert"), LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="this package's adapters"):
        to_lora(lora)


@pytest.mark.verb(
    "convert_to_lora",
    tuners=["Learner", "FAR", "NAS-LoRA"],
    limit={"Learner": "weight updates alone; `peft_learners.export` keeps biases and norms, too"},
    no=dict.fromkeys(
        ("FAR", "NAS-LoRA"), "refused, since it would drop biases and norms; `peft_learners.export` keeps them"
    ),
)
def test_peft_convert_to_lora():
    """PEFT's `convert_to_lora` converts what it can keep, and refuses the rest. PEFT's own conversion takes weight
    updates alone: one with nothing else is exact, the others are refused."""
    model = learner(
        "llama", priming_epochs=0, train_biases=False, train_norms=False, init_weights=False, task_type="CAUSAL_LM"
    )
    config, state = convert_to_lora(model, rank=4)
    again = get_peft_model(zoo.build("llama"), config)
    again.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False)
    inputs = zoo.inputs_of("llama", model)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-5, atol=1e-5)
    for other in (learner("llama"), learner("bert"), far("bert"), nas("bert")):
        with pytest.warns(UserWarning, match=r"peft_learners.export.to_lora"), pytest.raises(TypeError):
            convert_to_lora(other, rank=4)


def test_target_names():
    """Names match the modules that are meant, and no others."""
    layers = [f"encoder.layer.{i}.{part}" for i in range(12) for part in ("query", "value", "dense")]
    assert target_names([n for n in layers if n.endswith("query")], layers) == ["query"]
    (one,) = target_names(["encoder.layer.1.query"], layers)
    assert [name for name in layers if name == one or name.endswith(f".{one}")] == ["encoder.layer.1.query"]
    assert target_names(["lin0"], ["lin0", "x.lin0", "lin1"]) == "lin0"  # as a list it would match x.lin0 too
    ranks = {"encoder.layer.1.query": 3, "encoder.layer.2.query": 4}
    assert rank_patterns(ranks, usual=4) == {"encoder.layer.1.query": 3}
    assert rank_patterns({"0": 2, "2.0": 4, "2.2": 4}, usual=4) == {"^0": 2}  # "0" would fit 2.0 too
    assert saved_names(["norm"], ["norm", "layers.0.layernorm", "head"]) == (["norm"], ["layers.0.layernorm"])


@pytest.mark.slow
def test_command_line(warm: Warm, tmp_path: Path):
    """A saved adapter with three classes, its base model in a folder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**zoo.SMALL, max_position_embeddings=32, num_labels=3)
    base = transformers.BertForSequenceClassification(config).eval()
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "other")
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LearnerConfig(r=4, init_weights=False, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    inputs = {k: v for k, v in zoo.inputs_of("bert", model).items() if k != "labels"}

    call = ["export", str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert re.match("8 of the 13 linear layers .* --rank 64 .* or --rank 0.99 ", refused(*call))
    assert "would lose biases of linear layers" in refused(*call, "--rank", "0.9", "--strict-serving")
    run = "from peft_learners_cli import main; main()"
    assert "largest error" in warm.python(run, *call, "--rank", "16", log=tmp_path / "log")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == str(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-5, atol=1e-5)


def test_far_discard_rank(tmp_path: Path):
    """Discarded FAR nodes need no more rank than is kept. With `discard_unkept`, a quarter of 32 FFN nodes is left:
    the updates of both layers have rank 8 at most."""
    run = trained("far-discard", "bert")
    export = to_lora(run.model, rank=1.0)
    ranks = {m.name: m.rank for m in export.modules if m.kind == "low_rank"}
    ffn = [name for name in ranks if name.endswith(("intermediate.dense", "output.dense")) and "attention" not in name]
    assert len(ffn) == 4 and all(ranks[name] <= 8 for name in ffn)
