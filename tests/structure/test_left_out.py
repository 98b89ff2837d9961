"""What no tuner layer can stand in for is named: fused experts, XLNet's projections."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
import zoo
from peft import get_peft_model

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig
from peft_learners.structure.modules import stacked_parameters

OWN = [LearnerConfig, NASLoRAConfig, BottleneckConfig]
SIZES = {**zoo.SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2}


def mixtral() -> torch.nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4))


def qwen() -> torch.nn.Module:
    config = tf.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1)
    return tf.Qwen3MoeForCausalLM(config)


def gpt_oss() -> torch.nn.Module:
    layers = {"layer_types": ["full_attention"] * 2, "head_dim": 8}
    return tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, num_local_experts=4, **layers))


def warned(base, config) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(base, config)
    return [str(w.message) for w in caught if "peft_learners" in w.filename]


@pytest.mark.parametrize("config", OWN)
# 2 blocks of 4 experts; gate and up (2 * hidden, 16), down (16, hidden): counted by hand
@pytest.mark.parametrize("build,entries", [(mixtral, 12288), (qwen, 6144), (gpt_oss, 12288)])
def test_fused_experts(config, build, entries):
    """One warning has names and number; none where the user names modules or excludes the experts."""
    (text,) = warned(build(), config(task_type="CAUSAL_LM"))
    assert f"{config.__name__} leaves 4 parameters" in text and f"with {entries:,} entries" in text
    names = [f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate_up", "down")]
    assert all(name in text for name in names)
    assert f"LoraConfig(target_parameters={['down_proj', 'gate_up_proj']})" in text
    assert len(warned(build(), config(target_modules="all-linear", task_type="CAUSAL_LM"))) == 1
    assert warned(build(), config(target_modules=["o_proj"], task_type="CAUSAL_LM")) == []
    assert warned(build(), config(exclude_modules=["experts"], task_type="CAUSAL_LM")) == []
    (text,) = warned(build(), config(layers_to_transform=[1], task_type="CAUSAL_LM"))
    assert f"with {entries // 2:,} entries" in text and "layers.0" not in text


def test_far_refuses_experts():
    """FAR's error says that fused experts have no nodes."""
    with pytest.raises(ValueError, match=r"no feed-forward pair in the MixtralForCausalLM.*fused experts have none"):
        get_peft_model(mixtral(), FARConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("arch", zoo.ZOO)
def test_nothing_left_out(arch):
    """Models of linear layers have nothing to name."""
    assert stacked_parameters(zoo.build(arch)) == {}


def test_convolutions():
    """Convolutions' weights have as many dimensions, and are no such case."""
    base = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
    wav2vec = tf.Wav2Vec2Model(tf.Wav2Vec2Config(**base, **sizes, num_conv_pos_embedding_groups=2, vocab_size=10))
    mamba = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4))
    for model in (wav2vec, mamba):
        assert any(p.dim() == 3 for p in model.parameters()) and stacked_parameters(model) == {}
