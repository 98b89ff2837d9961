"""The report's statistics, by hand, and its tables of invented runs."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pandas as pd
import pytest
from sweep_records import PAPERS, grid, lines_with, paper, record, results, scored

from scripts.bench.rows import table_of
from scripts.docs.costs import table1
from scripts.docs.progress import coverage_table, phases_table, rates_table, setting_table
from scripts.docs.runs import Results
from scripts.docs.scores import LAYOUTS, headline, number, score_tables, short_number
from scripts.sweep.plan import VARIANTS, Run

# -- statistics ------------------------------------------------------------------------------------------------------


def text(*values: float, signed: bool = False, medians: bool = False) -> str:
    return number(pd.Series(values, dtype=float), medians, signed)


def test_standard_error():
    """Standard error is that of the mean with one degree of freedom less."""
    # mean (70 + 72 + 77) / 3 = 73; squares 9 + 1 + 16 = 26; sd = sqrt(26 / 2) = 3.60555; / sqrt(3) = 2.08167
    assert text(70.0, 72.0, 77.0) == "73.0 ± 2.1 (3 seeds)"
    assert short_number(pd.Series([70.0, 72.0, 77.0])) == "73.0 ± 2.1 (3)"


def test_paired_differences():
    """Differences are paired over the seeds that both have."""
    ours, theirs = {0: 70.0, 1: 72.0, 2: 77.0, 9: 99.0}, {2: 75.0, 1: 73.0, 0: 69.0, 5: 1.0}
    runs = {paper("rte", "bitfit", seed): value for seed, value in ours.items()}
    runs |= {paper("rte", "full", seed): value for seed, value in theirs.items()}
    lines = score_tables(scored(runs), PAPERS, LAYOUTS["table2-paper"])
    # 1, -1, 2: mean 2/3; squares (1 + 25 + 16) / 9; sd = sqrt(42 / 9 / 2) = 1.52753; / sqrt(3) = 0.88192
    (row,) = lines_with(lines, "| BitFit")
    assert "| +0.7 ± 0.9 (3 seeds), tie | – |" in row  # noqa: RUF001


def test_tie():
    """A tie is a difference smaller than its error."""
    # 1, 1, 2: mean 4/3; squares (1 + 1 + 4) / 9; sd = sqrt(1/3) = 0.57735; / sqrt(3) = 1/3
    assert text(1.0, 1.0, 2.0, signed=True) == "+1.3 ± 0.3 (3 seeds)"
    assert text(-1.0, -1.0, -2.0, signed=True) == "-1.3 ± 0.3 (3 seeds)"
    # -1, 3: mean 1, sd = sqrt(8), error = 2
    assert text(-1.0, 3.0, signed=True) == "+1.0 ± 2.0 (2 seeds), tie"
    # 0, 2: mean 1, sd = sqrt(2), error = 1: not smaller
    assert text(0.0, 2.0, signed=True) == "+1.0 ± 1.0 (2 seeds)"
    assert text(0.0, 0.0, signed=True) == "+0.0 ± 0.0 (2 seeds), tie"


def test_one_seed():
    """One seed has no error and is no tie."""
    assert text(71.3) == "71.3 (one seed)"
    assert text(0.0, signed=True) == "+0.0 (one seed)"
    assert short_number(pd.Series([71.3])) == "71.3 (1)" and text() == "–"  # noqa: RUF001


def test_minus_zero():
    """A small negative difference is not written as minus zero."""
    assert text(-0.01, signed=True) == text(-0.01, signed=True, medians=True) == "+0.0 (one seed)"


def test_medians():
    """Of 80, 90 and 82 the median is 82, the mean 84."""
    assert text(80.0, 90.0, 82.0, medians=True) == "82.0 (median of 3 seeds)"
    assert text(80.0, medians=True) == "80.0 (one seed)" and text(medians=True) == "–"  # noqa: RUF001
    assert text(-1.0, 4.0, signed=True, medians=True) == "+1.5 (median of 2 pairs)"


# -- tables of scores ------------------------------------------------------------------------------------------------


def test_task_table():
    """A tasks table has scores differences and the papers number."""
    found = scored(
        {
            paper("rte", "full"): 60.0,
            paper("rte", "full", 1): 62.0,
            paper("rte", "lora64"): 55.0,
            paper("rte", "lora64", 1): 55.0,
            paper("rte", "learner64_p2"): 61.0,
        }
    )
    lines = score_tables(found, PAPERS, LAYOUTS["table2-paper"])
    assert lines[0] == "**RTE**: 5 epochs, 2,490 train rows, 277 dev rows, up to 128 tokens"
    # full: mean 61, sd = sqrt(2), error 1. To LoRA 5 and 7: mean 6, error 1.
    assert lines_with(lines, "| full") == [
        "| full fine-tuning | 2,000,000 | 61.0 ± 1.0 (2 seeds) |  | +6.0 ± 1.0 (2 seeds) | 60.1 |"
    ]
    assert lines_with(lines, "| LoRA, r = 64") == [
        "| LoRA, r = 64 | 2,000,000 | 55.0 ± 0.0 (2 seeds) | -6.0 ± 1.0 (2 seeds) |  | – |"  # noqa: RUF001
    ]
    assert lines_with(lines, "| Learner, r = 64, p = 2") == [
        "| Learner, r = 64, p = 2 | 2,000,000 | 61.0 (one seed) | +1.0 (one seed) | +6.0 (one seed) | 60.1 |"
    ]
    assert not lines_with(lines, "| BitFit") and not lines_with(lines, "**Average")


def test_paper_metric_means():
    """A score is the mean of a tasks metrics of the paper too."""
    run = paper("mrpc", "full")
    lines = score_tables(results((run, record(run, 70.0, 80.6))), PAPERS, LAYOUTS["table2-paper"])
    # (70 + 80.6) / 2; the paper's (84.80 + 89.43) / 2 = 87.115
    assert lines_with(lines, "| full") == ["| full fine-tuning | 2,000,000 | 75.3 (one seed) |  | – | 87.1 |"]  # noqa: RUF001


def test_averaged_tasks():
    """Averages are over the tasks that all main methods have and by seed."""
    found = scored(
        {
            **{paper("rte", name, seed): 60.0 + seed for name in ("full", "lora64") for seed in (0, 1)},
            **{paper("mrpc", name): 80.0 for name in ("full", "lora64")},
            paper("cola", "full"): 10.0,
            paper("rte", "lora8"): 50.0,
        }
    )
    lines = score_tables(found, PAPERS, LAYOUTS["table2-paper"])
    assert lines[0] == "**Average of RTE and MRPC**"
    lines = lines[: lines.index(lines_with(lines, "**RTE**")[0])]
    # seed 1 has no MRPC; the paper's are (60.14 + 87.115) / 2 = 73.6 and, over all tasks, 79.51
    assert lines_with(lines, "| full") == [
        "| full fine-tuning | 2,000,000 | 70.0 (one seed) |  | +0.0 (one seed) | 73.6 | 79.5 |"
    ]
    assert not lines_with(lines, "| LoRA, r = 8 ")


MAIN = [name for name in VARIANTS if VARIANTS[name].core]


def averages_of(scores: dict[Run, float]) -> list[str]:
    lines = score_tables(scored(scores), PAPERS, LAYOUTS["table2-paper"])
    return lines[: lines.index(lines_with(lines, "**RTE**")[0])]


def test_averaged_seeds():
    """full: 70 and 72; LoRA, 69.5 and 79.5, lacks MRPC's second one: a mean of full's two would be above LoRA's one,
    and the difference of the first is 0.5."""
    found = {paper(task, name, seed): 70.0 + 2 * seed for task in ("rte", "mrpc") for name in MAIN for seed in (0, 1)}
    found |= {paper(task, "lora64", 0): 69.5 for task in ("rte", "mrpc")} | {paper("rte", "lora64", 1): 79.5}
    found |= {paper(task, "lora8", seed): 60.0 for task in ("rte", "mrpc") for seed in (0, 1)}
    lines = averages_of({**found, paper("mrpc", "lora64", 1): 79.5})
    # full: mean 71, sd = sqrt(2), error 1; to LoRA 0.5 and -7.5: mean -3.5, error 4
    assert "71.0 ± 1.0 (2 seeds) |  | -3.5 ± 4.0 (2 seeds), tie" in lines_with(lines, "| full")[0]
    del found[paper("mrpc", "lora64", 1)]
    lines = averages_of(found)
    assert "| 70.0 (one seed) |  | +0.5 (one seed) |" in lines_with(lines, "| full")[0]
    assert "| 69.5 (one seed) | -0.5 (one seed) |  |" in lines_with(lines, "| LoRA, r = 64 ")[0]
    assert "| 60.0 (one seed) |" in lines_with(lines, "| LoRA, r = 8 ")[0]


def test_costly_task_left_out():
    """A task that would cost seeds is left out of averages."""
    found = {paper(task, name, seed): 70.0 for task in ("rte", "mrpc") for name in MAIN for seed in (0, 1)}
    found |= {paper("cola", name): 10.0 for name in MAIN}
    lines = averages_of(found)
    assert lines[0] == "**Average of RTE and MRPC**" and "| 70.0 ± 0.0 (2 seeds) |" in lines_with(lines, "| full")[0]
    lines = averages_of({**found, **{paper("cola", name, 1): 10.0 for name in MAIN}})
    # (70 + 70 + 10) / 3
    assert lines[0] == "**Average of RTE, MRPC and CoLA**" and "| 50.0 ± 0.0 (2 " in lines_with(lines, "| full")[0]


def test_cut_sizes():
    """Sizes that were cut down are named."""
    short = paper("rte", "lora64")
    cut = record(short, 55.0, rows={"train": 64, "dev": 277})
    cut["config"] = {**cut["config"], "max_train_samples": 64, "max_length": 32}
    whole = [(run, record(run, 60.0)) for run in (paper("rte", "full"), paper("rte", "full", 1))]
    lines = score_tables(results(*whole, (short, cut)), PAPERS, LAYOUTS["table2-paper"])
    assert "2,490 train rows" in lines[0] and "64" not in lines[0]
    assert lines_with(lines, "| LoRA, r = 64 (the first 64 train rows, up to 32 tokens) |")
    both = results((paper("rte", "full"), cut))
    assert "the first 64 train rows" in score_tables(both, PAPERS, LAYOUTS["table2-paper"])[0]


def test_fewer_epochs():
    """Fewer epochs than the papers are named and NAS-LoRA is held against its uniform peer."""
    runs = {
        Run("nas", "rte", "bitfit", 3e-3, 0): 60.0,
        Run("nas", "rte", "full", 1e-4, 0): 66.0,
        Run("nas", "rte", "u_bitfit9", 3e-3, 0): 59.0,
        Run("nas", "mrpc", "mam8", 1e-3, 0): 80.0,
        Run("nas", "mrpc", "u_mam100", 1e-3, 0): 83.0,
        Run("nas", "mrpc", "s_mam100", 1e-3, 0): 82.0,
    }
    lines = score_tables(scored(runs), PAPERS, LAYOUTS["nas"])
    # also where two of three rows searched, which takes twice as long
    assert lines_with(lines, "**MRPC**")[0].startswith("**MRPC**: 3 epochs (paper: 20 epochs)")
    assert lines[0].startswith("**RTE**: 3 epochs (paper: 20 epochs), 2,490")
    (row,) = lines_with(lines, "| U-BitFit, 9 % of the biases (6 epochs) |")
    assert row.endswith("| 59.0 (one seed) | -7.0 (one seed) | -1.0 (one seed) | 74.0 |")
    (row,) = lines_with(lines, "| U-MaM")
    # the paper gives one metric of MRPC, ours are two
    assert row.endswith("| 83.0 (one seed) | – | +3.0 (one seed) | – |")  # noqa: RUF001
    (row,) = lines_with(lines, "| BitFit")
    assert row.endswith("| 60.0 (one seed) | -6.0 (one seed) |  | 81.9 |")


def test_nas_medians():
    """Of 61 - 60, 60 - 62 and 66 - 61, which are 1, -2 and 5, the median is 1, the mean 4 / 3; the medians differ by
    61 - 61.5."""
    uniform, kept = (60.0, 62.0, 61.0, 90.0), (61.0, 60.0, 66.0)
    runs = {Run("nas", "rte", "bitfit", 3e-3, seed): value for seed, value in enumerate(uniform)}
    runs |= {Run("nas", "rte", "u_bitfit9", 3e-3, seed): value for seed, value in enumerate(kept)}
    runs |= {Run("nas", "rte", "full", 1e-4, 0): 63.0}
    lines = score_tables(scored(runs), PAPERS, LAYOUTS["nas"])
    (row,) = lines_with(lines, "| U-BitFit, 9 %")
    assert "| 3e-3 | 61.0 (median of 3 seeds) | -2.0 (one seed) | +1.0 (median of 3 pairs) |" in row
    assert "| 1e-4 | 63.0 (one seed) |" in lines_with(lines, "| full")[0] and "tie" not in "".join(lines)


def test_missing_value():
    """A seed without a value is counted and left out."""
    found = {paper("stsb", "full", seed): seed for seed in (0, 1, 2)}
    records = {run: record(run, 80.0, None if seed == 1 else 82.0) for run, seed in found.items()}
    lines = score_tables(Results(records), PAPERS, LAYOUTS["table2-paper"])
    assert "| 81.0 ± 0.0 (2 seeds), 1 without a value |" in lines_with(lines, "| full")[0]


def test_no_runs_give_no_table():
    assert score_tables(Results({}), PAPERS, LAYOUTS["nas"]) == ["No finished runs yet."]
    for table in (headline, rates_table, phases_table, setting_table):
        assert table(Results({})) == ["No finished runs yet."]


# -- learning rates --------------------------------------------------------------------------------------------------


def test_chosen_rate():
    """The chosen rate is the best on held out rows."""
    found = Results(grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0, 3e-4: 61.0}))
    # held out / on dev, which chooses nothing
    assert rates_table(found)[2:] == [
        "| full fine-tuning | 3e-5: 60.0 / 60.3<br>**1e-4: 62.0 / 61.0**<br>3e-4: 61.0 / 63.0 |"
    ]
    lines = score_tables(found, PAPERS, LAYOUTS["table2-tuned"])
    assert "(249 more held out)" in lines[0]
    assert "| full fine-tuning | 2,000,000 | 1e-4 | 61.0 (one seed) |" in lines_with(lines, "| full")[0]
    assert not any("†" in line for line in lines)


def test_rate_at_grid_end():
    """A best rate at the end of the grid is marked."""
    found = Results(grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0, 3e-4: 63.0}))
    lines = score_tables(found, PAPERS, LAYOUTS["table2-tuned"])
    assert "| 3e-4 † |" in lines_with(lines, "| full")[0] and lines[-1].startswith("† ")
    assert rates_table(found)[2].endswith("**3e-4: 63.0 / 63.0** † |")
    # 1e-3 lies beyond, and is worse
    more = Results({**found.records, **grid("rte", "full", {1e-3: 50.0})})
    assert not any("†" in line for line in score_tables(more, PAPERS, LAYOUTS["table2-tuned"]))


def test_unfinished_grid():
    """An unfinished grid gives no score."""
    found = Results(grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0}))
    assert score_tables(found, PAPERS, LAYOUTS["table2-tuned"]) == ["No finished runs yet."]
    assert "| full fine-tuning | 2 of 3 rates | – |" in "\n".join(coverage_table(found))  # noqa: RUF001


def test_further_seeds():
    """Further seeds count at the chosen rate."""
    runs = grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0, 3e-4: 61.0})
    other = Run("tuned", "rte", "full", 1e-4, 3)
    found = Results({**runs, other: record(other, 64.0, held_out=10.0)})
    # seed 0 at 1e-4: 60 + 1 = 61; seed 3: 64. Mean 62.5, sd = sqrt(2 * 1.5^2) = 2.12, error 1.5
    assert found.scores("tuned", "rte", "full").to_dict() == pytest.approx({0: 61.0, 3: 64.0})
    assert "62.5 ± 1.5 (2 seeds)" in "\n".join(score_tables(found, PAPERS, LAYOUTS["table2-tuned"]))


def test_single_rate():
    """A protocol that chooses nothing has one rate."""
    found = scored({paper("rte", "full"): 60.0, Run("paper", "rte", "full", 1e-4, 1): 61.0})
    with pytest.raises(ValueError, match="'paper' must have one learning rate for full on rte, got 2e-05, 0.0001"):
        found.of("paper", "rte", "full")


# -- README, coverage, phases, setting -------------------------------------------------------------------------------


def test_headline():
    """The headline has both protocols and dashes where nothing is finished."""
    tuned = grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0, 3e-4: 61.0})
    lines = headline(Results({**scored({paper("rte", "full"): 60.0, paper("mrpc", "bitfit"): 70.0}).records, **tuned}))
    assert lines_with(lines, "| full") == ["| full fine-tuning | 2,000,000 | 60.0 (1) / 61.0 (1) | – / – |"]  # noqa: RUF001
    assert lines_with(lines, "| BitFit") == ["| BitFit | 2,000,000 | – / – | 70.0 (1) / – |"]  # noqa: RUF001
    assert lines_with(lines, "| *train rows*") == ["| *train rows* |  | 2,490 / 2,490 | 3,668 / – |"]  # noqa: RUF001


def test_coverage():
    """Coverage counts seeds of the planned ones."""
    lines = coverage_table(scored({paper("rte", "lora64"): 60.0, paper("rte", "lora64", 3): 60.0}))
    assert lines[0].endswith("(2 finished runs)")
    assert "| LoRA, r = 64 | 2 of 5 | – | – | – |" in lines  # noqa: RUF001
    assert len(lines_with(lines, "| U-BitFit, 9 %")) == 1  # in its own protocol alone


def test_phase_shares():
    """Shares of phases are medians over runs."""

    def phases(first: float, second: float, trained: int) -> list[dict[str, Any]]:
        return [
            {"name": "priming", "first_step": 0, "steps": 8, "seconds": first, "trained_parameters": 6_000_000},
            {"name": "learning", "first_step": 8, "steps": 12, "seconds": second, "trained_parameters": trained},
        ]

    runs = [paper("rte", "learner64_p2"), paper("stsb", "learner64_p2"), paper("rte", "learner64_p2", 1)]
    found = results(
        (runs[0], record(runs[0], 60.0, phases=phases(50.0, 50.0, 2_000_000))),
        (runs[1], record(runs[1], 80.0, 80.0, phases=phases(6.0, 4.0, 1_999_615))),
        (runs[2], record(runs[2], 60.0, phases=phases(9.0, 1.0, 2_000_000))),
        (paper("rte", "full"), record(paper("rte", "full"), 60.0)),
    )
    assert phases_table(found)[2:] == [  # of the seconds 50, 60 and 90 %
        "| Learner, r = 64, p = 2 (3 runs) | priming | 40 % | 60 % | 6,000,000 |",
        "|  | learning | 60 % | 40 % | 1,999,615 to 2,000,000 |",
    ]


def test_setting_differences():
    """The setting says what differs between runs."""
    first, second = paper("rte", "full"), paper("rte", "lora64")
    code = "0123456789abcdef-dirty"
    table = "\n".join(setting_table(results((first, record(first, 60.0, code=code)), (second, record(second, 60.0)))))
    assert "| machine | a machine, 1 process of 2 threads (cpu) |" in table
    assert "| code | 0123456-dirty (1)<br>not recorded (1) |" in table
    assert "| runs | 2, 1.0 hours in all |" in table and "| dates | 2026-11-22 |" in table


def test_costs_stand_beside_the_papers():
    def row(method: str, trained: int, time: float, size: int) -> dict[str, Any]:
        kinds = ("parameters", "stored", "optimizer", "total")
        return {
            "setting": {"name": "minilm-16x128-r64"},
            "device": {"type": "cpu"},
            "method": method,
            "trained_parameters": trained,
            "time_ratios": {"full": {"step": {"median": time}}},
            "bytes": {kind: size * (place + 1) for place, kind in enumerate(kinds)},
        }

    rows = [
        row("full", 9, 1.0, 2_000_000),
        row("far_priming", 9, 1.1, 3_000_000),
        row("far_after", 4, 0.875, 1_000_000),
    ]
    rows += [row("learner_priming", 5, 1.0, 1), {**row("bitfit", 2, 0.5, 1), "skipped": "ValueError: no."}]
    dashes = "– | " * 8  # noqa: RUF001
    # FAR's whole training: 1 % of the steps at 1.1 and 99 % at 0.875, 0.8773. The paper's minutes: 46.60 / 56.87 =
    # 0.819; 33.01, 31.02, 32.59, 27.73 and 40.50 of 56.87 likewise. Of bitfit and of one of the Learner's phases there
    # are no rows here; LoRA has none either, and is not in the paper.
    assert table1(table_of(rows), PAPERS)[2:] == [
        "| full fine-tuning | 9 | 2.0 | 1 | 1.00 | – | 4.0 | 6.0 | 8.0 | 66.95 | 66.95 | 56.87 | 1.00 | 1.306 |",  # noqa: RUF001
        "| FAR, 10 % | 9, then 4 | 3.0, then 1.0 | 1.10, then 0.88 | 0.88 | – | 6.0, then 2.0 | 9.0, then 3.0 | "  # noqa: RUF001
        "12.0, then 4.0 | 66.95 | 41.45 | 46.60 | 0.82 | 1.017 |",
        f"| sequential adapters | {dashes}71.68 | 5.34 | 33.01 | 0.58 | 0.554 |",
        f"| parallel adapters | {dashes}71.68 | 5.33 | 31.02 | 0.55 | 0.546 |",
        f"| FREEZE FFNs | {dashes}66.95 | 14.80 | 32.59 | 0.57 | 0.630 |",
        f"| BitFit | {dashes}66.95 | 0.64 | 27.73 | 0.49 | 0.440 |",
        f"| Learner, primed | {dashes}72.26 | 5.96 | 40.50 | 0.71 | 0.793 |",
    ]
    assert table1(table_of(rows), PAPERS, "minilm-16x32-r8") == ["No rows of minilm-16x32-r8 yet."]


# -- the papers' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,table", [("learners", "table2"), ("nas", "table1"), ("nas", "table2")], ids=lambda value: value
)
def test_paper_averages(name, table):
    """Over all tasks but WNLI, pairs averaged first. Both are rounded, each to half a unit of its last digit, so they
    may differ by a whole one."""
    data = PAPERS.data[name][table]
    for row in data["rows"]:
        scores = [fmean(values) for task, values in row["scores"].items() if task != "wnli"]
        assert len(scores) == 8
        assert row["average"] == pytest.approx(fmean(scores), abs=1.001 * 10 ** -data["decimals"]), row["name"]


def test_paper_rows():
    """Rows of the papers' tables without their heads. WARP, S-BitFit and U-BitFit of 25k stand in both tables of the
    NAS-LoRA paper, and once here."""
    counts = {
        ("learners", "table1"): 7,
        ("learners", "table2"): 12,
        ("nas", "table1"): 10 - 2,
        ("nas", "table2"): 12 - 1,
    }
    for (name, table), count in counts.items():
        found = PAPERS.data[name][table]["rows"]
        assert len(found) == count, (name, table)
        assert {row["ours"] for row in found} <= {None, *VARIANTS}
    by_name = {row["name"]: row["scores"] for row in PAPERS.data["nas"]["table1"]["rows"]}
    differ = {task for task in by_name["LoRA"] if by_name["LoRA"][task] != by_name["MaM"][task]}
    assert differ == {"mnli"}


def test_the_papers_headlines():
    table1, table2 = (PAPERS.rows("learners", table) for table in ("table1", "table2"))
    averages = {"full": 79.51, "far10": 79.68, "freeze_ffns": 79.24, "learner64_p2": 79.07, "learner64_p0": 76.84,
                "adapter_sequential": 76.10, "adapter_parallel": 71.94, "bitfit": 65.66}  # fmt: skip
    assert {name: table2[name]["average"] for name in averages} == averages
    costs = {"full": (56.87, 1.306), "far10": (46.60, 1.017), "learner64_p2": (40.50, 0.793),
             "adapter_sequential": (33.01, 0.554), "freeze_ffns": (32.59, 0.630),
             "bitfit": (27.73, 0.440)}  # fmt: skip
    assert {name: (table1[name]["time"], table1[name]["peak"]) for name in costs} == costs
    counts = {"full": (66.95, 66.95), "learner64_p2": (72.26, 5.96), "freeze_ffns": (66.95, 14.80),
              "bitfit": (66.95, 0.64), "adapter_sequential": (71.68, 5.34), "adapter_parallel": (71.68, 5.33),
              "far10": (66.95, 41.45)}  # fmt: skip
    assert {name: (table1[name]["total"], table1[name]["trained"]) for name in counts} == counts
    nas = PAPERS.rows("nas", "table1", "table2")
    averages = {"full": 88.2, "u_mam100": 88.3, "s_mam100": 88.1, "mam8": 87.7, "bitfit": 86.7, "u_bitfit18": 86.5,
                "u_bitfit9": 84.6, "s_bitfit18": 78.6, "s_bitfit9": 74.3}  # fmt: skip
    assert {name: nas[name]["average"] for name in averages} == averages
