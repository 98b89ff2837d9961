"""Bases whose weights are no plain floats: small models quantised by the libraries that are installed, and by hand."""

from __future__ import annotations

import functools
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from packaging.version import Version
from torch import Tensor, nn

#: bitsandbytes' 4-bit layers on a CPU want multiples of 32 outputs, and blocks of 64 inputs.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
LINEARS = 13  # of BERT: per block q k v, dense, intermediate, output; the pooler
HEAD = ("classifier",)
_FOLDERS = tempfile.TemporaryDirectory()


class PackedLinear(nn.Module):
    """A linear layer as any quantisation library may write one: whole numbers and a scale per row, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, (self.packed * self.scale).to(x.dtype), bias)


def _widen(module: Any, args: Any) -> None:
    module.stored = module.weight.data
    module.weight.data = module.stored.to(module.bias.dtype if module.bias is not None else torch.float32)


def _narrow(module: Any, args: Any, out: Tensor) -> None:
    module.weight.data = module.stored


def _in_fp8(linear: nn.Linear) -> nn.Linear:
    """fp8 storage, widened around each call by hooks, as diffusers' layerwise casting does."""
    linear.weight.data = linear.weight.data.to(torch.float8_e4m3fn)
    linear.register_forward_pre_hook(_widen)
    linear.register_forward_hook(_narrow)
    return linear


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device="cpu")


def _bnb(**settings: Any) -> Callable[[list[str]], Any]:
    return lambda keep: tf.BitsAndBytesConfig(
        llm_int8_skip_modules=keep, bnb_4bit_compute_dtype=torch.float32, **settings
    )


def _torchao(keep: list[str]) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return tf.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)


def _int8_of_torchao() -> str:
    """The class of int8 weights, which has another name since torchao 0.18."""
    with suppress(PackageNotFoundError):
        if Version(version("torchao")) < Version("0.18"):
            return "AffineQuantizedTensor"
    return "Int8Tensor"


@dataclass(frozen=True)
class Kind:
    """A way to quantise.

    Attributes:
        stored: what error messages call the weights.
        package: that must be installed.
        config: makes transformers' `quantization_config` from the names of modules to keep in float; or
        layer: makes a quantised layer from a linear one.
        autocast: whether its kernels run under autocast, with no adapter in sight.
        precision: of a call; bitsandbytes' 4-bit kernel for a CPU computes in bfloat16.
    """

    stored: str
    package: str | None = None
    config: Callable[[list[str]], Any] | None = None
    layer: Callable[[nn.Linear], nn.Module] | None = None
    autocast: bool = True
    precision: float = 1e-5


KINDS: dict[str, Kind] = {
    "packed": Kind("PackedLinear", layer=PackedLinear),
    "fp8": Kind("torch.float8_e4m3fn", layer=_in_fp8),
    "bnb-8bit": Kind("torch.int8", "bitsandbytes", config=_bnb(load_in_8bit=True)),
    "bnb-nf4": Kind(
        "torch.uint8", "bitsandbytes", config=_bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4"), precision=2e-2
    ),
    # Storage as FSDP wants it, whose dtype passes for that of a float weight.
    "bnb-fp4-in-bf16": Kind(
        "Params4bit",
        "bitsandbytes",
        config=_bnb(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
        precision=2e-2,
    ),
    "torchao-int8": Kind(_int8_of_torchao(), "torchao", config=_torchao),
    "quanto-int8": Kind(
        "WeightQBytesTensor",
        "optimum.quanto",
        config=lambda keep: tf.QuantoConfig(weights="int8", modules_to_not_convert=keep),
        autocast=False,
    ),
    "hqq-4bit": Kind("HQQLinear", "hqq", layer=_hqq, autocast=False),
}


def skip_if_absent(kind: str) -> None:
    package = KINDS[kind].package
    try:
        found = package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        assert package is not None
        pytest.skip(f"needs {package.replace('.', '-')}: pip install {package.replace('.', '-')}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def float_base(arch: str = "bert") -> nn.Module:
    """The model before it is quantised, biases and norms moved off 0 and 1."""
    torch.manual_seed(0)
    model: nn.Module
    if arch == "bert":
        config = tf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = tf.BertForSequenceClassification(config)
    else:
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def _folder(arch: str) -> Path:
    path = Path(_FOLDERS.name) / arch
    float_base(arch).save_pretrained(path)  # type: ignore[operator]
    return path


def base(kind: str, arch: str = "bert", keep: Sequence[str] = HEAD, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantised base, fresh from disk where transformers knows how to load it.

    Args:
        keep: endings of names of the linear layers that stay in float; an LM head does anyway.
    """
    made, model = KINDS[kind], float_base(arch)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    kept = [name for name in linears if name.endswith((*keep, "lm_head"))]
    if made.config is not None:
        load = type(model).from_pretrained  # type: ignore[attr-defined]
        config = made.config(kept)
        return load(_folder(arch), quantization_config=config, dtype=dtype, device_map="cpu").eval()
    assert made.layer is not None
    model = model.to(dtype)
    for name in linears:
        if name not in kept:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made.layer(model.get_submodule(name)))  # type: ignore[arg-type]
    return model.eval()


def inputs(arch: str = "bert", tokens: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (3, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids if arch == "llama" else torch.tensor([0, 1, 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
