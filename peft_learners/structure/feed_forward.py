"""The feed-forward pairs of a model, found from its structure.

Looks through adapters that are already there, as `modules` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .attention import attention_names
from .modules import is_linear, is_norm, linear_names, walk
from .weights import sizes


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
