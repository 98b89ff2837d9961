"""Bottleneck adapters, sequential (arXiv 1902.00751) and parallel (arXiv 2110.04366), which PEFT has not."""

from ..registry import ensure_peft_type, register

ensure_peft_type("BOTTLENECK")  # before the config, which sets it

from .config import BottleneckConfig  # noqa: E402
from .layer import BottleneckLayer, BottleneckLinear, BottleneckNorm  # noqa: E402
from .model import BottleneckModel  # noqa: E402

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckLinear", "BottleneckModel", "BottleneckNorm"]

register(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
