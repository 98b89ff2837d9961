"""What is made of the benchmark's rows: targets, tables, and the records of imports and curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.bench import imports as bench_import
from scripts.bench import rows as bench_rows
from scripts.bench import run as bench
from scripts.bench import scaling as bench_scaling
from scripts.bench import settings as bench_settings
from scripts.bench import tables as bench_tables
from scripts.docs import pages
from scripts.glue import run_record

QUARTILES = {"q1": 0.8, "median": 0.9, "q3": 1.0}


def row(setting: str, method: str, median: float = 0.9, **more) -> dict:
    """A row by hand, with what targets and tables read."""
    times = {"step": {**QUARTILES, "median": median}}
    sizes = {"stored": 0.94, "total": 0.5, "optimizer": 0.25}
    references = ("inference_base",) if method.startswith("inference") else ("lora", "full", "nas_plain")
    return {
        "setting": {"name": setting},
        "device": {"type": "cpu"},
        "method": method,
        "time_ratios": dict.fromkeys(references, times),
        "bytes_ratios": dict.fromkeys(references, sizes),
        "bytes": {"stored": 94, "total": 50},
        "flops_to_bound": 1.04,
        "tokens_per_second": 1234.5,
        "exchanged_bytes": 2_000_000,
        "adapter_file_bytes": 1_500_000,
        "save_seconds": [0.5, 0.1, 0.2],
        "load_seconds": None,
        **more,
    }


# -- targets -------------------------------------------------------------------------------------------------------


def found(rows: list[dict], device: str = "cpu") -> dict[tuple[str, str], tuple]:
    findings = bench_tables.targets_table(bench_rows.table_of(rows, device)).to_numpy()
    return {(name, setting): tuple(rest) for name, setting, *rest in findings}


def test_targets():
    """Each target is held against its rows."""
    rows = [
        row("minilm-16x128-r64", "learner_primed", 0.87),
        row("minilm-16x32-r64", "learner_primed", 0.871),
        row("minilm-16x128-r8", "learner_primed", 0.871),
        row("minilm-16x128-r64", "far_after", 0.5),
        row("minilm-16x128-r8", "nas_search", 1.04),
        row("import", "peft_learners", import_seconds={"median": 0.0492}),
        {"setting": {"name": "minilm-16x32-r8"}, "device": {"type": "cpu"}, "method": "nas_search", "skipped": "No."},
        row("llama-4x512-r64", "learner_primed", 0.95),
        {**row("minilm-16x32-r8", "learner_primed", 0.8), "device": {"type": "cuda"}},
    ]
    findings = found(rows)
    time, search = (
        "Learner after priming / LoRA: step time",
        "NAS-LoRA's search (U-MaM) / without importance: step time",
    )
    assert findings[time, "minilm-16x128-r64"] == ("0.87", "0.870", "met")
    assert findings[time, "minilm-16x32-r64"] == ("0.87", "0.871", "MISSED")
    assert findings[time, "minilm-16x128-r8"] == ("0.91", "0.871", "met")
    assert findings[time, "minilm-16x32-r8"] == ("0.91", "", "not measured")
    assert findings["Learner after priming / LoRA: stored bytes", "minilm-16x32-r64"] == ("0.95", "0.940", "met")
    assert findings["Learner after priming: flops / bound", "minilm-16x32-r64"] == ("1.05", "1.040", "met")
    assert findings["FAR after priming / full fine-tuning: step time", "minilm-16x128-r64"] == ("0.88", "0.500", "met")
    assert findings["FAR after priming / full fine-tuning: stored bytes", "minilm-16x128-r64"][1:] == (
        "0.940",
        "MISSED",
    )
    assert findings[search, "minilm-16x128-r8"] == ("1.03", "1.040", "MISSED")
    assert findings[search, "minilm-16x32-r8"] == ("1.03", "", "skipped: No.")
    assert findings["import over `import peft`: ms", "import"] == ("50", "49.200", "met")
    assert (time, "llama-4x512-r64") not in findings
    assert found(rows, "cuda")[time, "minilm-16x128-r64"][1:] == ("", "not measured")


# -- tables --------------------------------------------------------------------------------------------------------


def test_tables_have_medians_and_quartiles(tmp_path, capsys):
    rows = [row("minilm-16x32-r8", "lora", 1.0), row("minilm-16x128-r64", "far_after", 0.777)]
    rows += [row("minilm-16x128-r64", name) for name in ("lora", "learner_primed", "inference_lora")]
    where = {key: rows[0][key] for key in ("device", "method")} | {"setting": {"name": "minilm-16x128-r64"}}
    rows += [{**where, "method": "bitfit", "skipped": "ValueError: no."}]
    rows += [row("minilm-16x128-r64-dropout", "far_after", bytes_ratios={"full": {"stored": 0.6, "total": 0.5}})]
    rows += [row("minilm-16x128-r8", "nas_search"), row("bert512-2x128-r64-bf16", "learner_primed")]
    run_record.write_lines(tmp_path / "rows.jsonl", rows)
    tables = bench_tables.Tables(tmp_path)
    lines = [line for name in tables.makers for line in pages.markdown(tables[name])]
    cell = "0.90 [0.80, 1.00]"
    assert f"| after priming |  |  |  | {cell} | 0.94 | 0.50 |" in lines
    assert "| LoRA | 1.04 |  |  | 1.04 |" in lines
    assert "| after priming |  |  | 0.94 | 0.50 |" in lines and not any("| bert512" in line for line in lines)
    assert "| after, by hidden unit | 0.78 [0.80, 1.00] | 0.94 | 0.60 | 0.50 | 1.50 MB |" in lines
    label = "search of U-MaM, against the same adapter without importance"
    assert f"| {label} | {cell} |  | 0.25 | 1.50 MB |" in lines
    assert f"| LoRA |  |  |  | {cell} |" in lines
    whole = f"| LoRA | {cell} | {cell} | 1,234 | 1.04 | 1.00 | 1.00 | 2.00 MB | 1.50 MB | 0.20 s |  |"
    assert whole in lines
    assert f"| BitFit | skipped: ValueError: no. |{'  |' * 9}" in lines
    bench_tables.main([str(tmp_path), "--table", "minilm-16x32-r8"])
    said = capsys.readouterr().out
    assert "minilm-16x32-r8\n" in said and "LoRA 1.00 [0.80, 1.00] 1.00 [0.80, 1.00]" in said and "BitFit" not in said
    with pytest.raises(ValueError, match="must be one of learner, flops, .*, got unknown"):
        bench_tables.main([str(tmp_path), "--table", "unknown"])
    with pytest.raises(FileNotFoundError, match="must be rows"):
        bench_tables.main([str(tmp_path / "elsewhere")])


def test_methods_measured():
    """Every method of the tables is measured."""
    assert {*bench_tables.METHODS, *bench_tables.INFERENCE, *bench_tables.NAS} <= set(bench.METHODS)
    assert {*bench_tables.SHAPES, *bench_tables.BF16} <= set(bench_settings.SETTINGS)
    for _, _, settings, method, _ in bench_tables.TARGETS:
        shapes = {setting.removesuffix(bench_tables.KEPT_HEAP) for setting in settings}
        assert settings == ("import",) or (shapes <= set(bench_settings.SETTINGS) and method in bench.METHODS)


# -- imports and curves --------------------------------------------------------------------------------------------


def test_import_times(tmp_path, monkeypatch):
    """Imports are timed in processes of their own with compiled modules."""
    note = "from pathlib import Path\nnote = Path(__file__).with_suffix('.txt').open('a')\n"
    note += "note.write(str(Path(__cached__).exists()))\nnote.close()"
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(0.2)")
    (tmp_path / "quick_module.py").write_text(note)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    slow, quick = bench_import.import_rows(2, ("slow_module", "quick_module"))
    assert (slow["method"], quick["method"]) == ("slow_module", "quick_module")
    assert quick["import_seconds"]["median"] < 0.2 <= slow["import_seconds"]["q1"]
    assert len(slow["seconds"]["import"]) == len(quick["seconds"]["import"]) == 2
    # The bytecode is there before a module's own code runs; it lies where it is gone afterwards.
    assert (tmp_path / "quick_module.txt").read_text() == "TrueTrueTrue"
    assert not (tmp_path / "__pycache__").exists()


def test_curves():
    axes = {"rank": (2, 4), "tokens": (64,), "width": (32,), "adapters": (3,), "active_adapters": (2,)}
    points = bench_scaling.points(axes, rounds=1, width=16)
    rows, trained = [], {}
    for work, found in bench_scaling.scaling_rows(bench.measure_point, points, torch.device("cpu")):
        record = work.record()
        for row in found:
            assert "skipped" not in row and row["group"] == "scaling"
            trained[row["axis"], row["value"], row["method"]] = row["trained_parameters"]
        rows.append((record["rank"], record["batch"] * record["tokens"], record["width"]))
    assert rows == [(2, 1024, 16), (4, 1024, 16), (64, 64, 16), (64, 1024, 32), (16, 1024, 16), (32, 1024, 16)]
    # Low-rank updates alone, on two blocks of width 16: 4 layers 16 -> 16, 16 -> 64, 64 -> 16. Only active ones train.
    sizes = 2 * (4 * 32 + 2 * 80)
    for method in ("lora", "learner_unprimed"):
        assert trained["adapters", 3, method] == 16 * sizes
        assert trained["active_adapters", 2, method] == 2 * 16 * sizes
    assert trained["rank", 4, "lora"] - trained["rank", 2, "lora"] == 2 * (sizes + 32)  # the pooler too


# -- pages ---------------------------------------------------------------------------------------------------------


def test_page_markers(tmp_path: Path):
    """Pages get the tables that their markers name."""
    rows = [row("minilm-16x128-r64", "lora"), row("minilm-16x128-r64-kept-heap", "learner_primed", 0.77)]
    rows += [
        row("scaling", "learner_unprimed", 0.5, axis="rank", value=8),
        row("scaling", "lora", 1.0, axis="rank", value=8),
    ]
    run_record.write_lines(tmp_path / "rows.jsonl", rows)
    record = {"methods": {"lora": {"shares": {"norms": 0.25, "attention": 0.5}}, "full": {"shares": {"norms": 0.1}}}}
    (tmp_path / "profile-minilm-16x32-r64-cpu.json").write_text(json.dumps(record))
    names = ("learner-kept-heap", "scaling", "targets", "profile-minilm-16x32-r64")
    text = "before\n" + "".join(f"<!-- bench:{name} -->\nold\n<!-- bench:end -->\nbetween\n" for name in names)
    tables = bench_tables.Tables(tmp_path)

    def lines_of(name: str) -> list[str]:
        return pages.markdown(tables[name])

    new = pages.spliced(text, "bench", lines_of)
    assert "old" not in new and new.startswith("before\n") and new.count("between") == len(names)
    assert "| after priming |  |  |  | 0.77 [0.80, 1.00] | 0.94 | 0.50 |" in new
    assert "| rank | 8: 0.50 |" in new and new.count("not measured") > 5
    assert "| norms | 25 % | 10 % |" in new and "| attention | 50 % | 0 % |" in new
    assert pages.spliced(new, "bench", lines_of) == new
    with pytest.raises(ValueError, match="must be one of learner, .* got no-such"):
        pages.spliced("<!-- bench:no-such -->\n<!-- bench:end -->", "bench", lines_of)


def test_allocator_environment(monkeypatch):
    """What the environment tells the allocator stands in the rows."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    assert (
        bench.common_fields({"name": "x"}, torch.device("cpu"))["setting"]["allocator"]["MALLOC_TRIM_THRESHOLD_"]
        == "123"
    )
