"""The benchmark's targets against its rows: each target, what was found, and whether it is met.

    python -m scripts.bench.targets results/bench

With --everywhere figures of settings that no target is for are printed too; with --strict the exit status is 1 where a
target is missed, or its row is not there.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from scripts.bench.measure import aligned
from scripts.bench.rows import Row, row_of, rows_to_show, settings_of, time_ratio

Figure = Callable[[Row], float]


@dataclass(frozen=True)
class Target:
    """What a figure is to be at most.

    Attributes:
        name: of the figure.
        limit: the highest value that meets the target.
        settings: that it is for.
        method: whose rows have it.
        figure: reads it from a row; a median, where there are several values.
    """

    name: str
    limit: float
    settings: tuple[str, ...]
    method: str
    figure: Figure


@dataclass(frozen=True)
class Finding:
    """A target in one setting; where there is no value, `why` says why."""

    target: Target
    setting: str
    value: Optional[float]
    why: str = ""

    @property
    def verdict(self) -> str:
        """In a setting that the target is not for, none."""
        if self.setting not in self.target.settings:
            return ""
        if self.value is None:
            return self.why
        return "met" if self.value <= self.target.limit else "MISSED"


def step_time(reference: str) -> Figure:
    return lambda row: time_ratio(row, reference)["median"]


def stored(reference: str) -> Figure:
    return lambda row: row["bytes_ratios"][reference]["stored"]


def to_bound(row: Row) -> float:
    return row["flops_to_bound"]


def import_ms(row: Row) -> float:
    return 1000 * row["import_seconds"]["median"]


RANK_64 = ("minilm-16x32-r64", "minilm-16x128-r64")
RANK_8 = ("minilm-16x32-r8", "minilm-16x128-r8")
MINILM = (*RANK_8, *RANK_64)
#: The same shapes, measured with an allocator that gives no memory back.
KEPT_HEAP = "-kept-heap"


def kept(settings: Sequence[str]) -> tuple[str, ...]:
    return (*settings, *(f"{setting}{KEPT_HEAP}" for setting in settings))


LONG_ROWS = ("minilm-16x128-r8", "minilm-16x128-r64")

TARGETS = (
    Target("Learner after priming / LoRA: step time", 0.87, kept(RANK_64), "learner_primed", step_time("lora")),
    Target("Learner after priming / LoRA: step time", 0.91, kept(RANK_8), "learner_primed", step_time("lora")),
    Target("Learner after priming / LoRA: stored bytes", 0.95, RANK_64, "learner_primed", stored("lora")),
    Target("Learner after priming: flops / bound", 1.05, MINILM, "learner_primed", to_bound),
    Target(
        "Learner in priming / full fine-tuning: step time", 1.00, kept(MINILM), "learner_priming", step_time("full")
    ),
    Target("FAR after priming / full fine-tuning: step time", 0.88, RANK_64, "far_after", step_time("full")),
    Target("FAR after priming / full fine-tuning: stored bytes", 0.78, RANK_64, "far_after", stored("full")),
    *(
        Target(
            f"NAS-LoRA's search ({space}) / without importance: step time",
            1.03,
            RANK_8,
            f"nas_search{suffix}",
            step_time(f"nas_plain{suffix}"),
        )
        for space, suffix in (("U-MaM", ""), ("S-MaM", "_s_mam"), ("U-BitFit", "_u_bitfit"))
    ),
    Target(
        "Learner, unmerged / base model: inference",
        1.03,
        kept(LONG_ROWS),
        "inference_learner",
        step_time("inference_base"),
    ),
    Target(
        "Learner without priming, unmerged / base model: inference",
        1.03,
        kept(LONG_ROWS),
        "inference_learner_unprimed",
        step_time("inference_base"),
    ),
    Target("import over `import peft`: ms", 50.0, ("import",), "peft_learners", import_ms),
)


def check(rows: Sequence[Row], device: str = "cpu", everywhere: bool = False) -> Iterator[Finding]:
    """Each target in each of its settings.

    Args:
        device: the kind whose rows count.
        everywhere: also in the other settings that have such rows.
    """
    measured = [setting for setting, kind in settings_of(rows) if kind == device]
    for target in TARGETS:
        others = [setting for setting in measured if everywhere and setting not in target.settings]
        for setting in (*target.settings, *others):
            row = row_of(rows, setting, target.method, device)
            if row is not None and "skipped" not in row:
                yield Finding(target, setting, target.figure(row))
            elif setting in target.settings:
                why = "not measured" if row is None else f"skipped: {row['skipped']}"
                yield Finding(target, setting, None, why)


def report(findings: Sequence[Finding]) -> str:
    """The findings as a table."""
    table = [["figure", "setting", "at most", "found", ""]]
    for finding in findings:
        value = "" if finding.value is None else f"{finding.value:.3f}"
        table.append([finding.target.name, finding.setting, f"{finding.target.limit:.2f}", value, finding.verdict])
    return aligned(table)


def main(argv: Optional[list[str]] = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Hold the benchmark's rows against its targets.")
    parser.add_argument("rows", nargs="?", type=Path, default=Path("results/bench"), help="folder (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="whose rows count (%(default)s)")
    parser.add_argument("--everywhere", action="store_true", help="also in settings that a target is not for")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless all targets are met")
    args = parser.parse_args(argv)
    findings = list(check(rows_to_show(args.rows), args.device, args.everywhere))
    print(report(findings))
    return int(args.strict and any(finding.verdict not in ("met", "") for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
