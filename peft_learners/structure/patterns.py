"""Regexes that a config brings are looked at before any name is matched: some take a time without bound."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import sys
from collections.abc import Iterable
from typing import Any, Optional

# What reads regexes has no public name from Python 3.11 on.
_RENAMED = sys.version_info >= (3, 11)
sre: Any = importlib.import_module("re._constants" if _RENAMED else "sre_constants")
parser: Any = importlib.import_module("re._parser" if _RENAMED else "sre_parse")

#: Ways to match one name that a regex may have at most, and characters of it.
MOST_WAYS, MOST_CHARACTERS = 10**6, 50_000
#: What is many anyway is not told apart.
_MANY = 10**12
# How often a repeat can end: at each character of a name, or where what comes next is found, a word or a character.
_CHARACTERS, _ONE_CHARACTER, _ONE_WORD = 64, 8, 3
_REPEATS = {getattr(sre, name, None) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")} - {None}
#: Parts that match one character, or none, in one way.
_SINGLE = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT)
#: What a part of a regex begins with: one of these; None: many things.
Beginnings = Optional[list[str]]


def fault_of(pattern: str) -> str:
    """Why a regex can't be used, as a predicate; "" for one that can.

    A regex is matched by trying, one after the other, the ways in which it could fit. Their number is estimated from
    its parts: those of parts in a row multiply, those of alternatives add up, unless their beginnings tell which one
    it is. A part that has several ways of its own has no bound when it is repeated.
    """
    if len(pattern) > MOST_CHARACTERS:
        return f"has {len(pattern):,} characters, more than {MOST_CHARACTERS:,}"
    try:
        re.compile(pattern)
        ways = _ways(parser.parse(pattern), None)
    except (re.error, OverflowError) as error:
        return f"is no regex ({error})"
    except RecursionError:
        return "is nested too deeply"
    if ways == math.inf:
        return "repeats something that has several ways to match (as `(a+)+` and `(a|aa)*` do)"
    return "" if ways <= MOST_WAYS else "has too many repeats or alternatives in a row (as `.*.*.*.*.*` has)"


def first_fault(patterns: Iterable[str]) -> str:
    """A sentence about the first regex that can't be used; "" if all can."""
    faults = ((pattern, fault_of(pattern)) for pattern in patterns)
    return next((f"{pattern!r:.200} {fault}" for pattern, fault in faults if fault), "")


def _ways(items: Any, after: Beginnings) -> float:
    """Number of ways in which a name could fit, estimated from above.

    Args:
        items: a parsed regex.
        after: what comes next begins with.
    """
    ways: float = 1
    items = list(items)
    for index, (kind, value) in enumerate(items):
        if kind in _SINGLE:
            continue
        following = _beginnings(items, index + 1) if index + 1 < len(items) else after
        if kind in _REPEATS:
            least, most, inner = value
            inside = max(_ways(inner, None), 2 if inner.getwidth()[0] == 0 else 1)
            ways *= inside**most if most * math.log(inside) < 100 else math.inf
            if most > least:
                ways *= min(most - least + 1, _stops(following))
        elif kind is sre.BRANCH:
            each = [_ways(alternative, following) for alternative in value[1]]
            ways *= max(each) if _are_told_apart(value[1]) else sum(each)
        else:
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(inner, parser.SubPattern):
                    ways *= _ways(inner, following)
        ways = ways if ways == math.inf else min(ways, _MANY)
    return ways


def _stops(following: Beginnings) -> int:
    """At how many places of a name a repeat can end."""
    if not following:
        return _CHARACTERS
    return min(_CHARACTERS, sum(_ONE_WORD if len(word) >= 3 else _ONE_CHARACTER for word in following))


def _are_told_apart(alternatives: Any) -> bool:
    """Whether no two of them can fit at one place."""
    words = [word for alternative in alternatives for word in _beginnings(list(alternative)) or [""]]
    words.sort()
    return not any(later.startswith(word) for word, later in itertools.pairwise(words))


def _beginnings(items: list[Any], start: int = 0) -> Beginnings:
    """What parts in a row begin with, from one of them on."""
    word: list[str] = []
    for index in range(start, len(items)):
        kind, value = items[index]
        if kind is sre.LITERAL:
            word.append(chr(value))
            continue
        if word:
            break
        if kind is sre.SUBPATTERN:
            return _beginnings(list(value[-1]))
        if kind is sre.BRANCH:
            each = [_beginnings(list(alternative)) for alternative in value[1]]
            return None if None in each else [begin for found in each for begin in found or ()]
        if kind is sre.IN and all(one is sre.LITERAL for one, _ in value):
            return [chr(character) for _, character in value]
        if kind is not sre.AT:
            break
    return ["".join(word)] if word else None
