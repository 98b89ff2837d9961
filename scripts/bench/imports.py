"""How long importing the package takes beyond importing PEFT, in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from scripts.bench.measure import quartiles

ROUNDS = 10
_CODE = """
import json, time
start = time.perf_counter()
import {0}
middle = time.perf_counter()
import {1}
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


def import_rows(rounds: int = ROUNDS, packages: tuple[str, str] = ("peft", "peft_learners")) -> list[dict[str, Any]]:
    """A row with the seconds of importing the first package, and one of the second once the first is in.

    Modules are compiled in a first run that does not count, as pip compiles them when it installs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in packages}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-c", _CODE.format(*packages)]
        for number in range(rounds + 1):
            found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            if number:
                for name, value in zip(packages, json.loads(found.stdout.splitlines()[-1]), strict=True):
                    seconds[name].append(round(value, 6))
    return [
        {
            "group": "import",
            "method": name,
            "phase": "import",
            "settings": {},
            "seconds": {"import": values},
            "import_seconds": quartiles(values),
        }
        for name, values in seconds.items()
    ]
