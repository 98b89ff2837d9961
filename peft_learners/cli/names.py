"""Names of modules as people read them: blocks, kinds of modules, what names have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "outside the blocks"


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 2, and capital letters with the others."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", name)]


def by_block(block: str) -> tuple[bool, bool, list[tuple[int, str]]]:
    """A key that sorts blocks as the model has them, a decoder's after an encoder's; last what lies outside ("")."""
    return not block, "decoder" in block, natural(block)


def split_name(module: str, shared: int = 0) -> tuple[str, str]:
    """A module's name as that of its block and the rest; outside the blocks the block is "", and the rest is without
    its first `shared` parts."""
    parts = module.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():  # a list in a block (T5's `layer`, MobileBERT's `ffn`) is a part of the block
            return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
    return "", ".".join(parts[shared:])


def shared_parts(modules: Iterable[str]) -> int:
    """How many parts at their beginning all names have in common, their last parts aside."""
    columns = zip(*(module.split(".")[:-1] for module in modules), strict=False)  # ends with the shortest
    return [*(len({*parts}) == 1 for parts in columns), False].index(False)


def short_names(layers: Sequence[str]) -> list[str]:
    """The layers' names without what all of them begin or end with; a number keeps the word before it."""
    split = [layer.split(".") for layer in layers]
    shortest = min(map(len, split))
    begin = end = 0
    if len(split) > 1:
        while begin < shortest - 1 and len({parts[begin] for parts in split}) == 1:
            begin += 1
        while end < shortest - begin - 1 and len({parts[-1 - end] for parts in split}) == 1:
            end += 1
    if begin and any(parts[begin].isdigit() for parts in split):
        begin -= 1
    return [".".join(parts[begin : len(parts) - end]) for parts in split]


def ends_with(name: str, ending: str) -> bool:
    """Whether a module's name ends with whole parts of another."""
    return name == ending or name.endswith(f".{ending}")
