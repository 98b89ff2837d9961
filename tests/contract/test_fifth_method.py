"""A method is one folder: one that this test writes, outside the package, goes through all that ours go through."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOY = {
    "config.py": '''
from dataclasses import dataclass
from typing import ClassVar

from peft_learners.config import Check, PhasedConfig, is_positive_int, names_unknown_fields, option


@names_unknown_fields
@dataclass
class ToyConfig(PhasedConfig):
    """Configuration of Toy: LoRA without scaling."""

    method: ClassVar[str] = "toy"
    display_name: ClassVar[str] = "Toy"

    r: int = option(4, "Rank of the toys.", Check(is_positive_int, "a whole number of at least 1", "r=4"))
''',
    "layer.py": '''
from torch import nn

from peft_learners.layers.linear import DeltaLinear


class ToyLinear(DeltaLinear):
    """`y = x (W + B A)^T + b`."""

    adapter_layer_names = ("toy_A", "toy_B")

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.toy_A, self.toy_B = nn.ParameterDict({}), nn.ParameterDict({})

    def low_rank(self, adapter):
        return (self.toy_A[adapter], self.toy_B[adapter], 1.0) if adapter in self.toy_A else None
''',
    "model.py": '''
from peft_learners.structure.modules import linear_names
from peft_learners.tuner import PhasedModel

from .layer import ToyLinear


class ToyModel(PhasedModel):
    """Puts toys on every linear layer."""

    prefix = "toy_"
    tuner_layer_cls = ToyLinear

    def _found_targets(self, config, model):
        return linear_names(model)

    def _new_layer(self, module, name):
        return ToyLinear(module)

    def _update_layer(self, layer, adapter, config, name):
        layer._add("toy_A", adapter, config, config.r, layer.in_features, kaiming=True)
        layer._add("toy_B", adapter, config, layer.out_features, config.r)
''',
    "__init__.py": '''
"""A toy method."""

from peft_learners.registry import register

from .config import ToyConfig
from .model import ToyModel

register(ToyConfig, ToyModel)
''',
}
