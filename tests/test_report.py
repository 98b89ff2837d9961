"""`scripts/report.py`: reading, pictures and pages of invented runs, and the committed pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bench_rows
import bench_tables
import plot_bench
import pytest
import report
import report_pictures
import report_scores
import report_statistics
from report_runs import Results
from sweep_records import ROOT, grid, paper, record, scored

# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plot_bench, "save", lambda figure, path: figures.update({path.name: figure}))
    return figures


def draw_all(found: Results) -> list[str]:
    names = []
    for name, _, draw in report_pictures.pictures(found):
        draw(found, Path(report_pictures.file_of(name)))
        names.append(name)
    assert set(names) <= set(report_pictures.NAMES)
    return names


def test_convergence_is_the_mean_over_the_seeds_by_epoch(drawn):
    found = scored({paper("rte", "full"): 60.0, paper("rte", "full", 1): 64.0, paper("rte", "lora8"): 50.0})
    assert draw_all(found) == ["scores", "convergence-paper"]
    score, loss = drawn["sweep-convergence-paper.png"].axes
    (line,) = score.lines  # lora8 is none of the main methods
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.0, 2.0], [50.0, pytest.approx(62.0)])
    assert line.get_label() == "full fine-tuning" and list(loss.lines[0].get_ydata()) == [0.7, 0.5]
    assert drawn["sweep-convergence-paper.png"]._suptitle.get_text().endswith("(2 seeds)")


def test_scores_stand_at_what_is_trained_in_the_last_phase(drawn):
    tuned = grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0, 3e-4: 61.0})
    found = Results({**scored({paper("rte", "full"): 60.0, paper("rte", "full", 1): 64.0}).records, **tuned})
    draw_all(found)
    panels = drawn["sweep-scores.png"].axes
    assert len(panels) == 2 and panels[0].get_xscale() == "log"
    points = [(float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0])) for c in panels[0].containers]
    assert points == [(2e6, pytest.approx(62.0))]
    assert list(panels[0].lines[0].get_xdata()) == [6_000_000, 2_000_000]


def test_nothing_finished_gives_no_picture():
    assert list(report_pictures.pictures(Results({}))) == []


# -- files and pages -------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_files_that_are_cut_off_unfinished_or_of_other_names_are_passed_over(tmp_path):
    run = paper("rte", "full")
    good = record(run, 60.0)
    write(tmp_path, f"{run.name}.json", good)
    write(tmp_path, f"{paper('rte', 'full', 1).name}.json", json.dumps(record(paper("rte", "full", 1), 60.0))[:-9])
    write(
        tmp_path, f"{paper('rte', 'full', 2).name}.json", {**record(paper("rte", "full", 2), 60.0), "finished": False}
    )
    write(tmp_path, "notes.json", good)
    write(tmp_path, "paper-rte-no_such_variant-lr2e-05-seed0.json", good)
    write(tmp_path, f".{run.name}.json.77.part", good)
    write(tmp_path, "list.json", "[1, 2]")
    assert list(Results.read(tmp_path).records) == [run]
    assert Results.read(tmp_path / "nothing").records == {}


def test_a_file_of_other_settings_than_its_name_says_is_refused(tmp_path):
    write(tmp_path, f"{paper('rte', 'full', 4).name}.json", record(paper("rte", "full"), 60.0))
    with pytest.raises(ValueError, match="seed 0 there, 4 here"):
        Results.read(tmp_path)


def test_records_of_other_folders_may_stand_for_runs(tmp_path):
    write(tmp_path, "by-hand.json", record(paper("rte", "bitfit"), 60.0))
    assert list(Results.read(tmp_path / "sweep", [tmp_path]).records) == [paper("rte", "bitfit")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of two runs, and a page in a folder beside them."""
    for run in (paper("rte", "full"), paper("rte", "lora64")):
        write(tmp_path / "results/sweep", f"{run.name}.json", record(run, 61.4))
    shutil.copy(ROOT / "results/papers.json", tmp_path / "results")
    write(tmp_path / "results/architectures", "run-a.json", {})
    write(tmp_path / "results/figures", "run-a-architecture.png", "")
    names = ("table2-paper", "picture-convergence-paper", "picture-convergence-curves", "architectures", "table1")
    text = "\n".join(f"<!-- report:{name} -->\nold\n<!-- report:end -->\nbetween" for name in names)
    write(tmp_path / "docs", "page.md", f"before\n{text}\n")
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    return ["--results", str(folder / "results"), "--pages", str(folder / "docs/page.md"), *more]


def test_one_command_writes_the_tables_and_draws_the_pictures(folder, capsys):
    report.main(command(folder))
    said, text = capsys.readouterr().out, (folder / "docs/page.md").read_text()
    assert text.startswith("before\n") and text.count("between") == 5 and "old" not in text.split()
    assert "| full fine-tuning | 2,000,000 | 61.4 (one seed) |" in text
    assert "](../results/figures/sweep-convergence-paper.png)" in text and "Not drawn yet" in text
    assert "`run-a` ([json](../results/architectures/run-a.json)):" in text
    for name in ("scores", "convergence-paper"):
        path = folder / f"results/figures/sweep-{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG") and f"-> {path}" in said
    report.main(command(folder))
    assert (folder / "docs/page.md").read_text() == text


def test_a_page_or_picture_that_is_not_up_to_date_is_told(folder):
    with pytest.raises(SystemExit, match=r"Not up to date: page\.md, .*Run: python scripts/report\.py"):
        report.main(command(folder, "--check"))
    report.main(command(folder))
    report.main(command(folder, "--check"))
    page = folder / "docs/page.md"
    good = page.read_text()
    page.write_text(good.replace("61.4", "61.5", 1))
    with pytest.raises(SystemExit, match=r"Not up to date: page\.md\. "):
        report.main(command(folder, "--check"))
    assert page.read_text() != good
    page.write_text(good)
    (folder / "results/figures/sweep-scores.png").unlink()
    with pytest.raises(SystemExit, match=r"Not up to date: sweep-scores\.png\. "):
        report.main(command(folder, "--check"))


def test_a_run_that_was_added_makes_the_page_stale(folder):
    report.main(command(folder))
    run = paper("rte", "full", 1)
    write(folder / "results/sweep", f"{run.name}.json", record(run, 70.0))
    with pytest.raises(SystemExit, match=r"Not up to date: page\.md"):
        report.main(command(folder, "--check"))


@pytest.mark.parametrize("name", ["no-such", "picture-no-such"])
def test_a_marker_must_name_something(folder, name):
    (folder / "docs/page.md").write_text(f"<!-- report:{name} -->\n<!-- report:end -->\n")
    with pytest.raises(ValueError, match=f"<!-- report:{name} --> must name one of .*convergence|headline"):
        report.main(command(folder))


def test_papers_numbers_must_be_there(folder):
    (folder / "results/papers.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"papers\.json must hold"):
        report.main(command(folder))


def test_splicing_fills_each_marker_and_leaves_the_rest():
    text = "a\n<!-- x:one -->\nold\n<!-- x:end -->\nb <!-- y:one -->\nkept\n<!-- y:end -->\n"
    text += "<!-- x:two -->\n<!-- x:end -->"
    new = bench_tables.spliced(text, "x", lambda name: [f"| {name} |"])
    assert new == (
        "a\n<!-- x:one -->\n\n| one |\n\n<!-- x:end -->\nb <!-- y:one -->\nkept\n<!-- y:end -->\n"
        "<!-- x:two -->\n\n| two |\n\n<!-- x:end -->"
    )
    assert bench_tables.spliced(new, "x", lambda name: [f"| {name} |"]) == new


@pytest.mark.parametrize(
    "text",
    [
        "<!-- x:one -->\nno end",
        "<!-- x:one -->\n<!-- x:two -->\n<!-- x:end -->",
        "<!-- x:end -->",
        "<!-- x:one -->\n<!-- x:end -->\n<!-- x:two -->\n",
    ],
)
def test_a_marker_without_an_end_is_refused(text):
    with pytest.raises(ValueError, match="must have its <!-- x:end -->"):
        bench_tables.spliced(text, "x", lambda name: [])


def test_the_committed_pages_are_those_of_the_committed_files():
    assert (ROOT / "docs/results.md").read_text().count("<!-- report:end -->") > 10
    assert bench_rows.read_rows(ROOT / "results/bench")
    report.main(["--check"])


def test_scores_by_the_nas_recipe_are_medians():
    """Of 80, 90 and 82 the median is 82, the mean 84."""
    assert report_statistics.median_cell([80.0, 90.0, 82.0]) == "82.0 (median of 3 seeds)"
    assert report_statistics.median_cell([80.0]) == "80.0 (one seed)"
    assert report_statistics.median_cell([]) == report_statistics.MISSING
    assert report_scores.LAYOUTS["nas"].text([80.0, 90.0, 82.0]) == "82.0 (median of 3 seeds)"
    assert report_scores.LAYOUTS["table2-tuned"].text([80.0, 82.0]) == "81.0 ± 1.0 (2 seeds)"
