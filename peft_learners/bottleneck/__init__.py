"""Bottleneck adapters, sequential (arXiv 1902.00751) and parallel (arXiv 2110.04366), which PEFT has not."""

from ..registry import register
from .config import BottleneckConfig
from .layer import BottleneckLayer, BottleneckLinear, BottleneckNorm
from .model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckLinear", "BottleneckModel", "BottleneckNorm"]

register(BottleneckConfig, BottleneckModel)
