"""`scripts/docs/report.py`: a page of invented rows, and the committed pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scripts.bench import rows as bench_rows
from scripts.docs import folding, pages, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of the benchmark alone, and a page in a folder beside them."""
    (tmp_path / "results/bench").mkdir(parents=True)
    shutil.copy(ROOT / "results/papers.json", tmp_path / "results")
    shutil.copy(ROOT / "results/bench/minilm-16x128-r64-cpu.jsonl", tmp_path / "results/bench")
    names = ("table1", "table1-distilbert", "scores-core")
    text = "\n".join(f"<!-- report:{name} -->\nold\n<!-- report:end -->\nbetween" for name in names)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(f"before\n{text}\n")
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    return ["--results", str(folder / "results"), "--pages", str(folder / "docs/page.md"), *more]


def test_one_command(folder, capsys):
    """One command writes the tables, and has nothing to do afterwards."""
    report.main(command(folder))
    page = folder / "docs/page.md"
    text = page.read_text()
    assert capsys.readouterr().out == f"-> {page}\n"
    assert text.startswith("before\n") and text.count("between") == 3 and "old" not in text.split()
    assert "| full fine-tuning | 22,713,986 | 90.9 | 1 | 1.00 |" in text and "No finished runs yet." in text
    report.main(command(folder))
    assert capsys.readouterr().out == ""


def test_check_tells(folder):
    """A page that is not up to date is told, and stays as it is."""
    page = folder / "docs/page.md"
    begun = page.read_text()
    with pytest.raises(SystemExit, match=r"Not up to date: page\.md\. Run: python -m scripts\.docs\.report"):
        report.main(command(folder, "--check"))
    assert page.read_text() == begun
    report.main(command(folder))
    report.main(command(folder, "--check"))


def test_a_marker_must_name_something(folder):
    (folder / "docs/page.md").write_text("<!-- report:no-such -->\n<!-- report:end -->\n")
    with pytest.raises(ValueError, match="<!-- report:no-such --> must name one of table1, "):
        report.main(command(folder))


def test_splicing():
    """Splicing fills each marker and leaves the rest."""
    text = "a\n<!-- x:one -->\nold\n<!-- x:end -->\nb <!-- y:one -->\nkept\n<!-- y:end -->\n"
    text += "<!-- x:two -->\n<!-- x:end -->"
    new = pages.spliced(text, "x", lambda name: [f"| {name} |"])
    assert new == (
        "a\n<!-- x:one -->\n\n| one |\n\n<!-- x:end -->\nb <!-- y:one -->\nkept\n<!-- y:end -->\n"
        "<!-- x:two -->\n\n| two |\n\n<!-- x:end -->"
    )
    assert pages.spliced(new, "x", lambda name: [f"| {name} |"]) == new


@pytest.mark.parametrize(
    "text",
    [
        "<!-- x:one -->\nno end",
        "<!-- x:one -->\n<!-- x:two -->\n<!-- x:end -->",
        "<!-- x:end -->",
        "<!-- x:one -->\n<!-- x:end -->\n<!-- x:two -->\n",
    ],
)
def test_open_marker(text):
    """A marker without an end is refused."""
    with pytest.raises(ValueError, match="must have its <!-- x:end -->"):
        pages.spliced(text, "x", lambda name: [])


def test_committed_pages():
    """The committed pages are those of the committed files."""
    assert (ROOT / "docs/results.md").read_text().count("<!-- report:end -->") == 16
    assert bench_rows.read_rows(ROOT / "results/bench")
    report.main(["--check"])


def test_folding_table(tmp_path):
    """The better rate by held-out rows is shown, with its dev score; other runs and seeds stay out."""

    def run(name, rate, held, dev, **more):
        return {
            "from": "results/fold/minilm.jsonl",
            "run": name,
            "config": {"learning_rate": rate},
            "holdout": {"matthews_correlation": held, "loss": 1.0},
            "final": {"eval_matthews_correlation": dev},
            "adapter_bytes": 2_500_000,
            **more,
        }

    kept = {"a": 0.5, "b": 0.75, "c": 1.0}
    rows = [
        run("cola-r16-fold-lr0.0003-seed0", 3e-4, 0.125, 0.0625, kept_energy=kept),
        run("cola-r16-fold-lr0.001-seed0", 1e-3, 0.0, 0.5, kept_energy=kept),
        run("cola-r16-fold-lr0.001-seed1", 1e-3, 0.9, 0.9, kept_energy=kept),
        {**run("cola-r16-lora-lr0.001-seed0", 1e-3, 0.0, 0.5), "from": "results/sweep/tuned.jsonl"},
    ]
    (tmp_path / "archive.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert folding.table(tmp_path / "archive.jsonl")[2:] == [
        "| CoLA, r = 16 | Learner, primed, folded | 3e-4: 12.5, 1e-3: 0.0 | 6.2 | 50 / 75 % | 2.5 |"
    ]
