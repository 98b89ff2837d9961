"""One tiny Trainer run in a process of its own; kills itself after a checkpoint when told to.

Usage: python train_tiny.py OUT [--tuner NAME] [--kill_after STEP] [--kill_in_save STEP SECONDS] [--resume [FOLDER]]
    [--set key=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch
from training import adapted, adapter_values, arguments, far, learner, nas, trainer
from transformers import TrainerCallback

from peft_learners import BottleneckConfig, PhaseCallback
from peft_learners.phases.optimizer import raw_optimizer


class Kill(TrainerCallback):
    def __init__(self, step: int | None, in_save: tuple[int, float] | None) -> None:
        self.step, self.in_save = step, in_save
        self.save_seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.start, own = time.perf_counter(), os.getpid()
        # Another process kills this one, at a moment that this one has no say in.
        if self.in_save and self.in_save[0] == state.global_step and os.fork() == 0:
            time.sleep(self.in_save[1])
            if os.getppid() == own:
                os.kill(own, signal.SIGKILL)
            os._exit(0)

    def on_save(self, args, state, control, **kwargs):
        self.save_seconds.append(time.perf_counter() - self.start)
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


#: Fields that training writes.
LEARNED = ("completed_phases", "kept_energy", "rank_pattern", "reconfigured", "architecture", "pruned_rounds")
MODELS = {
    "learner": partial(learner, dropout=0.1, priming_epochs=1.5, priming_lr_scale=0.5),
    "learner-fold": partial(
        learner, dropout=0.1, priming_epochs=1.5, priming_lr_scale=0.5, after_priming="fold", fold_rank=0.9
    ),
    "far": partial(far, dropout=0.1, priming_ratio=0.55, priming_epochs=None),  # 0.55 * 9 = 4.95, rounded to 5
    "nas": partial(nas, dropout=0.1, rounds=2, search_steps=3, parameter_budget=0.2),
    "nas-structured": partial(nas, dropout=0.1, search_steps=5, granularity="structured"),
    "bottleneck": partial(
        adapted, BottleneckConfig(mode="parallel", bottleneck_dim=4, dropout=0.1, task_type="SEQ_CLS"), dropout=0.1
    ),
    "far-discard": partial(far, dropout=0.1, priming_steps=5, priming_epochs=None, discard_unkept=True),
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--tuner", choices=list(MODELS), default="learner")
    parser.add_argument("--kill_after", type=int)
    parser.add_argument("--kill_in_save", nargs=2, type=float)
    parser.add_argument("--resume", nargs="?", const=True)
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    settings = {key: json.loads(value) for key, value in (item.split("=") for item in args.set)}
    model = MODELS[args.tuner]()
    # rows in batches of 8: three steps per epoch, the boundary (rounded half up) at step 5, in mid-epoch
    defaults = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    kill = Kill(args.kill_after, args.kill_in_save)
    run = trainer(model, arguments(args.out, **{**defaults, **settings}), callbacks=[PhaseCallback(), kill])
    run.train(resume_from_checkpoint=args.resume)
    optimizer = raw_optimizer(run.optimizer)
    names = {p: n for n, p in model.named_parameters()}
    state = {f"{names[p]}/{k}": v for p, values in optimizer.state.items() for k, v in values.items()}
    starts = {log["phase"]: log["step"] for log in run.state.log_history if "phase_first_step" in log}
    learned = {name: value for name, value in model.peft_config["default"].to_dict().items() if name in LEARNED}
    final = {"adapter": adapter_values(model), "optimizer": state, "starts": starts, "learned": learned}
    torch.save({**final, "save_seconds": kill.save_seconds}, args.out / "final.pt")


if __name__ == "__main__":
    main()
