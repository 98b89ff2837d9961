"""Feed-forward pairs are found by structure, over architectures."""

from __future__ import annotations

import pytest
import transformers as tf
import zoo

from peft_learners.far.plan import named_feed_forwards, patterns_of
from peft_learners.structure.feed_forward import feed_forwards

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 64,
}
VISION = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2}

#: Architecture: pairs of two blocks each (counted by hand), endings of their names, hidden units.
ZOO = {
    "distilbert": (2, [["lin1", "lin2"]], 32),
    "bert": (2, [["intermediate.dense", "output.dense"]], 32),
    "roberta": (2, [["intermediate.dense", "output.dense"]], 32),
    # the block's own pair and that of its one extra FFN; the bottlenecks are none
    "mobilebert": (4, [["intermediate.dense", "output.dense"]], 32),
    "albert": (1, [["ffn", "ffn_output"]], 32),
    "gpt2": (2, [["c_fc", "c_proj"]], 64),
    "llama": (2, [["gate_proj", "up_proj", "down_proj"]], 32),
    "t5": (4, [["wi", "wo"]], 32),
    "vit": (2, [["fc1", "fc2"]], 32),
}
OTHERS = {
    "opt": (tf.OPTModel, tf.OPTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=40,
            vocab_size=64, word_embed_proj_dim=16), 2, [["fc1", "fc2"]], 40),
    "bart": (tf.BartModel, tf.BartConfig(**BART), 4, [["fc1", "fc2"]], 40),
    "t5-gated": (tf.T5Model, tf.T5Config(**T5, feed_forward_proj="gated-gelu"), 4, [["wi_0", "wi_1", "wo"]], 40),
    "phi3-fused": (tf.Phi3Model, tf.Phi3Config(**SMALL, pad_token_id=0), 2, [["gate_up_proj", "down_proj"]], 40),
    "bloom": (tf.BloomModel, tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=64), 2,
              [["dense_h_to_4h", "dense_4h_to_h"]], 64),
    "gptj": (tf.GPTJModel, tf.GPTJConfig(n_embd=16, n_layer=2, n_head=2, vocab_size=64, rotary_dim=4), 2,
             [["fc_in", "fc_out"]], 64),
    "deberta": (tf.DebertaV2Model, tf.DebertaV2Config(**SMALL), 2, [["intermediate.dense", "output.dense"]], 40),
    "clip": (tf.CLIPVisionModel, tf.CLIPVisionConfig(**VISION), 2, [["fc1", "fc2"]], 40),
    "mamba": (tf.MambaModel, tf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64), 0, [], 0),
}  # fmt: skip


def check(model, count: int, patterns: list, width: int) -> None:
    pairs = feed_forwards(model)
    assert len(pairs) == count
    assert patterns_of(pairs) == patterns
    assert all(pair.width == width for pair in pairs)
    if pairs:
        assert named_feed_forwards(model, patterns) == pairs


@pytest.mark.parametrize("arch", list(zoo.ZOO))
def test_zoo(arch):
    """Pairs of the zoo's models are found."""
    check(zoo.build(arch), *ZOO[arch])


@pytest.mark.parametrize("arch", list(OTHERS))
def test_other_architectures(arch):
    """Pairs of other architectures are found."""
    cls, config, *expected = OTHERS[arch]
    check(cls(config), *expected)
