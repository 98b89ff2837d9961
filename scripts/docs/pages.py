"""Tables in Markdown, and their places in the pages."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

Lines = list[str]
ROOT = Path(__file__).resolve().parents[2]


def markdown(table: pd.DataFrame) -> Lines:
    """The lines of a table of texts; what is not there stays empty."""
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (table.columns, *table.fillna("").to_numpy()))
    return [first.replace("|  |", "| |"), "|" + "---|" * len(table.columns), *rest]


def spliced(text: str, kind: str, lines_of: Callable[[str], Lines]) -> str:
    """A page with `lines_of(NAME)` between its markers, `<!-- KIND:NAME -->` and `<!-- KIND:end -->`.

    Raises:
        ValueError: a marker has no end, or an end no marker.
    """
    mark = re.compile(rf"<!-- {kind}:([\w-]+) -->\n(.*?)<!-- {kind}:end -->", re.DOTALL)
    found = mark.findall(text)
    if text.count(f"<!-- {kind}:") != 2 * len(found) or any(f"<!-- {kind}:" in body for _, body in found):
        raise ValueError(f"Each <!-- {kind}:NAME --> must have its <!-- {kind}:end --> before the next one begins.")

    def fill(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- {kind}:{match[1]} -->", "", *lines_of(match[1]), "", f"<!-- {kind}:end -->"])

    return mark.sub(fill, text)
