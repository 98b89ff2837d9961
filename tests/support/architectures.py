"""Architectures beside the zoo's: what their feed-forward networks are."""

from __future__ import annotations

import transformers as tf

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
