"""The subcommands of `peft-learners`: a module each, whose `run` takes what `peft_learners_cli` reads."""

from __future__ import annotations

import re
from collections.abc import Container


class CommandError(ValueError):
    """A sentence on what a user can put right."""


def with_options(message: str, options: Container[str]) -> str:
    """A sentence in which arguments of Python are the options of a command that has them."""

    def as_option(match: re.Match[str]) -> str:
        name, value = match[1] or match[3], (match[2] or match[4] or "").strip('"')
        if name not in options:
            return match[0]
        return f"--{name.replace('_', '-')} {'' if value == 'True' else value}".rstrip()

    return re.sub(r'`(\w+)=("[^"]*"|\w+)?`|\b(\w+)=([\w.]+)', as_option, message)
