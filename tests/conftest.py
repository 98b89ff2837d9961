from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import jinja2
import peft
import pytest
import torch
import transformers
from forks import Warm
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

torch.set_num_threads(1)  # the models are tiny: threads only cost

# Each save writes a model card, and its template takes as long to compile as all the rest of the save.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]

pytest_plugins = ["tiny_glue"]
REFUSES_PEFT = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
#: Files that take longest: they go first, so that two workers end at about the same time.
LONGEST = ("test_train_glue.py", "test_peft_suite.py")


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect() -> None:
    """What was imported is no garbage, and Trainer looks for some in all there is, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process to fork from that has not imported peft_learners."""
    process = Warm("peft", "transformers.trainer")
    yield process
    process.close()


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """torch.compile's caches and counters are empty."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """transformers 5.24.0 wants PEFT 0.22.0, which is not out, in `model.add_adapter` and its kin."""
    try:
        return (yield)
    except ValueError as error:
        if REFUSES_PEFT and "The version of PEFT you are using is not compatible" in str(error):
            pytest.skip(f"transformers {transformers.__version__} refuses PEFT {peft.__version__}: {error}")
        raise


def pytest_collection_modifyitems(items: list) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded of themselves, which xdist would swallow were it printed."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
