"""The numbers in the docs are those of the committed results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scripts.bench import rows as bench_rows

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"mrpc": ("eval_accuracy", "eval_f1"), "cola": ("eval_matthews_correlation",),
           "stsb": ("eval_pearson", "eval_spearmanr")}  # fmt: skip

PLAIN_FAR = {"retention_ratio": 0.1, "priming_ratio": 0.01, "selection": "l1", "granularity": "hidden_unit",
             "discard_unkept": False, "train_embeddings": True}  # fmt: skip
VARIANTS = {"": {}, "random nodes": {"selection": "random"}, "unkept discarded": {"discard_unkept": True},
            "output nodes": {"granularity": "output_node"}}  # fmt: skip
NAS = {
    "U-BitFit, 10 %": {"r": 0, "parameter_budget": 0.1, "nas_granularity": "unstructured", "rounds": 1},
    "U-BitFit, 10 %, two rounds": {"r": 0, "parameter_budget": 0.1, "nas_granularity": "unstructured", "rounds": 2},
    "U-BitFit, 50 %": {"r": 0, "parameter_budget": 0.5, "nas_granularity": "unstructured", "rounds": 1},
    "U-MaM, 321,024": {"r": 16, "parameter_budget": 321_024.0, "nas_granularity": "unstructured", "rounds": 1},
    "S-MaM, 321,024": {"r": 16, "parameter_budget": 321_024.0, "nas_granularity": "structured", "rounds": 1},
}  # fmt: skip
PAGES = ("learner.md", "far.md", "nas_lora.md")
BENCH = ROOT / "results/bench"


def rows() -> list[tuple[str, str, str, str]]:
    """`(task, method, values, file)` of the tables of single runs."""
    row = r"^\| (\w+) \| (\w+(?: \([^)]*\))?) \| ([\d. /]+) \| \[.*?\]\(\.\./(results/glue/.*?\.json)\) \|$"
    table = re.findall(row, (ROOT / "docs/methods.md").read_text(), re.M)
    assert table
    return table


@pytest.mark.parametrize("task,method,values,file", rows(), ids=lambda value: str(value)[-40:])
def test_single_runs(task, method, values, file):
    """Single runs are those of their files."""
    result = json.loads((ROOT / file).read_text())
    name, _, variant = method.partition(" (")
    assert result["finished"] and (result["task"], result["method"]) == (task.lower(), name)
    if name == "far":
        told = VARIANTS[variant.rstrip(")")]
        assert {key: result["config"][key] for key in PLAIN_FAR} == {**PLAIN_FAR, **told}
    if name == "nas_lora":
        told = NAS[variant.rstrip(")")]
        assert {key: result["config"][key] for key in told} == told
    assert values == " / ".join(f"{100 * result['final'][metric]:.1f}" for metric in METRICS[result["task"]])


def test_single_runs_in_tables():
    """Every single run is in the tables."""
    assert {row[3] for row in rows()} == {str(p.relative_to(ROOT)) for p in (ROOT / "results/glue").glob("*.json")}


def test_no_machine_paths():
    """Results hold no path of a machine."""
    for path in (ROOT / "results").glob("[!.]*/*.json*"):  # not what a sweep is training just now
        assert not re.search(r'"/(?!\s)', path.read_text()), path


def test_bench_ratios():
    """Of each row, the median over the rounds of its seconds over its peer's, by plain sorting."""
    found = bench_rows.read_rows(BENCH)
    own: dict[tuple, dict[str, list[float]]] = {}
    for row in found:
        if "step" in row.get("seconds", {}):
            place = (row["setting"]["name"], row["device"]["type"], row["group"], row.get("axis"), row.get("value"))
            own.setdefault(place, {})[row["method"]] = row["seconds"]["step"]
    checked = 0
    for row in found:
        for peer, ratio in row.get("time_ratios", {}).items():
            place = (row["setting"]["name"], row["device"]["type"], row["group"], row.get("axis"), row.get("value"))
            each = sorted(a / b for a, b in zip(row["seconds"]["step"], own[place][peer], strict=True))
            middle = (each[(len(each) - 1) // 2] + each[len(each) // 2]) / 2
            assert ratio["step"]["median"] == pytest.approx(middle, rel=1e-9), (place, row["method"], peer)
            checked += 1
    assert checked > 100


def test_kept_shares():
    """Kept shares are those of their files."""
    for init in ("kaiming", "lora"):
        record = json.loads((ROOT / f"results/architectures/shares-{init}.json").read_text())
        for row in record["rows"]:
            cells = [f"{100 * row['kept'][part]['share']:.1f}" for part in ("U", "V", "bias")]
            line = f"| {init} | {100 * row['budget']:.0f} % | {' | '.join(cells)} |"
            assert line in (ROOT / "docs/nas_lora.md").read_text(), line


def cost_rows() -> list[tuple[str, str, str, str]]:
    """`(trained in the first phase, in the last, size of the file, path)` of the cost tables in the tuners' pages."""
    form = r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) MB \| \[json\]\(\.\./(results/glue/[\w-]+\.json)\) \|$"
    pages = {page: re.findall(form, (ROOT / "docs" / page).read_text(), re.M) for page in PAGES}
    assert all(pages.values())
    return [row for found in pages.values() for row in found]


@pytest.mark.parametrize("first,last,size,file", cost_rows())
def test_page_costs(first, last, size, file):
    """Costs in the pages are those of the runs."""
    result = json.loads((ROOT / file).read_text())
    trained = result["parameters"]
    assert (first, last) == (f"{trained['trained_first_phase']:,}", f"{trained['trained_last_phase']:,}")
    digits = len(size.partition(".")[2])
    assert size == f"{result['adapter_bytes'] / 1e6:.{digits}f}"


@pytest.mark.parametrize("file", ["mrpc-learner-r64-minilm", "mrpc-far10-minilm"])
def test_export_costs(file):
    """What exports cost is what their files say."""
    record, page = (
        json.loads((ROOT / f"results/export/{file}.json").read_text()),
        (ROOT / "docs/export.md").read_text(),
    )
    table = page.partition(f"(../results/export/{file}.json)")[2].partition("\n\nThis is FAR")[0]

    def scores(dev: dict[str, float]) -> str:
        return f"{100 * dev['accuracy']:.1f} / {100 * dev['f1']:.1f}"

    for row in record["exports"]:
        errors = f"{row['median_error']:.2f} | {row['largest_error']:.2f}"
        line = f"| {row['rank']} | {errors} | {row['bytes'] / 1e6:.1f} MB | {scores(row['dev'])} |"
        assert f"{line} {row['changed_predictions']} |" in table
    assert f"{scores(record['adapter']['dev'])} by itself" in page
    assert f"{record['adapter']['bytes'] / 1e6:.1f} MB" in page
    assert record["rows"] == 408
