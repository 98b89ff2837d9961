"""What of a model FAR trains: which modules get deltas, on which of their parameters, and which rows or columns are
nodes. Read from the model's structure alone; looks through adapters that are already there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from .. import discovery
from ..feed_forward import FeedForward, sizes
from .config import FARConfig

_EMBEDDING_NAME = re.compile(r"embed", re.IGNORECASE)
Kind = Literal["linear", "embedding", "module"]


@dataclass(frozen=True)
class Nodes:
    """How the nodes of a unit lie in one linear layer's weight.

    Attributes:
        unit: name of the unit; layers of one unit keep the same nodes.
        axis: 0: a node is a row (and a bias entry); 1: a column.
        width: number of nodes.
        copies: rows per node, `width` apart (2 for a fused gate).
    """

    unit: str
    axis: int
    width: int
    copies: int = 1


@dataclass(frozen=True)
class Home:
    """A module that gets deltas.

    Attributes:
        kind: how it is called: a linear layer, an embedding table, or any other module, by its parameters' sums.
        parameters: names of its trained parameters, by the container that their deltas lie in.
        nodes: for the weights of an FFN.
        batchless: whether it is an embedding whose input has no batch dimension (relative positions).
    """

    kind: Kind
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    nodes: Nodes | None = None
    batchless: bool = False


def homes(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """All modules that FAR can stand in for, outside the new head, and the names of parameters that none holds.

    These are linear layers, embeddings, and modules with parameters of their own: norms, convolutions, and composites
    without a linear layer in them (ViT's embeddings) or with one that they don't call (`nn.MultiheadAttention`), which
    are taken whole.
    """
    head = discovery.new_head(model)
    poolers = [] if head else [n for n, _ in discovery.walk(model) if "pooler" in n.split(".")]
    found: dict[str, nn.Module] = {}
    held: set[int] = set()
    for name, module in discovery.walk(model):
        if not name or _below(name, head) or _below(name, found) or _below(name, poolers):
            continue
        base = discovery.base_of(module)
        if discovery.is_sinusoidal(module):
            held |= {id(p) for p in base.parameters()}
            continue
        own = [p for p in base.parameters(recurse=False) if p.is_floating_point()]
        linear_inside = any(discovery.is_linear(child) for child in base.modules() if child is not base)
        if discovery.is_linear(module) or (own and (not linear_inside or isinstance(base, nn.MultiheadAttention))):
            found[name] = module
    held |= {id(p) for module in found.values() for p in discovery.base_of(module).parameters()}
    lost = [
        f"{name}.{own}" if name else own
        for name, module in discovery.walk(model)
        if not (_below(name, head) or _below(name, found) or _below(name, poolers))
        for own, parameter in discovery.base_of(module).named_parameters(recurse=False)
        if id(parameter) not in held and parameter.is_floating_point()
    ]
    # A parameter that a composite shares with a leaf (BERT's LM bias) is the leaf's.
    leaves = {id(p) for m in found.values() if not _is_composite(m) for p in discovery.base_of(m).parameters()}
    found = {
        name: module
        for name, module in found.items()
        if not _is_composite(module) or any(id(p) not in leaves for p in discovery.base_of(module).parameters())
    }
    return found, lost


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in discovery.base_of(module).children())


def _below(name: str, tops: Sequence[str] | dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:depth]) in tops for depth in range(1, len(parts) + 1))


def kind_of(module: nn.Module) -> Kind:
    base = discovery.base_of(module)
    if discovery.is_linear(module):
        return "linear"
    # A subclass may scale or shift what it looks up, so its own forward is called.
    return "embedding" if type(base) is nn.Embedding else "module"


def lay_out_homes(
    model: nn.Module, config: FARConfig, chosen: dict[str, nn.Module], pairs: list[FeedForward]
) -> dict[str, Home]:
    """What FAR trains of each chosen module. Modules of which nothing trains are left out."""
    tables = [name for name, module in chosen.items() if isinstance(discovery.base_of(module), nn.Embedding)]
    linears = [name for name, module in chosen.items() if discovery.is_linear(module)]
    attention = set(discovery.attention_names(model, linears + tables))
    attention |= {n for n, m in chosen.items() if isinstance(discovery.base_of(m), nn.MultiheadAttention)}
    lm_head = discovery.output_embeddings(model)
    shared = {id(p) for name in tables if name not in attention for p in discovery.base_of(chosen[name]).parameters()}
    nodes = _nodes(config, chosen, pairs)
    result: dict[str, Home] = {}
    for name, module in chosen.items():
        base = discovery.base_of(module)
        kind = kind_of(module)
        embedding = name not in attention and (
            isinstance(base, nn.Embedding)
            or bool(_EMBEDDING_NAME.search(name))
            or (lm_head is not None and base is discovery.base_of(lm_head))
            or id(getattr(base, "weight", None)) in shared
        )
        if (embedding and not config.train_embeddings) or (name in attention and not config.train_attention):
            continue
        norms = {n for n, child in base.named_modules() if discovery.is_norm(child)}
        parameters: dict[str, tuple[str, ...]] = {}
        for parameter_name, parameter in base.named_parameters():
            owner, _, last = parameter_name.rpartition(".")
            if owner in norms:
                train, part = config.train_norms, "far_bias_delta" if last == "bias" else "far_layernorm_delta"
            elif "bias" in last and not isinstance(base, nn.Embedding):
                train, part = config.train_biases, "far_bias_delta"
            else:
                train, part = True, "far_delta"
            if train and parameter.is_floating_point():
                parameters[part] = (*parameters.get(part, ()), parameter_name)
        if parameters:
            result[name] = Home(
                kind, parameters, nodes.get(name), name in attention and isinstance(base, nn.Embedding)
            )
    return result


def _nodes(config: FARConfig, chosen: dict[str, nn.Module], pairs: list[FeedForward]) -> dict[str, Nodes]:
    nodes: dict[str, Nodes] = {}
    for pair in pairs:
        for name in pair.names:
            if name not in chosen:
                continue
            outputs = sizes(chosen[name])[1]
            if config.granularity == "output_node":
                nodes[name] = Nodes(name, 0, outputs)
            elif name == pair.last:
                nodes[name] = Nodes(pair.last, 1, pair.width)
            else:
                nodes[name] = Nodes(pair.last, 0, pair.width, outputs // pair.width)
    return nodes
