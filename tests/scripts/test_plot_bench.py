"""`scripts/bench/plot.py` on rows written by hand."""

from __future__ import annotations

import pytest

from scripts.bench import plot as plot_bench
from scripts.glue import run_record


def row(setting: str, method: str, median: float, flops: int, **more) -> dict:
    shape = {"name": setting, "model": "bert", "batch": 2, "tokens": 8, "rank": 4, "dtype": "float32"}
    return {
        "setting": shape,
        "device": {"type": "cpu", "name": "a machine", "threads": 1},
        "method": method,
        "time_ratios": {
            peer: {"step": {"q1": median - 0.1, "median": median, "q3": median + 0.2}} for peer in ("lora", "full")
        },
        "flops": flops,
        "bound_flops": 90,
        "bytes": {"stored": 4_000_000, "parameters": 3_000_000, "gradients": 2_000_000, "optimizer": 1_000_000},
        **more,
    }


ROWS = [
    row("tiny", "lora", 1.0, 100),
    row("tiny", "learner_primed", 0.8, 95),
    {**row("tiny", "bitfit", 0.5, 80), "skipped": "ValueError: no."},
    row("import", "peft_learners", 1.0, 1),
    *(
        row("scaling", method, value / 100, 1, axis=axis, value=value)
        for axis in ("rank", "adapters")
        for value in (64, 4)
        for method in ("full", "learner_unprimed")
    ),
]


@pytest.mark.parametrize("ending,begin", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_per_setting(tmp_path, ending, begin):
    run_record.write_lines(tmp_path / "rows.jsonl", ROWS)
    plot_bench.main([str(tmp_path), "--out", str(tmp_path / "out"), "--ending", ending])
    names = {f"bench-tiny-cpu.{ending}", f"bench-scaling-cpu.{ending}"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(path.read_bytes().startswith(begin) for path in (tmp_path / "out").iterdir())


def test_what_is_drawn(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot_bench, "save", lambda figure, path: drawn.update({path.name: figure}))
    list(plot_bench.draw_all(ROWS, tmp_path, "png"))
    times, flops, sizes = drawn["bench-tiny-cpu.png"].axes
    assert [tick.get_text() for tick in times.get_yticklabels()] == ["LoRA", "Learner, after priming"]
    assert [bar.get_width() for bar in times.containers[1]] == [1.0, 0.8]
    spread = times.containers[0].lines[2][0].get_segments()[1]
    assert spread[:, 0].tolist() == pytest.approx([0.7, 1.0])
    assert [bar.get_width() for bar in flops.patches] == [1.0, 0.95]
    assert flops.lines[0].get_xdata()[0] == 0.9  # the bound
    assert [bar.get_x() + bar.get_width() for bar in sizes.patches[::2]] == pytest.approx([4, 7, 9, 10])
    panels = drawn["bench-scaling-cpu.png"].axes
    assert [panel.get_xlabel() for panel in panels] == ["rank", "adapters in the model, one active"]
    learner = panels[0].lines[0]
    assert learner.get_label() == "Learner, without priming"
    assert (list(learner.get_xdata()), list(learner.get_ydata())) == ([4, 64], [0.04, 0.64])


def test_a_folder_without_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold rows of scripts.bench.run \(\*.jsonl\), but has none"):
        plot_bench.main([str(tmp_path)])
