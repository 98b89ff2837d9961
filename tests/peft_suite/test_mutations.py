"""Faults put into copies of the package, each of which has to make tests fail: those of PEFT's suite, or ours.

PEFT's suite sees no phases, so what it can't see (a freeze that has to last) is left to test_contract.py.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Warm

from peft_suite import runner, source

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peft_learners"
PEFTS = "test_custom_models.py::TestPeftCustomModel::"
CONTRACT = "contract/test_contract.py::"
#: Where tests of ours lie, and none of PEFT's.
OURS = ("contract/", "methods/")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="copies are tried in forks -- runs on Linux and macOS"),
]


@dataclass(frozen=True)
class Mutant:
    """A textual edit, and the test that must fail with it (and not without)."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return self.name


DELTAS = "{name: delta.detach() for name, delta in self.parameter_deltas(adapter).items()}"
MUTANTS = [
    Mutant(
        "Learner merges no bias",
        "layers/linear.py",
        '        if bias is not None:\n            values["bias"]',
        '        if False:\n            values["bias"]',
        PEFTS + "test_merge_layers[Learner both r=3]",
    ),
    Mutant(
        "NAS-LoRA merges no bias",
        "layers/linear.py",
        '        if bias is not None:\n            values["bias"]',
        '        if False:\n            values["bias"]',
        PEFTS + "test_merge_layers[NAS both]",
    ),
    Mutant(
        "Learner merges no bias of norms",
        "layers/module.py",
        DELTAS,
        DELTAS[:-1] + ' if name != "bias"}',
        PEFTS + "test_merge_layers[Learner norms alone]",
    ),
    Mutant(
        "NAS-LoRA merges no bias of other modules",
        "layers/module.py",
        DELTAS,
        DELTAS[:-1] + ' if name != "bias"}',
        PEFTS + "test_merge_layers[NAS norms]",
    ),
    Mutant(
        "FAR merges no bias",
        "far/layer.py",
        "if part not in self.far_source[adapter]]",
        'if part not in self.far_source[adapter] and "bias" not in part]',
        PEFTS + "test_merge_layers[FAR both]",
    ),
    *(
        Mutant(
            f"{tuner} does not move new adapters",
            "tuner.py",
            "        layer._move_adapter_to_device_of_base_layer(adapter_name)\n",
            "",
            PEFTS + f"test_adapter_dtype_autocast[False-False-dtype1-{case}]",
        )
        for tuner, case in (
            ("Learner", "Learner both r=3"),
            ("FAR", "FAR both"),
            ("NAS-LoRA", "NAS both"),
            ("Bottleneck", "Bottleneck both"),
        )
    ),
    Mutant(
        "Learner does not cast the input of low-rank updates",
        "ops/delta_linear.py",
        "middle = _masked(x.to(wide), mask",
        "middle = _masked(x, mask",
        PEFTS + "test_forward_bfloat16[Learner both r=3]",
    ),
    Mutant(
        "NAS-LoRA does not cast the input of low-rank updates",
        "ops/delta_linear.py",
        "middle = _masked(x.to(wide), mask",
        "middle = _masked(x, mask",
        PEFTS + "test_forward_bfloat16[NAS both]",
    ),
    Mutant(
        "Learner does not cast the input of dense deltas",
        "ops/delta_linear.py",
        "add_product(out, x.to(wide), rest",
        "add_product(out, x, rest",
        PEFTS + "test_forward_bfloat16[Learner in priming]",
    ),
    Mutant(
        "FAR does not cast the input",
        "layers/linear.py",
        "self._cast_input_dtype(x, delta.dtype)",
        "x",
        PEFTS + "test_forward_bfloat16[FAR both]",
    ),
    Mutant(
        "Learner freezes by requires_grad alone",
        "layers/value.py",
        "self.register_buffer(self.name, value)",
        "self.register_parameter(self.name, parameter)",
        CONTRACT + "test_stays_frozen[learner-distilbert]",
    ),
    Mutant(
        "a clone has no frozen values",
        "tuner.py",
        "layer.copy_frozen(source, adapter_name)",
        "pass",
        "contract/test_clones.py::test_clone[learner-last phase-own config]",
    ),
    Mutant(
        "folding leaves the scale in",
        "learner/layer.py",
        "pair.b / (self.learner_scaling[adapter] / root)",
        "pair.b",
        "methods/test_fold.py::test_nearest_product[None]",
    ),
    Mutant(
        "a state of another phase is loaded",
        "tuner.py",
        "model.register_load_state_dict_pre_hook(_check_state)",
        "pass",
        "contract/test_clones.py::test_whole_state[far-discard]",
    ),
    Mutant(
        "Learner loads a primed adapter unfrozen",
        "learner/model.py",
        "layer.freeze_parts(adapter, (DENSE_PART,))",
        "pass",
        CONTRACT + "test_reload_trainable[learner-distilbert]",
    ),
]
CONTROL = "control"
#: What PEFT's tests and ours import beside the package: slow, and the same for all copies.
COMMON = (
    "accelerate.test_utils.testing",
    "datasets",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
)
TESTS = sorted({mutant.test for mutant in MUTANTS})


def occurrences(mutant: Mutant) -> int:
    return (PACKAGE / mutant.file).read_text().count(mutant.old)


def copy_of_package(folder: Path, mutant: Mutant | None) -> Path:
    """The folder, with a copy of the package in it that has the mutant's edit."""
    shutil.copytree(PACKAGE, folder / "peft_learners", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path = folder / "peft_learners" / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
    return folder


def report_of(warm: Warm, folder: Path, mutant: Mutant | None, suite: Path, of_ours: bool) -> runner.Report:
    """What a run of the mutant's test reported; without one, of all tests that are ours, or PEFT's."""
    tests = [mutant.test] if mutant is not None else TESTS
    chosen = [f"tests/{test}" for test in tests if test.startswith(OURS) == of_ours]
    report = folder / "report.xml"
    if of_ours:
        options = ["-p", "no:cacheprovider", "-q", "-W", "ignore", "-o", "addopts=", "--junitxml", str(report)]
    else:
        options = runner.arguments(suite, report, modules=())
    package = str(copy_of_package(folder, mutant))
    where = ROOT if of_ours else suite
    job = warm.start("peft_suite.runner:here", package, [*options, *chosen], log=folder / "log", folder=where)
    return runner.read(report, job.wait(), job.output())


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[runner.Report]]:
    """By the name of each mutant, what its runs reported."""
    suite = source.fetch_or_skip()
    warm = Warm(*COMMON, **runner.ENVIRONMENT)
    reports: dict[str, list[runner.Report]] = {}

    def add(mutant: Mutant | None, of_ours: bool) -> None:
        report = report_of(warm, tmp_path_factory.mktemp("mutant"), mutant, suite, of_ours)
        reports.setdefault(CONTROL if mutant is None else mutant.name, []).append(report)

    add(None, False)
    add(None, True)
    for mutant in MUTANTS:
        if occurrences(mutant) == 1:
            add(mutant, mutant.test.startswith(OURS))
    warm.close()
    return reports


def test_control(reports: dict[str, list[runner.Report]]):
    """The unchanged copy passes the tests that mutants fail."""
    for report in reports[CONTROL]:
        assert report.status == 0, report.output[-3000:]
    assert sum(report.total("passed") for report in reports[CONTROL]) == len(TESTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant(mutant: Mutant, reports: dict[str, list[runner.Report]]):
    """The mutant makes its test fail."""
    assert occurrences(mutant) == 1, f"{mutant.file} has changed: edit it as the mutant's name says"
    (report,) = reports[mutant.name]
    assert report.status == 1, report.output[-3000:]
    assert report.total("failure") == 1 and report.total("error") == report.total("passed") == 0
