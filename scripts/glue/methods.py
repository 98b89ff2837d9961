"""The ways to train that `scripts.glue.train --method` knows. A new one is a function and an entry in `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, TrainerCallback

from peft_learners import FARConfig, LearnerConfig, NASLoRAConfig, PhaseCallback
from scripts.glue import peers as peers
from scripts.glue.adalora import AdaLoraCallback, adalora
from scripts.glue.method_arguments import MethodArguments


def learner(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """Learners with priming."""
    config = LearnerConfig(
        task_type="SEQ_CLS",
        r=args.r,
        priming_epochs=args.priming_epochs,
        priming_lr_scale=args.priming_lr_scale,
        learner_dropout=args.dropout,
        after_priming=args.after_priming,
    )
    return get_peft_model(model, config)


FAR_ARGUMENTS = (
    "retention_ratio",
    "priming_ratio",
    "granularity",
    "selection",
    "discard_unkept",
    "train_embeddings",
)


def far(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """FAR: everything for a short priming, then only the FFN nodes that moved most, and all outside the FFNs."""
    settings = {name: getattr(args, name) for name in FAR_ARGUMENTS}
    return get_peft_model(model, FARConfig(task_type="SEQ_CLS", **settings))


NAS_LORA_ARGUMENTS = (
    "r",
    "parameter_budget",
    "nas_granularity",
    "search_epochs",
    "rounds",
    "init",
    "criterion",
    "averaging",
    "rewind",
    "train_biases",
)


def nas_lora(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """NAS-LoRA: search over low-rank and bias updates, prune to a budget, rewind, retrain. --rank 0: biases alone."""
    settings = {name.removeprefix("nas_"): getattr(args, name) for name in NAS_LORA_ARGUMENTS}
    if args.parameter_budget > 1:
        settings["parameter_budget"] = round(args.parameter_budget)
    return get_peft_model(model, NASLoRAConfig(task_type="SEQ_CLS", **settings))


@dataclass(frozen=True)
class Method:
    """A way to train: `method(model, method_arguments)` returns the model to train.

    Attributes:
        wrap: makes the model to train.
        arguments: the `MethodArguments` that it uses; they are recorded.
        callbacks: make the callbacks that it needs in the Trainer.
        rank: its `r` where none is given.
    """

    wrap: Callable[[PreTrainedModel, MethodArguments], torch.nn.Module]
    arguments: tuple[str, ...] = ()
    callbacks: tuple[Callable[[], TrainerCallback], ...] = ()
    rank: int = 64

    def __call__(self, model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
        return self.wrap(model, args)

    def tokens(self, args: MethodArguments) -> int:
        """Number of tokens that it puts before each example. They take up positions of the model."""
        return args.num_virtual_tokens if "num_virtual_tokens" in self.arguments else 0


METHODS: dict[str, Method] = {
    "learner": Method(
        learner,
        ("r", "priming_epochs", "priming_lr_scale", "after_priming", "dropout"),
        callbacks=(PhaseCallback,),
    ),
    "far": Method(far, FAR_ARGUMENTS, callbacks=(PhaseCallback,)),
    "nas_lora": Method(nas_lora, NAS_LORA_ARGUMENTS, callbacks=(PhaseCallback,), rank=16),
    "lora": Method(peers.lora, ("r", "dropout")),
    "adalora": Method(adalora, ("r", "dropout"), callbacks=(AdaLoraCallback,)),
    "shira": Method(peers.shira, ("r",)),
    "mam": Method(peers.mam, ("r", "dropout"), rank=8),
    "bottleneck": Method(peers.bottleneck, ("mode", "bottleneck_dim")),
    "prompt_tuning": Method(peers.prompt_tuning, ("num_virtual_tokens",)),
    "bitfit": Method(peers.bitfit),
    "freeze_ffns": Method(peers.freeze_ffns),
    "full": Method(peers.full),
}
