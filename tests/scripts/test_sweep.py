"""`scripts/sweep/run.py`: real runs of a tiny model, processes killed at random, two sweeps in one folder."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from scripts.docs.runs import Results
from scripts.glue import data as glue_data
from scripts.glue import run_record
from scripts.glue import train as train_glue
from scripts.sweep import run as sweep
from scripts.sweep import store as sweep_store
from scripts.sweep.plan import Run, best_rate

ROOT = Path(__file__).resolve().parents[2]
#: Settings of the small sweeps that are not a real one's.
CHANGED = {"max_length": 32, "r": 4, "per_device_train_batch_size": 4, "num_train_epochs": 4.0}
#: Of runs that are to be killed: long enough to be met in training.
EPOCHS = 32.0
TIMES = ("seconds", "wall_seconds", "peak_memory_bytes", "date")


def record(run: Run, **changes: object) -> dict:
    """A finished record of a run, as train_glue.py would write it."""
    from scripts.sweep.plan import VARIANTS, settings

    config = {**settings(run), **changes.pop("config", {})}
    config.setdefault("total_batch_size", config["per_device_train_batch_size"])
    fields = {"method": VARIANTS[run.variant].method, "task": run.task, "model": sweep_store.MODEL}
    return {"run": run.name, **fields, "config": config, "final": {"eval_accuracy": 0.5}, "finished": True, **changes}


def write(folder: Path, *runs: dict) -> None:
    """Lines of the protocols' files, in the place of what was there."""
    for name in {row["run"].partition("-")[0] for row in runs}:
        rows = [row for row in runs if row["run"].startswith(f"{name}-")]
        run_record.write_lines(folder / f"{name}.jsonl", rows)


PAPER = Run("paper", "rte", "lora64", 2e-5, 0)
TUNED = Run("tuned", "rte", "lora64", 3e-4, 0)


# -- what is finished ------------------------------------------------------------------------------------------------


def test_unfinished_lines(tmp_path):
    """Lines of no finished run are refused."""
    assert sweep_store.finished(tmp_path) == {}
    write(tmp_path, record(PAPER))
    assert set(sweep_store.finished(tmp_path)) == {PAPER}
    for wrong in (
        record(PAPER, finished=False),
        {**record(PAPER), "run": "paper-x"},
        {"run": PAPER.name, "file": "x"},
    ):
        write(tmp_path, record(TUNED), wrong)
        with pytest.raises(ValueError, match="paper.jsonl must hold finished runs, got 'paper-"):
            sweep_store.finished(tmp_path)
    (tmp_path / "paper.jsonl").write_text('{"run": "pap', encoding="utf-8")
    with pytest.raises(ValueError, match="paper.jsonl, line 1, must be a JSON object"):
        sweep_store.finished(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8},
        {"seed": 1},
        {"num_train_epochs": 4.0},
        {"holdout_share": 0.1},
        {"optim": "adafactor"},
        {"total_batch_size": 32},  # of two processes
        {"load_best_model_at_end": True},  # which would choose on dev
        {"bf16": True},
        {"max_train_samples": 64},
    ],
)
def test_foreign_record(config, tmp_path):
    """A record made with other settings than its name says is refused."""
    write(tmp_path, record(PAPER, config=config))
    (key,) = config
    with pytest.raises(ValueError, match=f"{key} .* there, .* here.*another --out"):
        sweep_store.finished(tmp_path)


def test_pointer_line(tmp_path):
    """A line may name the file of its record."""
    old = record(PAPER)
    del old["config"]["holdout_share"]  # records from before there was such a thing
    run_record.write_json(tmp_path / "old.json", old)
    write(tmp_path / "sweep", {"run": PAPER.name, "file": "../old.json"})
    assert sweep_store.finished(tmp_path / "sweep") == {PAPER: old}
    run_record.write_json(tmp_path / "old.json", record(PAPER, model="other"))
    with pytest.raises(ValueError, match="model 'other' there"):
        sweep_store.finished(tmp_path / "sweep")


def test_finished_moved(tmp_path):
    """Killed before the line is there, or before the run's folder is gone: the next look ends the same."""
    work, about = tmp_path / sweep_store.WORK, sweep_store.About()
    other = Run("paper", "rte", "full", 2e-5, 0)
    write(tmp_path, record(other))
    run_record.write_json(work / TUNED.name / "results.json", record(TUNED))
    run_record.write_json(work / PAPER.name / "results.json", record(PAPER, finished=False))
    (work / PAPER.name / "checkpoint-3").mkdir()
    assert set(sweep_store.collect(tmp_path, about)) == {other, TUNED}
    assert not (work / TUNED.name).exists() and (work / PAPER.name / "checkpoint-3").is_dir()
    assert run_record.read_lines(tmp_path / "tuned.jsonl") == [record(TUNED)]
    run_record.write_json(work / PAPER.name / "results.json", record(PAPER))
    run_record.write_json(work / TUNED.name / "results.json", record(TUNED))  # as if the folder had not gone
    assert set(sweep_store.collect(tmp_path, about)) == {other, TUNED, PAPER}
    assert run_record.read_lines(tmp_path / "paper.jsonl") == [record(other), record(PAPER)]
    assert run_record.read_lines(tmp_path / "tuned.jsonl") == [record(TUNED)]
    assert [path.name for path in work.iterdir()] == [".lock"]


def test_foreign_folder_kept(tmp_path):
    """A finished folder of other settings is refused and kept."""
    run_record.write_json(tmp_path / sweep_store.WORK / PAPER.name / "results.json", record(PAPER, config={"r": 8}))
    with pytest.raises(ValueError, match="r 8 there, 64 here"):
        sweep_store.collect(tmp_path, sweep_store.About())
    assert not (tmp_path / "paper.jsonl").exists() and (tmp_path / sweep_store.WORK / PAPER.name).is_dir()


def test_committed_runs():
    """The committed runs of earlier work count."""
    found = sweep_store.finished(ROOT / "results" / "sweep")
    names = {(run.protocol, run.task, run.variant) for run in found}
    paper = {"full", "lora64", "learner64_p2", "far10", "far10_random", "far10_output_node"}
    assert names >= {("paper", "mrpc", name) for name in paper} | {
        ("nas", "mrpc", name) for name in ("bitfit", "mam8")
    }
    assert names >= {("nas", "mrpc", "u_mam100"), ("paper", "stsb", "learner64_p2"), ("paper", "cola", "learner64_p2")}


def test_scores():
    """Scores are means of a tasks metrics and only of held out rows."""
    both = {"accuracy": 0.8, "f1": 0.9}
    assert sweep_store.score(both, "mrpc") == pytest.approx(85.0)  # (80 + 90) / 2
    assert sweep_store.score({"accuracy": 0.8}, "mrpc") is None
    runs = {
        PAPER: record(PAPER),
        TUNED: record(TUNED, holdout={"accuracy": 0.7, "loss": 1.0}),
        Run("tuned", "rte", "lora64", 1e-3, 0): record(TUNED, holdout={"accuracy": None}),
    }
    assert list(sweep_store.holdout_scores(runs).values()) == [None, 70.0, float("-inf")]
    found = Results(runs)
    assert best_rate(found.held_out, "rte", "lora64") == 3e-4
    assert not found.is_searched("rte", "lora64")


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words,message",
    [
        (["--tasks", "rte", "nothing"], "--tasks must be of rte, mrpc, cola, stsb, got nothing"),
        (["--variants", "x"], "--variants must be of full, .* got x"),
        (["--jobs", "0"], "--jobs must be above 0, got 0"),
        (["--budget_hours", "-1"], "--budget_hours must be above 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        sweep.main(words)


def test_list(tmp_path, capsys):
    """The list marks what is finished."""
    write(tmp_path, record(PAPER))
    words = ["--model_name_or_path", f"x/{sweep_store.MODEL}", "--out", str(tmp_path), "--list", "--seeds", "0"]
    assert sweep.main([*words, "--protocols", "paper", "--tasks", "rte", "--variants", "lora64", "full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  paper-rte-full-lr2e-05-seed0", f"x {PAPER.name}", "1 of 2 finished"]


def test_folder_owner(tmp_path):
    """A folder is one sweeps and says whose."""
    about = sweep_store.About("tiny", {"max_train_samples": 64})
    about.write(tmp_path)
    about.write(tmp_path)
    assert sweep_store.About.read(tmp_path) == about
    with pytest.raises(ValueError, match="holds a sweep of tiny with .*64.* this one is of tiny with {}"):
        sweep_store.About("tiny").write(tmp_path)
    cut = record(PAPER, model="somebody/tiny", config={"max_train_samples": 64})
    write(tmp_path, cut)
    assert set(sweep_store.finished(tmp_path)) == {PAPER}  # as the folder says


def test_hub_model(tmp_path):
    """A model of the Hub and its folder are one."""
    write(tmp_path, record(PAPER, model=f"sentence-transformers/{sweep_store.MODEL}"))
    assert set(sweep_store.finished(tmp_path)) == {PAPER}


def test_extra_settings():
    """Settings of methods after the dashes are known."""
    assert sweep.changed_settings(["--retention_ratio", "0.5", "--bf16"]) == {"retention_ratio": 0.5, "bf16": True}
    assert sweep.changed_settings(["--float32_matmul_precision", "medium"]) == {}


def test_extra_settings_in_record(tmp_path):
    """Settings after the dashes are part of what a record must say."""
    write(tmp_path, record(PAPER))
    words = ["--model_name_or_path", sweep_store.MODEL, "--out", str(tmp_path), "--list"]
    with pytest.raises(ValueError, match="max_train_samples None there, 7 here"):
        sweep.main([*words, "--", "--max_train_samples", "7"])


@pytest.mark.parametrize(
    "visible,number,expected", [(None, "1", "1"), ("", "0", "0"), ("3", "0", "3"), ("5,7", "1", "7")]
)
def test_gpu_given(visible, number, expected):
    """A process gets a GPU that the sweep was given."""
    assert sweep.visible_device(number, visible) == expected


@pytest.mark.parametrize("number", ["1", "cuda:0"])
def test_gpu_not_given(number):
    """A GPU that the sweep was not given is named."""
    with pytest.raises(ValueError, match=f"--devices must be numbers below 1, got {number}: CUDA_VISIBLE_DEVICES=3"):
        sweep.visible_device(number, "3")


def test_gpu_refused_early(tmp_path, monkeypatch):
    """A GPU that the sweep was not given is refused before anything trains."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    words = ["--model_name_or_path", sweep_store.MODEL, "--out", str(tmp_path / "out"), "--devices", "0", "1"]
    with pytest.raises(ValueError, match="--devices must be numbers below 1, got 1"):
        sweep.main(words)
    assert not (tmp_path / "out").exists()


# -- held-out rows ---------------------------------------------------------------------------------------------------


def test_held_out_rows(data_dir):
    """Held out rows are the same in every call and not trained on."""
    task = glue_data.find_task("rte")
    everything = glue_data.load_glue(task, str(data_dir))
    first, second = (glue_data.load_glue(task, str(data_dir), holdout_share=0.25) for _ in range(2))
    named = {"train": first.train, "holdout": first.holdout, "all": everything.train}
    pairs = {name: list(zip(rows["text"], rows["text_pair"], strict=True)) for name, rows in named.items()}
    assert first.holdout["text"] == second.holdout["text"] and first.train["text"] == second.train["text"]
    assert (len(first.train), len(first.holdout)) == (36, 12)
    assert sorted(pairs["train"] + pairs["holdout"]) == sorted(pairs["all"])
    assert first.dev[""]["text"] == everything.dev[""]["text"]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_wrong_share_is_named(share, data_dir):
    with pytest.raises(ValueError, match=f"--holdout_share must be from 0 to below 1, got {share}"):
        glue_data.load_glue(glue_data.find_task("rte"), str(data_dir), holdout_share=share)


# -- whole sweeps ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread_and_no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def words(model_dir, data_dir):
    """The arguments of a small sweep into a folder: a phased method by the paper's protocol on two tasks."""

    def make(out: Path, *more: str) -> list[str]:
        own = ["--model_name_or_path", model_dir, "--data_dir", data_dir, "--out", out, "--devices", "cpu"]
        some = ["--tasks", "rte", "mrpc", "--variants", "learner8_p2", "--protocols", "paper", "--seeds", "0"]
        extra = [word for name, value in CHANGED.items() for word in (f"--{name}", value)]
        return [str(word) for word in (*own, *some, *more, "--", *extra)]

    return make


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, object]:
    rows = [row for path in folder.glob("*.jsonl") for row in run_record.read_lines(path)]
    found = {row["run"]: without_times(row) for row in rows}
    assert len(found) == len(rows)
    return found


def tuned_but_for_one_rate(out: Path) -> None:
    """Write the other two rates of the tuned protocol's grid, as if they had been trained and learned nothing."""
    runs = [Run("tuned", "rte", "learner8_p2", lr, 0) for lr in (1e-4, 1e-3)]
    config, held_out = {**CHANGED, "num_train_epochs": EPOCHS}, {"accuracy": 0.0, "loss": 1.0}
    write(out, *(record(run, model="tiny-bert", config=config, holdout=held_out) for run in runs))


@pytest.mark.slow
def test_killed_at_random(words, tmp_path):
    """A run by the paper's recipe, and one that holds out rows and sorts the others by length."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    for folder in (alone, out):
        tuned_but_for_one_rate(folder)
    more = ("--tasks", "rte", "--protocols", "paper", "tuned", "--jobs", "2")
    broken, whole = ([*words(folder, *more), "--num_train_epochs", str(EPOCHS)] for folder in (out, alone))
    unbroken = sweep.parsed(whole)
    todo = [run for run in unbroken.read() if run not in unbroken.records]
    assert [(run.protocol, run.lr) for run in todo] == [("paper", 2e-5), ("tuned", 3e-4)]
    for run in todo:
        train_glue.main([*unbroken.command(run)[3:], "--use_cpu"])
    unbroken.read()
    expected = results(alone)
    assert len(expected) == 2 + 2

    command = [sys.executable, "-m", "scripts.sweep.run", *broken]
    rng, seen, logs = random.Random(), set(), ""
    for begun in ("*/checkpoint-*/trainer_state.json", "*/checkpoint-*"):  # the first is whole
        process = subprocess.Popen(command, start_new_session=True)
        try:
            while not {*(out / ".work").glob(begun)} - seen and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5))
            logs += "".join(path.read_text() for path in (out / ".work").glob("*/log.txt"))
            assert process.poll() is None  # it is killed, and did not end
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seen = {*(out / ".work").glob("*/checkpoint-*")}
    assert "Going on from" in logs  # the kills met runs in training
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert results(out) == expected
    assert [path.name for path in (out / ".work").iterdir()] == [".lock"]


@pytest.mark.slow
def test_failing_run(words, tmp_path, capsys):
    """A run that fails is named and the others go on."""
    broken = tmp_path / ".work" / "paper-rte-learner8_p2-lr2e-05-seed0" / "run_config.json"
    broken.mkdir(parents=True)  # where a file is to be written
    assert sweep.main(words(tmp_path, "--jobs", "2")) == 1
    said = capsys.readouterr()
    assert "paper-rte-learner8_p2-lr2e-05-seed0 failed with status 1: see " in said.out + said.err
    assert set(results(tmp_path)) == {"paper-mrpc-learner8_p2-lr2e-05-seed0"}


def test_busy_folder(words, tmp_path):
    """A folder in which another process trains is left alone."""
    run = Run("paper", "rte", "learner8_p2", 2e-5, 0)
    with run_record.only_process(tmp_path / ".work" / run.name):
        assert sweep.main(words(tmp_path, "--tasks", "rte", "--budget_hours", "0.0003")) == 0
        with pytest.raises(run_record.BusyError, match="another process trains there"):
            train_glue.main(["--task", "rte", "--output_dir", str(tmp_path / ".work" / run.name), "--use_cpu"])
    assert results(tmp_path) == {}


def test_progress_in_log(words, tmp_path, capsys, monkeypatch):
    """The progress in a log file is not drawn at every look."""
    looks, sleep = [], time.sleep
    monkeypatch.setattr(sweep, "POLL", 0.01)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: (looks.append(seconds), sleep(seconds)))
    with run_record.only_process(tmp_path / ".work" / "paper-rte-learner8_p2-lr2e-05-seed0"):
        assert sweep.main(words(tmp_path, "--tasks", "rte", "--budget_hours", "0.0003")) == 0
    assert len(looks) > 10
    assert 1 <= capsys.readouterr().err.count("0/1") <= 3  # at first, at the end


def test_keep_adapters(words, tmp_path):
    """Adapters are kept where that is asked for."""
    run = Run("paper", "rte", "learner8_p2", 2e-5, 0)
    (tmp_path / "out" / ".work" / run.name / "adapter").mkdir(parents=True)
    write(tmp_path / "out", record(run, model="tiny-bert", config=CHANGED))
    assert sweep.main(words(tmp_path / "out", "--tasks", "rte", "--keep", str(tmp_path / "kept"))) == 0
    assert (tmp_path / "kept" / run.name).is_dir() and not (tmp_path / "out" / ".work" / run.name).exists()
