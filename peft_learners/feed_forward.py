"""The feed-forward pairs of a model, found from its structure.

Looks through adapters that are already there, as `discovery` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from .discovery import attention_names, base_of, is_linear, is_norm, linear_names, walk


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with an activation between them; hidden unit i is row i of the first and column i of the last.

    Attributes:
        first: names of the linear layers that lead in. Gated ones have two (gate and up), or one of twice the width,
            whose rows i and `width + i` belong to unit i.
        last: name of the linear layer that leads out.
        width: number of hidden units.
    """

    first: tuple[str, ...]
    last: str
    width: int

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.first, self.last)


def sizes(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear layer."""
    base = base_of(module)
    into, out = _get_in_out_features(base)
    return int(into or 0), int(out or 0)


def feed_forwards(model: nn.Module) -> list[FeedForward]:
    """The feed-forward pairs of the backbone, in its order.

    In the order in which a model registers its modules, with nothing but activations and dropout between them: one or
    more linear layers d -> h side by side (or one d -> 2h), then one h -> d, with h other than d; not in an attention.
    A gate that comes last (w1, w2, w3) counts to the pair before it.
    """
    modules = dict(walk(model))
    linears = linear_names(model)
    attention = set(attention_names(model, linears))
    outside = dict.fromkeys(name for name in linears if name not in attention)  # in order
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    found: list[FeedForward] = []
    pending: list[str] = []
    scope = ""
    for name, module in modules.items():
        if not (is_linear(module) or is_norm(module)):
            continue
        here = max((entry for entry in lists if name.startswith(f"{entry}.")), key=len, default="")
        block = name[: len(here) + 1 + name[len(here) + 1 :].find(".")] if here else ""
        usable = name in outside
        if not usable or block != scope:
            pending, scope = [], block
        if not usable:
            continue
        into, out = sizes(module)
        if pending:
            d, h = sizes(modules[pending[0]])
            if out == d and into != d and h in (into, 2 * into):
                found.append(FeedForward(tuple(pending), name, into))
                pending = []
                continue
            if (into, out) == (d, h) and _parent(name) == _parent(pending[0]):
                pending.append(name)
                continue
        pending = [name]
    return _with_late_gates(found, modules, list(outside))


def _with_late_gates(found: list[FeedForward], modules: dict[str, nn.Module], linears: list[str]) -> list[FeedForward]:
    taken = {name for pair in found for name in pair.names}
    result = []
    for pair in found:
        siblings = [n for n in linears if _parent(n) == _parent(pair.last) and n not in taken]
        late = [n for n in siblings if sizes(modules[n]) == sizes(modules[pair.first[0]])]
        own = _parent(pair.first[0]) == _parent(pair.last)
        result.append(FeedForward((*pair.first, *late), pair.last, pair.width) if own and len(late) == 1 else pair)
    return result


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


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
    patterns = []
    for pair in pairs:
        split = [name.split(".") for name in pair.names]
        shared = 0
        while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
            shared += 1
        pattern = [".".join(parts[shared:]) for parts in split]
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns
