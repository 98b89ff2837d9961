"""The numbers in the docs are those of the committed results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from archive import RUNS

from scripts.bench import rows as bench_rows

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "results/bench"


def test_no_machine_paths():
    """Results hold no path of a machine."""
    for path in (ROOT / "results").rglob("*.json*"):
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


@pytest.mark.parametrize("page", ["learner.md", "far.md", "nas_lora.md"])
def test_page_costs(page):
    """Trained parameters and sizes of files in the pages are those of a run in the archive."""
    form = r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) MB \|$"
    rows = re.findall(form, (ROOT / "docs" / page).read_text(), re.M)
    assert rows
    for first, last, size in rows:
        digits = len(size.partition(".")[2])
        assert any(
            (first, last) == (f"{p['trained_first_phase']:,}", f"{p['trained_last_phase']:,}")
            and size == f"{run['adapter_bytes'] / 1e6:.{digits}f}"
            for run in RUNS
            if (p := run["parameters"])
        ), (first, last, size)


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
