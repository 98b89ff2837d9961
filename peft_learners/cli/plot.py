"""`peft-learners plot`: a picture of what training has made of adapters, by their method."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from . import CommandError
from .source import read

#: Modules that draw adapters of a method: `draw(adapters, title, widths)`.
DRAWN = {"learner": "ranks", "far": "nodes", "nas_lora": "architecture"}


def run(adapters: Sequence[str], out: Optional[Path], title: Optional[str], width: Sequence[tuple[str, int]]) -> None:
    """Draw adapters of one method into a file."""
    found = {name: read(name) for name in adapters}
    methods = {adapter.config.method: name for name, adapter in found.items()}
    if len(methods) > 1:
        titles = {adapter.config.method: adapter.config.shown_name() for adapter in found.values()}
        named = " and ".join(f"{name} is a {titles[method]} adapter" for method, name in methods.items())
        raise CommandError(f"Adapters of one method can be drawn together, but {named}. Draw them one by one.")
    (method,) = methods
    if method not in DRAWN:
        kinds = "ranks (Learners), kept nodes (FAR) and what a search kept (NAS-LoRA)"
        raise CommandError(f"There is nothing to draw of a {method} adapter: pictures are of {kinds}.")
    try:
        figures: Any = importlib.import_module(f"{__package__}.figure")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "matplotlib":
            raise
        raise CommandError('plot needs matplotlib: pip install "peft-learners[plot]"') from error
    drawing: Any = importlib.import_module(f"{__package__}.{DRAWN[method]}")
    titled = {adapter.title if Path(name).exists() else name: adapter for name, adapter in found.items()}
    path = out or Path(f"{method}.png")
    # Folders of one name are called by their paths.
    shown = titled if len(titled) == len(found) else found
    figures.save(drawing.draw_adapters(shown, title, dict(width)), path)
    print(f"Wrote {path}.")
