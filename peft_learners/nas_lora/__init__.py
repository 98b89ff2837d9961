"""NAS-LoRA (arXiv 2305.16597): search over low-rank and bias updates, prune to a budget, rewind, retrain."""

from ..registry import ensure_peft_type, register

ensure_peft_type("NAS_LORA")  # before the config, which sets it

from .architecture import Architecture  # noqa: E402
from .config import NASLoRAConfig  # noqa: E402
from .layer import NASLoRABias, NASLoRALayer, NASLoRALinear  # noqa: E402
from .model import NASLoRAModel  # noqa: E402

__all__ = ["Architecture", "NASLoRABias", "NASLoRAConfig", "NASLoRALayer", "NASLoRALinear", "NASLoRAModel"]

register(name="nas_lora", config_cls=NASLoRAConfig, model_cls=NASLoRAModel)
