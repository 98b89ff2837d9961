"""Tables and the picture of results/evidence: scores, steps to LoRA's score, and costs, by method and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import pandas as pd

from scripts.docs.pages import Lines, markdown
from scripts.evidence import variants
from scripts.evidence.figures import Evidence, Mean, Record
from scripts.evidence.plan import REFERENCE

NONE = "\u2013"
NOTHING: Lines = ["No finished runs yet."]
#: Columns of means over tasks.
SPENT = {"steps": "steps, mean (tasks)", "near": "to a point less", "time": "time", "flops": "flops"}


#: Claims on scores: what is claimed, of which variant, against which, and the least difference that it means.
CLAIMS = (
    ("An unprimed Learner is LoRA", "unprimed", "lora", -1.0),
    ("Priming makes up for low rank", "keep", "unprimed", 0.0),
    ("Priming needs fewer steps", "fold_tenth_60", "lora_60", 0.0),
    ("A primed Learner is as good as full fine-tuning", "keep", "full", -1.0),
    ("BitFit is far below the others", "lora", "bitfit", 5.0),
    ("FAR is as good as full fine-tuning", "far", "full", -1.0),
    ("FREEZE FFNs is as good as full fine-tuning", "freeze_ffns", "full", -1.0),
    ("Nine tenths of the biases can be pruned", "u_bitfit10", "bitfit", -1.0),
    ("A searched architecture beats a uniform one of equal size (NAS-LoRA, Table 1)", "u_mam", "mam", 0.0),
    ("Unstructured pruning keeps more than structured (the same)", "u_mam", "s_mam", 0.0),
    ("A tenth of the biases beats LoRA of rank 1 at about equal bytes", "u_bitfit10", "lora1", 0.0),
)


class Tables:
    """The tables of the page, each under the name of its marker."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.tasks = evidence.tasks
        self.tables: dict[str, Callable[[], Lines]] = {
            **{f"scores-{name}": partial(self.scores, shown) for name, shown in evidence.protocol.page.items()},
            **{f"steps-{name}": partial(self.steps, shown) for name, shown in evidence.protocol.page.items()},
            "rates": self.rates,
            "tests-rank": partial(self.tests, "sst2", evidence.protocol.page.get("rank", ())),
            "losses-decoder": partial(self.losses, "decoder", evidence.protocol.page["core"]),
            "held-decoder": partial(self.held, "decoder", evidence.protocol.page["core"]),
            "claims": self.claims,
            "rows": self.rows,
        }

    def _shown(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if any(self.evidence.cell(task, name) for task in self.tasks)]

    def _label(self, task: str) -> str:
        return self.evidence.protocol.tasks[task].label

    def scores(self, names: Sequence[str]) -> Lines:
        """Score on the test part by task, and how far it is from LoRA's."""
        rows = []
        for name in self._shown(names):
            row = {"": self.evidence.protocol.variants[name].label}
            for task in self.tasks:
                row[self._label(task)] = self._score(task, name)
            mean = over([self.evidence.difference(task, name) for task in self.tasks])
            row["to LoRA, mean (tasks)"] = (
                "" if name == REFERENCE or mean is None else f"{signed(mean)} ({mean.count})"
            )
            rows.append(row)
        return markdown(pd.DataFrame(rows)) if rows else NOTHING

    def _score(self, task: str, name: str) -> str:
        found, difference = self.evidence.test(task, name), self.evidence.difference(task, name)
        if found is None:
            return "diverged" if self.evidence.cell(task, name) else NONE
        own = f"**{found.value:.1f}** ± {found.error:.1f}" if found.error is not None else f"**{found.value:.1f}**"
        beside = "" if difference is None or name == REFERENCE else f"; {signed(difference)}"
        return f"{own} ({found.count}){beside}"

    def steps(self, names: Sequence[str]) -> Lines:
        """What each method spends to LoRA's score, to what LoRA spends."""
        rows = []
        for name in self._shown(names):
            row = {"": self.evidence.protocol.variants[name].label}
            for task in self.tasks:
                row[self._label(task)] = self._arrival(task, name)
            for what, label in SPENT.items():
                mean = over([self.evidence.ratio(task, name, what) for task in self.tasks])
                row[label] = NONE if mean is None else f"{plain(mean)} ({mean.count})"
            for label, found in (("file", self._file(name)), ("peak", self._peak(name))):
                row[label] = NONE if found is None else f"{found:.2f}"
            rows.append(row)
        return markdown(pd.DataFrame(rows)) if rows else NOTHING

    def _arrival(self, task: str, name: str) -> str:
        ratio, count = self.evidence.ratio(task, name, "steps"), len(self.evidence.cell(task, name))
        if ratio is None:
            return NONE
        arrived = self.evidence.arrived(task, name)
        return f"{plain(ratio)} ({arrived} of {count})" if arrived else f"never (0 of {count})"

    def _file(self, name: str) -> float | None:
        """Bytes of the saved adapter to those of LoRA's, in the mean over tasks. Of a method that trains the model in
        place its trained parameters count, four bytes each."""

        def size(variant: str, record: Record) -> int:
            in_place = self.evidence.protocol.variants[variant].method in variants.IN_PLACE
            return 4 * record["phases"][-1]["trained_parameters"] if in_place else record["file_bytes"]

        pairs = [(self.evidence.cell(task, name), self.evidence.cell(task, REFERENCE)) for task in self.tasks]
        first = [[next(iter(cell.values())) for cell in pair] for pair in pairs if all(pair)]
        sizes = [size(name, own) / size(REFERENCE, other) for own, other in first]
        return fmean(sizes) if sizes else None

    def _peak(self, name: str) -> float | None:
        """Bytes that the largest phase holds to those of LoRA's, in the mean over tasks."""
        tokens = [self.evidence.protocol.tasks[task].tokens for task in self.tasks if self.evidence.cell(task, name)]
        pairs = [(self.evidence.costs(name, each), self.evidence.costs(REFERENCE, each)) for each in tokens]
        peaks = [[max(cost.bytes for cost in costs) for costs in pair] for pair in pairs if all(pair)]
        return fmean(own / other for own, other in peaks) if peaks else None

    def claims(self) -> Lines:
        """What the papers claim of scores, and what the runs say: beyond the margin and on several tasks, or open."""
        rows = []
        for claim, own, other, least in CLAIMS:
            found = over([self.evidence.difference(task, own, other) for task in self.evidence.protocol.tasks])
            labels = [self.evidence.protocol.variants[name].label for name in (own, other)]
            number = "not run" if found is None else f"{signed(found)} ({found.count})"
            verdict = "open"
            if found is not None and found.count > 1 and abs(found.value - least) > found.margin:
                verdict = "**yes**" if found.value > least else "**no**"
            rows.append(
                {"claim": claim, "compared": f"{labels[0]} - {labels[1]}", "points (tasks)": number, "": verdict}
            )
        return markdown(pd.DataFrame(rows))

    def _value(self, task: str, value: float) -> str:
        return f"loss {-value:.4f}" if self.evidence.protocol.tasks[task].causal else f"{value:.1f}"

    def rates(self) -> Lines:
        """Score on the rows to choose by, by rate, with the first seed."""
        tasks = [task for task in self.evidence.protocol.tasks if any(run.task == task for run in self.evidence.runs)]
        rows = []
        for name, variant in self.evidence.protocol.variants.items():
            cells = {self._label(task): self._rates(task, name) for task in tasks}
            if any(cells.values()):
                rows.append({"": variant.label, **cells})
        return markdown(pd.DataFrame(rows)) if rows else NOTHING

    def tests(self, task: str, names: Sequence[str]) -> Lines:
        """Score on the test part, by rate, with the first seed."""
        rows = []
        for name in names:
            tests = {
                power(rate): self.evidence.runs[run]["test"] for rate, run in self.evidence.grid(task, name).items()
            }
            cells = {rate: "diverged" if test is None else f"{test:.1f}" for rate, test in tests.items()}
            if cells:
                rows.append({"": self.evidence.protocol.variants[name].label, **cells})
        return markdown(pd.DataFrame(rows)) if rows else NOTHING

    def losses(self, task: str, names: Sequence[str]) -> Lines:
        """Training loss, in the mean since the evaluation before, and loss on the rows to choose by, by quarters."""
        rows = []
        for name in names:
            records = list(self.evidence.cell(task, name).values())
            if not records:
                continue
            ends = [point["step"] for point in records[0]["curve"]]
            row = {"": self.evidence.protocol.variants[name].label}
            for end in ends[len(ends) // 4 - 1 :: len(ends) // 4]:
                train, held_out = (
                    fmean(point["loss"] for r in records for point in r[curve] if point["step"] == end)
                    for curve in ("train_loss", "curve")
                )
                row[f"step {end}"] = f"{train:.3f} / {held_out:.3f}"
            rows.append(row)
        return markdown(pd.DataFrame(rows)) if rows else NOTHING

    def held(self, task: str, names: Sequence[str]) -> Lines:
        """What a step of each phase takes: its time, and the bytes that it holds, in MB."""
        tokens, rows = self.evidence.protocol.tasks[task].tokens, []
        found = [row for row in self.evidence.cost_rows if row["tokens"] == tokens and row["variant"] in names]
        for cost in sorted(found, key=lambda row: (names.index(row["variant"]), row["phase"])):
            ratio, held = cost["ratio_to_lora"], cost["bytes"]
            several = sum(other["variant"] == cost["variant"] for other in found) > 1
            when = (", in priming", ", afterwards")[cost["phase"]] if several else ""
            rows.append(
                {
                    "": self.evidence.protocol.variants[cost["variant"]].label + when,
                    "time": f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
                    "trained": f"{cost['trained_parameters']:,}",
                    **{part: f"{held[part] / 1e6:.0f}" for part in ("stored", "gradients", "optimizer")},
                    "all": f"{held['total'] / 1e6:.0f}",
                }
            )
        return markdown(pd.DataFrame(rows)) if rows else NOTHING

    def _rates(self, task: str, name: str) -> str:
        best, cells = self.evidence.rate(task, name), []
        rates = self.evidence.protocol.rates(task, name)
        for rate, run in self.evidence.grid(task, name).items():
            text = self._value(task, self.evidence.choice[run])
            end = " †" if rate in (rates[0], rates[-1]) else ""
            cells.append(f"{power(rate)}: **{text}**{end}" if rate == best else f"{power(rate)}: {text}")
        return ", ".join(cells)

    def rows(self) -> Lines:
        """Rows, steps and target of each task."""
        rows = []
        for task in self.tasks:
            record = next(iter(self.evidence.cell(task, REFERENCE).values()))
            target = self.evidence.target(task)
            row = {"": self._label(task), **{part: f"{count:,}" for part, count in record["rows"].items()}}
            rows.append({**row, "steps": f"{record['curve'][-1]['step']}", "LoRA's score": f"{target:.1f}"})
        return markdown(pd.DataFrame(rows)) if rows else NOTHING


def over(values: Sequence[Mean | None]) -> Mean | None:
    """The mean over the tasks that have a value."""
    known = [value for value in values if value is not None]
    return Mean.over_tasks(known) if known else None


def plain(mean: Mean) -> str:
    """A mean with its error over seeds."""
    least = "≥ " if mean.capped else ""
    return f"{least}{mean.value:.2f}" if mean.error is None else f"{least}{mean.value:.2f} ± {mean.error:.2f}"


def signed(mean: Mean) -> str:
    """A difference with its errors: over seeds, and for other test rows."""
    errors = [f"{error:.1f}" for error in (mean.error, mean.rows) if error is not None]
    return " ± ".join([f"{mean.value:+.1f}", *(["/".join(errors)] if errors else [])])


def power(rate: float) -> str:
    """A learning rate without needless zeros: 3e-5."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def draw(evidence: Evidence, path: Path) -> None:
    """Draw the score on the rows to choose by against steps, a panel per task; the dashed line is LoRA's
    at its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not (tasks := evidence.tasks):
        return
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.8), layout="constrained", squeeze=False)
    handles = {}
    for panel, task in zip(panels[0], tasks, strict=True):
        for index, name in enumerate(evidence.protocol.page["core"]):
            if records := evidence.cell(task, name):
                curves = [[point["score"] or 0.0 for point in record["curve"]] for record in records.values()]
                steps = [point["step"] for point in next(iter(records.values()))["curve"]]
                means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                label = evidence.protocol.variants[name].label
                (handles[label],) = panel.plot(steps, means, marker=".", color=f"C{index}")
        panel.axhline(evidence.target(task), color="0.4", linestyle="--", linewidth=1)
        panel.set(title=evidence.protocol.tasks[task].label, xlabel="steps")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("score on the rows to choose by")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
