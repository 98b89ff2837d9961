"""Models and calls that do something unusual with their layers' weights."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
import zoo
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from tuners import TUNERS
from zoo import logits_of

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig

LM = {"init_weights": False, "task_type": "CAUSAL_LM"}


def tied() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**zoo.SMALL, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("config", [LearnerConfig, NASLoRAConfig])
def test_merge_by_name(config):
    """What is merged by name is checked, and not what is active."""
    base = tied()
    inputs = zoo.inputs_of("llama", base)
    model = get_peft_model(base, config(r=4, **LM)).eval()
    model.add_adapter("head", config(r=4, target_modules=["lm_head"], **LM))
    logits = logits_of(model, inputs)
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        model.merge_adapter(adapter_names=["head"])
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        copy.deepcopy(model).merge_and_unload(adapter_names=["head"])
    assert torch.equal(logits_of(model, inputs), logits)
    model.set_adapter("head")
    model.merge_adapter(adapter_names=["default"])
    model.unmerge_adapter()


def test_merge_warning():
    """The warning about phases goes by what is merged."""
    model = get_peft_model(zoo.build("llama"), LearnerConfig(r=2, task_type="CAUSAL_LM"))
    model.add_adapter("fine", LearnerConfig(r=2, priming_epochs=0, **LM))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dense_delta" in name:
                parameter.fill_(0.01)
    model.set_adapter("fine")
    with pytest.warns(UserWarning, match="phases were never driven"):
        model.merge_adapter(adapter_names=["default"])


@pytest.mark.parametrize("tuner", ["learner-unprimed", "nas-structured"])
def test_torch_encoder_layers(tuner):
    """torch's own encoder layers, whose fast path reads weights, follow the adapter."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 8)
    model = get_peft_model(copy.deepcopy(base), TUNERS[tuner].config(init_weights=False)).eval()
    with torch.no_grad():
        out = model(x)
        assert not torch.allclose(out, base(x), atol=1e-3)
        torch.testing.assert_close(model.merge_and_unload()(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("config", [LearnerConfig, NASLoRAConfig, FARConfig])
@pytest.mark.filterwarnings("ignore")
def test_parametrized_weight(config, norm):
    """A weight that is computed can't be merged into."""
    torch.manual_seed(0)
    layers = {"into": norm(nn.Linear(8, 8)), "act": nn.ReLU(), "out": nn.Linear(8, 4)}
    base = nn.Sequential(OrderedDict(layers))
    settings = {"target_modules": ["into", "out"], "init_weights": False}
    model, x = get_peft_model(base, config(**settings)).eval(), torch.randn(3, 8)
    out = model(x)
    with pytest.raises(ValueError, match="The weight of a .*Linear is computed from other parameters"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), out, rtol=0, atol=0)


def test_mamba():
    """Layers of Mamba whose weights are read are left out."""
    torch.manual_seed(0)
    config = tf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    base = tf.MambaForCausalLM(config).eval()
    inputs = zoo.inputs_of("llama", base)
    inputs.pop("attention_mask")
    for adapter in (LearnerConfig(r=2, priming_epochs=0, **LM), NASLoRAConfig(r=2, parameter_budget=0.5, **LM)):
        model = get_peft_model(copy.deepcopy(base), adapter)
        adapted = {name.rpartition(".")[2] for name in model.targeted_module_names}
        assert {"in_proj", "x_proj"} <= adapted and not adapted & {"conv1d", "dt_proj", "out_proj"}
        model.train()
        model(**inputs).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        out = logits_of(model, inputs)
        torch.testing.assert_close(logits_of(model.merge_and_unload(), inputs), out, rtol=1e-5, atol=1e-5)


def test_mixed_batch_splits():
    """A mixed batch splits all that has a row for each of its own. Whisper gives its table of positions the position
    ids beside the tokens."""
    torch.manual_seed(0)
    heads, layers = (
        {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        {"encoder_layers": 1, "decoder_layers": 1},
    )
    config = tf.WhisperConfig(
        vocab_size=64, d_model=16, **layers, **heads, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=10, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = get_peft_model(tf.WhisperForConditionalGeneration(config).eval(), FARConfig(init_weights=False)).eval()
    torch.manual_seed(1)
    model.add_adapter("other", FARConfig(init_weights=False))
    tokens = torch.randint(3, 60, (3, 5))
    inputs = {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": tokens}
    rows = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        rows[adapter] = logits_of(model, inputs)
    with model.disable_adapter():
        rows["__base__"] = logits_of(model, inputs)
    names = ["other", "__base__", "default"]
    mixed = logits_of(model, {**inputs, "adapter_names": names})
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], rows[name][row], rtol=1e-5, atol=1e-5)


@pytest.mark.verb(
    "adapter_names=",
    limit="not where layers see tokens and not rows (OPT, MoE), nor with heads of several layers (RoBERTa); as LoRA",
)
@pytest.mark.parametrize("tuner", ["learner-unprimed", "far", "nas-unstructured", "bottleneck-parallel"])
def test_mixed_batch_refused(tuner):
    """Mixed batches are refused where rows can't be told apart."""
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16
    )
    model = get_peft_model(tf.OPTForCausalLM(config).eval(), TUNERS[tuner].config(**LM)).eval()
    inputs = zoo.inputs_of("llama", model)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        logits_of(model, {**inputs, "adapter_names": ["default", "__base__", "default"]})
    roberta = get_peft_model(
        zoo.build("roberta"), TUNERS[tuner].config(task_type="SEQ_CLS", init_weights=False)
    ).eval()
    with pytest.raises(TypeError, match="Mixed batching is only supported"):
        logits_of(roberta, {**zoo.inputs_of("roberta", roberta), "adapter_names": ["default", "__base__", "default"]})


@pytest.mark.parametrize("tuner", ["learner", "far", "nas-unstructured", "bottleneck-parallel"])
def test_input_cast_off(tuner):
    """Casting of the input can be switched off."""
    model = get_peft_model(zoo.build("bert"), TUNERS[tuner].config(task_type="SEQ_CLS"))
    inputs = zoo.inputs_of("bert", model)
    out = logits_of(model, inputs)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits_of(model, inputs), out)


@pytest.mark.parametrize("tuner", ["learner", "far", "nas-structured"])
def test_base_layer_hooks(tuner):
    """Hooks on a base layer are called, forward and backward, as with LoRA: tools that watch layers see them."""
    model = get_peft_model(zoo.build("bert"), TUNERS[tuner].config(task_type="SEQ_CLS", init_weights=False))
    layer = model.base_model.model.bert.encoder.layer[1].intermediate.dense
    seen: list[str] = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.base_layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    model(**zoo.inputs_of("bert", model)).loss.backward()
    assert seen == ["forward", "backward"]


@pytest.mark.parametrize("tuner", [LearnerConfig, FARConfig, NASLoRAConfig, BottleneckConfig])
def test_gathered_weights(tuner):
    """Weights that are gathered for each call take the plain path, as ZeRO's third stage has it: between the calls of
    their module parameters are empty vectors."""
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    rank = {"r": 2} if tuner in (LearnerConfig, NASLoRAConfig) else {}
    config = tuner(target_modules=["0", "2"], init_weights=False, **rank)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), trained, allow_unused=True)
    layers = [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]
    assert len(layers) == 2
    gathered = []
    for layer in layers:
        full = layer.weight.data, layer.bias.data

        def gather(module, args, full=full):
            gathered.append(module)
            module.weight.data, module.bias.data = full

        def release(module, *_):
            module.weight.data, module.bias.data = torch.empty(0), torch.empty(0)

        layer.register_forward_pre_hook(gather)
        # backward needs the weight again, as ZeRO's own hooks see to it
        layer.register_full_backward_pre_hook(lambda m, grads, full=full: setattr(m.weight, "data", full[0]))
        layer.register_forward_hook(release)
        release(layer)
    out = model(x)
    assert gathered == layers and layers[0].weight.numel() == layers[0].bias.numel() == 0
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), trained, allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "arch,tuner", [("llama", "learner"), ("t5", "learner"), ("vit", "far"), ("gpt2", "bottleneck-parallel")]
)
def test_threads(arch, tuner):
    """Threads that share a model get what one alone gets."""
    base = zoo.build(arch)
    inputs = zoo.inputs_of(arch, base)
    model = get_peft_model(base, TUNERS[tuner].config(init_weights=False)).eval()
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    expected = logits_of(model, inputs)
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: logits_of(model, inputs), range(60)))
    assert all(torch.equal(out, expected) for out in outs)
    after = dict(model.named_parameters())
    assert all(id(after[name]) == place and torch.equal(after[name], value) for name, (place, value) in before.items())


@pytest.mark.parametrize("config", [NASLoRAConfig.u_bitfit(0.5), NASLoRAConfig(r=2)])
def test_channel_norm_bias(config):
    """The bias of a norm over another dimension than the last trains. Behind frozen convolutions only the bias of
    Wav2Vec2's group norm takes part in the gradient."""
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
    heads = {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0, "vocab_size": 10}
    own = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**sizes, **heads, **own))
    base.freeze_feature_encoder()
    model = get_peft_model(base, config).train()
    model(input_values=torch.randn(2, 400), labels=torch.tensor([0, 1])).loss.backward()
    layer = model.base_model.model.wav2vec2.feature_extractor.conv_layers[0].layer_norm
    assert layer.nas_lora_bias_delta["default"].bias.grad.any()


@pytest.mark.parametrize("tuner", [LearnerConfig, FARConfig, NASLoRAConfig, BottleneckConfig])
def test_meta_forward(tuner):
    """A model on the meta device can be called."""
    base = zoo.build("llama")
    inputs = {"input_ids": zoo.inputs_of("llama", base)["input_ids"].to("meta")}
    model = get_peft_model(base, tuner(task_type="CAUSAL_LM")).to("meta")
    assert model(**inputs).logits.is_meta


@pytest.mark.parametrize("tuner", ["learner-unprimed", "bottleneck-sequential", "bottleneck-parallel", "far"])
@pytest.mark.parametrize("gated", [False, True])
def test_t5_float16(tuner, gated, tmp_path):
    """T5 works as transformers loads it in float16. transformers leaves `wo` in float32 there, so that what is between
    the blocks is of two types."""
    form = {"feed_forward_proj": "gated-gelu"} if gated else {}
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60, **form)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    base = tf.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    types = {p.dtype for n, p in base.named_parameters() if n.endswith(".wo.weight")}
    assert types == {torch.float32} and base.shared.weight.dtype == torch.float16
    settings = {"init_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(base, TUNERS[tuner].config(**settings)).eval()
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    logits = logits_of(model, inputs)
    exact = logits_of(copy.deepcopy(model).double(), inputs)
    assert logits.dtype == torch.float16
    assert (logits.double() - exact).abs().max() < 2**-7 * exact.abs().max()  # 11 bits, some roundings


def test_traced_learner():
    """A traced Learner takes other batch sizes."""
    model = get_peft_model(zoo.build("bert"), LearnerConfig(r=2, init_weights=False)).eval().requires_grad_(False)
    ids = torch.randint(20, (6, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda ids: logits_of(model, {"input_ids": ids}), (ids[:3],), check_trace=False)
    for rows in (2, 3, 6):
        torch.testing.assert_close(traced(ids[:rows]), logits_of(model, {"input_ids": ids[:rows]}))


def test_replaced_forward():
    """A forward that was put on a base layer is called."""
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LearnerConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0].base_layer
    layer.forward = lambda x: type(layer).forward(layer, x) + 1
    x = torch.randn(300, 8)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias) + 1)
