"""Trains tiny adapters in one of two processes (or alone, as the reference) and writes what the test compares.

The environment says which of them this is, as `torchrun` has it: `torchrun --nproc_per_node 2 ddp_tiny.py OUT`.
"""

# No postponed annotations: DDP checks those of a communication hook.
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from training import adapter_values, arguments, bottleneck, far, learner, nas, trainer
from transformers import TrainerCallback

from peft_learners import PhaseCallback
from peft_learners.phases.ddp import search_ddp_wrappers

#: With it DDP sends buffers.
BROADCAST = getattr(dist, "_broadcast_coalesced", None)
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES = {
    "far": {},
    "far-output-node": {"gradient_accumulation_steps": 2},
    "nas": {"gradient_accumulation_steps": 2},
    "nas-structured": {},
    "fold": {},
    "plain": {},
    "unused": {"ddp_find_unused_parameters": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "again": {},
    "checkpointing": CHECKPOINTING,
    "bottleneck": {},
    "bottleneck-checkpointing": CHECKPOINTING,
}


MODELS = {
    "far": far,
    "far-output-node": partial(far, granularity="output_node"),
    "nas": partial(nas, search_epochs=1, parameter_budget=0.2),
    "nas-structured": partial(nas, search_epochs=1, granularity="structured"),
    "fold": partial(learner, priming_lr_scale=0.5, after_priming="fold"),
    "bottleneck": bottleneck,
    "bottleneck-checkpointing": bottleneck,
}


class Watch(TrainerCallback):
    """Counts the bytes that DDP reduces and the numbers that it broadcasts in each step, and compares the ranks after
    it."""

    def __init__(self) -> None:
        self.now = 0
        self.sent: list[int] = []
        self.reduced: list[int] = []
        self.trained: list[int] = []
        self.equal: list[bool] = []

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.now += bucket.buffer().numel() * bucket.buffer().element_size()
        buffer = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    def broadcast(self, group, tensors, *rest):
        self.sent.append(sum(tensor.numel() for tensor in tensors))
        return BROADCAST(group, tensors, *rest)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        dist._broadcast_coalesced = self.broadcast
        for ddp in search_ddp_wrappers(model):
            ddp.register_comm_hook(None, self.hook)

    def on_train_end(self, args, state, control, **kwargs):
        dist._broadcast_coalesced = BROADCAST

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.now = 0
        self.trained.append(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.reduced.append(self.now)
        flat = torch.cat([v.detach().flatten().double() for v in model.state_dict().values()])  # indices too
        if dist.is_initialized():
            other = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(other, flat)
            self.equal.append(all(torch.equal(flat, o) for o in other))


def main(folder: str) -> None:
    out = Path(folder)
    results = {}
    world = 1
    for name, settings in CASES.items():
        watch = Watch()
        model = MODELS.get(name, partial(learner, priming_lr_scale=0.5))()
        args = arguments(out / name, **settings)
        world = args.world_size
        args.per_device_train_batch_size = 8 // world // settings.get("gradient_accumulation_steps", 1)
        if name == "again":
            # A Trainer that has finished and is still alive, with a wrapper of its own; then all phases once more.
            earlier = trainer(model, args)
            earlier.train()
            model.base_model.restart_phases()
        run = trainer(model, args, callbacks=[watch, PhaseCallback()])
        run.train()
        if args.process_index == 0:
            torch.save(adapter_values(model), out / f"{name}.pt")
        results[name] = {
            "reduced": watch.reduced,
            "trained": watch.trained,
            "equal": watch.equal,
            "sent": watch.sent,
            "steps": run.state.global_step,
            "first_steps": model.peft_config["default"].phase_first_steps,
        }
        run.accelerator.free_memory()
        if args.process_index == 0:
            (out / "results.json").write_text(json.dumps({"world": world, "cases": results}))


if __name__ == "__main__":
    main(sys.argv[1])
