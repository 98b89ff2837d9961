"""What a user reads of a boundary while Trainer trains. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def tell(lines: Iterable[object], args: Any, state: Any) -> None:
    """Print lines as Trainer prints its logs: above its progress bar, or, without one, as they are; once in all.

    Args:
        args, state: Trainer's arguments and state.
    """
    if not state.is_world_process_zero:
        return
    for line in lines:
        if args.disable_tqdm:
            print(line)
        else:
            tqdm.write(str(line))


def in_units(count: float) -> str:
    """A number of bytes to three digits, in units of 1000."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 999.5 and unit != "TB":
        count, unit = count / 1000, next(units)
    digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {unit}"
