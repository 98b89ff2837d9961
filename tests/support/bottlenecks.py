"""Models with bottleneck adapters in float64, and the adapters' formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_learners import BottleneckConfig


def adapted(arch: str, mode: str = "parallel", seed: int = 1, **settings: Any) -> PeftModel:
    """A model of the zoo in float64 whose adapter changes the function."""
    torch.manual_seed(seed)
    fields = {"bottleneck_dim": 5, "init_weights": False, "task_type": zoo.ZOO[arch].task_type, **settings}
    return get_peft_model(zoo.build(arch).double(), BottleneckConfig(mode=mode, **fields)).double().eval()


def adapter(layer: Any, z: Tensor, f: Callable[[Tensor], Tensor], name: str = "default") -> Tensor:
    """`W_up f(W_down z + b_down) + b_up`, by its formula."""
    down, up = layer.bottleneck_down[name].weight, layer.bottleneck_up[name].weight
    return f(z @ down.T + layer.bottleneck_down[name].bias) @ up.T + layer.bottleneck_up[name].bias


def llama_network(mlp: Any, x: Tensor) -> Tensor:
    gate = x @ mlp.gate_proj.weight.T
    return (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
