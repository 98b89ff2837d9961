"""How much each parameter of a search space matters, gathered while it trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layer import NASLoRALayer


def _unscaled(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor] | None:
    """The gradients as the optimizer is about to use them; None if it is about to skip the step.

    A fused optimizer is handed scaled gradients by GradScaler, with the scale beside them.
    """
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is not None and bool(found_inf):
        return None
    return gradients if scale is None else [gradient / scale.to(gradient.device) for gradient in gradients]


class Gatherer:
    """Adds up the scores of an adapter's parameters, one optimizer step after the other.

    Before a step with gradient g (of the whole step: accumulated, averaged over ranks, unscaled and clipped) each
    parameter theta scores `-theta * g`, the first-order change of the loss if it were pruned; for the criterion
    "magnitude", `|theta|`. Scores are summed over the steps, which ranks as their mean does, or only the last step's
    are kept.

    Source: arXiv 2305.16597, section 3.1.
    """

    def __init__(self, layers: Sequence[NASLoRALayer], adapter: str, magnitude: bool, last: bool) -> None:
        self._layers, self._adapter, self._magnitude, self._last = list(layers), adapter, magnitude, last

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        scores, thetas, gradients = [], [], []
        for layer in self._layers:
            for part, theta in layer.scored(self._adapter):
                if theta.grad is not None and id(theta) in held:
                    own = layer.nas_lora_scores[self._adapter]
                    if part not in own:
                        own[part] = torch.zeros_like(theta, dtype=torch.float32, requires_grad=False)
                    scores.append(own[part])
                    thetas.append(theta.detach())
                    gradients.append(theta.grad)
        unscaled = _unscaled(optimizer, gradients) if scores else None
        if unscaled is None:
            return
        if self._last:
            torch._foreach_zero_(scores)
        if any(theta.dtype != score.dtype for theta, score in zip(thetas, scores, strict=True)):
            thetas, unscaled = [t.float() for t in thetas], [g.float() for g in unscaled]
        if self._magnitude:
            torch._foreach_add_(scores, torch._foreach_abs(thetas))
        else:
            torch._foreach_addcmul_(scores, thetas, unscaled, value=-1)
