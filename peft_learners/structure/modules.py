"""What a model is made of, found from its structure: backbone, new head, blocks, linear layers, norms, biases.

All functions look through adapters that are already there: a module wrapped by a tuner layer counts as what it wraps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import takewhile

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .weights import base_of, is_plain_float

#: Of these models some layers' weights are read by kernels, and the layers are not called.
_STATE_SPACE_MODELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_READ_NOT_CALLED = {"conv1d", "dt_proj", "out_proj"}


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


def is_within(name: str, modules: Container[str]) -> bool:
    """Whether a name is one of these modules', or that of something in one of them."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts) + 1))


def common_parent(names: Iterable[str]) -> str:
    """Name of the innermost module that holds all these."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


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


def pretrained_parts(model: nn.Module) -> dict[str, nn.Module]:
    """`{name: module}` of the transformers models in a module of the user's own; {} where it is one itself."""
    found: dict[str, nn.Module] = {}
    if not _is_transformers(model):
        for name, module in walk(model):
            if name and isinstance(original_of(module), PreTrainedModel) and not is_within(name, found):
                found[name] = original_of(module)
    return found


def _is_transformers(model: nn.Module) -> bool:
    """Whether transformers tells what of a model is new. Not of a class of one's own around a model of any name."""
    if not isinstance(model, PreTrainedModel) or _backbone_prefix(model):
        return isinstance(model, PreTrainedModel)
    definer = next(of for of in type(model).__mro__ if "forward" in vars(of))
    return definer.__module__.startswith(("transformers.", "transformers_modules.")) or bool(_lm_head(model))


def transformers_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The one transformers model in a module of the user's own, after its name and a dot; else '' and `model`."""
    parts = list(pretrained_parts(model).items())
    return (f"{parts[0][0]}.", parts[0][1]) if len(parts) == 1 else ("", model)


def backbone_prefix(model: nn.Module) -> str:
    """Name of the pretrained backbone inside a task model, with a trailing dot; '' if the model is the backbone."""
    outer, model = transformers_model(model)
    return outer + _backbone_prefix(model)


def _backbone_prefix(model: nn.Module) -> str:
    name = getattr(model, "base_model_prefix", "")
    inner = getattr(model, name, None) if isinstance(name, str) and name else None
    return f"{name}." if isinstance(inner, nn.Module) and inner is not model else ""


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The pretrained LM head, or None."""
    return _lm_head(transformers_model(model)[1])


def _lm_head(model: nn.Module) -> nn.Module | None:
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
    model ("...For...") that holds its backbone's parts directly has the linear layers beside them for a head. In a
    module of the user's own, what lies outside the one transformers model in it is new too.
    """
    outer, inner = transformers_model(model)
    if outer:
        return [*(outer + name for name in new_head(inner)), *parts_outside(model, [outer.rstrip(".")])[0]]
    if output_embeddings(model) is not None:
        return []
    prefix = _backbone_prefix(model)
    if prefix:
        children = [(name, child) for name, child in model.named_children() if f"{name}." != prefix]
        return [name for name, child in children if any(True for _ in child.parameters())]
    if not re.search(r"For[A-Z]", type(model).__name__):
        return []
    return [name for name, child in model.named_children() if is_linear(original_of(child))]


def parts_outside(model: nn.Module, inner: list[str]) -> tuple[list[str], list[str]]:
    """What of a model lies outside the modules `inner`: names of modules that can be called, and of parameters that
    belong to none of those, or that share a module with parameters of the inner ones."""
    known = {id(p) for name in inner for p in original_of(model.get_submodule(name)).parameters()}
    modules: list[str] = []
    parameters: list[str] = []

    def look(module: nn.Module, prefix: str) -> None:
        parameters.extend(f"{prefix}{n}" for n, p in module.named_parameters(recurse=False) if id(p) not in known)
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            own = [id(p) not in known for p in original_of(child).parameters()]
            if name in inner or not any(own):
                continue
            if any(part.startswith(f"{name}.") for part in inner) or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                look(child, f"{name}.")
            elif not all(own) or isinstance(child, (nn.ParameterList, nn.ParameterDict)):
                found = original_of(child).named_parameters()
                parameters.extend(f"{name}.{n}" for n, p in found if id(p) not in known)
            else:
                modules.append(name)

    look(model, "")
    return modules, parameters


def original_of(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _in_backbone(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the backbone that a tuner may stand in for, as far as their place goes.

    Left out: the head and the LM head; the inside of `nn.MultiheadAttention`, which reads its weights without calling
    it; and a pooler where there is no head, since nothing may read it (a task model is built with a pooler only if
    its head does).
    """
    prefix, head, lm_head = backbone_prefix(model), new_head(model), output_embeddings(model)
    outside = {*head, *(name for name, module in walk(model) if isinstance(module, nn.MultiheadAttention))}
    config = getattr(transformers_model(model)[1], "config", None)
    if getattr(config, "model_type", None) in _STATE_SPACE_MODELS:
        outside |= {name for name, _ in walk(model) if name.rpartition(".")[2] in _READ_NOT_CALLED}
    for name, module in walk(model):
        if not name.startswith(prefix) or base_of(module) is lm_head or module is lm_head:
            continue
        if not is_within(name, outside) and (head or "pooler" not in name.split(".")):
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


def block_indices(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """`{name: index of the outermost block that it lies in}` for those of `names` that lie in a numbered one."""
    blocks = {name for name in block_names(model) if name.rpartition(".")[2].isdigit()}
    found = {}
    for name in names:
        parts = name.split(".")
        holders = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        outermost = next((holder for holder in holders if holder in blocks), None)
        if outermost is not None:
            found[name] = int(outermost.rpartition(".")[2])
    return found


def norm_names(model: nn.Module) -> list[str]:
    """Norms inside the backbone's blocks (not the embeddings' norm, nor a final one)."""
    blocks = set(block_names(model))
    return [name for name, module in walk(model) if is_norm(module) and is_within(name, blocks)]


def block_linear_names(model: nn.Module) -> list[str]:
    """Linear layers inside the backbone's blocks."""
    blocks = set(block_names(model))
    return [name for name in linear_names(model) if is_within(name, blocks)]


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of three dimensions or more in the backbone's blocks that no linear layer, convolution or norm holds:
    fused experts (Mixtral, gpt-oss), XLNet's projections. A tuner layer stands in for none of them."""
    blocks = set(block_names(model))
    return {
        f"{name}.{own}": parameter
        for name, module in walk(model)
        if is_within(name, blocks) and not (is_linear(module) or is_norm(module))
        if "conv" not in type(base_of(module)).__name__.lower()
        for own, parameter in base_of(module).named_parameters(recurse=False)
        if parameter.dim() > 2
    }
