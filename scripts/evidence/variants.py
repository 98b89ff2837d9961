"""What the protocol trains: methods with their settings, as protocol.yaml names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, TrainerCallback, TrainerState

import peft_learners
from peft_learners import PhaseCallback
from peft_learners.learner.config import DENSE_PART
from peft_learners.structure.modules import block_indices
from scripts.glue import peers
from scripts.glue.method_arguments import MethodArguments

#: Methods without a config of their own.
PEERS: dict[str, Callable[[PreTrainedModel, MethodArguments], torch.nn.Module]] = {
    "full": peers.full,
    "bitfit": peers.bitfit,
    "freeze_ffns": peers.freeze_ffns,
    "mam": peers.mam,
}


#: Those that train a model's own parameters: their file is the whole model.
IN_PLACE = ("full", "bitfit", "freeze_ffns")


def build(model: PreTrainedModel, method: str, fields: Mapping[str, Any], epochs: float) -> torch.nn.Module:
    """The model to train.

    Args:
        model: with its new head.
        method: one of `PEERS`, or the name of a config of this package or of PEFT, as `LearnerConfig`.
        fields: the config's. A `priming_share` is that share of `epochs`, as `priming_epochs`. `by_block` is for
            `callbacks`, and left out here.
        epochs: of the whole training.
    """
    if method in PEERS:
        return PEERS[method](model, MethodArguments(r=8))
    fields = {name: value for name, value in fields.items() if name != "by_block"}
    task_type = "SEQ_CLS" if model.get_output_embeddings() is None else "CAUSAL_LM"
    if "priming_share" in fields:
        fields["priming_epochs"] = fields.pop("priming_share") * epochs
    if own := getattr(peft_learners, method, None):
        return get_peft_model(model, own(task_type=task_type, **fields))
    # PEFT takes the new head for a part of the backbone in some models.
    config = getattr(peft, method)(task_type=task_type, modules_to_save=peers.head(model), **fields)
    return get_peft_model(model, config)


class PrimeByBlock(TrainerCallback):
    """Primes the attention of one block after the other, each for as many steps, the last block first.

    Args:
        share: of all steps, which priming takes.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Train the dense deltas of the block whose turn it is, as long as there are any, and no others."""
        base = model.get_base_model()
        dense = {name: value for name, value in base.named_parameters() if DENSE_PART in name}
        blocks = block_indices(base, dense)
        order = sorted(set(blocks.values()), reverse=True)
        turn = int(state.global_step / (self.share * state.max_steps) * len(order))
        if turn < len(order):
            for name, value in dense.items():
                value.requires_grad_(blocks.get(name) == order[turn])


def callbacks(method: str, fields: Mapping[str, Any]) -> list[TrainerCallback]:
    """What the Trainer needs for it."""
    found: list[TrainerCallback] = [PhaseCallback()] if hasattr(peft_learners, method) else []
    return [*found, PrimeByBlock(fields["priming_share"])] if fields.get("by_block") else found
