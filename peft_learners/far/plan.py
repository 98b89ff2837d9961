"""What of a model FAR trains: which modules get deltas, on which of their parameters, and which rows or columns are
nodes. Read from the model's structure alone; looks through adapters that are already there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..structure.attention import attention_names
from ..structure.feed_forward import FeedForward
from ..structure.modules import common_parent, is_linear, is_norm, is_within, new_head, output_embeddings, walk
from ..structure.weights import base_of, sizes
from .config import FARConfig

_EMBEDDING_NAME = re.compile(r"embed", re.IGNORECASE)


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

    def rows(self, selection: torch.Tensor) -> torch.Tensor:
        """Rows (or columns) of the weight that belong to selected nodes."""
        return torch.cat([selection + copy * self.width for copy in range(self.copies)])


@dataclass(frozen=True)
class Target:
    """A module that gets deltas.

    Attributes:
        parameters: names of its trained parameters, by the container that their deltas lie in.
        nodes: for the weights of an FFN.
        batchless: whether it is an embedding whose input has no batch dimension (relative positions).
    """

    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    nodes: Nodes | None = None
    batchless: bool = False


def adaptable(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """All modules that FAR can stand in for, outside the new head, and the names of parameters that none holds.

    These are linear layers, embeddings, and modules with parameters of their own: norms, convolutions, and composites
    without a linear layer in them (ViT's embeddings) or with one that they don't call (`nn.MultiheadAttention`), which
    are taken whole.
    """
    head = new_head(model)
    outside = set(head) or {name for name, _ in walk(model) if "pooler" in name.split(".")}
    found: dict[str, nn.Module] = {}
    held: set[int] = set()
    for name, module in walk(model):
        if not name or is_within(name, outside) or is_within(name, found):
            continue
        base = base_of(module)
        if is_sinusoidal(module):
            held |= {id(p) for p in base.parameters()}
            continue
        own = [p for p in base.parameters(recurse=False) if p.is_floating_point()]
        linear_inside = any(is_linear(child) for child in base.modules() if child is not base)
        if is_linear(module) or (own and (not linear_inside or isinstance(base, nn.MultiheadAttention))):
            found[name] = module
    held |= {id(p) for module in found.values() for p in base_of(module).parameters()}
    lost = [
        f"{name}.{own}" if name else own
        for name, module in walk(model)
        if not (is_within(name, outside) or is_within(name, found))
        for own, parameter in base_of(module).named_parameters(recurse=False)
        if id(parameter) not in held and parameter.is_floating_point()
    ]
    # A parameter that a composite shares with a leaf (BERT's LM bias) is the leaf's.
    leaves = {id(p) for m in found.values() if not _is_composite(m) for p in base_of(m).parameters()}
    found = {
        name: module
        for name, module in found.items()
        if not _is_composite(module) or any(id(p) not in leaves for p in base_of(module).parameters())
    }
    return found, lost


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in base_of(module).children())


def lay_out_targets(
    model: nn.Module, config: FARConfig, chosen: dict[str, nn.Module], pairs: list[FeedForward]
) -> dict[str, Target]:
    """What FAR trains of each chosen module. Modules of which nothing trains are left out."""
    tables = [name for name, module in chosen.items() if isinstance(base_of(module), nn.Embedding)]
    linears = [name for name, module in chosen.items() if is_linear(module)]
    attention = set(attention_names(model, linears + tables))
    attention |= {n for n, m in chosen.items() if isinstance(base_of(m), nn.MultiheadAttention)}
    lm_head = output_embeddings(model)
    shared = {id(p) for name in tables if name not in attention for p in base_of(chosen[name]).parameters()}
    nodes = _nodes(config, chosen, pairs)
    result: dict[str, Target] = {}
    for name, module in chosen.items():
        base = base_of(module)
        embedding = name not in attention and (
            isinstance(base, nn.Embedding)
            or bool(_EMBEDDING_NAME.search(name))
            or (lm_head is not None and base is base_of(lm_head))
            or id(getattr(base, "weight", None)) in shared
        )
        if (embedding and not config.train_embeddings) or (name in attention and not config.train_attention):
            continue
        norms = {n for n, child in base.named_modules() if is_norm(child)}
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
            batchless = name in attention and isinstance(base, nn.Embedding)
            result[name] = Target(parameters, nodes.get(name), batchless)
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


def named_feed_forwards(model: nn.Module, patterns: Sequence[Sequence[str]]) -> list[FeedForward]:
    """The pairs that a user names: endings of module names, the last being the linear layer that leads out.

    `["intermediate.dense", "output.dense"]` matches every P with linear layers `P.intermediate.dense` and
    `P.output.dense`.

    Raises:
        ValueError: a pattern that matches nothing, or layers whose sizes don't fit.
    """
    modules = dict(walk(model))
    found: dict[str, FeedForward] = {}
    for pattern in patterns:
        *first, last = pattern
        before = len(found)
        for name in modules:
            if name != last and not name.endswith(f".{last}"):
                continue
            prefix = name[: len(name) - len(last)]
            names = [f"{prefix}{part}" for part in first]
            if not all(n in modules and is_linear(modules[n]) for n in (*names, name)):
                continue
            width = sizes(modules[name])[0]
            for n in names:
                if sizes(modules[n])[1] not in (width, 2 * width):
                    raise ValueError(
                        f"FARConfig: `ffn_modules` names {n} ({sizes(modules[n])[1]} outputs) before {name} "
                        f"({width} inputs): the first linear layers must have as many outputs as the last has inputs, "
                        "or, gated and fused, twice as many."
                    )
            found[name] = FeedForward(tuple(names), name, width)
        if len(found) == before:
            linears = sorted({n.rpartition(".")[2] for n, m in modules.items() if n and is_linear(m)})
            raise ValueError(
                f"FARConfig: `ffn_modules` must hold endings of names of linear layers with one prefix in common, the "
                f"last being the one that leads out, got {list(pattern)}, which matches nothing. The model's linear "
                f"layers are named {', '.join(linears)}. For example: ffn_modules=[['fc_in', 'fc_out']]."
            )
    return list(found.values())


def patterns_of(pairs: Sequence[FeedForward]) -> list[list[str]]:
    """Endings of names, as `named_feed_forwards` takes them, one list for all blocks that are built alike."""
    patterns: list[list[str]] = []
    for pair in pairs:
        parent = common_parent(pair.names)
        pattern = [name.removeprefix(f"{parent}.") for name in pair.names]
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns
