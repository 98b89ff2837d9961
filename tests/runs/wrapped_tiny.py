"""Adapters wrapped by PEFT's own policy for LoRA under FSDP, in two gloo processes: outputs and gradients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import zoo
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from training import bottleneck, far, learner, nas

MAKE = {"learner": learner, "far": far, "nas": nas, "bottleneck": bottleneck}


def wrapped(model: nn.Module, version: int) -> nn.Module:
    policy = fsdp_auto_wrap_policy(model)
    if version == 1:
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    for module in reversed([module for module in model.modules() if module is not model]):
        if policy(module=module, recurse=False, nonwrapped_numel=0):
            fully_shard(module)
    return fully_shard(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in found.items()}


def main(folder: str) -> None:
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "TransformerBlock"
    dist.init_process_group("gloo")
    results = {}
    for name, make in MAKE.items():
        for version in (1, 2):
            alone, model = make().train(), wrapped(make().train(), version)
            inputs = zoo.inputs_of("distilbert", alone)
            own, theirs = model(**inputs), alone(**inputs)
            own.loss.backward()
            theirs.loss.backward()
            if version == 1:
                with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                    found = gradients(model)
            else:
                found = gradients(model)
            expected = gradients(alone)
            results[f"{name}-{version}"] = {
                "units": sum(isinstance(m, (FullyShardedDataParallel, FSDPModule)) for m in model.modules()),
                "logits": float((own.logits - theirs.logits).abs().max()),
                "gradients": max(float((found[key] - value).abs().max()) for key, value in expected.items()),
            }
    if dist.get_rank() == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
