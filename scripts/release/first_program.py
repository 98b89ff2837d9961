"""Print the first Python program of a Markdown page that is marked to be run.

python -m scripts.release.first_program README.md
"""

import re
import sys
from pathlib import Path


def first_program(text: str) -> str:
    """The code of the first block under `<!-- run -->`.

    Raises:
        ValueError: the page has none.
    """
    block = re.search(r"^<!-- run -->\n```python\n(.*?)^```$", text, re.M | re.S)
    if block is None:
        raise ValueError("The page has no Python block under <!-- run -->.")
    return block[1]


if __name__ == "__main__":
    print(first_program(Path(sys.argv[1]).read_text()), end="")
