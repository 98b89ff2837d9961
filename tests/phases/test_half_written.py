"""Half-written checkpoints: a run that would be resumed from one says so before its first step, and what to do."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forks import Warm
from training import adapter_values, arguments, learner, nas, sgd, trainer
from transformers import Trainer, TrainerCallback, TrainerState

from peft_learners import PhaseCallback
from peft_learners.phases.whole_checkpoints import fault_of, last_whole, record_of, refuse_half_loaded, warn_if_fresh

Values = dict[str, torch.Tensor]
MAKE = {"learner": partial(learner, dropout=0.1), "nas": partial(nas, dropout=0.1)}
OF_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
#: What Trainer reads of a checkpoint, and what lies beside it.
READ = ("adapter_model.safetensors", *OF_TRAINING, "trainer_state.json")
UNREAD = ("adapter_config.json", "README.md", "training_args.bin")


class Steps(TrainerCallback):
    """Counts the steps that a run begins."""

    begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1


def make_run(tuner: str, out: Path, **settings: Any) -> tuple[Trainer, list[str]]:
    """A fresh run, and what it says as it is made."""
    settings = {"save_strategy": "steps", "save_steps": 1, **settings}
    callbacks = settings.pop("callbacks", None) or [PhaseCallback(), Steps()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(MAKE[tuner](), arguments(out, **settings), callbacks=callbacks)
    return run, about_checkpoints(caught)


def about_checkpoints(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if re.search("half-written|weights alone", str(w.message))]


def train(run: Trainer, checkpoint: Path | bool | None = None) -> list[str]:
    """What it says of checkpoints in the training."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(resume_from_checkpoint=str(checkpoint) if isinstance(checkpoint, Path) else checkpoint)
    return about_checkpoints(caught)


def steps_begun(run: Trainer) -> int:
    return next(c.begun for c in run.callback_handler.callbacks if isinstance(c, Steps))


def equal(one: Values, other: Values) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def sentence(what: object, fault: str, whole: Path) -> str:
    return (
        f"The checkpoint {what} is half-written ({fault}): resume from the last whole one, "
        f"trainer.train(resume_from_checkpoint={str(whole)!r})."
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Values]]:
    """By tuner: the folder of a run with six checkpoints, and the adapter at its end."""

    @functools.cache
    def make(tuner: str) -> tuple[Path, Values]:
        out = tmp_path_factory.mktemp(tuner)
        run, _ = make_run(tuner, out)
        run.train()
        return out, adapter_values(run.model)

    return make


@pytest.fixture
def copied(whole, tmp_path: Path) -> Callable[..., Path]:
    """Some of the run's checkpoints in a folder of the test's own, as if it had written them."""

    def copy(*steps: int, tuner: str = "learner", name: str = "out") -> Path:
        out = tmp_path / name
        for step in steps:
            folder = shutil.copytree(whole(tuner)[0] / f"checkpoint-{step}", out / f"checkpoint-{step}")
            state = folder / "trainer_state.json"
            state.write_text(state.read_text().replace(str(whole(tuner)[0]), str(out)))
        return out

    return copy


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# -- each file in turn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("tuner", MAKE)
def test_file_read(copied, tuner, file, damage):
    """A checkpoint that lacks what Trainer reads of it, or has half of it, is told of before the first step, with the
    last whole one. What Trainer would resume from in silence is an error of ours; it refuses the others itself."""
    out = copied(4, 5, tuner=tuner)
    damage(out / "checkpoint-5" / file)
    missing = "the weights" if file.startswith("adapter") else file
    fault = f"it lacks {missing}" if damage is remove else f"{file} is cut off"
    expected = sentence(repr(str(out / "checkpoint-5")), fault, out / "checkpoint-4")
    run, told = make_run(tuner, out)
    assert told == [expected]
    with pytest.raises(Exception) as error:
        run.train(resume_from_checkpoint=True)
    assert steps_begun(run) == 0
    silent = file in OF_TRAINING if damage is remove else file == "rng_state.pth"
    assert (str(error.value) == expected) == silent


@pytest.mark.parametrize("tuner", MAKE)
def test_files_unread(whole, copied, tuner):
    """A checkpoint that lacks only what Trainer doesn't read is whole: the resumed run ends with the same bits."""
    out = copied(5, tuner=tuner)
    assert {file.name for file in (out / "checkpoint-5").iterdir()} == {*READ, *UNREAD}
    for file in UNREAD:
        (remove if file == "README.md" else cut)(out / "checkpoint-5" / file)
    run, told = make_run(tuner, out)
    assert told == train(run, True) == []
    assert equal(adapter_values(run.model), whole(tuner)[1])


@pytest.mark.parametrize("tuner", MAKE)
def test_sentence_followed(whole, copied, tuner):
    """A run that follows the sentence ends with the same bits, and writes the half-written checkpoint anew."""
    out = copied(4, 5, tuner=tuner)
    remove(out / "checkpoint-5" / "optimizer.pt")
    run, (told,) = make_run(tuner, out)
    assert train(run, Path(told.split("'")[-2])) == []
    assert equal(adapter_values(run.model), whole(tuner)[1])
    assert last_whole(out) == out / "checkpoint-6" and fault_of(out / "checkpoint-5") is None


def test_files_matter(whole, copied):
    """Without the callback, a run whose checkpoint lacks one of these files ends elsewhere in silence."""
    for file in OF_TRAINING:
        out = copied(5, name=file)
        remove(out / "checkpoint-5" / file)
        run, _ = make_run("learner", out, callbacks=[Steps()])
        run.train(resume_from_checkpoint=True)
        assert not equal(adapter_values(run.model), whole("learner")[1]), file


# -- which one is whole ---------------------------------------------------------------------------------------------


def test_several_half_written(copied):
    """The last whole one is named, not the last but one; without any, training from the start."""
    out = copied(3, 4, 5)
    remove(out / "checkpoint-5" / "trainer_state.json")
    remove(out / "checkpoint-4" / "optimizer.pt")  # half-deleted, say
    half = repr(str(out / "checkpoint-5"))
    assert make_run("learner", out)[1] == [sentence(half, "it lacks trainer_state.json", out / "checkpoint-3")]
    shutil.rmtree(out / "checkpoint-3")
    assert make_run("learner", out)[1] == [
        f"The checkpoint {half} is half-written (it lacks trainer_state.json), and no other one is whole: train from "
        "the start, trainer.train()."
    ]


def test_ranks(copied):
    """Checkpoints of two processes hold random numbers of each, and one process can go on from them."""
    folder = copied(5) / "checkpoint-5"
    told = {"output_dir": "out", "save_only_model": False, "save_on_each_node": False}
    state = json.loads((folder / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["PhaseCallback"]["attributes"]["saved"]
    saved.update(record_of(SimpleNamespace(world_size=2, **told)))
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert fault_of(folder) == "it lacks rng_state_1.pth"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert fault_of(folder) is None
    cut(folder / "rng_state_1.pth")
    assert fault_of(folder) == "rng_state_1.pth is cut off"
    assert record_of(SimpleNamespace(world_size=2, **{**told, "save_on_each_node": True}))["files"] == [
        *OF_TRAINING[:2]
    ]


def test_further_adapter(copied):
    """An adapter beside the first has a folder of its own in the checkpoint."""
    folder = copied(5) / "checkpoint-5"
    file = folder / "other" / "adapter_model.safetensors"
    file.parent.mkdir()
    shutil.copy(folder / file.name, file)
    assert fault_of(folder) is None
    cut(file)
    assert fault_of(folder) == "other/adapter_model.safetensors is cut off"


@pytest.mark.parametrize(
    "files",
    [
        ("pytorch_model_fsdp.bin", "optimizer.bin"),
        ("pytorch_model_fsdp_0/", "optimizer_0/"),
        ("latest", "global_step5/"),
    ],
    ids=["fsdp-full", "fsdp-sharded", "deepspeed"],
)
def test_engines(copied, files):
    """Of a checkpoint of an engine, Trainer's own state and the random numbers of each process are judged."""
    folder = copied(5) / "checkpoint-5"
    for name in OF_TRAINING[:2]:
        remove(folder / name)
    assert fault_of(folder) == "it lacks optimizer.pt, scheduler.pt"
    for name in files:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("")
    assert fault_of(folder) is None
    cut(folder / "rng_state.pth")
    assert fault_of(folder) == "rng_state.pth is cut off"
    remove(folder / "rng_state.pth")
    assert fault_of(folder) == "it lacks rng_state.pth"
    cut(folder / "trainer_state.json")
    assert fault_of(folder) == "trainer_state.json is cut off"


# -- where it lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
def test_other_output_dir(copied, tmp_path: Path, named):
    """A checkpoint in another run's folder is found by what that run has told, or by the argument's name."""
    folder = copied(4, 5, name="earlier") / "checkpoint-5"
    remove(folder / "rng_state.pth")
    settings = {"resume_from_checkpoint": str(folder)} if named else {}
    run, told = make_run("learner", tmp_path / "out", **settings)
    expected = sentence(repr(str(folder)), "it lacks rng_state.pth", folder.with_name("checkpoint-4"))
    assert told == ([expected] if named else [])
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        run.train(resume_from_checkpoint=str(folder))
    assert steps_begun(run) == 0


def test_moved(whole, copied, tmp_path: Path):
    """A checkpoint that was moved can be resumed; that it lacks the optimizer's state is seen without its folder."""
    folder = copied(5).rename(tmp_path / "moved") / "checkpoint-5"
    run, told = make_run("learner", tmp_path / "new")
    assert told == train(run, folder) == []
    assert equal(adapter_values(run.model), whole("learner")[1])
    for file in OF_TRAINING[:2]:
        shutil.copytree(folder, half := tmp_path / file / "checkpoint-5")
        remove(half / file)
        run, _ = make_run("learner", tmp_path / "new")  # which holds a whole one of step 6
        expected = sentence("of step 5", "it lacks optimizer.pt or scheduler.pt", tmp_path / "new" / "checkpoint-6")
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            run.train(resume_from_checkpoint=str(half))
        assert steps_begun(run) == 0


def test_other_run_of_that_step(copied, tmp_path: Path):
    """A half-written checkpoint of the same step in the output folder is not taken for one that was resumed from."""
    other, _ = make_run("learner", tmp_path / "new", learning_rate=1e-3, max_steps=5)
    other.train()
    remove(tmp_path / "new" / "checkpoint-5" / "rng_state.pth")
    run, told = make_run("learner", tmp_path / "new")
    assert len(told) == 1
    assert train(run, copied(5) / "checkpoint-5") == []


# -- no false alarm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", MAKE)
def test_weights_alone(tmp_path: Path, tuner):
    """`save_only_model` checkpoints are whole. A run that is resumed from one is told how it differs."""
    run, _ = make_run(tuner, tmp_path, save_only_model=True, max_steps=5)
    run.train()
    assert {file.name for file in (tmp_path / "checkpoint-5").iterdir()} == {READ[0], READ[-1], *UNREAD}
    for settings in ({"save_only_model": True}, {}):
        run, told = make_run(tuner, tmp_path, **settings)
        (said,) = train(run, tmp_path / "checkpoint-4")
        assert told == [] and said.startswith(
            "The checkpoint of step 4 holds the weights alone (save_only_model=True)"
        )


def test_written_without_callback(tmp_path: Path):
    """Checkpoints of runs without the callback are judged by what they hold: all of it, or weights alone."""
    run, _ = make_run("learner", tmp_path, callbacks=[Steps()], max_steps=3)
    run.train()
    run, told = make_run("learner", tmp_path)
    assert told == train(run, tmp_path / "checkpoint-2") == []
    folder = tmp_path / "checkpoint-1"
    for file in OF_TRAINING[:2]:
        remove(folder / file)
    assert fault_of(folder) == "it lacks optimizer.pt, scheduler.pt"
    with pytest.raises(ValueError, match="it lacks optimizer.pt, scheduler.pt"):
        make_run("learner", tmp_path)[0].train(resume_from_checkpoint=str(folder))
    remove(folder / OF_TRAINING[2])
    run, _ = make_run("learner", tmp_path)
    assert ["weights alone" in said for said in train(run, folder)] == [True]


@pytest.mark.parametrize(
    "settings",
    [
        {"ignore_data_skip": True},
        {"save_total_limit": 1},
        {"optim": "sgd"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5},
        {"restore_callback_states_from_checkpoint": True},
        {"auto_find_batch_size": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings(tmp_path: Path, settings):
    """Whole checkpoints are whole with each of Trainer's settings, in a fresh run and in the one that wrote them."""
    run, told = make_run("learner", tmp_path, **settings, max_steps=3)
    assert told == train(run) == []
    assert last_whole(tmp_path) == tmp_path / "checkpoint-3"
    again, told = make_run("learner", tmp_path, **settings, max_steps=4)
    first = min(tmp_path.glob("checkpoint-*"), key=lambda folder: folder.name)  # before any evaluation
    assert told == train(again, first) == [] and again.state.global_step == 4
    assert train(run, tmp_path / "checkpoint-4") == []


@pytest.mark.parametrize("fp16", [False, True])
def test_skipped_steps(tmp_path: Path, fp16):
    """In fp16 a scheduler may stand at its start after the first steps, which the gradients' scaler has skipped."""
    settings = {"fp16": fp16, "world_size": 1, "save_only_model": False, "resume_from_checkpoint": None}
    args = SimpleNamespace(output_dir=str(tmp_path), **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(sgd(learner()), lambda step: 1.0)
    state = TrainerState(global_step=1)
    if fp16:
        refuse_half_loaded(args, state, scheduler, record_of(args))
    else:
        with pytest.raises(ValueError, match=r"^The checkpoint of step 1 is half-written \(it lacks optimizer.pt or"):
            refuse_half_loaded(args, state, scheduler, record_of(args))


@pytest.mark.slow
def test_two_processes(tmp_path: Path, warm: Warm):
    """Two ranks resume from a whole checkpoint, and so does one process. If it lacks the random numbers of one rank,
    both refuse it."""

    def run(ranks: int, *options: str) -> tuple[set[int], list[str]]:
        jobs = warm.ranks(ranks, "runs.train_tiny:main", [str(tmp_path), *options], logs=tmp_path)
        return {job.wait() for job in jobs}, [job.output() for job in jobs]

    statuses, output = run(2)
    assert statuses == {0}, output
    folder = tmp_path / "checkpoint-5"
    shutil.rmtree(tmp_path / "checkpoint-6")
    for ranks in (2, 1):
        statuses, output = run(ranks, "--resume", str(folder))
        assert statuses == {0} and not re.search("half-written|weights alone", "".join(output)), output
    for step in range(6, 10):
        shutil.rmtree(tmp_path / f"checkpoint-{step}", ignore_errors=True)
    remove(folder / "rng_state_1.pth")
    statuses, output = run(2, "--resume")
    expected = sentence(repr(str(folder)), "it lacks rng_state_1.pth", tmp_path / "checkpoint-4")
    assert statuses == {1} and all(f"ValueError: {expected}" in said for said in output), output
    assert f"UserWarning: {expected}" in output[0] and "UserWarning: The checkpoint" not in output[1]


# -- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tuner,settings", [("learner", []), ("nas", ["--set", "save_total_limit=2"])])
def test_killed_in_saves(tmp_path: Path, warm: Warm, record_property, tuner, settings):
    """Runs are killed at random moments of a save. Started again, each ends with the same bits, or says which
    checkpoint is whole and ends with the same bits from there."""

    def run(out: Path, *options: str) -> tuple[int, str]:
        out.mkdir(exist_ok=True)
        arguments = [str(out), "--tuner", tuner, *settings, *options]
        job = warm.start("runs.train_tiny:main", arguments, log=out.with_name(f"{out.name}.txt"))
        return job.wait(), job.output()

    assert run(tmp_path / "whole")[0] == 0
    expected = torch.load(tmp_path / "whole" / "final.pt")
    seconds = sorted(expected["save_seconds"])[len(expected["save_seconds"]) // 2]
    chance, outcomes = random.Random(23), Counter[str]()
    for number in range(10):
        out = tmp_path / str(number)
        step, moment = chance.randint(1, 8), chance.uniform(0, 1.1 * seconds)
        status, output = run(out, "--kill_in_save", str(step), str(moment))
        assert status == -9, output
        status, output = run(out, "--resume") if any(out.glob("checkpoint-*")) else run(out)
        outcome = "resumed"
        if status != 0:
            told = re.search(r"is half-written \(.*?\)(?:: resume .*?_checkpoint='(.+?)'|, and .* train from)", output)
            assert told and "Error" in output, output
            outcome = "told" if told[1] else "told to begin anew"
            status, output = run(out, *(["--resume", told[1]] if told[1] else []))
            assert status == 0, output
        outcomes[outcome] += 1
        final = torch.load(out / "final.pt")
        assert equal(final["adapter"], expected["adapter"]) and equal(final["optimizer"], expected["optimizer"])
        assert final["starts"] == expected["starts"] and final["learned"] == expected["learned"]
    record_property(f"kills in saves, {tuner}", dict(outcomes))
    assert outcomes["told"] + outcomes["told to begin anew"] > 0


def test_fresh_adapter_under_fsdp(tmp_path: Path):
    """A fresh adapter is told of a checkpoint from behind the boundary, with the call that loads it; no other is."""
    trainer(learner(), arguments(tmp_path, save_strategy="steps", save_steps=1)).train()
    args = arguments(tmp_path)
    with pytest.warns(UserWarning, match=r"written in the phase 'learning'.*from_pretrained\(base_model, '.*6'"):
        warn_if_fresh(args, {"default": "priming"})
    named = arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_fresh(named, {"default": "priming"})
        warn_if_fresh(args, {"default": "learning"})
