"""NAS-LoRA (arXiv 2305.16597): search over low-rank and bias updates, prune to a budget, rewind, retrain."""

from ..registry import register
from .architecture import Architecture
from .config import NASLoRAConfig
from .layer import NASLoRABias, NASLoRALayer, NASLoRALinear
from .model import NASLoRAModel

__all__ = ["Architecture", "NASLoRABias", "NASLoRAConfig", "NASLoRALayer", "NASLoRALinear", "NASLoRAModel"]

register(NASLoRAConfig, NASLoRAModel)
