"""Learner layers: a linear layer or a norm, plus per-adapter deltas."""

from __future__ import annotations

from typing import ClassVar

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..layers.base import DeltaLayer
from ..layers.linear import DeltaLinear
from ..layers.module import DeltaNorm
from ..ops.terms import Dense, LowRank
from .config import DENSE_PART, PRIMING, LearnerConfig


class LearnerLayer(DeltaLayer):
    """Common to Learner layers."""

    def __repr__(self) -> str:
        return "learner." + super().__repr__()


class LearnerLinear(LearnerLayer, DeltaLinear):
    """`y = x (W + scaling * P2 P1 + priming_lr_scale * theta)^T + b + db`.

    Shapes: `x: (..., in_features)`, `P1: (r, in_features)`, `P2: (out_features, r)`,
    `theta: (out_features, in_features)` on primed layers only, `db: (out_features,)` where the layer has a bias.
    P1 is Kaiming-uniform and all else zero at first, so that a fresh Learner leaves the function as it is.

    Source: arXiv 2208.02070, equation 2 (collapse) and section 4 (priming).
    """

    # A container's name ends in nothing a model calls a module (PEFT matches modules_to_save by endings), and those of
    # biases and norms hold what Trainer exempts from weight decay.
    adapter_layer_names = ("learner_P1", "learner_P2", "learner_bias_delta", DENSE_PART)
    other_param_names = ("learner_r", "learner_scaling", "learner_lr_scale", "learner_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.learner_bias_delta = nn.ParameterDict({})
        self.learner_P1 = nn.ParameterDict({})
        self.learner_P2 = nn.ParameterDict({})
        self.learner_dense_delta = nn.ParameterDict({})
        self.learner_dropout: dict[str, float] = {}
        self.learner_r: dict[str, int] = {}
        self.learner_scaling: dict[str, float] = {}
        self.learner_lr_scale: dict[str, float] = {}

    def update_layer(self, adapter: str, config: LearnerConfig, name: str, primed: bool) -> None:
        """Create the parameters of a new adapter.

        Args:
            name: the layer's name in the model, for `rank_pattern`.
            primed: whether this layer gets a dense delta.
        """
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        self.learner_r[adapter] = rank
        self.learner_scaling[adapter] = float(config.scaling)
        self.learner_lr_scale[adapter] = float(config.priming_lr_scale)
        self.learner_dropout[adapter] = float(config.learner_dropout)
        self.add_parameter("learner_P1", adapter, config, rank, self.in_features, kaiming=True)
        self.add_parameter("learner_P2", adapter, config, self.out_features, rank)
        if config.train_biases and getattr(self.get_base_layer(), "bias", None) is not None:
            self.add_parameter("learner_bias_delta", adapter, config, self.out_features)
        if primed:
            self.add_parameter("learner_dense_delta", adapter, config, self.out_features, self.in_features)
        if PRIMING in config.completed_phases:
            self.frozen_peft_weight_names[adapter] = (DENSE_PART,)

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.learner_r

    def low_rank(self, adapter: str) -> LowRank:
        return self.learner_P1[adapter], self.learner_P2[adapter], self.learner_scaling[adapter]

    def dense(self, adapter: str) -> Dense | None:
        if adapter not in self.learner_dense_delta:
            return None
        return self.learner_dense_delta[adapter], self.learner_lr_scale[adapter]

    def bias_delta(self, adapter: str) -> Tensor | None:
        return self.learner_bias_delta[adapter] if adapter in self.learner_bias_delta else None

    def dropout(self, adapter: str) -> float:
        return self.learner_dropout[adapter] if self.training else 0.0


class LearnerNorm(LearnerLayer, DeltaNorm):
    """A norm with deltas on its weight and bias."""

    containers: ClassVar = {"weight": "learner_layernorm_delta", "bias": "learner_bias_delta"}
    # The order of parameters, by which a checkpoint's optimizer state finds them.
    adapter_layer_names = ("learner_bias_delta", "learner_layernorm_delta")
