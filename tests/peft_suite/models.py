"""Tiny models of each family of PEFT's suite, in a cache of the Hub, so that its tests load them by their ids.

PEFT's tests skip by the names of architectures (all merging on Llamas, for one), because of what some of PEFT's own
tuners can't do. So the ids say nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
import zoo
from huggingface_hub.file_download import repo_folder_name

SMALL = zoo.SMALL
BART = {
    "vocab_size": 64, "d_model": 16, "max_position_embeddings": 32,
    "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
}  # fmt: skip


def _bert(of: type) -> Callable[[], tf.PreTrainedModel]:
    return lambda: of(tf.BertConfig(**SMALL, max_position_embeddings=32))


def _roberta(of: type) -> Callable[[], tf.PreTrainedModel]:
    return lambda: of(tf.RobertaConfig(**SMALL, max_position_embeddings=34))


def _opt() -> tf.PreTrainedModel:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes, num_attention_heads=2, vocab_size=64, max_position_embeddings=32))


def _gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32))


def _bart() -> tf.PreTrainedModel:
    return tf.BartForConditionalGeneration(tf.BartConfig(**BART))


FAMILIES: dict[str, list[Callable[[], torch.nn.Module]]] = {
    "decoder": [zoo.llama, _opt, _gpt2],
    "encoder": [_bert(tf.BertModel), _roberta(tf.RobertaModel)],
    "sequence classification": [
        _bert(tf.BertForSequenceClassification),
        _roberta(tf.RobertaForSequenceClassification),
    ],
    "encoder-decoder": [zoo.t5, _bart],
    "token classification": [_bert(tf.BertForTokenClassification)],
    "question answering": [_bert(tf.BertForQuestionAnswering)],
}


#: What the cache calls the only revision of each model.
REVISION = "0" * 40


@functools.cache
def saved(family: str, cache: Path) -> list[str]:
    """Ids on the Hub of a family's models, which are put into a cache, each with the same weights in every run."""
    ids = []
    for number, build in enumerate(FAMILIES[family]):
        name = f"peft-suite/{family.replace(' ', '-')}-{number}"
        folder = cache / repo_folder_name(repo_id=name, repo_type="model")
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        torch.manual_seed(number)
        model = build()
        model.save_pretrained(folder / "snapshots" / REVISION)
        ids.append(name)
    return ids
