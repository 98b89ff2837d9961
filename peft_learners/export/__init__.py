"""Trained adapters as plain LoRA, for all that knows LoRA alone.

from peft_learners.export import save_as_lora

save_as_lora("out", model)             # unprimed Learners, NAS-LoRA: exact
save_as_lora("out", model, rank=0.99)  # primed Learners, FAR: the nearest low-rank updates
"""

from .lora import ExportedModule, LoraExport, save_as_lora, to_lora

__all__ = ["ExportedModule", "LoraExport", "save_as_lora", "to_lora"]
