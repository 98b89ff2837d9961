"""The attention of a model, found from its structure: which linear layers belong to it, and what each is for."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .modules import is_linear, walk

_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)s?$", re.IGNORECASE)
_ATTENTION_INPUT_NAME = re.compile(
    r"(^|_)(in|w?(q|k|v|kv|qk|qkv)|quer(y|ies)|keys?|values?|pos(ition(al)?)?|gates?|g)(_|$)", re.IGNORECASE
)
_VALUE_NAME = re.compile(r"(v|value|values)(_?(proj|projection|lin|linear|layer|head|net))?", re.IGNORECASE)
_FEED_FORWARD_NAME = re.compile(r"(^|_)(mlp|ffn?|feed_forward|feedforward|intermediate|experts?)$", re.IGNORECASE)


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
