"""The ways to train that `scripts.glue.train --method` knows. A new one is a function and an entry in `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import torch
from transformers import PreTrainedModel, TrainerCallback

from scripts.glue import peers as peers
from scripts.glue.adalora import AdaLoraCallback, adalora


@dataclass
class MethodArguments:
    """Arguments of the methods; a method uses those that its entry in `METHODS` names."""

    r: Optional[int] = field(
        default=None,
        metadata={
            # torchrun's own parser takes --r for a cut-off option of its own and stops.
            "aliases": ["--rank"],
            "help": "Rank of the low-rank modules. Default: 64 (learner, lora, adalora, shira), 16 (nas_lora), "
            "8 (mam). Of adalora the mean in the end. Under torchrun write --rank.",
        },
    )
    priming_epochs: float = field(
        default=2.0, metadata={"help": "Epochs of priming, fractions allowed; 0: none (learner)."}
    )
    priming_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of the primed weights relative to the rest (learner)."}
    )
    retention_ratio: float = field(
        default=0.10, metadata={"help": "Share of each FFN layer's nodes that train after priming (far)."}
    )
    priming_ratio: float = field(default=0.01, metadata={"help": "Share of all steps that prime (far)."})
    granularity: str = field(
        default="hidden_unit",
        metadata={"help": "What a node of an FFN is (far).", "choices": ["hidden_unit", "output_node"]},
    )
    selection: str = field(
        default="l1", metadata={"help": "How nodes are ranked (far).", "choices": ["l1", "l2", "random"]}
    )
    discard_unkept: bool = field(
        default=False, metadata={"help": "Return nodes that are not kept to their pretrained values (far)."}
    )
    train_embeddings: bool = field(default=True, metadata={"help": "Train the embeddings too (far)."})
    parameter_budget: float = field(
        default=0.5,
        metadata={"help": "What is kept: parameters, or up to 1.0 a share of the search space (nas_lora)."},
    )
    nas_granularity: str = field(
        default="unstructured",
        metadata={"help": "What is pruned (nas_lora).", "choices": ["unstructured", "structured"]},
    )
    search_epochs: Optional[float] = field(
        default=None, metadata={"help": "Epochs of one round of search; default: all phases equally long (nas_lora)."}
    )
    rounds: int = field(default=1, metadata={"help": "Rounds of search; 1: one-shot (nas_lora)."})
    init: str = field(
        default="kaiming", metadata={"help": "Initial values of U and V (nas_lora).", "choices": ["kaiming", "lora"]}
    )
    criterion: str = field(
        default="importance",
        metadata={"help": "What is pruned first (nas_lora).", "choices": ["importance", "magnitude", "random"]},
    )
    averaging: str = field(
        default="mean", metadata={"help": "Scores of which steps count (nas_lora).", "choices": ["mean", "last"]}
    )
    rewind: str = field(
        default="initial", metadata={"help": "Values to retrain from (nas_lora).", "choices": ["initial", "fresh"]}
    )
    train_biases: bool = field(default=True, metadata={"help": "Search the biases too (nas_lora)."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the low-rank modules (learner, lora, mam, adalora)."}
    )
    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Trained embeddings before each example (prompt_tuning)."}
    )
    mode: str = field(
        default="sequential",
        metadata={"help": "Where the adapters are (bottleneck).", "choices": ["sequential", "parallel"]},
    )
    bottleneck_dim: Optional[int] = field(
        default=None,
        metadata={"help": "Width of an adapter. Default: 256 (sequential), 512 (parallel) (bottleneck)."},
    )

    def __post_init__(self) -> None:
        if self.bottleneck_dim is None:
            self.bottleneck_dim = 256 if self.mode == "sequential" else 512


def learner(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """Learners with priming."""
    from peft import get_peft_model

    from peft_learners import LearnerConfig

    config = LearnerConfig(
        task_type="SEQ_CLS",
        r=args.r,
        priming_epochs=args.priming_epochs,
        priming_lr_scale=args.priming_lr_scale,
        learner_dropout=args.dropout,
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
    from peft import get_peft_model

    from peft_learners import FARConfig

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
    from peft import get_peft_model

    from peft_learners import NASLoRAConfig

    settings = {name.removeprefix("nas_"): getattr(args, name) for name in NAS_LORA_ARGUMENTS}
    if args.parameter_budget > 1:
        settings["parameter_budget"] = round(args.parameter_budget)
    return get_peft_model(model, NASLoRAConfig(task_type="SEQ_CLS", **settings))


def phases() -> TrainerCallback:
    """Drives the phases of this package's tuners."""
    from peft_learners import PhaseCallback

    return PhaseCallback()


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
    "learner": Method(learner, ("r", "priming_epochs", "priming_lr_scale", "dropout"), callbacks=(phases,)),
    "far": Method(far, FAR_ARGUMENTS, callbacks=(phases,)),
    "nas_lora": Method(nas_lora, NAS_LORA_ARGUMENTS, callbacks=(phases,), rank=16),
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
