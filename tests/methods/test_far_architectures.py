"""FAR on architectures with something odd: weights read without calling their layer, tied to layers of another kind,
kept frozen by the model itself, modules called without arguments, weight norm."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo
from peft import PeftModel, get_peft_model
from torch import nn
from training import arguments, far, trainer
from zoo import logits_of

from peft_learners import FARConfig

SMALL = {**zoo.SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**zoo.SMALL, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "pad_token_id": 0,
           "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout": 0.0}  # fmt: skip


def rows() -> torch.Tensor:
    return torch.randint(3, 60, (3, 17), generator=torch.Generator().manual_seed(1))


def tokens(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"input_ids": rows(), "labels": rows()}


def speech(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(3, 80, 16), "labels": rows()}


def images(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    # rel_embeddings.weight is read
    "deberta-v2": (lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(
        **SMALL, relative_attention=True, max_relative_positions=8, pos_att_type=["p2c", "c2p"])), tokens),
    # the LM head's weights and bias are read, one of them tied to the embeddings
    "mobilebert": (lambda: tf.MobileBertForMaskedLM(tf.MobileBertConfig(
        **SMALL, embedding_size=8, true_hidden_size=16, intra_bottleneck_size=16)), tokens),
    # the embeddings are scaled (a subclass of nn.Embedding) and tied to the LM head
    "gemma": (lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA, pad_token_id=0)), tokens),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ, scale_embedding=True)), tokens),
    # sinusoidal positions, frozen by the model
    "pegasus": (lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**SEQ2SEQ)), tokens),
    "whisper": (lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=80, max_source_positions=8)), speech),
    # relative positions are a module without arguments
    "swin": (lambda: tf.SwinForImageClassification(tf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, drop_path_rate=0.0,
    )), images),
    "bert-mlm": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)), tokens),
}  # fmt: skip
#: Parameters that the model itself keeps frozen.
FROZEN = {"pegasus": 2 * 1024 * 16, "whisper": 8 * 16}


@pytest.mark.parametrize("arch", list(CASES))
def test_trains_everything(arch, tmp_path: Path):
    """FAR trains what full fine-tuning trains, and merges to it."""
    build, make_inputs = CASES[arch]
    torch.manual_seed(0)
    base = build().eval()
    inputs = make_inputs(base)
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    assert sum(p.numel() for p in base.parameters()) - trained == FROZEN.get(arch, 0)
    reference = copy.deepcopy(base)
    reference(**inputs).loss.backward()
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, FARConfig(retention_ratio=0.25, priming_steps=2))
    assert model.get_nb_trainable_parameters()[0] == trained
    model(**inputs).loss.backward()
    for module_name, layer in model.base_model.model.named_modules():
        for part in getattr(layer, "far_names", {}).get("default", {}):
            if part in layer.far_source["default"]:
                continue
            gradient = layer._by_parameter(part, "default", layer.leaf(part, "default").parameter.grad)
            for name, value in gradient.items():
                expected = reference.get_parameter(f"{module_name}.{name}").grad
                expected = torch.zeros_like(value) if expected is None else expected
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=f"{module_name}.{name}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base_model.set_schedule(total_steps=5, optimizer=optimizer)
    for step in range(1, 5):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    logits = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    assert torch.equal(logits_of(again, inputs), logits)
    again.add_adapter("other", FARConfig(init_weights=False))  # the frozen parameters are known for it too
    assert torch.equal(logits_of(copy.deepcopy(again), inputs), logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), logits, rtol=1e-4, atol=1e-4)
    assert not [name for name in vars(merged) if "learners" in name]


def test_weight_norm_copy():
    """Convolutions with weight norm survive a copy."""
    config = tf.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = get_peft_model(tf.Wav2Vec2ForSequenceClassification(config), FARConfig(init_weights=False)).eval()
    inputs = {"input_values": torch.randn(2, 800)}
    assert torch.equal(logits_of(copy.deepcopy(model), inputs), logits_of(model, inputs))


def test_requires_grad_flags(tmp_path: Path):
    """What an adapter holds doesn't depend on the flags of the moment. As with PEFT's tuners the user's flags are
    ignored, which is told. PEFT leaves a model frozen at unloading."""
    base = zoo.build("distilbert")
    total = sum(p.numel() for p in base.parameters())
    base.distilbert.embeddings.requires_grad_(False)
    with pytest.warns(UserWarning, match="first: distilbert.embeddings.word_embeddings.weight.*exclude_modules"):
        model = get_peft_model(base, FARConfig(init_weights=False))
    assert model.get_nb_trainable_parameters()[0] == total
    model.save_pretrained(tmp_path)
    inputs = zoo.inputs_of("distilbert", model)
    for frozen in (False, True):
        other = zoo.build("distilbert").requires_grad_(not frozen)
        assert torch.equal(logits_of(PeftModel.from_pretrained(other, tmp_path), inputs), logits_of(model, inputs))
    back = model.unload()
    assert get_peft_model(back, FARConfig()).get_nb_trainable_parameters()[0] == total


def two_adapters(arch: str) -> tuple[nn.Module, dict, dict[str, torch.Tensor]]:
    build, make_inputs = CASES[arch]
    torch.manual_seed(0)
    model = get_peft_model(build().eval(), FARConfig(init_weights=False))
    model.add_adapter("other", FARConfig(init_weights=False))
    inputs, logits = make_inputs(model), {}
    for name in ("other", "default"):
        model.set_adapter(name)
        logits[name] = logits_of(model, inputs)
    return model, inputs, logits


@pytest.mark.parametrize("arch", ["mobilebert", "deberta-v2", "gemma"])
def test_read_weights(arch):
    """Weights that are read follow disabling and merging."""
    build, _ = CASES[arch]
    torch.manual_seed(0)
    base = build().eval()
    model, inputs, logits = two_adapters(arch)
    expected = logits_of(base, inputs)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, inputs), logits["default"], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():  # PEFT unmerges here
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model, inputs), logits["default"], rtol=1e-4, atol=1e-4)
    model.set_adapter("other")
    torch.testing.assert_close(logits_of(model, inputs), logits["other"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["mobilebert", "deberta-v2"])
def test_read_weights_mixed_batch(arch):
    """Weights that are read are refused in mixed batches."""
    model, inputs, _ = two_adapters(arch)
    with pytest.raises(ValueError, match="can't give each row its own"):
        model(**inputs, adapter_names=["default", "other", "__base__"])


def test_torch_encoder_layers():
    """torch's own encoder layers follow the adapter. Their fast path, in eval mode, reads weights without calling the
    layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)

    torch.manual_seed(0)
    model, x = get_peft_model(Net(), FARConfig(init_weights=False)), torch.randn(2, 5, 16)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=1e-5, atol=1e-5)


def test_other_ratio_refused(tmp_path: Path):
    """A file of another ratio is refused, and the adapter stays uncut."""
    cut = far(retention_ratio=0.25)
    trainer(cut, arguments(tmp_path)).train()
    cut.save_pretrained(tmp_path / "cut")
    for discard in (False, True):
        model = far(retention_ratio=0.5, init_weights=False, discard_unkept=discard)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(**zoo.inputs_of("distilbert", model)).loss.backward()
        optimizer.step()
        moments = len(optimizer.state)
        before = {n: v.clone() for n, v in model.state_dict().items()}
        with pytest.raises(ValueError, match="does not fit the adapter.*Nothing was loaded"):
            model.load_adapter(tmp_path / "cut", "default")
        assert not model.peft_config["default"].reconfigured
        assert len(optimizer.state) == moments > 0
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[n], v) for n, v in before.items())


@pytest.mark.parametrize("discard", [False, True])
def test_kept_nothing(tmp_path: Path, discard):
    """An adapter that kept nothing goes on in silence."""
    model = far(retention_ratio=0.0, discard_unkept=discard)
    trainer(model, arguments(tmp_path)).train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(zoo.build("distilbert"), tmp_path / "adapter", is_trainable=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has nothing of it.*")
        trainer(again, arguments(tmp_path)).train()
    assert again.peft_config["default"].reconfigured
    assert again.base_model.model.distilbert.transformer.layer[0].ffn.lin1.far_delta["default"].weight.shape == (0, 16)


def test_excluded_sharer():
    """One module left out leaves out all that share its weight, and FAR says so."""
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0)
    base = tf.GPT2LMHeadModel(config)
    total, table = sum(p.numel() for p in base.parameters()), base.lm_head.weight.numel()
    with pytest.warns(UserWarning, match=r"lm_head and transformer\.wte share a weight, and lm_head is left out"):
        model = get_peft_model(base, FARConfig(exclude_modules=["lm_head"]))
    assert model.get_nb_trainable_parameters()[0] == total - table


@pytest.mark.filterwarnings("ignore")
def test_fsdp_refused(tmp_path: Path):
    """Composites under FSDP are refused, and not computed wrong. FSDP takes the parameters of an attention that
    computes with them itself out of torch's sight."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    model = get_peft_model(Model(), FARConfig(target_modules=["attention"], init_weights=False)).eval()
    x = torch.randn(2, 3, 16)
    assert model(x).isfinite().all()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(NotImplementedError, match="MultiheadAttention .* exclude_modules"):
            sharded(x)
    finally:
        torch.distributed.destroy_process_group()
