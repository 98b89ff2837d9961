"""The peers in `scripts/glue/train.py`: what each trains, to the unit, and that a run cut off goes on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_glue import same_numbers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from scripts.glue import data as glue_data
from scripts.glue import methods as glue_methods
from scripts.glue import train as train_glue
from scripts.glue.method_arguments import MethodArguments
from scripts.glue.methods import METHODS

NEW = ("freeze_ffns", "adalora", "shira", "prompt_tuning", "bottleneck")

# -- counts ----------------------------------------------------------------------------------------------------------

# DistilBERT with 2 labels: 6 blocks, d = 768, h = 3072.
ALL = 66_955_010
ATTENTION = 6 * 4 * 768 * 768
BIASES = 6 * (4 * 768 + 3072 + 768)
NORMS = 6 * 2 * 2 * 768
HEAD = 768 * 768 + 768 + 768 * 2 + 2
NORM_BIASES = 6 * 2 * 768 + 768  # the embeddings' too
SIZES = 6 * (4 * (768 + 768) + 2 * (768 + 3072))  # inputs and outputs of all 36 linear layers
SEQUENTIAL = 12 * (768 * 256 * 2 + 256 + 768)
PARALLEL = 6 * (768 * 512 * 2 + 512 + 768)


def distilbert() -> DistilBertForSequenceClassification:
    with torch.device("meta"):
        return DistilBertForSequenceClassification(DistilBertConfig())


def trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def total(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "method,count,parts",
    [
        ("full", 66_955_010, ALL),
        ("freeze_ffns", 14_807_810, ATTENTION + BIASES + NORMS + HEAD),
        ("bitfit", 643_586, BIASES + NORM_BIASES + HEAD),
    ],
)
def test_in_place_counts(method, count, parts):
    """What trains in place on DistilBERT."""
    model = METHODS[method](distilbert(), MethodArguments())
    assert trained(model) == count == parts
    assert total(model) == ALL


@pytest.mark.parametrize(
    "mode,count,of,adapters",
    [("sequential", 5_341_442, 71_685_890, SEQUENTIAL), ("parallel", 5_336_834, 71_681_282, PARALLEL)],
)
def test_bottleneck_counts(mode, count, of, adapters):
    """Bottleneck adapters on DistilBERT have the paper's widths."""
    model = METHODS["bottleneck"](distilbert(), MethodArguments(mode=mode))
    assert trained(model) == count == adapters + NORMS + HEAD
    assert of == ALL + adapters
    assert total(model) == of + NORMS + HEAD  # which train beside the pretrained ones


def test_prompt_counts():
    """Prompt tuning on DistilBERT trains the prompt and the head."""
    model = METHODS["prompt_tuning"](distilbert(), MethodArguments())
    assert trained(model) == 607_490 == 20 * 768 + HEAD


def test_lora_mam_heads():
    """Per block: q, k, v, out of 768 x 768, two linear layers of 768 x 3,072; MaM leaves v out and takes biases."""
    sizes = 4 * (768 + 768) + 2 * (768 + 3072)
    biases = 6 * (4 * 768 + 3072 + 768 + 2 * 768) + 768  # norms' too, and the embeddings'
    assert trained(METHODS["lora"](distilbert(), MethodArguments(r=64))) == 6 * 64 * sizes + HEAD
    assert trained(METHODS["mam"](distilbert(), MethodArguments(r=8))) == 6 * 8 * (sizes - 2 * 768) + biases + HEAD


def test_mam_roberta_count():
    """MAM on RoBERTa-large has the paper's count beside the head."""
    config = RobertaConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
    )
    with torch.device("meta"):
        base = RobertaForSequenceClassification(config)
    head_weights = 1024 * 1024 + 2 * 1024  # its biases count to the 272,386
    assert trained(METHODS["mam"](base, MethodArguments(r=8))) == 3_418_114 + head_weights


@pytest.mark.parametrize(
    "method,count,parts",
    [
        ("shira", 1_476_866, 64 * SIZES // 6 + HEAD),  # as many values per layer as LoRA would have
        ("adalora", 1_919_810, 96 * SIZES // 6 + 96 * 6 + HEAD),  # one and a half times the rank; a scale per rank
    ],
)
def test_peft_block_counts(method, count, parts):
    """Not without memory, where SHiRA can't draw, and AdaLoRA's constants seem to train."""
    config = DistilBertConfig(n_layers=1, vocab_size=8)
    model = METHODS[method](DistilBertForSequenceClassification(config), MethodArguments(r=64))
    assert trained(model) == count == parts


def test_shira_seed():
    """The seed draws SHiRA's positions."""

    def positions(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = METHODS["shira"](tiny_bert(), MethodArguments(r=4))
        layers = [module for module in model.modules() if hasattr(module, "shira_indices")]
        assert len(layers) == 6 + 1
        return layers[0].shira_indices["default"]

    assert torch.equal(positions(0), positions(0))
    assert not torch.equal(positions(0), positions(1))


def tiny_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=25,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def test_freeze_ffns_bert():
    """Freeze FFNs on BERT leaves embeddings FFNs and the pooler's weight."""
    model = METHODS["freeze_ffns"](tiny_bert(), MethodArguments())
    block, attention = "bert.encoder.layer.0", "bert.encoder.layer.0.attention"
    projections = [f"{attention}.self.{name}" for name in ("query", "key", "value")] + [f"{attention}.output.dense"]
    norms = [f"{attention}.output.LayerNorm", f"{block}.output.LayerNorm"]
    wanted = {f"{name}.{part}" for name in (*projections, *norms, "classifier") for part in ("weight", "bias")}
    wanted |= {
        f"{name}.bias" for name in (f"{block}.intermediate.dense", f"{block}.output.dense", "bert.pooler.dense")
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted


SMALL = {
    "vocab_size": 25,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}


def test_bitfit_bare_biases():
    """DeBERTa's queries and values have theirs in the attention itself; beside them output, FFN, norms, embeddings."""
    model = METHODS["bitfit"](DebertaForSequenceClassification(DebertaConfig(**SMALL)), MethodArguments())
    backbone = {name: p.numel() for name, p in model.deberta.named_parameters() if p.requires_grad}
    own = {name.rpartition(".")[2]: count for name, count in backbone.items() if not name.endswith(".bias")}
    assert own == {"q_bias": 16, "v_bias": 16}
    assert sum(backbone.values()) == 2 * 16 + (16 + 32 + 16) + 2 * 16 + 16


def test_bitfit_mam_refused():
    """BitFit needs biases and MAM the names it knows."""
    llama = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="bitfit trains biases, and the backbone of LlamaForSequenceClassification"):
        METHODS["bitfit"](llama, MethodArguments())
    for model in (llama, DebertaForSequenceClassification(DebertaConfig(**SMALL))):
        with pytest.raises(ValueError, match=r"found no query \(query or q_lin\) in (Llama|Deberta)For"):
            METHODS["mam"](model, MethodArguments())


def test_freeze_ffns_needs_an_attention():
    config = FNetConfig(vocab_size=25, hidden_size=16, num_hidden_layers=1, intermediate_size=32)
    with pytest.raises(ValueError, match="freeze_ffns trains the attention, and none was found in FNetForSequenceCla"):
        METHODS["freeze_ffns"](FNetForSequenceClassification(config), MethodArguments())


@pytest.mark.parametrize("method", ["adalora", "shira", "prompt_tuning", "bottleneck"])
@pytest.mark.parametrize(
    "name,head", [("distilbert", 16 * 16 + 16 + 34), ("roberta", 16 * 16 + 16 + 34), ("bert", 34)]
)
def test_head_whole(method, name, head):
    """The head trains whole and nothing else in it."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    base: torch.nn.Module = {
        "distilbert": lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
        ),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(num_hidden_layers=1, **small)),
        "bert": tiny_bert,
    }[name]()
    model = METHODS[method](base, MethodArguments(r=4, bottleneck_dim=8))
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n}
    assert sum(parameter.numel() for parameter in found.values()) == head
    assert all(".modules_to_save.default." in n for n in found)
    tokens = torch.arange(3, 15).view(2, 6)
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# -- runs ------------------------------------------------------------------------------------------------------------

# Tiny BERT: one block, d = 16, h = 32, a pooler, 2 labels.
TINY_SIZES = 4 * (16 + 16) + 2 * (16 + 32) + (16 + 16)
TINY_BIASES, TINY_NORMS, TINY_HEAD = 4 * 16 + 32 + 16 + 16, 2 * 2 * 16, 16 * 2 + 2
TINY = {
    "freeze_ffns": 4 * 16 * 16 + TINY_BIASES + TINY_NORMS + TINY_HEAD,
    "adalora": 6 * TINY_SIZES + 7 * 6 + TINY_HEAD,  # r=4: 6 at first, in 7 layers
    "shira": 4 * TINY_SIZES + TINY_HEAD,
    "prompt_tuning": 4 * 16 + TINY_HEAD,
    "bottleneck": 2 * (2 * 16 * 8 + 8 + 16) + TINY_NORMS + TINY_HEAD,
}
STEPS = 9  # 3 epochs of 3


@pytest.fixture
def whole(request, arguments, tmp_path):
    """A run that was not stopped, with a checkpoint after each step, and its folder."""
    method = request.param

    def run(folder: Path) -> dict:
        return train_glue.main(
            arguments(
                method=method,
                num_train_epochs=3,
                save_strategy="steps",
                save_steps=1,
                save_total_limit=STEPS,
                logging_strategy="steps",  # the Trainer forgets the losses since its last log
                logging_steps=1,
                output_dir=folder,
            )
        )

    return method, run, run(tmp_path / "whole"), tmp_path / "whole"


@pytest.mark.parametrize("whole", NEW, indirect=True)
def test_cut_off_run(whole, tmp_path):
    """A run trains its parameters and goes on exactly after it was cut off."""
    method, run, results, folder = whole
    assert results["parameters"]["trained_first_phase"] == results["parameters"]["trained_last_phase"] == TINY[method]
    if method != "freeze_ffns":  # of which the whole model is saved
        first, last = (load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, STEPS))
        same = {name for name, value in first.items() if torch.equal(value, last[name])}
        assert same == {name for name in first if "shira_indices" in name}
    # AdaLoRA: while ranks fall, when they fall for the last time, and after.
    for step in (2, 5, 7) if method == "adalora" else (4,):
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(folder, cut)
        (cut / "results.json").unlink()
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(cut / f"checkpoint-{later}")
        for name in ("adapter", "model"):
            shutil.rmtree(cut / name, ignore_errors=True)
        same_numbers(results, run(cut))
        states = [torch.load(f / f"checkpoint-{step + 1}" / "optimizer.pt")["state"] for f in (folder, cut)]
        torch.testing.assert_close(*states, rtol=0, atol=0)  # AdaLoRA's averages are in there
        (own,), (other,) = ((sorted(f.glob("*/*model.safetensors")))[-1:] for f in (folder, cut))
        saved, again = load_file(own), load_file(other)
        assert own.parent.name == other.parent.name
        assert saved.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in saved.items())


def test_freeze_ffns_moves(arguments, tmp_path):
    """Freeze FFNs changes what it trains and nothing else."""
    train_glue.main(arguments(method="freeze_ffns", save_strategy="steps", save_steps=1))
    first, last = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("checkpoint-5", "model"))
    moved = {name for name, value in last.items() if not torch.equal(value, first[name])}
    model = METHODS["freeze_ffns"](tiny_bert(), MethodArguments())
    # A key's bias shifts all scores of a query alike, so that its gradient is zero but for rounding.
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved | {"bert.encoder.layer.0.attention.self.key.bias"} == wanted


def test_virtual_tokens_take_up_positions(arguments):
    with pytest.raises(ValueError, match="--max_length must be from 1 to 28 for this model, got 29"):
        train_glue.main(arguments(method="prompt_tuning", max_length=29))


# -- AdaLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", ["adalora"], indirect=True)
def test_adalora_ranks(whole, model_dir, data_dir):
    """AdaLoRA ends with the mean rank and saves no other."""
    from peft import PeftModel

    *_, folder = whole
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    # Of 9 steps 15 % and 50 %, rounded down.
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (9, 1, 4)
    assert (config["init_r"], config["target_r"]) == (6, 4)
    scales = {k: v for k, v in load_file(folder / "adapter" / "adapter_model.safetensors").items() if "lora_E" in k}
    assert len(scales) == 7 and sum(len(value) for value in scales.values()) == 7 * 4
    assert len({len(value) for value in scales.values()}) > 1  # some layers have more, others less
    checkpoints = [load_file(folder / f"checkpoint-{n}" / "adapter_model.safetensors") for n in range(1, STEPS + 1)]
    scales_by_step = [[value for key, value in saved.items() if "lora_E" in key] for saved in checkpoints]
    assert {len(value) for values in scales_by_step for value in values} == {6}  # what is masked may come back
    # Of 7 x 6 = 42 ranks: 28 + 14 (1 - (n - 1) / 4)^3 after the warm-up of one step, rounded down.
    left = [sum(int((value != 0).sum()) for value in values) for values in scales_by_step]
    assert left == [42, 33, 29, 28, 28, 28, 28, 28, 28]

    rows = glue_data.load_glue(glue_data.TASKS["cola"], str(data_dir)).dev[""]
    inputs = AutoTokenizer.from_pretrained(model_dir)(list(rows["text"]), padding=True, return_tensors="pt")
    logits = []
    for name in ("checkpoint-9", "adapter"):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder / name).eval()(**inputs).logits)
    torch.testing.assert_close(logits[0], logits[1])


def test_adalora_needs_two_steps(arguments):
    with pytest.raises(ValueError, match="AdaLoRA needs at least 2 optimizer steps, .* got 1.*--max_steps"):
        train_glue.main(arguments(method="adalora", max_steps=1))


def test_adalora_mask_steps(arguments, tmp_path):
    """AdaLoRA masks once in two steps."""
    train_glue.main(arguments(method="adalora", max_steps=2))
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(len(value) for key, value in found.items() if "lora_E" in key) == 7 * 4


def test_methods_say_what_they_use():
    known = set(MethodArguments.__dataclass_fields__)
    assert all(set(method.arguments) <= known for method in glue_methods.METHODS.values())
