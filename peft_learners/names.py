"""Names for a config that PEFT resolves to exactly the modules that are meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils.other import get_pattern_key


def target_names(names: list[str], modules: Collection[str]) -> list[str] | str:
    """The shortest endings that match exactly these modules, or a regex where there are none.

    Args:
        modules: names of all modules of the base model.
    """
    others = {name for name in modules if name} - set(names)
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(re.escape(name) for name in sorted(names))  # PEFT wants the whole name to match
    return sorted(_find_minimal_target_modules(names, others)) if others else sorted(names)


def rank_patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by keys that PEFT reads as regexes for the ends of names: whole names, escaped where one fits another."""
    names = list(ranks)
    plain = all(get_pattern_key(names, name) == name for name in names)
    return {name if plain else f"^{re.escape(name)}": rank for name, rank in ranks.items()}


def saved_names(names: list[str], modules: Collection[str]) -> tuple[list[str], list[str]]:
    """Names for `modules_to_save`, and the other modules that they match too: PEFT takes all that end like them."""
    others = [m for m in modules if m and m not in names and any(m.endswith(name) for name in names)]
    return sorted(names), others
