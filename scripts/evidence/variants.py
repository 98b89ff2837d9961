"""What the protocol trains: methods with their settings, as protocol.yaml names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, TrainerCallback

import peft_learners
from peft_learners import PhaseCallback
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
        fields: the config's. A `priming_share` is that share of `epochs`, as `priming_epochs`.
        epochs: of the whole training.
    """
    if method in PEERS:
        return PEERS[method](model, MethodArguments(r=8))
    fields = dict(fields)
    task_type = "SEQ_CLS" if model.get_output_embeddings() is None else "CAUSAL_LM"
    if "priming_share" in fields:
        fields["priming_epochs"] = fields.pop("priming_share") * epochs
    if own := getattr(peft_learners, method, None):
        return get_peft_model(model, own(task_type=task_type, **fields))
    # PEFT takes the new head for a part of the backbone in some models.
    config = getattr(peft, method)(task_type=task_type, modules_to_save=peers.head(model), **fields)
    return get_peft_model(model, config)


def callbacks(method: str) -> list[TrainerCallback]:
    """What the Trainer needs for it."""
    return [PhaseCallback()] if hasattr(peft_learners, method) else []
