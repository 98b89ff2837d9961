"""What a model is made of, found from its structure: backbone, new head, blocks, linear layers, norms, attention.

All functions look through adapters that are already there: a module wrapped by a tuner layer counts as what it wraps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)s?$", re.IGNORECASE)
#: Of these models some layers' weights are read by kernels, and the layers are not called.
_STATE_SPACE_MODELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_READ_NOT_CALLED = {"conv1d", "dt_proj", "out_proj"}
_ATTENTION_INPUT_NAME = re.compile(
    r"(^|_)(in|w?(q|k|v|kv|qk|qkv)|quer(y|ies)|keys?|values?|pos(ition(al)?)?|gates?|g)(_|$)", re.IGNORECASE
)
_VALUE_NAME = re.compile(r"(v|value|values)(_?(proj|projection|lin|linear|layer|head|net))?", re.IGNORECASE)
_FEED_FORWARD_NAME = re.compile(r"(^|_)(mlp|ffn?|feed_forward|feedforward|intermediate|experts?)$", re.IGNORECASE)


def base_of(module: nn.Module) -> nn.Module:
    """The original module behind tuner layers."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`(name, module)` of every module of the original model, without the insides of adapters and saved copies."""
    skipped: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if parent in skipped:
            skipped.add(name)
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            skipped.add(name)
        yield name, module


def is_linear(module: nn.Module) -> bool:
    """A linear layer `(..., in) -> (..., out)`: `nn.Linear`, transformers' `Conv1D`, or a quantised one."""
    base = base_of(module)
    if isinstance(base, (nn.Linear, Conv1D)):
        return True
    named_linear = "Linear" in type(base).__name__ and not any(base.children())
    sizes = (("in_features", "out_features"), ("infeatures", "outfeatures"))  # the latter: GPTQ
    return named_linear and any(hasattr(base, into) and hasattr(base, out) for into, out in sizes)


def is_norm(module: nn.Module) -> bool:
    """A norm with a trainable weight vector (LayerNorm, any RMSNorm, MobileBERT's NoNorm), but no batch norm."""
    base = base_of(module)
    if "norm" not in type(base).__name__.lower() or any(base.children()) or any(True for _ in base.buffers()):
        return False
    parameters = dict(base.named_parameters())
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in parameters.values())


def backbone_prefix(model: nn.Module) -> str:
    """Name of the pretrained backbone inside a task model, with a trailing dot; '' if the model is the backbone."""
    name = getattr(model, "base_model_prefix", "")
    inner = getattr(model, name, None) if isinstance(name, str) and name else None
    return f"{name}." if isinstance(inner, nn.Module) and inner is not model else ""


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The pretrained LM head, or None."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        return get()
    except (NotImplementedError, AttributeError):
        return None


def new_head(model: nn.Module) -> list[str]:
    """Names of the freshly initialised head: what has parameters and lies outside the pretrained backbone.

    A model with output embeddings has a pretrained LM head, and what lies around it is pretrained too: []. A task
    model ("...For...") that holds its backbone's parts directly has the linear layers beside them for a head.
    """
    if output_embeddings(model) is not None:
        return []
    prefix = backbone_prefix(model)
    if prefix:
        children = [(name, child) for name, child in model.named_children() if f"{name}." != prefix]
        return [name for name, child in children if any(True for _ in child.parameters())]
    if not re.search(r"For[A-Z]", type(model).__name__):
        return []
    return [name for name, child in model.named_children() if is_linear(_original(child))]


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _in_backbone(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the backbone that a tuner may stand in for, as far as their place goes.

    Left out: the head and the LM head; the inside of `nn.MultiheadAttention`, which reads its weights without calling
    it; and a pooler where there is no head, since nothing may read it (a task model is built with a pooler only if
    its head does).
    """
    prefix, head, lm_head = backbone_prefix(model), new_head(model), output_embeddings(model)
    outside = [f"{name}." for name in head]
    if getattr(getattr(model, "config", None), "model_type", None) in _STATE_SPACE_MODELS:
        outside += [f"{name}." for name, _ in walk(model) if name.rpartition(".")[2] in _READ_NOT_CALLED]
    outside += [f"{name}." for name, module in walk(model) if isinstance(module, nn.MultiheadAttention)]
    for name, module in walk(model):
        if not name.startswith(prefix) or base_of(module) is lm_head or module is lm_head:
            continue
        if any(f"{name}.".startswith(outer) for outer in outside) or (not head and "pooler" in name.split(".")):
            continue
        yield name, module


def linear_names(model: nn.Module) -> list[str]:
    """Linear layers of the backbone that a tuner can stand in for (see `_in_backbone` for what is left out)."""
    return [name for name, module in _in_backbone(model) if is_linear(module)]


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """The bias vector of a linear layer, a norm, a convolution, ...; None for modules without, for those that hold
    others, and for batch norms, whose running statistics would change beside it."""
    base = base_of(module)
    bias = getattr(base, "bias", None)
    # HQQ's linear layers keep theirs as a bare tensor.
    own = isinstance(bias, torch.Tensor) and (isinstance(bias, nn.Parameter) or is_linear(base))
    plain = own and bias is not None and bias.dim() == 1 and is_plain_float(bias)
    alone = not any(True for _ in base.children()) and not hasattr(base, "running_mean")
    return bias if plain and alone else None


def bias_names(model: nn.Module) -> list[str]:
    """Modules of the backbone with a bias vector of their own. A bias that several modules share is left out."""
    found = {name: bias for name, module in _in_backbone(model) if name and (bias := bias_of(module)) is not None}
    times = Counter(id(bias) for bias in found.values())
    return [name for name, bias in found.items() if times[id(bias)] == 1]


def block_names(model: nn.Module) -> list[str]:
    """Names of the backbone's blocks: the children of its module lists."""
    prefix = backbone_prefix(model)
    return [
        f"{name}.{child}"
        for name, module in walk(model)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name.startswith(prefix)
        for child, _ in module.named_children()
    ]


def norm_names(model: nn.Module) -> list[str]:
    """Norms inside the backbone's blocks (not the embeddings' norm, nor a final one)."""
    blocks = set(block_names(model))
    return [name for name, module in walk(model) if is_norm(module) and _ancestor_in(name, blocks)]


def _attentions(model: nn.Module, linears: Iterable[str]) -> dict[str, str]:
    """`{name: name of the innermost attention that it belongs to}` for those of `linears` that belong to one."""
    linears = list(linears)
    attention = {
        name
        for name, module in walk(model)
        if name and not is_linear(module)
        if _ATTENTION_CLASS.search(type(module).__name__)
        or (
            _ATTENTION_NAME.search(name.rpartition(".")[2])
            and sum(linear.startswith(f"{name}.") for linear in linears) > 1
        )
    }
    found = {}
    for name in linears:
        parts = name.split(".")
        for depth in range(len(parts) - 1, 0, -1):
            if _FEED_FORWARD_NAME.search(parts[depth]):
                break
            outer = ".".join(parts[:depth])
            if outer in attention:
                found[name] = outer
                break
    return found


def attention_names(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Those of `linears` (or embeddings: T5's relative positions) that belong to an attention.

    They lie below a module whose class says so, or whose name does and which holds several linear layers (MobileBERT
    calls a bottleneck "attention"), and not below a feed-forward part of it.
    """
    return list(_attentions(model, linears))


def attention_output_names(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """The output projections of attentions among `linears`: of each the last layer, in the order of registration,
    whose name is not one of queries, keys, values, positions or gates. An attention inside another that has one has
    none of its own (ConvBERT's `attention.self`, whose last layer makes what the outer one's output joins)."""
    last = {
        attention: name
        for name, attention in _attentions(model, linears).items()
        if not _ATTENTION_INPUT_NAME.search(name.rpartition(".")[2])
    }
    return [name for inner, name in last.items() if not any(inner.startswith(f"{outer}.") for outer in last)]


def value_names(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """The value projections among `linears`; a projection that makes values and others at once is none."""
    attention = attention_names(model, linears)
    return [name for name in attention if _VALUE_NAME.fullmatch(name.rpartition(".")[2])]


def block_linear_names(model: nn.Module) -> list[str]:
    """Linear layers inside the backbone's blocks."""
    blocks = set(block_names(model))
    return [name for name in linear_names(model) if _ancestor_in(name, blocks)]


def _ancestor_in(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:depth]) in names for depth in range(1, len(parts) + 1))


def is_plain_float(value: object) -> bool:
    """Whether a tensor holds floating-point numbers as they are.

    Quantised ones may pass for such by their dtype: torchao and quanto report that of the numbers they stand for,
    bitsandbytes that of its storage. They are told by their class. fp8 can't hold a trained sum.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.element_size() < 2:
        return False
    return type(value) in (torch.Tensor, nn.Parameter) or type(value).__name__ == "DTensor"


def float_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer if it is a plain floating-point matrix, else None."""
    weight = getattr(base_of(module), "weight", None)
    return weight if weight is not None and is_plain_float(weight) and weight.dim() == 2 else None


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether a weight is made anew from other parameters in each call (weight norm, a parametrization)."""
    older = any(f"{name}_{end}" in module._parameters for end in ("g", "v", "orig"))
    return older or nn.utils.parametrize.is_parametrized(module, name)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere, and fetches them for each of its calls."""
    return getattr(module.__dict__.get("_hf_hook"), "offload", False)


def stored_as(module: nn.Module) -> str:
    """How a module stores its weight, for error messages: a dtype, or the class of tensor or module that hides it."""
    base = base_of(module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return type(base).__name__
    passes_for_float = weight.is_floating_point() and weight.element_size() >= 2
    return type(weight).__name__ if passes_for_float and not is_plain_float(weight) else str(weight.dtype)


def refuse_unfit_head(model: nn.Module, trained_whole: Iterable[str]) -> None:
    """Modules that are trained whole need float weights that stay where they are.

    Raises:
        ValueError: a linear layer in them is quantised or offloaded.
    """
    endings = list(trained_whole)
    for name, module in walk(model):
        if not any(name == ending or name.endswith(f".{ending}") for ending in endings):
            continue
        for part in _original(module).modules():
            last = name.rpartition(".")[2]
            whole = f"{name} is trained whole (the model's head, and what modules_to_save names), but its weights are "
            if is_linear(part) and float_weight(part) is None:
                raise ValueError(
                    f"{whole}quantised (got {stored_as(part)}). Leave it in float when the base model is quantised: "
                    f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{last!r}]), or with other methods "
                    f"modules_to_not_convert=[{last!r}]."
                )
            if is_offloaded(part):
                raise ValueError(f"{whole}offloaded. Keep it on a device: device_map={{..., {name!r}: 0}}.")


def readable_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer as (out_features, in_features), if the layer does nothing but multiply by it.

    None for layers that must be called: quantised, of another class, hooked (offloaded), or wrapped.
    """
    if type(module) not in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "_hf_hook" in module.__dict__ or "forward" in module.__dict__ or any(hooks):
        return None
    weight = float_weight(module)
    return weight.t() if weight is not None and isinstance(module, Conv1D) else weight


def is_sinusoidal(module: nn.Module) -> bool:
    """A table of fixed sine and cosine positions (Whisper's encoder, Pegasus, Marian), which no one trains.

    Read from the values, since flags are gone once PEFT has frozen a model: each row holds d/2 pairs of a sine and a
    cosine of one angle, whose squares sum to 1.
    """
    base = base_of(module)
    if not isinstance(base, nn.Embedding) or base.weight.is_meta or base.embedding_dim < 2:
        return False

    def fits(table: torch.Tensor) -> bool:
        return bool(((table.float().square().sum(1) / (base.embedding_dim // 2) - 1).abs() < 0.02).all())

    table = base.weight.detach()
    return len(table) > 1 and fits(table[:16]) and fits(table)  # a vocabulary fails at its first rows


def frozen_on_purpose(model: nn.Module) -> list[str]:
    """Names of parameters that someone froze before the first adapter, in a model that otherwise trains."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return []
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [name for name, trains in flags.items() if not trains] if any(flags.values()) else []
