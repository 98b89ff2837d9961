"""Files of the benchmark's rows: JSON lines, one row per measurement."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

Row = dict[str, Any]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines in one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, or of a folder's files `*.jsonl` but `*-selected*.jsonl`; none if there is no such file.

    Raises:
        ValueError: a line is no row.
    """
    if path.is_dir():
        files = (file for file in sorted(path.glob("*.jsonl")) if "-selected" not in file.name)
        return [row for file in files for row in read_rows(file)]
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_row(line, f"{path}, line {number},") for number, line in enumerate(lines, 1)]


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} must be a JSON object, got {line[:80]!r}; delete the file, or measure with --again."
        )
    return row


def rows_to_show(path: Path) -> list[Row]:
    """The rows of a folder.

    Raises:
        FileNotFoundError: it holds none.
    """
    rows = read_rows(path)
    if not rows:
        raise FileNotFoundError(f"{path} must hold rows of scripts/bench/run.py (*.jsonl), but has none.")
    return rows


def settings_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """`(setting, kind of device)` in the order of the rows."""
    return list(dict.fromkeys((row["setting"]["name"], row["device"]["type"]) for row in rows))


def row_of(rows: Sequence[Row], setting: str, method: str, device: str = "cpu") -> Optional[Row]:
    """The first row of a method in a setting: a reference has one in each group."""
    wanted = (setting, device, method)
    found = (row for row in rows if (row["setting"]["name"], row["device"]["type"], row["method"]) == wanted)
    return next(found, None)


def time_ratio(row: Row, reference: str) -> dict[str, float]:
    """Quartiles of a step's time relative to another method's."""
    return row["time_ratios"][reference]["step"]
