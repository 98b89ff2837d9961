"""`peft-learners card`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

from ..hub import write_card
from ..hub.full_card import check_picture, read_adapter
from ..hub.short_card import CARD


def run(folder: str, base_model: Optional[str], picture: Optional[Path]) -> None:
    """Write the card of the adapter in a folder."""
    check_picture(picture)
    write_card(folder, base_model=base_model, picture=picture)
    adapter = read_adapter(folder, base_model)
    if adapter.base_id is None:
        print(
            f"The adapter was trained on a local folder; the card calls the base model {adapter.base!r}. If it is on "
            "the Hub, give its id: --base-model OWNER/NAME",
            file=sys.stderr,
        )
    print(f"Wrote {Path(folder) / CARD}.")
