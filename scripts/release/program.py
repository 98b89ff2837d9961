"""Print the program of a Markdown page: its Python blocks under `<!-- program -->`.

python -m scripts.release.program README.md
"""

import re
import sys
from pathlib import Path


def program(text: str) -> str:
    """The blocks, one after the other.

    Raises:
        ValueError: the page has none.
    """
    blocks = re.findall(r"^<!-- program -->\n```python\n(.*?)^```$", text, re.M | re.S)
    if not blocks:
        raise ValueError("The page has no Python block under <!-- program -->.")
    return "\n".join(blocks)


if __name__ == "__main__":
    print(program(Path(sys.argv[1]).read_text()), end="")
