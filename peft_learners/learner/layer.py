"""Learner layers: a linear layer or a norm, plus per-adapter deltas."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.base import DeltaLayer
from ..layers.linear import DeltaLinear
from ..layers.module import DeltaNorm
from ..ops.low_rank import Factored, total
from ..ops.terms import Dense, LowRank
from .config import DENSE_PART, LearnerConfig


class LearnerLayer(DeltaLayer):
    """Common to Learner layers."""

    def __repr__(self) -> str:
        return "learner." + super().__repr__()


class LearnerLinear(LearnerLayer, DeltaLinear):
    """`y = x (W + scaling * P2 P1 + priming_lr_scale * theta)^T + b + db`.

    Shapes: `x: (..., in_features)`, `P1: (r, in_features)`, `P2: (out_features, r)`,
    `theta: (out_features, in_features)` on primed layers only, `db: (out_features,)` where the layer has a bias.
    P1 is Kaiming-uniform and all else zero at first, so that a fresh Learner leaves the function as it is. Once the
    layer is folded, theta is gone and P1, P2 hold what it had learned, too.

    Source: arXiv 2208.02070, equation 2 (collapse) and section 4 (priming).
    """

    # A container's name ends in nothing a model calls a module (PEFT matches modules_to_save by endings), and those of
    # biases and norms hold what Trainer exempts from weight decay.
    adapter_layer_names = ("learner_P1", "learner_P2", "learner_bias_delta", DENSE_PART)
    other_param_names = ("learner_r", "learner_scaling", "learner_lr_scale", "learner_dropouts", "learner_primed")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.learner_bias_delta = nn.ModuleDict()
        self.learner_P1 = nn.ModuleDict()
        self.learner_P2 = nn.ModuleDict()
        self.learner_dense_delta = nn.ModuleDict()
        # Modules, which tools switch off; no user's module is called as the container ends (PEFT's modules_to_save).
        self.learner_dropouts = nn.ModuleDict()
        self.learner_r: dict[str, int] = {}
        self.learner_scaling: dict[str, float] = {}
        self.learner_lr_scale: dict[str, float] = {}
        #: Whether the layer is primed in the first phase, or was.
        self.learner_primed: dict[str, bool] = {}

    def update_layer(self, adapter: str, config: LearnerConfig, name: str, primed: bool) -> None:
        """Create the parameters of a new adapter.

        Args:
            name: the layer's name in the model, for `rank_pattern`.
            primed: whether this layer gets a dense delta, which a folded one no longer has.
        """
        _, rank = config.rank_of(name)
        self.learner_r[adapter] = rank
        self.learner_scaling[adapter] = float(config.scaling)
        self.learner_lr_scale[adapter] = float(config.priming_lr_scale)
        self.learner_dropouts[adapter] = nn.Dropout(config.learner_dropout)
        self.add_parameter("learner_P1", adapter, config, rank, self.in_features, kaiming=True)
        self.add_parameter("learner_P2", adapter, config, self.out_features, rank)
        if config.train_biases and getattr(self.get_base_layer(), "bias", None) is not None:
            self.add_parameter("learner_bias_delta", adapter, config, self.out_features)
        self.learner_primed[adapter] = primed
        if primed and not config.is_folded:
            self.add_parameter(DENSE_PART, adapter, config, self.out_features, self.in_features)

    def has_adapter(self, adapter: str) -> bool:
        return adapter in self.learner_r

    def low_rank(self, adapter: str) -> LowRank:
        return self.value("learner_P1", adapter), self.value("learner_P2", adapter), self.learner_scaling[adapter]

    def dense_delta(self, adapter: str) -> Tensor | None:
        """theta, if the layer is primed and not folded."""
        if adapter not in self.learner_dense_delta or self.leaf(DENSE_PART, adapter).is_empty:
            return None
        return self.value(DENSE_PART, adapter)

    def dense(self, adapter: str) -> Dense | None:
        theta = self.dense_delta(adapter)
        return None if theta is None else (theta, self.learner_lr_scale[adapter])

    def bias_delta(self, adapter: str) -> Tensor | None:
        return self.value("learner_bias_delta", adapter) if adapter in self.learner_bias_delta else None

    def dropout(self, adapter: str) -> float:
        dropout: Any = self.learner_dropouts[adapter]
        return dropout.p if dropout.training else 0.0

    # -- folding ----------------------------------------------------------------------------------------------------

    def whole_update(self, adapter: str) -> Tensor:
        """`scaling * P2 P1 + priming_lr_scale * theta`, (out_features, in_features), float32 or wider."""
        return total(*self.matrices(adapter))

    def take_factors(self, adapter: str, pair: Factored, optimizer: Optimizer | None) -> None:
        """Give P1 and P2 the values of a pair whose product is the whole update; their optimizer state goes."""
        root = abs(self.learner_scaling[adapter]) ** 0.5
        self.leaf("learner_P1", adapter).set(pair.a / root, optimizer)
        self.leaf("learner_P2", adapter).set(pair.b / (self.learner_scaling[adapter] / root), optimizer)
        self.learner_r[adapter] = pair.rank

    def drop_dense(self, adapter: str, optimizer: Optimizer | None) -> None:
        """Leave nothing of theta."""
        if adapter in self.learner_dense_delta:
            self.leaf(DENSE_PART, adapter).clear(optimizer)

    def take_form(self, adapter: str, rank: int, dense: bool, optimizer: Optimizer | None) -> None:
        """Make room for a file's values: factors of a rank, with or without theta."""
        p1 = self.value("learner_P1", adapter)
        if rank != len(p1):
            self.leaf("learner_P1", adapter).set(p1.new_zeros(rank, self.in_features), optimizer)
            self.leaf("learner_P2", adapter).set(p1.new_zeros(self.out_features, rank), optimizer)
            self.learner_r[adapter] = rank
        if dense and self.dense_delta(adapter) is None:
            self.make_whole(adapter)
            self.leaf(DENSE_PART, adapter).set(p1.new_zeros(self.out_features, self.in_features), optimizer)
        elif not dense:
            self.drop_dense(adapter, optimizer)

    def make_whole(self, adapter: str) -> None:
        super().make_whole(adapter)
        if self.learner_primed.get(adapter) and adapter not in self.learner_dense_delta:  # it was loaded folded
            self.put_empty(DENSE_PART, adapter, self.value("learner_P1", adapter).device)


class LearnerNorm(LearnerLayer, DeltaNorm):
    """A norm with deltas on its weight and bias."""

    containers: ClassVar = {"weight": "learner_layernorm_delta", "bias": "learner_bias_delta"}
    # The order of parameters, by which a checkpoint's optimizer state finds them.
    adapter_layer_names = ("learner_bias_delta", "learner_layernorm_delta")
