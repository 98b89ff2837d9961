"""Adapters under engines (DDP, FSDP2, DeepSpeed) on a CPU, in two gloo processes, and in one on the joined batch.

`main(FOLDER, ENGINE)` makes the runs of `PLAN[ENGINE]` and leaves in FOLDER the adapter's values after each step and
`results.json`; `alone(FOLDER, ENGINE)` leaves beside them what one process computes. A boundary lies after the third
of nine steps.
"""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import zoo
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import adapted, arguments, bottleneck, far, learner, nas, trainer
from transformers import TrainerCallback

from peft_learners import PhaseCallback, ScheduleError

STEPS, BOUNDARY = 9, 3
FSDP = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
ZERO = {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": 100000}
#: Settings of the engines.
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2-full": {"state_dict_type": "FULL_STATE_DICT"},
    "fsdp2-sharded": {"state_dict_type": "SHARDED_STATE_DICT"},
    "fsdp2-ram": {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True},
    "fsdp2-checkpointing": {"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True},
    "zero2": {"stage": 2},
    # A threshold of 0: a small model's parameters are partitioned, too.
    "zero3": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
BLOCKS = {"distilbert": "TransformerBlock", "llama": "LlamaDecoderLayer"}
LINEARS = {
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def lora(arch: str) -> nn.Module:
    return adapted(LoraConfig(r=4, target_modules=LINEARS[arch], task_type=zoo.ZOO[arch].task_type), arch)


CASES: dict[str, Any] = {
    "lora": lora,
    "bottleneck": bottleneck,
    "unprimed": partial(learner, priming_epochs=0),
    "learner": partial(learner, priming_steps=BOUNDARY, priming_lr_scale=0.5),
    "fold": partial(learner, priming_steps=BOUNDARY, after_priming="fold"),
    "far": partial(far, priming_epochs=None, priming_steps=BOUNDARY),
    "nas": partial(nas, search_steps=BOUNDARY),
    "nas-structured": partial(nas, search_steps=BOUNDARY, granularity="structured"),
}
#: Cases that cross the boundary in one run, and those that an engine other than DDP lets do so in two.
ONE_RUN, TWO_RUNS = ("lora", "bottleneck", "unprimed", "learner"), ("fold", "far", "nas", "nas-structured")
_LEARNER = (("distilbert", "learner"),)
_ALL = (*(("distilbert", case) for case in CASES), *(("llama", case) for case in ("learner", "far", "nas")))
PLAN: dict[str, tuple[tuple[str, str], ...]] = {
    # Single entries of equal scores may be pruned otherwise where gradients are rounded otherwise: test_ddp.py.
    "ddp": tuple(("distilbert", case) for case in CASES if case != "nas"),
    "fsdp2-full": _ALL,
    "fsdp2-sharded": _LEARNER,
    "fsdp2-ram": _LEARNER,
    "fsdp2-checkpointing": _LEARNER,
    "zero2": _ALL,
    "zero3": _ALL,
}


def let_a_cpu_use_engines() -> None:
    """accelerate turns FSDP on for the kinds of processes in a list that CPUs are not in, and transformers names no
    backend beside DeepSpeed, where a CPU needs gloo."""
    source = inspect.getsource(accelerate.state.AcceleratorState.__init__)
    last = "DistributedType.MULTI_NEURON,\n            ]:"
    assert source.count(last) == 1, "accelerate has changed"
    source = source.replace(last, f"DistributedType.MULTI_CPU,\n                {last}")
    space: dict[str, Any] = {}
    exec(compile(textwrap.dedent(source), "accelerate_state", "exec"), vars(accelerate.state), space)
    accelerate.state.AcceleratorState.__init__ = space["__init__"]
    own = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", own(self, *args, **kwargs)[1])


def settings_of(engine: str, arch: str) -> dict[str, Any]:
    """Trainer's arguments for an engine."""
    if engine.startswith("fsdp2"):
        config = {**FSDP, "transformer_layer_cls_to_wrap": [BLOCKS[arch]], **ENGINES[engine]}
        return {"fsdp": True, "fsdp_config": config}
    if engine.startswith("zero"):
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {**dict.fromkeys((*names, "gradient_clipping"), "auto"), "zero_optimization": ZERO | ENGINES[engine]}
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        return {"deepspeed": config, "use_cpu": False, "ddp_backend": "gloo"}
    return {}


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes of gradients given to them: of what is reduced, single numbers aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.namespace == "c10d"
        if function.namespace == "c10d" and "reduce" in function.__name__:
            given = args[1] if "scatter" in function.__name__ else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            tensors = [t for part in tensors for t in (part if isinstance(part, (list, tuple)) else [part])]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)
        return function(*args, **(kwargs or {}))


class Watch(TrainerCallback):
    """Keeps the adapter's values, whole, after each step, and counts what the process holds and sends."""

    def __init__(self, saves: tuple[int, ...]) -> None:
        self.trainer: Any = None
        self.saves = saves
        self.values: list[dict[str, Tensor]] = []
        self.state: list[int] = []
        self.sent: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._counter = Sent()
        if state.global_step in (0, BOUNDARY):
            self._counter.__enter__()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step - 1 in (0, BOUNDARY):
            self._counter.__exit__(None, None, None)
            self.sent.append(self._counter.bytes)
        self.values.append(values_of(self.trainer))
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        held = [v for values in optimizer.state.values() for v in values.values() if v.dim()]
        held = [v.to_local() if hasattr(v, "to_local") else v for v in held]
        self.state.append(sum(v.numel() * v.element_size() for v in held))
        control.should_save |= state.global_step in self.saves


def values_of(own: Any) -> dict[str, Tensor]:
    """The adapter's and the head's values, whole; under FSDP and ZeRO-3 those of the first rank alone."""
    split = own.is_deepspeed_enabled or own.is_fsdp_enabled
    values = (own.accelerator.get_state_dict(own.model_wrapped) if split else own.model.state_dict()) or {}
    prefixes = ("lora_", "learner_", "far_", "nas_lora_", "bottleneck_", "modules_to_save.")
    return {
        name.replace("_checkpoint_wrapped_module.", ""): value.detach().clone().cpu()
        for name, value in values.items()
        if any(f".{prefix}" in name for prefix in prefixes)
    }


class Runs:
    """The runs of one case under one engine; without one, in one process."""

    def __init__(self, folder: Path, engine: str | None, arch: str, case: str) -> None:
        self.engine, self.arch, self.case = engine, arch, case
        self.folder = folder / f"{arch}-{case}"
        self.world = int(os.environ["WORLD_SIZE"]) if engine else 1
        self.rank = int(os.environ["RANK"]) if engine else 0
        self.results: dict[str, Any] = {}

    def fresh(self) -> nn.Module:
        return CASES[self.case](arch=self.arch)

    def loaded(self, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(zoo.build(self.arch), folder, is_trainable=True)

    def trainer(self, name: str, model: nn.Module, callbacks: list[TrainerCallback], **settings: Any) -> Any:
        """Trainer under the engine, whatever trained in this process before."""
        AcceleratorState._reset_state()
        GradientState._reset_state()
        for key in [key for key in os.environ if key.startswith(("FSDP_", "ACCELERATE_USE_"))]:
            del os.environ[key]
        settings |= settings_of(self.engine, self.arch) if self.engine else {}
        args = arguments(self.folder / name, per_device_train_batch_size=8 // self.world, **settings)
        return trainer(model, args, callbacks=callbacks)

    def train(
        self,
        name: str,
        model: nn.Module,
        resume: Path | None = None,
        saves: tuple[int, ...] = (),
        stop: bool = False,
        final: bool = False,
        steps: int = STEPS,
        driven: bool = True,
    ) -> None:
        watch = Watch(saves)
        # The watch comes first: it sees values before a boundary is crossed.
        ours = [PhaseCallback(stop_at_boundary=stop)] if self.case != "lora" and driven else []
        own = watch.trainer = self.trainer(name, model, [watch, *ours], max_steps=steps)
        saving, save = Sent(), model.save_pretrained

        def counted(*arguments: Any, **keywords: Any) -> None:
            with saving:
                save(*arguments, **keywords)

        model.save_pretrained = counted
        own.train(resume_from_checkpoint=None if resume is None else str(resume))
        if final:
            self.save(own)
        torch.save(watch.values, self.folder / f"{name}-{self.rank}.pt")
        self.results[name] = {"state": watch.state, "sent": watch.sent, "kind": type(own.model_wrapped).__name__}
        self.results[name]["collectives_in_saves"] = saving.calls
        self.results[name]["trained"] = [
            log.get("trained_parameters") for log in own.state.log_history if "loss" in log
        ]
        own.accelerator.free_memory()

    def save(self, own: Any) -> None:
        """The adapter at the end, in one file."""
        if own.is_fsdp_enabled:
            own.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        own.save_model(str(self.folder / "final"))

    def one_run(self) -> None:
        """Across the boundary; then resumed before and after it."""
        self.train("run", self.fresh(), saves=(2, 5), final=True)
        for step in (2, 5):
            checkpoint = self.folder / "run" / f"checkpoint-{step}"
            model = self.fresh()
            if step > BOUNDARY and self.case == "learner" and self.engine.startswith("fsdp2"):
                # A sharded checkpoint holds no adapter to load: that of another run at this step does as well.
                full = self.folder.parents[1] / "fsdp2-full" / self.folder.name / "run" / checkpoint.name
                model = self.loaded(full if self.engine == "fsdp2-sharded" else checkpoint)
            self.train(f"run-{step}", model, resume=checkpoint)

    def two_runs(self) -> None:
        """Up to the boundary, and on from there; each of them resumed."""
        try:
            self.train("refused", self.fresh())
        except ScheduleError as error:
            self.results["refused"] = str(error)
        if self.case == "nas":
            self.train("forgotten", self.fresh(), saves=(2,), steps=2, driven=False)
        first, second = self.folder / "first", self.folder / "second"
        self.train("first", self.fresh(), saves=(2,), stop=True)
        searches = self.case.startswith("nas") or self.engine.startswith("fsdp2")  # scores lie in the adapter's file
        model = self.loaded(first / "checkpoint-2") if searches else self.fresh()
        self.train("first-2", model, resume=first / "checkpoint-2", stop=True)
        boundary = first / f"checkpoint-{BOUNDARY}"
        self.train("second", self.loaded(boundary), saves=(2,), steps=STEPS - BOUNDARY, final=True)
        model = self.loaded(second / "checkpoint-2" if self.engine.startswith("fsdp2") else boundary)
        self.train("second-2", model, resume=second / "checkpoint-2", steps=STEPS - BOUNDARY)

    def first_run_refused(self) -> None:
        """A first run whose checkpoints would hold no adapter."""
        try:
            self.train("refused", self.fresh(), stop=True)
        except ValueError as error:
            self.results["refused"] = str(error)

    def all(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.case in ONE_RUN or self.engine == "ddp":
            self.one_run()
        if self.case in TWO_RUNS and self.engine != "ddp":
            self.two_runs()


def main(folder: str, engine: str) -> None:
    let_a_cpu_use_engines()
    results = {}
    for arch, case in PLAN[engine]:
        runs = Runs(Path(folder), engine, arch, case)
        runs.all()
        results[f"{arch}-{case}"] = runs.results
    if engine == "fsdp2-sharded":
        runs = Runs(Path(folder), engine, "distilbert", "far")
        runs.first_run_refused()
        results["distilbert-far"] = runs.results
    if int(os.environ["RANK"]) == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))


def alone(folder: str, engine: str) -> None:
    """What one process computes on the joined batch; of a second run, from what the engine's first has saved."""
    for arch, case in PLAN[engine]:
        runs = Runs(Path(folder) / "alone", None, arch, case)
        runs.folder.mkdir(parents=True)
        if case in ONE_RUN or engine == "ddp":
            runs.train("run", runs.fresh())
        else:
            boundary = Path(folder) / f"{arch}-{case}" / "first" / f"checkpoint-{BOUNDARY}"
            runs.train("first", runs.fresh(), saves=(2,), stop=True)
            runs.train("second", runs.loaded(boundary), steps=STEPS - BOUNDARY)
