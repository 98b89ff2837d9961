"""Half-written checkpoints of Trainer, told from whole ones by their files.

Trainer writes the weights first, then the optimizer, the scheduler and the random numbers, and `trainer_state.json`
last. It fails on some half-written checkpoints without saying what to do. From one that lacks the optimizer, the
scheduler or the random numbers it resumes in silence, and the run ends elsewhere.

What engines write (FSDP, DeepSpeed) is complete before `trainer_state.json` begins, since they wait for all processes.
So in their checkpoints only that file is judged, and the random numbers, which each process writes without waiting.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments

_STATE = "trainer_state.json"
_WEIGHTS = ("adapter_model", "model", "pytorch_model")
_OF_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state")  # the last with `.pth`, or with a rank and `.pth`
_OF_ENGINES = ("global_step", "latest", "pytorch_model_fsdp", "optimizer.bin", "optimizer_")

#: What a run tells of its checkpoints, in them: `{"output_dir": str, "files": [...]}`.
Record = dict[str, Any]


def record_of(args: TrainingArguments) -> Record:
    """Where a run writes its checkpoints, and which files they have beside weights and `trainer_state.json`."""
    if args.world_size <= 1:
        ranks = ["rng_state.pth"]
    else:  # with `save_on_each_node` a folder holds those of one node
        ranks = [] if args.save_on_each_node else [f"rng_state_{rank}.pth" for rank in range(args.world_size)]
    files = [] if args.save_only_model else [*_OF_TRAINING[:2], *ranks]
    return {"output_dir": os.path.abspath(args.output_dir), "files": files}


def warn_if_half_written(args: TrainingArguments) -> None:
    """Look at the checkpoint that a run would be resumed from, before Trainer does.

    That is the one that the arguments name, or the last one. A run that begins anew reads neither, so this only warns.
    """
    for folder in _resumed_from(args):
        fault = fault_of(folder)
        if fault is not None:
            warnings.warn(_sentence(f"The checkpoint {str(folder)!r}", fault, [folder.parent]), stacklevel=3)


def warn_if_fresh(args: TrainingArguments, present: Mapping[str, str]) -> None:
    """Look at whether an adapter is in the phase of the checkpoint that a run under FSDP would be resumed from.

    torch loads an optimizer's state by name there, and stops at a parameter that the checkpoint has none of.

    Args:
        present: the phase that each adapter is in.
    """
    for folder in _resumed_from(args):
        state = _state_in(folder) or {}
        for adapter, first_steps in _told(state, "first_steps").items():
            begun = {phase: step for phase, step in first_steps.items() if step <= state["global_step"]}
            then, now = max(begun, key=lambda phase: begun[phase]), present.get(adapter)
            if now != then and now in first_steps:
                warnings.warn(
                    f"The checkpoint {str(folder)!r} was written in the phase {then!r}, but the adapter {adapter!r} "
                    f"is in {now!r}. To resume from it under FSDP, load its adapter first: model = "
                    f"PeftModel.from_pretrained(base_model, {str(folder)!r}, is_trainable=True).",
                    stacklevel=3,
                )


def _resumed_from(args: TrainingArguments) -> list[Path]:
    """The checkpoint that a run would be resumed from: the one that the arguments name, or the last one."""
    named = Path(args.resume_from_checkpoint or "")
    last = _checkpoints(Path(args.output_dir))[:1]
    return [named] if args.resume_from_checkpoint and named.is_dir() else last


def refuse_half_loaded(args: TrainingArguments, state: TrainerState, lr_scheduler: Any, record: Record) -> None:
    """Look at the checkpoint that Trainer has resumed a run from, before the first step.

    Trainer does not tell which folder that was. It is looked for where this run and the earlier one write theirs. If
    it lies elsewhere, a scheduler that stands at its start tells that nothing was loaded into optimizer and scheduler.

    Args:
        record: of the run that wrote it, empty if it did not have any.

    Raises:
        ValueError: it is half-written.
    """
    if state.global_step == 0:
        return
    places = [Path(args.output_dir), Path(record.get("output_dir", args.output_dir))]
    folder = _loaded(args, state, places)
    # With a scaler of gradients (fp16), first steps may have been skipped.
    fresh = isinstance(lr_scheduler, LambdaLR) and lr_scheduler.last_epoch == 0 and not args.fp16
    fault = fault_of(folder) if folder is not None else None
    if fault is None and fresh and record.get("files"):
        folder, fault = None, "it lacks optimizer.pt or scheduler.pt"
    if fault is not None:
        what = f"of step {state.global_step}" if folder is None else repr(str(folder))
        raise ValueError(_sentence(f"The checkpoint {what}", fault, places if folder is None else [folder.parent]))
    if fresh:
        warnings.warn(
            f"The checkpoint of step {state.global_step} holds the weights alone (save_only_model=True): optimizer, "
            "learning rate and random numbers begin anew, so this run ends elsewhere than one that never stopped.",
            stacklevel=3,
        )


def fault_of(folder: Path) -> str | None:
    """What a half-written checkpoint lacks, in words; None for a whole one."""
    names = {path.name for path in folder.glob("*")}
    state = _state_in(folder)
    if state is None:
        return f"{_STATE} is cut off" if _STATE in names else f"it lacks {_STATE}"
    engine = any(name.startswith(_OF_ENGINES) for name in names)
    weights = [
        path
        for path in [*folder.glob("*"), *folder.glob("*/*")]  # each further adapter has a folder of its own
        if path.name.startswith(_WEIGHTS) and path.suffix in (".safetensors", ".bin")
    ]
    if not weights and not engine:
        return "it lacks the weights"
    judged = "rng_state" if engine else ""
    missing = sorted(name for name in _expected(state, names) - names if name.startswith(judged))
    if missing:
        return f"it lacks {', '.join(missing)}"
    training = [folder / name for name in names if name.startswith((*_OF_TRAINING, "scaler.pt"))]
    judged_files = [path for path in (*weights, *training) if path.name.startswith(judged)]
    cut = next((path for path in sorted(judged_files) if _is_cut(path)), None)
    return None if cut is None else f"{cut.relative_to(folder)} is cut off"


def last_whole(output_dir: Path) -> Path | None:
    """The last checkpoint in a folder from which a run can be resumed."""
    for folder in _checkpoints(output_dir):
        resumable = any(path.name.startswith(("optimizer", "global_step")) for path in folder.glob("*"))
        if resumable and fault_of(folder) is None:
            return folder
    return None


def _expected(state: dict[str, Any], names: set[str]) -> set[str]:
    """Files of the training's state that a checkpoint should have."""
    if record := _told(state, "saved"):
        return set(record["files"])
    # Written without PhaseCallback: all of them or, with `save_only_model`, none.
    missing = {kind for kind in _OF_TRAINING if not any(name.startswith(kind) for name in names)}
    return set() if len(missing) == len(_OF_TRAINING) else {kind.replace("state", "state.pth") for kind in missing}


def _loaded(args: TrainingArguments, state: TrainerState, places: list[Path]) -> Path | None:
    """The folder whose `trainer_state.json` is what Trainer has loaded."""
    name = f"checkpoint-{state.global_step}"
    named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    log = json.dumps(state.log_history)  # as text, in which NaN equals NaN
    for folder in [*named, *(place / name for place in places)]:
        held = _state_in(folder) or {}
        if held.get("global_step") == state.global_step and json.dumps(held.get("log_history")) == log:
            return folder
    return None


def _sentence(what: str, fault: str, places: list[Path]) -> str:
    whole = next(filter(None, map(last_whole, places)), None)
    if whole is None:
        return f"{what} is half-written ({fault}), and no other one is whole: train from the start, trainer.train()."
    return (
        f"{what} is half-written ({fault}): resume from the last whole one, "
        f"trainer.train(resume_from_checkpoint={str(whole)!r})."
    )


def _checkpoints(output_dir: Path) -> list[Path]:
    """Those that Trainer would find, the last one first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda p: -int(steps[p]))


def _state_in(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _told(state: dict[str, Any], attribute: str) -> dict[str, Any]:
    """What PhaseCallback keeps under a name in a checkpoint; empty where there is nothing."""
    callbacks = [told for told in (state.get("stateful_callbacks") or {}).values() if isinstance(told, dict)]
    return next(filter(None, (told["attributes"].get(attribute) for told in callbacks)), {})


def _is_cut(path: Path) -> bool:
    """A file of torch.save has its table at the end, and safetensors tells its length at the start."""
    if path.suffix != ".safetensors":
        return not zipfile.is_zipfile(path)
    try:
        with safe_open(path, framework="pt"):
            return False
    except (SafetensorError, OSError):
        return True
