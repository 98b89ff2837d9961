"""`scripts/evidence`: the rows, the plan, the figures by hand, and sweeps that are killed at random."""

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
import torch
import training
import yaml
from bases import float_base
from transformers import TrainerCallback

from scripts.docs import evidence as page
from scripts.evidence import costs, data, sweep, variants
from scripts.evidence.figures import Evidence, Mean
from scripts.evidence.plan import Protocol, Run, Stage, Task, Variant
from scripts.evidence.run import train
from scripts.glue import run_record

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 32, "choice": 8, "test": 12}


@pytest.fixture(autouse=True)
def precision_restored():
    """A run and the costs set the whole process's precision, which other tests rely on."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def protocol(**changes: object) -> Protocol:
    """LoRA and a primed Learner on two tasks."""
    fields: dict = {
        "recipe": {"per_device_train_batch_size": 4, "warmup_steps": 0.1},
        "evaluations": 4,
        "precision": "highest",
        "max_length": 32,
        "seeds": [0, 1],
        "tasks": {"rte": Task("RTE", COUNTS, 2, 12), "mrpc": Task("MRPC", COUNTS, 2, 12)},
        "variants": {
            "lora": Variant("LoRA", "LoraConfig", [1e-4, 3e-4, 1e-3], {"r": 4, "target_modules": "all-linear"}),
            "fold": Variant("folded", "LearnerConfig", [1e-4, 3e-4, 1e-3], {"r": 4, "priming_share": 0.5}),
        },
        "stages": [Stage(["rte", "mrpc"], ["lora", "fold"])],
        "page": {"core": ["lora", "fold"]},
    }
    return Protocol(**{**fields, **changes})


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["rte", "sst2", "grammar"])
def test_parts_disjoint(task, data_dir):
    """No text trains and tests, whatever the sizes, and two calls cut alike."""
    first, second = (data.cut(task, COUNTS, data_dir) for _ in range(2))
    assert {name: len(rows) for name, rows in first.items()} == COUNTS
    names = [name for name in first["train"].column_names if name != "label"]
    texts = {part: set(zip(*(rows[name] for name in names), strict=True)) for part, rows in first.items()}
    assert len(set.union(*texts.values())) == sum(COUNTS.values())
    assert all(first[part].to_dict() == second[part].to_dict() for part in COUNTS)


def test_too_few_rows(data_dir):
    with pytest.raises(ValueError, match=r"Task rte needs 1020 different rows in .*, and has \d\d\."):
        data.cut("rte", {**COUNTS, "train": 1000}, data_dir)


def test_grammar_pairs():
    """Both sentences of a pair are in one part, and no content word of the training rows is in another."""
    parts = data.cut("grammar", COUNTS, None)
    words = {part: [text.lower().strip(".").split() for text in rows["text"]] for part, rows in parts.items()}
    for own in words.values():
        ordered = [sorted(each) for each in own]
        assert all(ordered.count(each) % 2 == 0 for each in ordered)
    nouns = data.grammar.TRAIN.words()
    assert not nouns & {word for name in ("choice", "test") for text in words[name] for word in text}


# -- the plan --------------------------------------------------------------------------------------------------------


def test_order():
    """The middle rates first, then the others; a second seed at the rate that the first chose, once all are there."""
    plan, done = protocol(), {}
    first = [run.name for run in plan.planned(done)]
    assert first[:4] == [f"{task}-{name}-lr0.0003-seed0" for name in ("lora", "fold") for task in ("rte", "mrpc")]
    assert len(first) == 2 * 2 * 3 and not any("seed1" in name for name in first)
    for rate, score in ((1e-4, 60.0), (3e-4, 70.0)):
        done[Run("rte", "lora", rate, 0)] = score
    assert plan.best_rate(done, "rte", "lora") is None
    done[Run("rte", "lora", 1e-3, 0)] = float("-inf")
    assert [run.name for run in plan.planned(done)] == [*first, "rte-lora-lr0.0003-seed1"]


def test_best_of_equals():
    """Of two equal rates the lower; none where all diverged."""
    runs = [Run("rte", "lora", rate, 0) for rate in (1e-4, 3e-4, 1e-3)]
    assert protocol().best_rate(dict.fromkeys(runs, 50.0), "rte", "lora") == 1e-4
    assert protocol().best_rate(dict.fromkeys(runs, float("-inf")), "rte", "lora") is None


def test_diverged_run_is_never_best():
    """A loss or a score that is no number is below all others, of a classifier and of the decoder."""
    causal = Task("d", COUNTS, 1, 12, causal=True)
    plan = protocol(tasks={"rte": protocol().tasks["rte"], "decoder": causal})
    assert plan.value("decoder", {"score": 0.0, "loss": None}) == plan.value("rte", {"score": 50.0, "loss": None})
    assert plan.value("rte", {"score": 50.0, "loss": None}) == float("-inf")
    point = {"score": 1.0, "loss": 0.5}
    assert (plan.value("decoder", point), plan.value("rte", point)) == (-0.5, 1.0)


def test_names_of_runs():
    run = Run("sst2", "u_bitfit10", 3e-5, 2)
    assert run.name == "sst2-u_bitfit10-lr3e-05-seed2" and Run.parse(run.name) == run
    with pytest.raises(ValueError, match="<task>-<variant>-lr<rate>-seed<seed>, got 'sst2'"):
        Run.parse("sst2")


def test_committed_protocol():
    """Each variant of the protocol has three rates in half decades, and each stage and table names what there is."""
    plan = Protocol.read()
    for variant in plan.variants.values():
        low, middle, high = variant.rates
        assert 2.9 < middle / low < 3.5 and 2.9 < high / middle < 3.5
    assert all(task.rows["test"] >= 3000 or task.causal for task in plan.tasks.values()) and len(plan.seeds) >= 3
    assert "fold_blocks" not in {name for _, names in costs.kinds(plan).values() for name in names}
    named = {name for stage in plan.stages for name in stage.variants} | {n for own in plan.page.values() for n in own}
    assert named <= set(plan.variants) and {task for stage in plan.stages for task in stage.tasks} <= set(plan.tasks)


class Turns(TrainerCallback):
    """The blocks whose dense deltas have a gradient, step by step, and how many deltas have moved at most."""

    def __init__(self) -> None:
        self.found: list[set[str]] = []
        self.moved = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        dense = {n: p for n, p in model.named_parameters() if "dense_delta" in n and p.grad is not None}
        self.found.append({name.split("layer.")[1][0] for name in dense})

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        moved = [n for n, p in model.named_parameters() if "dense_delta" in n and p.any()]
        self.moved = max(self.moved, len(moved))


def test_priming_by_block(tmp_path):
    """Each step of priming trains the attention of one block, the last block first; each is moved, and then folded."""
    fields = {"r": 2, "priming_share": 0.4, "after_priming": "fold", "by_block": True}
    args = training.arguments(tmp_path, num_train_epochs=5)
    model = variants.build(float_base("bert"), "LearnerConfig", fields, epochs=args.num_train_epochs)
    turns = Turns()
    training.trainer(model, args, callbacks=[*variants.callbacks("LearnerConfig", fields), turns]).train()
    assert turns.found == [{"1"}, {"1"}, {"0"}, {"0"}] + 6 * [set()]
    assert len(model.peft_config["default"].kept_energy) == turns.moved == 2 * 4  # attention layers of two blocks


# -- figures ---------------------------------------------------------------------------------------------------------


def record(scores: list[float], test: float, boundary: int | None = None, resampled: tuple = (1.0, 3.0)) -> dict:
    """A run of 40 steps, evaluated four times, with a boundary or without."""
    starts = [0] if boundary is None else [0, boundary]
    curve = [{"step": 10 * (i + 1), "score": score, "loss": 0.5} for i, score in enumerate(scores)]
    phases = [{"first_step": start, "trained_parameters": 100} for start in starts]
    train_loss = [{"step": point["step"], "loss": 10 / point["step"]} for point in curve]
    return {
        "curve": curve,
        "train_loss": train_loss,
        "test": test,
        "resampled": [*resampled],
        "phases": phases,
        "file_bytes": 1_000_000,
    }


@pytest.fixture
def evidence() -> Evidence:
    """LoRA and a folded Learner on RTE. LoRA's target is (80 + 82) / 2 = 81."""
    runs = {
        Run("rte", "lora", 1e-4, 0): record([50, 60, 70, 75], 75),
        Run("rte", "lora", 3e-4, 0): record([50, 70, 81, 80], 80, resampled=(79.0, 81.0)),
        Run("rte", "lora", 1e-3, 0): record([50, 50, 50, 50], 50),
        Run("rte", "lora", 3e-4, 1): record([50, 60, 70, 82], 82, resampled=(81.0, 83.0)),
        Run("rte", "fold", 1e-4, 0): record([50, 60, 70, 70], 70, 20),
        Run("rte", "fold", 3e-4, 0): record([60, 70, 80, 80], 83, 20, (84.0, 82.0)),
        Run("rte", "fold", 1e-3, 0): record([50, 50, 50, 50], 50, 20),
        Run("rte", "fold", 3e-4, 1): record([82, 82, 82, 80], 81, 20, (82.0, 80.0)),
    }
    cost = {"tokens": 12, "bytes": {"total": 1}}
    costs = [
        {**cost, "variant": "lora", "phase": 0, "ratio_to_lora": {"median": 1.0}, "flops": {"matrix_products": 10}},
        {**cost, "variant": "fold", "phase": 1, "ratio_to_lora": {"median": 0.9}, "flops": {"matrix_products": 9}},
        {**cost, "variant": "fold", "phase": 0, "ratio_to_lora": {"median": 1.5}, "flops": {"matrix_products": 15}},
    ]
    return Evidence(protocol(), runs, costs)


def test_steps_to_target(evidence):
    """LoRA reaches 81 at steps 30 and 40. The Learner folds at step 20: its first seed never has 81 from there on, and
    counts with all 40; its second has it before, which does not count, and again at 30. So 35 / 35."""
    assert evidence.target("rte") == 81
    steps = evidence.ratio("rte", "fold", "steps")
    assert steps.value == pytest.approx(1.0)
    # What remains is 40 - 30 and 30 - 40, to 35: stdev = 10 sqrt(2) / 35, over sqrt(2).
    assert steps.error == pytest.approx(10 / 35)
    assert evidence.arrived("rte", "fold") == 1 and evidence.arrived("rte", "lora") == 2


def test_short_run_that_fails(evidence):
    """A training of 20 steps that never has 81 does not count with its 20, but with LoRA's 40."""
    short = record([50, 60], 60, 5)
    assert evidence.spent("rte", short, "fold", "steps") == 40
    assert evidence.spent("rte", short, "fold", "time") == pytest.approx(5 * 1.5 + 35 * 0.9)
    assert evidence.spent("rte", record([50, 82], 82, 5), "fold", "steps") == 20


def test_near_the_target(evidence):
    """80 is near 81: LoRA has it at 30 and 40, the Learner at 30 and 30."""
    assert evidence.ratio("rte", "fold", "near").value == pytest.approx(60 / 70)


def test_time_and_flops_by_phase(evidence):
    """20 steps of priming at 1.5, then 20 or 10 steps at 0.9: 48 and 39, to LoRA's 30 and 40. Flops: ten times."""
    assert evidence.ratio("rte", "fold", "time").value == pytest.approx(87 / 70)
    assert evidence.ratio("rte", "fold", "flops").value == pytest.approx(87 / 70)
    assert evidence.ratio("rte", "lora", "time").value == pytest.approx(1.0)


def test_paired_difference(evidence):
    """83 - 80 = 3 and 81 - 82 = -1: mean 1, standard error 2. By resamples: (84 - 79 + 82 - 81) / 2 = 3 and
    (82 - 81 + 80 - 83) / 2 = -1, whose standard deviation is 4 / sqrt(2)."""
    found = evidence.difference("rte", "fold")
    assert (found.value, found.error, found.count) == (1.0, pytest.approx(2.0), 2)
    assert found.rows == pytest.approx(4 / 2**0.5)


def test_costs_of_the_same_settings(evidence):
    """A variant that differs by its length alone has the costs of the one that was measured."""
    own = evidence.protocol.variants
    evidence.protocol.variants["short"] = Variant(
        "short", own["fold"].method, own["fold"].rates, own["fold"].fields, 0.5
    )
    assert evidence.costs("short", 12) == evidence.costs("fold", 12) != [] == evidence.costs("short", 99)


def test_unfinished_cells(evidence):
    """A cell without all of its rates is no cell; one seed has no error."""
    del evidence.runs[Run("rte", "fold", 1e-4, 0)]
    assert evidence.test("rte", "fold") is None and evidence.ratio("rte", "fold", "steps") is None
    assert Mean.of([2.0]) == Mean(2.0, None, 1) and Mean.of([2.0]).margin == float("inf")
    # Errors add in squares: sqrt(3^2 + 4^2) / 2 = 2.5 of seeds. Student's t of three seeds is 4.303 (any table), so
    # the margin is sqrt((4.303 * 2.5)^2 + (1.96 * 6)^2) = 15.94.
    found = Mean.over_tasks([Mean(1.0, 3.0, 3, 12.0, 3), Mean(2.0, 4.0, 4, 0.0, 4, capped=True)])
    assert found == Mean(1.5, 2.5, 2, 6.0, 3, capped=True) and found.margin == pytest.approx(15.94, abs=0.01)


def test_tables(evidence):
    """The cells are the figures above."""
    tables = page.Tables(evidence).tables
    assert "| folded | **82.0** ± 1.0 (2); +1.0 ± 2.0/2.8 | +1.0 ± 2.0/2.8 (1) |" in tables["scores-core"]()
    (steps,) = (line for line in tables["steps-core"]() if line.startswith("| folded |"))
    assert steps.startswith("| folded | ≥ 1.00 ± 0.29 (1 of 2) | ≥ 1.00 ± 0.29 (1) | 0.86 ± ")
    assert steps.endswith(" (1) | 1.00 | 1.00 |")
    assert "| LoRA | 1e-4: 75.0, 3e-4: **80.0**, 1e-3: 50.0 |" in tables["rates"]()
    assert "±" not in "".join(page.Tables(Evidence(Protocol.read(), {})).claims())  # nothing is claimed of no runs
    assert page.Tables(Evidence(protocol(), {})).tables["scores-core"]() == page.NOTHING


def test_losses_and_bytes(evidence):
    """Training losses of 10 over the step, and a cost row's numbers in MB."""
    table = page.Tables(evidence)
    assert (
        table.losses("rte", ["lora"])[-1] == "| LoRA | 1.000 / 0.500 | 0.500 / 0.500 | 0.333 / 0.500 | 0.250 / 0.500 |"
    )
    held = {"stored": 3e6, "gradients": 1e6, "optimizer": 2e6, "total": 8e6}
    ratio = {"median": 1.25, "q1": 1.0, "q3": 1.5}
    rows = [dict(row, bytes=held, ratio_to_lora=ratio, trained_parameters=1234) for row in evidence.cost_rows]
    lines = page.Tables(Evidence(evidence.protocol, evidence.runs, rows)).held("rte", ["lora", "fold"])[2:]
    cells = "1.25 (1.00 to 1.50) | 1,234 | 3 | 1 | 2 | 8 |"
    assert lines == [f"| {name} | {cells}" for name in ("LoRA", "folded, in priming", "folded, afterwards")]


# -- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(model_dir, data_dir, tmp_path, monkeypatch):
    """The arguments of a small sweep: two variants, one task, one seed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = yaml.safe_load((ROOT / "scripts/evidence/protocol.yaml").read_text())
    fields = {"r": 4, "priming_share": 0.5, "after_priming": "fold"}
    own.update(
        seeds=[0],
        evaluations=16,
        tasks={"rte": {"label": "RTE", "rows": COUNTS, "epochs": 40, "tokens": 12}},
        variants={"fold": {"label": "f", "method": "LearnerConfig", "fields": fields, "rates": [1e-4, 3e-4, 1e-3]}},
        stages=[{"tasks": ["rte"], "variants": ["fold"]}],
        page={},
    )
    file = tmp_path / "protocol.yaml"
    file.write_text(yaml.safe_dump(own))

    def make(folder: Path, *more: str) -> list[str]:
        places = ["--out", folder / "runs.jsonl", "--work", folder / "work", "--protocol", file]
        base = ["--model_name_or_path", model_dir, "--data_dir", data_dir]
        return [str(word) for word in (*base, *places, *more)]

    return make


def results(folder: Path) -> dict[str, dict]:
    """What runs computed, without times."""
    rows = run_record.read_lines(folder / "runs.jsonl")
    for row in rows:
        del row["date"], row["train_loss"]  # transformers' first mean after a resume is over fewer steps
        for phase in row["phases"]:
            del phase["seconds"]
    assert len({row["run"] for row in rows}) == len(rows)
    return {row["run"]: row for row in rows}


def test_costs_by_phase(words, tmp_path, model_dir):
    """A folded Learner trains the attention's weights in its first phase: 4 layers of 16 x 16 in one block."""
    own = yaml.safe_load((tmp_path / "protocol.yaml").read_text())
    own["variants"]["lora"] = {"label": "l", "method": "LoraConfig", "fields": {"r": 4}, "rates": [1e-4, 3e-4, 1e-3]}
    own["stages"][0]["variants"] = ["lora", "fold"]
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(own))
    places = ["--out", tmp_path / "costs.jsonl", "--protocol", tmp_path / "protocol.yaml", "--rounds", "2"]
    costs.main([str(word) for word in ("--model_name_or_path", model_dir, *places)])
    lora, first, last = run_record.read_lines(tmp_path / "costs.jsonl")
    assert [(row["variant"], row["phase"]) for row in (lora, first, last)] == [("lora", 0), ("fold", 0), ("fold", 1)]
    assert first["trained_parameters"] - last["trained_parameters"] == 4 * 16 * 16
    assert lora["ratio_to_lora"] == {"q1": 1.0, "median": 1.0, "q3": 1.0}
    assert first["bytes"]["total"] > last["bytes"]["total"] and first["flops"] != last["flops"]


@pytest.mark.slow
def test_killed_at_random(words, tmp_path):
    """Two jobs, killed twice, then two sweeps of one folder: each run once, as if nobody had killed it."""
    assert sweep.main(words(tmp_path / "whole")) == 0
    expected, out = results(tmp_path / "whole"), tmp_path / "killed"
    assert len(expected) == 3
    command = [sys.executable, "-m", "scripts.evidence.sweep", *words(out, "--jobs", "2")]
    chance, seen = random.Random(), set()
    for _ in range(2):
        process = subprocess.Popen(command, start_new_session=True, cwd=ROOT)
        try:
            while not {*out.glob("work/*/checkpoint-*/trainer_state.json")} - seen and process.poll() is None:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
            assert process.poll() is None  # it is killed, and did not end
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seen = {*out.glob("work/*/checkpoint-*/trainer_state.json")}
    assert seen  # the kills left something to go on from
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert results(out) == expected and not [*(out / "work").iterdir()]


def test_foreign_runs_refused(words, tmp_path, capsys):
    """A run of other settings than the protocol's is named, and so is one of no variant of it."""
    plan, run = protocol(), Run("rte", "lora", 3e-4, 0)
    own = {**record([50], 50), "run": run.name, "settings": plan.settings(run), "rows": COUNTS}
    file = tmp_path / "runs.jsonl"
    run_record.write_lines(file, [own])
    assert set(sweep.finished(plan, file)) == {run}
    run_record.write_lines(file, [{**own, "settings": {**own["settings"], "max_length": 64}}])
    with pytest.raises(ValueError, match="seed0, was made with other settings .max_length: 64 there, 32 here"):
        sweep.finished(plan, file)
    run_record.write_lines(file, [{**own, "run": "rte-other-lr0.0003-seed0"}])
    with pytest.raises(ValueError, match="must hold runs of the protocol's tasks and variants, got rte-other"):
        sweep.finished(plan, file)


def test_diverged_run_told(words, tmp_path, model_dir):
    """A Learner whose values are no numbers at its fold ends as a run that diverged, and stops no other."""
    plan, run = Protocol.read(tmp_path / "protocol.yaml"), Run("rte", "fold", 1e30, 0)
    data_dir = Path(words(tmp_path)[3])
    found = train(plan, run, data_dir, str(model_dir), tmp_path / "work")
    assert found["test"] is None and found["curve"][-1] == {"step": 40, "score": None, "loss": None}
    assert plan.value("rte", found["curve"][-1]) == float("-inf")


def test_foreign_checkpoints_cleared(tmp_path):
    """Checkpoints of other settings are not gone on from; those of the same are kept."""
    plan, run = protocol(), Run("rte", "lora", 3e-4, 0)
    sweep._open(tmp_path, plan, run)
    (tmp_path / "checkpoint-4").mkdir()
    sweep._open(tmp_path, plan, run)
    assert (tmp_path / "checkpoint-4").is_dir()
    sweep._open(tmp_path, protocol(max_length=64), run)
    assert not (tmp_path / "checkpoint-4").exists()


def test_failing_run(words, tmp_path, capsys):
    """A run that fails is named, and leaves a status."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/rte-fold-lr0.0003-seed0").write_text("where a folder is to be")
    words = words(tmp_path, "--only", ".*lr0.0003.*", "--deadline", str(time.time() + 60))
    assert sweep.main(words) == 1
    assert "rte-fold-lr0.0003-seed0 failed: " in capsys.readouterr().err
