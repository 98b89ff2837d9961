"""The benchmark's rows: files of JSON lines, one row per measurement, and a table of pandas made of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.glue.run_record import read_lines

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of a folder's files `*.jsonl`; none if there is no such file.

    Raises:
        ValueError: a line is no row.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [row for file in files for row in read_lines(file)]


def table_of(rows: Sequence[Row], device: str = "cpu") -> pd.DataFrame:
    """The rows of a kind of device by `setting` and `method`; nested fields have names with dots. Of several rows (a
    reference has one in each group) only the first is there.

    Raises:
        FileNotFoundError: there are no rows.
    """
    if not rows:
        raise FileNotFoundError("There must be rows of scripts.bench.run (*.jsonl), but there are none.")
    table = pd.json_normalize([row for row in rows if row["device"]["type"] == device])
    names = {"setting.name": "setting"}
    return table.rename(columns=names).drop_duplicates(["setting", "method"]).set_index(["setting", "method"])


def column(table: pd.DataFrame, name: str) -> pd.Series:
    """A column of rows; without values if no row has that field."""
    return table[name] if name in table else pd.Series(None, table.index, dtype=object)
