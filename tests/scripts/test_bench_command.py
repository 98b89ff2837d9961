"""The benchmark's command line: what it measures, what it takes for finished, and where it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo

from scripts.bench import compare
from scripts.bench import rows as bench_rows
from scripts.bench import run as bench
from scripts.glue import run_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("hidden-place") / "tiny-bert"
    zoo.build("bert").save_pretrained(folder)
    fixed = ["--setting", "minilm-16x32-r8", "--model_name_or_path", str(folder), "--device", "cpu"]
    return [*fixed, "--threads", "1", "--rounds", "1", "--groups", "peft", "--label", "x"]


def test_finished_setting(arguments, tmp_path, capsys):
    """A setting whose file is there is skipped."""
    bench.main([*arguments, "--out", str(tmp_path), "--dropout", "0.1"])
    path = tmp_path / "minilm-16x32-r8-x-cpu.jsonl"
    rows = bench_rows.read_rows(path)
    assert [row["method"] for row in rows] == list(bench.GROUPS["peft"])
    assert rows[0]["setting"]["name"] == "minilm-16x32-r8-x"
    assert rows[0]["setting"]["model"] == "tiny-bert" and "hidden-place" not in path.read_text()
    assert set(rows[0]["setting"]["dropout"].values()) == {0.1}
    date = path.stat().st_mtime_ns
    bench.main([*arguments, "--out", str(tmp_path)])
    assert path.stat().st_mtime_ns == date and "is there" in capsys.readouterr().out
    bench.main([*arguments, "--out", str(tmp_path), "--again"])
    again = bench_rows.read_rows(path)
    assert set(again[0]["setting"]["dropout"].values()) == {0.0}
    # Masks of dropout are kept for backward.
    assert rows[1]["bytes"]["stored"] > again[1]["bytes"]["stored"]


@pytest.mark.parametrize(
    "more,named",
    [
        (["--groups", "far"], "--groups"),
        (["--rounds", "1"], "--rounds"),
        (["--dropout", "0", "--threads", "1"], "--dropout, --threads"),
    ],
)
def test_label_needed(monkeypatch, more, named):
    """What is measured otherwise needs a name of its own."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    words = ["--setting", "minilm-16x32-r8", "--device", "cpu", *more]
    with pytest.raises(ValueError, match=f"--label must name what is measured with other {named}, got none"):
        bench.parse(words)
    bench.parse([*words, "--label", "x"])


@pytest.mark.parametrize("rows", [[], [{"schema_version": 0}]], ids=["empty", "older"])
def test_unfit_file(tmp_path, monkeypatch, rows):
    """A file that is not what is asked for is measured anew."""
    measured = []
    monkeypatch.setattr(bench, "run_setting", lambda *given: measured.append((given[0], given[1], given[-1])))
    argv = [
        "--setting",
        "minilm-16x32-r8",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--label",
        "x",
    ]
    path = tmp_path / "minilm-16x32-r8-x-cpu.jsonl"
    run_record.write_lines(path, [{"schema_version": bench.SCHEMA_VERSION}])
    bench.main(argv)
    assert measured == []
    run_record.write_lines(path, rows)
    bench.main(argv)
    assert measured == [("minilm-16x32-r8", "minilm-16x32-r8-x", path)]


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "minilm-16x32-r8-x-cpu.jsonl"
    argv = ["--setting", "minilm-16x32-r8", "--label", "x", "--out", str(tmp_path), "--device", "cpu"]
    for line in ('{"setting": {', "3", ""):
        path.write_text(f"{{}}\n{line}\n")
        for read in (lambda: bench_rows.read_rows(tmp_path), lambda: bench.main([*argv, "--threads", "1"])):
            with pytest.raises(ValueError, match=r"x-cpu.jsonl, line 2, .* delete the file, and make it again"):
                read()


@pytest.mark.parametrize(
    "more,message",
    [
        (["--setting", "minilm-16x32-r8"], "--model_name_or_path must name the model of the setting minilm-16x32-r8"),
        (["--setting", "bert-large-16x128-r64"], "needs a device of the kind cuda, got cpu"),
        (["--setting", "import", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--setting", "import", "--groups", "far"], "--setting import must be without --groups"),
        (["--setting", "scaling", "--groups", "far", "--dropout", "0"], "must be without --groups and --dropout"),
    ],
)
def test_wrong_arguments(tmp_path, more, message):
    """Arguments that can't be right."""
    with pytest.raises(ValueError, match=message):
        bench.main([*more, "--out", str(tmp_path), "--device", "cpu", "--threads", "1", "--label", "x"])


def test_more_tokens_than_positions(arguments, tmp_path):
    with pytest.raises(ValueError, match="tokens must be from 1 to 32 for the model tiny-bert, got 128"):
        bench.main(["--setting", "minilm-16x128-r8", *arguments[2:], "--out", str(tmp_path)])


def test_missing_device():
    """All leaves out what the device or the model is missing for."""
    args, device = bench.parse(["--setting", "all", "--device", "cpu", "--threads", "1", "--label", "x"])
    own = ["distilbert-16x128-r64", "llama-4x512-r64", "bert512-2x128-r16-bf16", "bert512-2x128-r64-bf16"]
    assert bench.settings_to_run(args, device) == [*own, "scaling", "import"]
    args.dropout = 0.0
    assert bench.settings_to_run(args, device) == own
    args.dropout, args.model_name_or_path = None, "somewhere"
    assert len(bench.settings_to_run(args, device)) == 11
    assert "decoder-1b-4x512-r64" in bench.settings_to_run(args, torch.device("cuda"))


@pytest.mark.slow
def test_compare(arguments, tmp_path):
    """The second one's package is this one's under another name, which no commit is of."""
    (tmp_path / "peft_learners").symlink_to(ROOT / "peft_learners")
    model = arguments[arguments.index("--model_name_or_path") + 1]
    words = [str(ROOT), str(tmp_path), "--setting", "minilm-16x32-r8", "--model_name_or_path", model]
    more = [
        "--groups",
        "learner",
        "inference",
        "--rounds",
        "3",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "rows.jsonl"),
    ]
    rows = compare.main([*words, *more])
    assert rows == run_record.read_lines(tmp_path / "rows.jsonl")
    assert [row["method"] for row in rows] == [*bench.GROUPS["learner"], *bench.GROUPS["inference"]]
    for row in rows:
        assert row["stored"]["before"] == row["stored"]["after"] >= 0
        assert 0 < row["time_ratio"]["q1"] <= row["time_ratio"]["median"] <= row["time_ratio"]["q3"]
        assert row["code"] == {"before": run_record.code(), "after": f"{run_record.code()}, package None"}
    assert rows[0]["time_to_lora"] == {key: {"q1": 1.0, "median": 1.0, "q3": 1.0} for key in ("before", "after")}
    assert rows[1]["stored"]["before"] > 0 and rows[-1]["time_to_lora"] == {"before": None, "after": None}
