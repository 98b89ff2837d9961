"""Starts PEFT's suite in a process of its own and reads its report."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import processes

MODULES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_config",
    "test_low_level_api",
    "test_other",
)
ENVIRONMENT = {
    # Only what the suite needs: a plugin that some environment has must not change what it does.
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # the models are tiny: threads only cost
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass
class Report:
    """What a run of pytest came to.

    Attributes:
        counts: by outcome ("passed", "skipped", "failure", "error"), then by PEFT's module and the tuner of the case.
    """

    status: int
    closing_line: str
    output: str
    counts: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    skip_reasons: Counter[str] = field(default_factory=Counter)

    def total(self, outcome: str) -> int:
        return sum(self.counts.get(outcome, {}).values())


def arguments(suite: Path, report: Path, modules: Sequence[str] = MODULES) -> list[str]:
    """Arguments of a pytest that runs modules of the suite, from the folder `suite`."""
    fixed = ["-p", "peft_suite.plugin", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(suite)]
    fixed += ["--import-mode", "prepend", "-q", "-W", "ignore", "--tb", "short", "-rfE", "--junitxml", str(report)]
    return [*fixed, *(f"tests/{module}.py" for module in modules)]


def here(package: str, arguments: list[str]) -> int:
    """The exit status of pytest in this process, on a copy of the package in the folder `package`."""
    import pytest

    sys.path.insert(0, package)
    copy = importlib.import_module("peft_learners")
    if not Path(str(copy.__file__)).is_relative_to(package):
        raise ImportError(f"peft_learners is {copy.__file__}, not the copy in {package}")
    return int(pytest.main(arguments))


def run(suite: Path, folder: Path, *options: str, modules: Sequence[str] = MODULES) -> Report:
    """Run the suite with our cases.

    Args:
        suite: what `source.fetch` returned.
        folder: for the report.
    """
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", *arguments(suite, report, modules), *options]
    done = subprocess.run(
        command, cwd=suite, env=processes.environment(**ENVIRONMENT), capture_output=True, text=True, timeout=850
    )
    return read(report, done.returncode, done.stdout, done.stderr)


def read(report: Path, status: int, output: str, errors: str = "") -> Report:
    """What a JUnit report says, which may be missing where pytest came to no end."""
    lines = output.strip().splitlines()
    result = Report(status, lines[-1] if lines else "", output + errors)
    if not report.is_file():
        return result
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        module = case.get("classname", "").split(".")[1]
        tuner = re.search(r"\b(Learner|FAR|NAS|Bottleneck)\b", case.get("name", ""))
        result.counts.setdefault(outcome, Counter())[module, tuner[0] if tuner else ""] += 1
        for skipped in case.iter("skipped"):
            result.skip_reasons[skipped.get("message", "")] += 1
    return result
