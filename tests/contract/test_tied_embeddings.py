"""Language models whose output embeddings are their input embeddings."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import PeftModel, get_peft_model
from tuners import TUNERS, refuses_to_merge
from zoo import logits_of

SMALL = {**zoo.SMALL, "num_hidden_layers": 1}
EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "t5": "shared"}
one_of_each = pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured"])


def build(arch: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model: Any
    if arch == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    elif arch == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, max_position_embeddings=32, tie_word_embeddings=True))
    else:
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
        )
    return model.eval(), zoo.inputs_of("t5", model)


def adapted(tuner: str, arch: str, **settings: Any) -> tuple[PeftModel, torch.nn.Module, dict[str, torch.Tensor]]:
    """A model whose adapter (and what it saves whole) changes the function, its base, inputs."""
    base, inputs = build(arch)
    original = copy.deepcopy(base)
    torch.manual_seed(1)
    task = "SEQ_2_SEQ_LM" if arch == "t5" else "CAUSAL_LM"
    model = get_peft_model(base, TUNERS[tuner].config(init_weights=False, task_type=task, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    assert not torch.allclose(logits_of(model, inputs), logits_of(original, inputs), atol=1e-3)
    return model, original, inputs


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def same(model: torch.nn.Module, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> bool:
    return bool((logits_of(model, inputs) - logits).abs().max() <= 1e-5 * logits.abs().max())


@pytest.mark.verb("tied embeddings")
@pytest.mark.parametrize("arch", list(EMBEDDINGS))
@pytest.mark.parametrize("tuner", list(TUNERS))
def test_tie_holds(tuner, arch, tmp_path: Path):
    """The tie holds."""
    model, original, inputs = adapted(tuner, arch)
    logits = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), logits)
    back = again.unload()
    assert is_tied(back)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in back.state_dict().items())

    if refuses_to_merge(tuner, model):
        return
    model.merge_adapter()
    assert same(model, inputs, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layers of one weight are unmerged together, with no word about it
        model.unmerge_adapter()
    assert same(model, inputs, logits)
    merged = model.merge_and_unload()
    assert is_tied(merged) and merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    assert same(type(merged).from_pretrained(tmp_path / "merged"), inputs, logits)


@pytest.mark.verb(
    "tied embeddings",
    limit="one of the two in `modules_to_save` is trained as a copy: merging unties them, as with LoRA; without "
    "`ensure_weight_tying`",
)
@pytest.mark.parametrize("which", ["output", "input"])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@one_of_each
def test_modules_to_save_copy(tuner, arch, which, tmp_path: Path):
    """One of the two in `modules_to_save` is a copy."""
    name = "lm_head" if which == "output" else EMBEDDINGS[arch]
    model, original, inputs = adapted(tuner, arch, modules_to_save=[name])
    logits = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "adapter")
    assert torch.equal(logits_of(again, inputs), logits)
    assert is_tied(again.unload())
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    assert not is_tied(merged) and not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    assert same(type(merged).from_pretrained(tmp_path / "merged"), inputs, logits)


@pytest.mark.verb(
    "tied embeddings",
    limit={
        "Learner": "with `target_modules=['lm_head']` merging is refused, since it would change the input embeddings",
        "NAS-LoRA": "with `target_modules=['lm_head']` merging is refused, since it would change the input embeddings",
    },
)
@pytest.mark.parametrize("arch", list(EMBEDDINGS))
@one_of_each
def test_lm_head_merge_refused(tuner, arch, tmp_path: Path):
    """An adapted LM head isn't merged into the input embeddings."""
    model, original, inputs = adapted(tuner, arch, target_modules=["lm_head"])
    logits = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    assert torch.equal(logits_of(again, inputs), logits)
    if tuner == "far":  # whose one delta is that of the embeddings too
        assert same(model.merge_and_unload(), inputs, logits)
        return
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"lm_head shares its weight with .*exclude_modules=\['lm_head'\]"):
            merge()
    assert torch.equal(logits_of(model, inputs), logits)  # nothing was merged
