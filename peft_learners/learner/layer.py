"""Learner layers: a linear layer or a norm, plus per-adapter deltas."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..discovery import base_of, readable_weight
from ..functional import effective_weight, linear_with_updates, norm_with, sum_of
from ..layer import TEST_STD, DeltaLayer
from .config import DENSE_PART, PRIMING, LearnerConfig


class LearnerLayer(DeltaLayer):
    """Common to Learner layers: creation of parameters, and the freeze of a primed adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.learner_bias_delta = nn.ParameterDict({})

    def _add(self, part: str, adapter: str, config: LearnerConfig, *shape: int, kaiming: bool = False) -> None:
        value = torch.empty(*shape)
        if kaiming:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        elif config.init_weights:
            nn.init.zeros_(value)
        if not config.init_weights:
            nn.init.normal_(value, std=TEST_STD)
        getattr(self, part)[adapter] = nn.Parameter(value)

    def _finish_update(self, adapter: str, config: LearnerConfig) -> None:
        self._move_adapter_to_device_of_base_layer(adapter)
        if PRIMING in config.completed_phases and DENSE_PART in self.adapter_layer_names:
            self.frozen_peft_weight_names[adapter] = (DENSE_PART,)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


class LearnerLinear(LearnerLayer):
    """`y = x (W + scaling * P2 P1 + priming_lr_scale * theta)^T + b + db`.

    Shapes: `x: (..., in_features)`, `P1: (r, in_features)`, `P2: (out_features, r)`,
    `theta: (out_features, in_features)` on primed layers only, `db: (out_features,)` where the layer has a bias.
    P1 is Kaiming-uniform and all else zero at first, so that a fresh Learner leaves the function as it is.

    Source: arXiv 2208.02070, equation 2 (collapse) and section 4 (priming).
    """

    adapter_layer_names = ("learner_P1", "learner_P2", "learner_bias_delta", "learner_dense_delta")
    other_param_names = ("learner_r", "learner_scaling", "learner_lr_scale", "learner_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.learner_P1 = nn.ParameterDict({})
        self.learner_P2 = nn.ParameterDict({})
        self.learner_dense_delta = nn.ParameterDict({})
        self.learner_dropout = nn.ModuleDict({})
        self.learner_r: dict[str, int] = {}
        self.learner_scaling: dict[str, float] = {}
        self.learner_lr_scale: dict[str, float] = {}
        self.in_features: Any
        self.out_features: Any
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        # transformers' Conv1D stores its weight as (in_features, out_features)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

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
        dropout = nn.Dropout(config.learner_dropout) if config.learner_dropout > 0 else nn.Identity()
        self.learner_dropout[adapter] = dropout
        self._add("learner_P1", adapter, config, rank, self.in_features, kaiming=True)
        self._add("learner_P2", adapter, config, self.out_features, rank)
        if config.train_biases and getattr(self.get_base_layer(), "bias", None) is not None:
            self._add("learner_bias_delta", adapter, config, self.out_features)
        if primed:
            self._add("learner_dense_delta", adapter, config, self.out_features, self.in_features)
        self._finish_update(adapter, config)

    def _low_rank(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        return self.learner_P1[adapter], self.learner_P2[adapter], self.learner_scaling[adapter]

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        weight = self._readable_weight(adapters)
        if weight is None or args or kwargs:
            return self._forward_plain(x, adapters, *args, **kwargs)
        base: Any = self.get_base_layer()
        biases = [self.learner_bias_delta[name] for name in adapters if name in self.learner_bias_delta]
        bias = sum_of(base.bias, biases)
        primed = [name for name in adapters if name in self.learner_dense_delta]
        dense = [(self.learner_dense_delta[name], self.learner_lr_scale[name]) for name in primed]
        dropped = [name for name in adapters if self._drops(name)]
        low_rank = [self._low_rank(name) for name in adapters if name not in dropped]
        out = linear_with_updates(x, weight, bias, low_rank, dense)
        for name in dropped:
            p1, p2, factor = self._low_rank(name)
            out = out + F.linear(F.linear(self.learner_dropout[name](x), p1), p2) * factor
        return out

    def _drops(self, adapter: str) -> bool:
        return self.training and isinstance(self.learner_dropout[adapter], nn.Dropout)

    def _readable_weight(self, adapters: list[str]) -> Tensor | None:
        """The weight as (out_features, in_features) if it can be added to; None sends the call down the plain path."""
        weight = readable_weight(self.base_layer)
        if weight is None or any(self.learner_P1[name].dtype != weight.dtype for name in adapters):
            return None
        return weight

    def _forward_plain(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The same sum through `base_layer(x)`: for weights of another type, quantised, hooked or wrapped."""
        out = self.base_layer(x, *args, **kwargs)
        dtype = out.dtype
        for name in adapters:
            p1, p2, factor = self._low_rank(name)
            cast = self._cast_input_dtype(x, p1.dtype)
            out = out + F.linear(F.linear(self.learner_dropout[name](cast), p1), p2) * factor
            if name in self.learner_dense_delta:
                out = out + F.linear(cast, self.learner_dense_delta[name]) * self.learner_lr_scale[name]
            if name in self.learner_bias_delta:
                out = out + self.learner_bias_delta[name]
        return out.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`scaling * P2 P1 + priming_lr_scale * theta`, in the layout of the layer's weight."""
        p1, p2, factor = self._low_rank(adapter)
        # On a CPU, half-precision matrix products are slow or missing.
        wide = p1.device.type == "cpu" and p1.dtype in (torch.float16, torch.bfloat16)
        delta = (p2.float() @ p1.float() if wide else p2 @ p1) * factor
        if adapter in self.learner_dense_delta:
            delta = torch.add(delta, self.learner_dense_delta[adapter], alpha=self.learner_lr_scale[adapter])
        delta = delta.to(p1.dtype)
        return delta.t() if self.fan_in_fan_out else delta

    def merged_values(self, adapter: str) -> dict[str, Tensor]:
        base: Any = self.get_base_layer()
        if base.weight.dtype != self.learner_P1[adapter].dtype:
            return super().merged_values(adapter)
        # Summed in the order of the forward pass, so that the merged layer rounds as the unmerged one does.
        dense = []
        if adapter in self.learner_dense_delta:
            dense = [(self.learner_dense_delta[adapter].detach(), self.learner_lr_scale[adapter])]
        p1, p2, factor = self._low_rank(adapter)
        weight = base.weight.detach().t() if self.fan_in_fan_out else base.weight.detach()
        full = effective_weight(weight, [(p1.detach(), p2.detach(), factor)], dense)
        values = {"weight": full.t().contiguous() if self.fan_in_fan_out else full}
        if adapter in self.learner_bias_delta:
            values["bias"] = self._sum(base, "bias", self.learner_bias_delta[adapter].detach(), 1)
        return values

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        deltas = {"weight": self.get_delta_weight(adapter).detach()}
        if adapter in self.learner_bias_delta:
            deltas["bias"] = self.learner_bias_delta[adapter].detach()
        return deltas

    def __repr__(self) -> str:
        return "learner." + super().__repr__()


class LearnerNorm(LearnerLayer):
    """A norm with `weight + dw` and `bias + db`; `dw, db: (features,)`, `x: (..., features)`."""

    adapter_layer_names = ("learner_layernorm_delta", "learner_bias_delta")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.learner_layernorm_delta = nn.ParameterDict({})
        weight: Any = base_of(base_layer).weight
        self.in_features = self.out_features = int(weight.shape[0])

    def update_layer(self, adapter: str, config: LearnerConfig) -> None:
        """Create the parameters of a new adapter."""
        self._add("learner_layernorm_delta", adapter, config, self.out_features)
        if getattr(self.get_base_layer(), "bias", None) is not None:
            self._add("learner_bias_delta", adapter, config, self.out_features)
        self._finish_update(adapter, config)

    def forward_with(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        weight = sum_of(base.weight, [self.learner_layernorm_delta[name] for name in adapters])
        assert weight is not None
        biases = [self.learner_bias_delta[name] for name in adapters if name in self.learner_bias_delta]
        bias = sum_of(getattr(base, "bias", None), biases)
        return norm_with(base, x, weight, bias, *args, **kwargs)

    def get_deltas(self, adapter: str) -> dict[str, Tensor]:
        deltas = {"weight": self.learner_layernorm_delta[adapter].detach()}
        if adapter in self.learner_bias_delta:
            deltas["bias"] = self.learner_bias_delta[adapter].detach()
        return deltas

    def __repr__(self) -> str:
        return "learner." + super().__repr__()
