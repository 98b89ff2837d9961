"""What a training step of each method costs, beside Table 1 of the Learners paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from scripts.bench.rows import Row, row_of, time_ratio
from scripts.bench.tables import Lines, markdown
from scripts.docs.runs import Papers
from scripts.docs.statistics import MISSING

#: Of bytes, in the order of the columns.
KINDS = ("stored", "optimizer", "total")
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


def table1(rows: Sequence[Row], papers: Papers, setting: str = SETTINGS["table1"], device: str = "cpu") -> Lines:
    """Per method: trained parameters, time of a step, bytes; of methods with phases, of each in their order, and the
    mean time of a step of a whole training, the phases weighted by their steps.

    A method of the paper without benchmark rows has dashes beside the paper's numbers; other methods without rows are
    left out. Bytes are counted, in MB: *weights* (buffers too), *stored* (what autograd keeps from forward for
    backward), *optimizer* (its state), and *peak*, the sum of these and of the gradients.
    """
    head = ["", "trained", "weights", "time / full", "whole / full", "time / LoRA", "stored", "optimizer", "peak"]
    theirs = papers.rows("learners", "table1")
    reference = theirs["full"]
    columns = ("total, M", "trained, M", "minutes", "/ full", "peak, GB")
    model = papers.model("learners")
    measured = {method: phases for method in METHODS if (phases := _phases(rows, method, setting, device))}
    if not measured:
        return [f"No rows of {setting} yet."]
    body = []
    for method in METHODS:
        found, paper = measured.get(method, []), theirs.get(method.paper)
        if not found and not paper:
            continue
        body.append(
            [
                method.label,
                _each(found, lambda row: f"{row['trained_parameters']:,}"),
                _each(found, partial(_megabytes, kind="parameters")),
                _each(found, partial(_time, peer="full")),
                _whole_time(found, method.shares),
                _each(found, partial(_time, peer="lora")),
                *(_each(found, partial(_megabytes, kind=kind)) for kind in ("stored", "optimizer", "total")),
                *(_paper_cells(paper, reference) if paper else [MISSING] * len(columns)),
            ]
        )
    return markdown([*head, *(f"{model}: {columns[0]}", *columns[1:])], body)


def _phases(rows: Sequence[Row], method: Method, setting: str, device: str) -> list[Row]:
    """A method's rows in the order of its phases; empty if one is not there or was skipped."""
    found = [row_of(rows, setting, name, device) for name in method.rows]
    measured = [row for row in found if row is not None and "skipped" not in row]
    return measured if len(measured) == len(found) else []


def _each(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """The phases' cells, once where they are the same; a dash without phases."""
    return ", then ".join(dict.fromkeys(cell(row) for row in rows)) or MISSING


def _megabytes(row: Row, kind: str) -> str:
    return f"{row['bytes'][kind] / 1e6:.1f}"


def _ratio(row: Row, peer: str) -> float | None:
    """Time of a step over that of the peer; None if they were not measured in turn."""
    if peer == row["method"]:
        return 1.0
    return time_ratio(row, peer)["median"] if peer in row.get("time_ratios", {}) else None


def _time(row: Row, peer: str) -> str:
    ratio = _ratio(row, peer)
    return "1" if peer == row["method"] else MISSING if ratio is None else f"{ratio:.2f}"


def _whole_time(rows: Sequence[Row], shares: Sequence[float]) -> str:
    """Mean time of a step of a whole training over that of full fine-tuning."""
    ratios = [ratio for row in rows if (ratio := _ratio(row, "full")) is not None]
    if len(ratios) < len(shares):
        return MISSING
    return f"{sum(share * ratio for share, ratio in zip(shares, ratios, strict=True)):.2f}"


def _paper_cells(paper: Mapping[str, float], reference: Mapping[str, float]) -> list[str]:
    total, trained, minutes, peak = (paper[key] for key in ("total", "trained", "time", "peak"))
    return [f"{total:.2f}", f"{trained:.2f}", f"{minutes:.2f}", f"{minutes / reference['time']:.2f}", f"{peak:.3f}"]
