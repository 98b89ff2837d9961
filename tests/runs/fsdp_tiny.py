"""Adapters under FSDP2 on a CPU: two gloo processes; or, without a world, one process on the joined batch.

`fsdp_tiny.main(FOLDER)` trains each case in turn and leaves, of rank 0, the values after each step and what was said.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import torch.distributed as dist
import zoo
from peft import LoraConfig, PeftModel
from torch import nn
from training import adapted, adapter_values, arguments, bottleneck, far, learner, nas, trainer
from transformers import TrainerCallback

from peft_learners import PhaseCallback, ScheduleError

FSDP = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["TransformerBlock"],
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
}
#: Phases of 3 and 6 steps.
MODELS: dict[str, Any] = {
    "lora": lambda: adapted(LoraConfig(r=4, target_modules=["q_lin", "v_lin", "lin1", "lin2"], task_type="SEQ_CLS")),
    "learner": partial(learner, priming_steps=3, priming_lr_scale=0.5),
    "bottleneck": bottleneck,
}
#: Learners under other settings of FSDP2.
SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {"state_dict_type": "SHARDED_STATE_DICT"},
    "ram": {"cpu_ram_efficient_loading": True},
    "checkpointing": {"activation_checkpointing": True},
}
REFUSED: dict[str, Any] = {
    "fold": partial(learner, priming_steps=3, after_priming="fold"),
    "far": partial(far, priming_epochs=None, priming_steps=3),
    "nas": partial(nas, search_steps=3),
}


def let_a_cpu_use_fsdp() -> None:
    """accelerate turns FSDP on for the kinds of processes in a list that CPUs are not in."""
    source = inspect.getsource(accelerate.state.AcceleratorState.__init__)
    last = "DistributedType.MULTI_NEURON,\n            ]:"
    assert source.count(last) == 1, "accelerate has changed"
    source = source.replace(last, f"DistributedType.MULTI_CPU,\n                {last}")
    space: dict[str, Any] = {}
    exec(compile(textwrap.dedent(source), "accelerate_state", "exec"), vars(accelerate.state), space)
    accelerate.state.AcceleratorState.__init__ = space["__init__"]


class Watch(TrainerCallback):
    """Keeps the adapter's values and the size of the optimizer's state, whole, after each step."""

    def __init__(self) -> None:
        self.values: list[dict[str, torch.Tensor]] = []
        self.state: list[int] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in adapter_values(model).items()}
        self.values.append(whole)
        own = [v for values in optimizer.state.values() for v in values.values() if v.dim()]
        self.state.append(sum(v.numel() for v in own))  # of a DTensor: all of it


def run(
    model: nn.Module, out: Path, ours: bool = True, resume: str | None = None, fsdp: Any = None, **settings: Any
) -> tuple[Any, Watch]:
    world = dist.get_world_size() if dist.is_initialized() else int(arguments(out).world_size)
    engine = {"fsdp": True, "fsdp_config": {**FSDP, **(fsdp or {})}} if world > 1 else {}
    args = arguments(out, per_device_train_batch_size=8 // world, **engine, **settings)
    watch = Watch()
    own = trainer(model, args, callbacks=[PhaseCallback(), watch] if ours else [watch])
    own.train(resume_from_checkpoint=resume)
    return own, watch


def reloaded(folder: Path, **settings: Any) -> PeftModel:
    return PeftModel.from_pretrained(zoo.build("distilbert"), folder, **settings)


def main(folder: str) -> None:
    out, results = Path(folder), {}
    if arguments(out).world_size > 1:
        let_a_cpu_use_fsdp()
    for name in (*MODELS, *SETTINGS):
        model, fsdp = MODELS.get(name, MODELS["learner"])(), SETTINGS.get(name)
        own, watch = run(model, out / name, name != "lora", fsdp=fsdp, save_strategy="steps", save_steps=1)
        if own.is_fsdp_enabled:
            own.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        own.save_model(str(out / name / "final"))
        kind = type(own.model_wrapped).__name__
        results[name] = {"state": watch.state, "kind": kind}
        if own.is_world_process_zero():
            torch.save(watch.values, out / f"{name}.pt")
        own.accelerator.free_memory()
    for name in ("learner", *SETTINGS):
        for step in (2, 5):
            path = out / name / f"checkpoint-{step}"
            # A sharded checkpoint holds no adapter to load: that of another run at this step does as well.
            saved = out / "learner" / f"checkpoint-{step}"
            model = MODELS["learner"]() if step == 2 else reloaded(saved, is_trainable=True)
            own, watch = run(model, out / f"{name}-{step}", resume=str(path), fsdp=SETTINGS.get(name))
            if own.is_world_process_zero():
                torch.save(watch.values, out / f"{name}-{step}.pt")
            own.accelerator.free_memory()
    said = {}
    for name, make in REFUSED.items():
        try:
            run(make(), out / name)
        except ScheduleError as error:
            said[name] = str(error)
    # The second of two runs: an adapter that was saved at its boundary.
    for name in REFUSED:
        folder_of_first = out.parent / f"{name}-first"
        own, watch = run(reloaded(folder_of_first, is_trainable=True), out / f"{name}-second", max_steps=4)
        if own.is_world_process_zero():
            torch.save(watch.values, out / f"{name}-second.pt")
        own.accelerator.free_memory()
    if not dist.is_initialized() or dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps({"cases": results, "said": said}))


if __name__ == "__main__":
    main(sys.argv[1])
