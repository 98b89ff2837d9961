"""The configuration of bottleneck adapters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Optional

from transformers.activations import ACT2FN

from ..config import (
    FLAG,
    NOT_ZERO,
    Check,
    PhasedConfig,
    is_number,
    is_positive_int,
    names_unknown_fields,
    one_of,
    option,
)

#: By mode, `bottleneck_dim` and `scaling` where they are not given.
DEFAULTS = {"sequential": (256, 1.0), "parallel": (512, 4.0)}


@names_unknown_fields
@dataclass
class BottleneckConfig(PhasedConfig):
    """Configuration of bottleneck adapters, sequential (Houlsby) or parallel (He).

    An adapter is `A(z) = W_up f(W_down z + b_down) + b_up`, with `W_down: (bottleneck_dim, features)` and
    `W_up: (features, bottleneck_dim)`. A *sequential* adapter follows the attention's output projection, and another
    one the last linear layer of the feed-forward network: `h = y + scaling * A(y)`, where y is that layer's output,
    before dropout and the residual sum. A *parallel* adapter lies beside each feed-forward network:
    `h = FFN(x) + scaling * A(x)`. W_down is Kaiming-uniform at first and all else zero, so a fresh adapter changes no
    bit of what the model computes. Norms inside the blocks get a delta on their weight and bias. The new head is
    trained whole.

    An adapter that is not linear fits into no weight. It can't be merged, nor converted to LoRA.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751), section 2.1; He et al.,
    "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366), section 3.3 ("scaled parallel
    adapter").
    """

    method: ClassVar[str] = "bottleneck"
    default_targets: ClassVar[str] = "the layers that the adapters follow (in parallel mode the FFNs' last ones)"
    display_name: ClassVar[str] = "bottleneck"
    about: ClassVar[str] = (
        "Bottleneck adapters are small networks of two linear layers with an activation between them: *sequential* "
        "ones follow each attention and each feed-forward network "
        "([Houlsby et al., 2019](https://arxiv.org/abs/1902.00751)), *parallel* ones lie beside the feed-forward "
        "networks ([He et al., 2022](https://arxiv.org/abs/2110.04366)). They, the norms of the blocks and the head "
        "are trained. They are not linear, so that they can't be merged into the model."
    )
    unmergeable: ClassVar[str] = (
        "A bottleneck adapter is not linear, so that no weight of the base model can hold it. Keep it beside the "
        "model; model.unload() takes it off, and `with model.disable_adapter():` calls the base model without it."
    )

    elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("r", "rank"), "Here it is `bottleneck_dim`"),
        "lora_alpha": "Here it is `scaling`, which multiplies the adapters' output as it is",
        "lora_dropout": "Here it is `dropout`",
        "act_fn": "Here it is `non_linearity`",
        "reduction_factor": "Here it is `bottleneck_dim`, the hidden size divided by reduction_factor",
    }

    mode: Literal["sequential", "parallel"] = option(
        "sequential",
        "'sequential': one adapter after the attention and one after the FFN of each block (Houlsby). 'parallel': one "
        "beside each FFN (He).",
        one_of(tuple(DEFAULTS), "mode='parallel'"),
    )
    bottleneck_dim: Optional[int] = option(
        None,
        "Hidden size of the adapters. None: 256 in sequential mode, 512 in parallel mode; replaced when the config is "
        "made, so that a later change of `mode` leaves it.",
        Check(lambda v: v is None or is_positive_int(v), "None or a whole number of at least 1", "bottleneck_dim=256"),
    )
    non_linearity: str = option(
        "relu", "Activation f of the adapters, by its name in transformers' ACT2FN ('gelu', 'silu', ...)."
    )
    scaling: Optional[float] = option(
        None,
        "Factor of the adapters' output. None: 1 in sequential mode, 4 in parallel mode; replaced when the config is "
        "made, so that a later change of `mode` leaves it.",
        Check(lambda v: v is None or (is_number(v) and v != 0), f"None or {NOT_ZERO}", "scaling=4.0"),
    )
    dropout: float = option(
        0.0,
        "Dropout on the adapters' hidden units.",
        Check(lambda v: is_number(v) and 0 <= v < 1, "a probability in [0, 1)", "dropout=0.1"),
    )
    train_norms: bool = option(True, "Train deltas on the norms inside the blocks.", FLAG)

    def __post_init__(self) -> None:
        super().__post_init__()
        dim, scaling = DEFAULTS[self.mode]
        self.bottleneck_dim = dim if self.bottleneck_dim is None else self.bottleneck_dim
        self.scaling = scaling if self.scaling is None else self.scaling
        if not _is_activation(self.non_linearity):
            near = difflib.get_close_matches(str(self.non_linearity), filter(_is_activation, ACT2FN), 1) or ["gelu"]
            right = "the name of an activation without parameters in transformers.activations.ACT2FN"
            Check(_is_activation, right, f"non_linearity={near[0]!r}")(self, "non_linearity")

    def savings(self) -> dict[str, str]:
        return {"bottleneck_dim": "smaller adapters", **super().savings()}

    def module_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        rows = super().module_rows(shapes)
        for row, parts in zip(rows, self._parts_by_module(shapes).values(), strict=True):
            if down := parts.get("bottleneck_down.weight"):
                row["bottleneck_dim"] = down[0]
        return rows

    def fixed_in_training(self) -> dict[str, Any]:
        return {"mode": self.mode, "scaling": float(self.scaling or 0), "non_linearity": self.non_linearity}


def _is_activation(name: object) -> bool:
    return isinstance(name, str) and name in ACT2FN and not any(True for _ in ACT2FN[name].parameters())
