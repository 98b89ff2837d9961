"""`scripts/docs/report.py`: reading, pictures and pages of invented runs, and the committed pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from sweep_records import METRICS, ROOT, grid, paper, record, results, scored

from scripts.bench import plot as plot_bench
from scripts.bench import rows as bench_rows
from scripts.docs import pages, report
from scripts.docs import pictures as report_pictures
from scripts.docs.runs import Results
from scripts.glue import run_record
from scripts.sweep.plan import VARIANTS, Run

# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plot_bench, "save", lambda figure, path, metadata: figures.update({path.name: figure}))
    return figures


def draw_all(found: Results) -> list[str]:
    pictures = list(report_pictures.pictures(found))
    for picture in pictures:
        picture.draw(Path())
    names = [picture.name for picture in pictures]
    assert set(names) <= set(report_pictures.NAMES)
    return names


def test_convergence(drawn):
    """Convergence is the mean over the seeds by epoch."""
    found = scored({paper("rte", "full"): 60.0, paper("rte", "full", 1): 64.0, paper("rte", "lora8"): 50.0})
    assert draw_all(found) == ["scores", "convergence-paper"]
    score, loss = drawn["sweep-convergence-paper.png"].axes
    (line,) = score.lines  # lora8 is none of the main methods
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.0, 2.0], [50.0, pytest.approx(62.0)])
    assert line.get_label() == "full fine-tuning" and list(loss.lines[0].get_ydata()) == [0.7, 0.5]
    assert drawn["sweep-convergence-paper.png"]._suptitle.get_text().endswith("(2 seeds)")


def test_score_positions(drawn):
    """Scores stand at what is trained in the last phase."""
    tuned = grid("rte", "full", {3e-5: 60.0, 1e-4: 62.0, 3e-4: 61.0})
    found = Results({**scored({paper("rte", "full"): 60.0, paper("rte", "full", 1): 64.0}).records, **tuned})
    draw_all(found)
    panels = drawn["sweep-scores.png"].axes
    assert len(panels) == 2 and panels[0].get_xscale() == "log"
    points = [(float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0])) for c in panels[0].containers]
    assert points == [(2e6, pytest.approx(62.0))]
    assert list(panels[0].lines[0].get_xdata()) == [6_000_000, 2_000_000]


def test_nas_panel(drawn):
    """Of 60, 70 and 62 the median is 62, the mean 64."""
    found = {Run("nas", "rte", "bitfit", 3e-3, seed): value for seed, value in enumerate((60.0, 70.0, 62.0))}
    found |= {paper("rte", "full", seed): value for seed, value in enumerate((60.0, 64.0))}
    draw_all(scored(found))
    means, medians = drawn["sweep-scores.png"].axes
    (mean,), (median,) = means.containers, medians.containers
    assert float(median.lines[0].get_ydata()[0]) == pytest.approx(62.0)
    assert (mean.has_yerr, median.has_yerr) == (True, False)
    assert medians.get_title().endswith("\nRTE (medians, 3 seeds)") and means.get_title().endswith("\nRTE (2 seeds)")
    curves = drawn["sweep-convergence-nas.png"]
    assert curves._suptitle.get_text().endswith("(medians, 3 seeds)")
    assert float(curves.axes[0].lines[0].get_ydata()[-1]) == pytest.approx(62.0)


def test_panel_seeds(drawn):
    """A panel counts the seeds of its averages."""
    draw_all(scored({paper("rte", "full"): 60.0, paper("rte", "full", 1): 64.0, paper("mrpc", "full"): 80.0}))
    (panel,) = drawn["sweep-scores.png"].axes
    assert panel.get_title().endswith("\nRTE and MRPC (1 seed)") and not panel.containers[0].has_yerr


def test_no_shared_seed(drawn):
    """Tasks whose methods share no seed give no panel."""
    assert draw_all(scored({paper("rte", "full", 0): 60.0, paper("mrpc", "full", 1): 60.0})) == ["convergence-paper"]


def searched(task: str, seed: int, *kept: int, variant: str = "u_bitfit18") -> tuple[Run, dict[str, Any]]:
    """A run whose search kept so many of the 8 parameters in each of two blocks."""
    rows = [
        {
            "module": f"encoder.layer.{block}.dense",
            "kind": "bias",
            "parameters": own,
            "of": 8,
            "share": own / sum(kept),
        }
        for block, own in enumerate(kept)
    ]
    run = Run("nas", task, variant, 3e-3, seed)
    about = {"granularity": "unstructured", "r": 0, "budget": sum(kept), "rows": rows}
    return run, record(run, *[60.0] * len(METRICS[task]), architecture=about)


def test_mean_architectures(drawn):
    """Of 8 parameters 2, 8 and 5 in the first block: 15 / 24; 6, 0 and 3 in the second: 9 / 24."""
    runs = [searched("rte", 0, 2, 6), searched("rte", 1, 8, 0), searched("mrpc", 0, 5, 3)]
    without = Run("nas", "rte", "s_mam100", 1e-3, 0)  # a record that is older than this field
    found = results(*runs, searched("rte", 0, 1, 1, variant="u_mam25"), (without, record(without, 60.0)))
    assert [name for name in draw_all(found) if name.startswith("architecture")] == ["architecture-u_bitfit18"]
    heatmap = drawn["sweep-architecture-u_bitfit18.png"].axes[0]
    assert heatmap.images[0].get_array().ravel().tolist() == pytest.approx([15 / 24, 9 / 24])
    title = heatmap.get_title()
    assert title.startswith("U-BitFit, 18 % of the biases on RTE and MRPC (3 runs)\n") and "of 16 parameters" in title


def test_distinct_styles():
    """No two variants are drawn alike."""
    styles = [tuple(report_pictures.style_of(name).values()) for name in VARIANTS]
    assert len(set(styles)) == len(styles)


def test_nothing_finished_gives_no_picture():
    assert list(report_pictures.pictures(Results({}))) == []


# -- files and pages -------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def write_runs(folder: Path, found: dict[Run, dict[str, Any]]) -> None:
    """Records into their protocols' files, each in the place of the run's line or below the others."""
    for run, own in found.items():
        path = folder / f"{run.protocol}.jsonl"
        rows = {row["run"]: row for row in run_record.read_lines(path)}
        run_record.write_lines(path, ({**rows, run.name: {"run": run.name, **own}}).values())


def test_foreign_records(tmp_path):
    """Records of other settings than their names say are refused."""
    write_runs(tmp_path, {paper("rte", "full", 4): record(paper("rte", "full"), 60.0)})
    with pytest.raises(ValueError, match="seed 0 there, 4 here"):
        Results.read(tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Results of two runs, and a page in a folder beside them."""
    runs = (paper("rte", "full"), paper("rte", "lora64"))
    write_runs(tmp_path / "results/sweep", {run: record(run, 61.4) for run in runs})
    shutil.copy(ROOT / "results/papers.json", tmp_path / "results")
    write(tmp_path / "results/architectures", "run-a.json", {})
    write(tmp_path / "results/figures", "run-a-architecture.png", "")
    names = ("table2-paper", "picture-convergence-paper", "picture-convergence-curves", "architectures", "table1")
    text = "\n".join(f"<!-- report:{name} -->\nold\n<!-- report:end -->\nbetween" for name in names)
    write(tmp_path / "docs", "page.md", f"before\n{text}\n")
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    return ["--results", str(folder / "results"), "--pages", str(folder / "docs/page.md"), *more]


def test_one_command(folder, capsys):
    """One command writes the tables and draws the pictures."""
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


def test_check_tells(folder):
    """A page or picture that is not up to date is told."""
    with pytest.raises(SystemExit, match=r"Not up to date: page\.md, .*Run: python -m scripts\.docs\.report"):
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


def test_stale_picture(folder, capsys):
    """A picture drawn from other numbers is not up to date and it alone is drawn again."""
    report.main(command(folder))
    run = paper("rte", "full")
    found = record(run, 61.4)
    found["epochs"][0]["eval_accuracy"] = 0.4  # instead of 0.5: neither a table nor the other picture shows it
    write_runs(folder / "results/sweep", {run: found})
    with pytest.raises(SystemExit, match=r"Not up to date: sweep-convergence-paper\.png\. "):
        report.main(command(folder, "--check"))
    capsys.readouterr()
    report.main(command(folder))
    assert capsys.readouterr().out == f"-> {folder / 'results/figures/sweep-convergence-paper.png'}\n"
    report.main(command(folder, "--check"))
    report.main(command(folder))
    assert capsys.readouterr().out == ""


def test_damaged_picture(folder):
    """A file that is no whole picture or another one is not up to date."""
    report.main(command(folder))
    scores, other = (folder / f"results/figures/sweep-{name}.png" for name in ("scores", "convergence-paper"))
    whole = scores.read_bytes()
    plain = folder / "plain.png"
    plot_bench.save(plt.figure(), plain)
    for spoiled in (b"garbage", b"", whole[: len(whole) // 2], other.read_bytes(), plain.read_bytes()):
        scores.write_bytes(spoiled)
        with pytest.raises(SystemExit, match=r"Not up to date: sweep-scores\.png\. "):
            report.main(command(folder, "--check"))
    scores.write_bytes(whole)
    report.main(command(folder, "--check"))


def test_sweep_architectures(folder):
    """Learned architectures of the sweep stand beside the others."""
    run, found = searched("rte", 0, 2, 6)
    write_runs(folder / "results/sweep", {run: found})
    report.main(command(folder))
    text = (folder / "docs/page.md").read_text()
    assert text.index("`run-a` ([json]") < text.index("](../results/figures/sweep-architecture-u_bitfit18.png)")
    assert "\nWhat U-BitFit, 18 % of the biases on RTE (1 run) kept, by block and module:\n" in text
    report.main(command(folder, "--check"))


def test_common_settings(folder):
    """A sweep on fewer rows: its files are what their names say, and the page names the size."""
    sweep = folder / "results/sweep"
    for run in (paper("rte", "full"), paper("rte", "lora64")):
        found = record(run, 61.4, rows={"train": 64, "dev": 277})
        found["config"]["max_train_samples"] = 64
        write_runs(sweep, {run: found})
    with pytest.raises(ValueError, match="max_train_samples 64 there, None here"):
        report.main(command(folder))
    write(sweep, "sweep.json", {"model": "all-MiniLM-L6-v2", "settings": {"max_train_samples": 64}})
    report.main(command(folder))
    text = (folder / "docs/page.md").read_text()
    assert "**RTE**: 5 epochs, the first 64 train rows, 277 dev rows, up to 128 tokens" in text
    assert "| full fine-tuning | 2,000,000 | 61.4 (one seed) |" in text
    report.main(command(folder, "--check"))


def test_added_run(folder):
    """A run that was added makes the page stale."""
    report.main(command(folder))
    run = paper("rte", "full", 1)
    write_runs(folder / "results/sweep", {run: record(run, 70.0)})
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
    assert (ROOT / "docs/results.md").read_text().count("<!-- report:end -->") > 10
    assert bench_rows.read_rows(ROOT / "results/bench")
    report.main(["--check"])
