"""The ways to train a model that `train_glue.py --method` knows. A new one is a function and an entry in `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Optional

import torch
from transformers import PreTrainedModel


@dataclass
class MethodArguments:
    """Arguments of the methods; a method uses those that its entry in `METHODS` names."""

    r: Optional[int] = field(
        default=None,
        metadata={
            # torchrun's own parser takes --r for a cut-off option of its own and stops.
            "aliases": ["--rank"],
            "help": "Rank of the low-rank modules. Default: 64 (lora, learner), 16 (nas_lora), 8 (mam). Under "
            "torchrun write --rank.",
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
        default=0.0, metadata={"help": "Dropout on the input of the low-rank modules (lora, mam, learner)."}
    )


def lora(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """LoRA on every linear layer. lora_alpha=r: a scaling of 1, as Learners without priming have it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS", r=args.r, lora_alpha=args.r, target_modules="all-linear", lora_dropout=args.dropout
    )
    return get_peft_model(model, config)


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


def bitfit(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """BitFit (Zaken et al., 2021): all biases of the backbone, norms' included, and the head, in place."""
    backbone = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(backbone) or name.endswith(".bias"))
    return model


def mam(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """Uniform LoRA on query, key and every `dense` of the blocks, and all biases: the peer of S-MaM and U-MaM
    (arXiv 2305.16597, section 4.1; BERT's and RoBERTa's names). lora_alpha=r: a scaling of 1."""
    from peft import LoraConfig, get_peft_model

    targets = r".*\.layer\.\d+\..*(query|key|dense)"
    config = LoraConfig(
        task_type="SEQ_CLS", r=args.r, lora_alpha=args.r, target_modules=targets, bias="all", lora_dropout=args.dropout
    )
    return get_peft_model(model, config)


def full(model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
    """All parameters of the model."""
    return model


@dataclass(frozen=True)
class Method:
    """A way to train: `method(model, method_arguments)` returns the model to train.

    Attributes:
        wrap: makes the model to train.
        arguments: the `MethodArguments` that it uses; they are recorded.
        phased: whether it is a phased tuner, which needs `peft_learners.PhaseCallback`.
        rank: its `r` where none is given.
    """

    wrap: Callable[[PreTrainedModel, MethodArguments], torch.nn.Module]
    arguments: tuple[str, ...] = ()
    phased: bool = False
    rank: int = 64

    def __call__(self, model: PreTrainedModel, args: MethodArguments) -> torch.nn.Module:
        return self.wrap(model, args)


METHODS: dict[str, Method] = {
    "learner": Method(learner, ("r", "priming_epochs", "priming_lr_scale", "dropout"), phased=True),
    "far": Method(far, FAR_ARGUMENTS, phased=True),
    "nas_lora": Method(nas_lora, NAS_LORA_ARGUMENTS, phased=True, rank=16),
    "lora": Method(lora, ("r", "dropout")),
    "mam": Method(mam, ("r", "dropout"), rank=8),
    "bitfit": Method(bitfit),
    "full": Method(full),
}
