"""Tiny models from config, one of each architecture the package is tested on, with inputs to call them by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}
ROWS, TOKENS = 3, 7


def _text(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, 60, (ROWS, TOKENS), generator=generator),
        "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }


def _causal(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    inputs = _text(model)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def _image(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1, 1])}


@dataclass(frozen=True)
class Entry:
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.nn.Module], dict[str, torch.Tensor]]
    task_type: str
    #: attention linears, linears of the backbone, norms inside blocks: counted by hand from the architecture
    attention: int
    linears: int
    norms: int
    head: tuple[str, ...] = ()


def _no_dropout(config: tf.PretrainedConfig) -> tf.PretrainedConfig:
    for name in list(vars(config)):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return config


def distilbert() -> torch.nn.Module:
    config = tf.DistilBertConfig(
        dim=16, hidden_dim=32, n_layers=2, n_heads=2, vocab_size=64, max_position_embeddings=32
    )
    return tf.DistilBertForSequenceClassification(_no_dropout(config))


def bert() -> torch.nn.Module:
    return tf.BertForSequenceClassification(_no_dropout(tf.BertConfig(**SMALL, max_position_embeddings=32)))


def roberta() -> torch.nn.Module:
    return tf.RobertaForSequenceClassification(_no_dropout(tf.RobertaConfig(**SMALL, max_position_embeddings=34)))


def mobilebert() -> torch.nn.Module:
    config = tf.MobileBertConfig(
        **SMALL, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16, num_feedforward_networks=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return tf.MobileBertForSequenceClassification(_no_dropout(config))


def albert() -> torch.nn.Module:
    config = tf.AlbertConfig(**SMALL, embedding_size=8, max_position_embeddings=32)
    return tf.AlbertForSequenceClassification(_no_dropout(config))


def gpt2() -> torch.nn.Module:
    config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, pad_token_id=0)
    return tf.GPT2ForSequenceClassification(_no_dropout(config))


def llama() -> torch.nn.Module:
    config = tf.LlamaConfig(**SMALL, max_position_embeddings=32, num_key_value_heads=2, pad_token_id=0)
    return tf.LlamaForCausalLM(_no_dropout(config))


def t5() -> torch.nn.Module:
    config = tf.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return tf.T5ForConditionalGeneration(_no_dropout(config))


def vit() -> torch.nn.Module:
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return tf.ViTForImageClassification(_no_dropout(config))


ZOO: dict[str, Entry] = {
    # per layer: q k v out + lin1 lin2; sa_layer_norm, output_layer_norm
    "distilbert": Entry(distilbert, _text, "SEQ_CLS", 8, 12, 4, ("pre_classifier", "classifier")),
    # the same, and the pooler, which the head reads
    "bert": Entry(bert, _text, "SEQ_CLS", 8, 13, 4, ("classifier",)),
    "roberta": Entry(roberta, _text, "SEQ_CLS", 8, 12, 4, ("classifier",)),
    # per layer: q k v out; intermediate, output; 2 bottlenecks (input, attention), output.bottleneck, one extra ffn
    # (2 linears) = 11; embedding_transformation, pooler
    # norms per layer: attention, output, 2 bottlenecks, output.bottleneck, ffn
    "mobilebert": Entry(mobilebert, _text, "SEQ_CLS", 8, 24, 12, ("classifier",)),
    # one shared block: q k v dense + ffn, ffn_output; embedding_hidden_mapping_in; pooler
    "albert": Entry(albert, _text, "SEQ_CLS", 4, 8, 2, ("classifier",)),
    # per layer: c_attn, c_proj, c_fc, c_proj (Conv1D)
    "gpt2": Entry(gpt2, _text, "SEQ_CLS", 4, 8, 4, ("score",)),
    # per layer: q k v o, gate up down; a pretrained LM head, no new one
    "llama": Entry(llama, _causal, "CAUSAL_LM", 8, 14, 4),
    # encoder layer: q k v o, wi wo; decoder layer: 8, wi wo; norms 2 and 3 per layer
    "t5": Entry(t5, _causal, "SEQ_2_SEQ_LM", 24, 32, 10),
    "vit": Entry(vit, _image, None, 8, 12, 4, ("classifier",)),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """The zoo's model with weights that depend on `seed` alone, in eval mode, biases and norms moved off 0 and 1."""
    torch.manual_seed(seed)
    model = ZOO[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def with_labels(arch: str, **labels: Any) -> torch.nn.Module:
    """A model of that architecture whose config says other things of labels."""
    model: Any = build(arch)
    config = copy.deepcopy(model.config)
    for name, value in labels.items():
        setattr(config, name, value)
    return type(model)(config)


def inputs_of(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return ZOO[name].inputs(model)


def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model makes of its inputs in eval mode."""
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def causal_lm(arch: str) -> torch.nn.Module:
    """A causal model: one without a new head."""
    if arch == "llama":
        return build("llama")
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    return tf.GPT2LMHeadModel(config).eval()
