"""Names for a config that PEFT resolves to exactly the modules that are meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils.other import get_pattern_key
from torch import nn


def target_names(names: list[str], modules: Collection[str]) -> list[str] | str:
    """The shortest endings that match exactly these modules, or a regex where there are none.

    Args:
        modules: names of all modules of the base model.
    """
    others = {name for name in modules if name} - set(names)
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(re.escape(name) for name in sorted(names))  # PEFT wants the whole name to match
    return sorted(_find_minimal_target_modules(names, others)) if others else sorted(names)


def rank_patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """Those ranks that differ from the usual one, by keys that PEFT reads as regexes for the ends of names.

    Args:
        ranks: of all targets. Keys are whole names; anchored and escaped if one of them fits another target, too.
    """
    names = [name for name, rank in ranks.items() if rank != usual]
    plain = all(get_pattern_key(names, name) == name for name in ranks)
    return {name if plain else f"^{re.escape(name)}": ranks[name] for name in names}


def saved_names(names: list[str], modules: Collection[str]) -> tuple[list[str], list[str]]:
    """Names for `modules_to_save`, and the other modules that they match too: PEFT takes all that end like them."""
    others = [m for m in modules if m and m not in names and any(m.endswith(name) for name in names)]
    return sorted(names), others


def check_adapter_name(name: str) -> None:
    """Refuse a name that torch's containers can't hold.

    Raises:
        ValueError: it has a dot, or is the name of one of their methods.
    """
    if hasattr(nn.ParameterDict, name) or "." in name:
        better = name.replace(".", "_") if "." in name else f"{name}_1"
        raise ValueError(
            "adapter_name must have no dot, nor be the name of a method of torch's containers, which hold adapters by "
            f"their names, got {name!r}. Take another: {better!r}."
        )
