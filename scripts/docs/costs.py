"""What a training step of each method costs, beside Table 1 of the Learners paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from scripts.bench.tables import time_column
from scripts.docs.pages import Lines, markdown

#: Of a cell that nothing stands behind.
MISSING = "\N{EN DASH}"
#: Settings of the benchmark by the table's name: that of the scores, and one of the paper's model.
SETTINGS = {"table1": "minilm-16x128-r64", "table1-distilbert": "distilbert-16x128-r64"}


@dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes:
        label: in the first column.
        rows: names of its benchmark rows, one per phase in their order.
        paper: its name in `papers.json`; empty: not in the paper.
        shares: of the steps of a training that each phase has, in the paper's experiments.
    """

    label: str
    rows: tuple[str, ...]
    paper: str = ""
    shares: tuple[float, ...] = (1.0,)


METHODS = (
    Method("full fine-tuning", ("full",), "full"),
    Method("FAR, 10 %", ("far_priming", "far_after"), "far10", (0.01, 0.99)),
    Method("sequential adapters", ("adapter_sequential",), "adapter_sequential"),
    Method("parallel adapters", ("adapter_parallel",), "adapter_parallel"),
    Method("FREEZE FFNs", ("freeze_ffns",), "freeze_ffns"),
    Method("BitFit", ("bitfit",), "bitfit"),
    Method("Learner, primed", ("learner_priming", "learner_primed"), "learner64_p2", (0.4, 0.6)),
    Method("Learner, without priming", ("learner_unprimed",)),
    Method("LoRA", ("lora",)),
    Method("AdaLoRA, rank 64 to 32", ("adalora",)),
    Method("SHiRA", ("shira",)),
    Method("prompt tuning", ("prompt_tuning",)),
    Method("MaM", ("lora_mam",)),
)


def table1(table: pd.DataFrame, paper: Mapping[str, Any], setting: str = SETTINGS["table1"]) -> Lines:
    """Per method: trained parameters, time of a step, bytes; of methods with phases, of each in their order, and the
    mean time of a step of a whole training, the phases weighted by their steps.

    A method of the paper without benchmark rows has dashes beside the paper's numbers; other methods without rows are
    left out. Bytes are counted, in MB: *weights* (buffers too), *stored* (what autograd keeps from forward for
    backward), *optimizer* (its state), and *peak*, the sum of these and of the gradients.

    Args:
        table: the benchmark's rows.
        paper: the Learners paper's part of `papers.json`.
        setting: of the benchmark.
    """
    theirs = {row["ours"]: row for row in paper["table1"]["rows"]}
    phases = {method: _phases(table, method, setting) for method in METHODS}
    if not any(phases.values()):
        return [f"No rows of {setting} yet."]
    lines = []
    for method, found in phases.items():
        if found or method.paper:
            beside = _paper_cells(paper["model"], theirs.get(method.paper), theirs["full"]["time"])
            lines.append({"": method.label, **_cells(found, method.shares), **beside})
    return markdown(pd.DataFrame(lines))


def _phases(table: pd.DataFrame, method: Method, setting: str) -> list[pd.Series]:
    """A method's rows in the order of its phases; empty if one is not there or was skipped."""
    found = [table.loc[(setting, name)] for name in method.rows if (setting, name) in table.index]
    measured = [row for row in found if pd.isna(row.get("skipped"))]
    return measured if len(measured) == len(method.rows) else []


def _cells(phases: Sequence[pd.Series], shares: Sequence[float]) -> dict[str, str]:
    def each(cell: Callable[[pd.Series], str]) -> str:
        """The phases' cells, once where they are the same; a dash without phases."""
        return ", then ".join(dict.fromkeys(map(cell, phases))) or MISSING

    def ratio(row: pd.Series, peer: str) -> float:
        """Time of a step over that of the peer; NaN if they were not measured in turn."""
        return 1.0 if row.name[1] == peer else row.get(time_column(peer), float("nan"))

    def time(row: pd.Series, peer: str) -> str:
        found = ratio(row, peer)
        return "1" if row.name[1] == peer else MISSING if pd.isna(found) else f"{found:.2f}"

    def megabytes(row: pd.Series, kind: str) -> str:
        return f"{row[f'bytes.{kind}'] / 1e6:.1f}"

    whole = sum(share * ratio(row, "full") for share, row in zip(shares, phases, strict=False))
    return {
        "trained": each(lambda row: f"{row.trained_parameters:,.0f}"),
        "weights": each(partial(megabytes, kind="parameters")),
        "time / full": each(partial(time, peer="full")),
        "whole / full": MISSING if not phases or pd.isna(whole) else f"{whole:.2f}",
        "time / LoRA": each(partial(time, peer="lora")),
        "stored": each(partial(megabytes, kind="stored")),
        "optimizer": each(partial(megabytes, kind="optimizer")),
        "peak": each(partial(megabytes, kind="total")),
    }


def _paper_cells(model: str, paper: Mapping[str, float] | None, minutes_of_full: float) -> dict[str, str]:
    heads = {"total": f"{model}: total, M", "trained": "trained, M", "time": "minutes", "ratio": "/ full"}
    heads["peak"] = "peak, GB"
    if paper is None:
        return dict.fromkeys(heads.values(), MISSING)
    found = {**paper, "ratio": paper["time"] / minutes_of_full}
    return {head: f"{found[name]:.{3 if name == 'peak' else 2}f}" for name, head in heads.items()}
