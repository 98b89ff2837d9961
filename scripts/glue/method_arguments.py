"""The arguments of the methods that scripts.glue.train knows."""

from dataclasses import dataclass, field
from typing import Optional


@dataclass
class MethodArguments:
    """Arguments of the methods; a method uses those that its entry in `METHODS` names."""

    r: Optional[int] = field(
        default=None,
        metadata={
            # What is written everywhere: torchrun's own parser takes --r for a cut-off option of its own and stops.
            "aliases": ["--rank"],
            "help": "Rank of the low-rank modules; write --rank. Default: 64 (learner, lora, adalora, shira), 16 "
            "(nas_lora), 8 (mam). Of adalora the mean in the end.",
        },
    )
    priming_epochs: float = field(
        default=2.0, metadata={"help": "Epochs of priming, fractions allowed; 0: none (learner)."}
    )
    priming_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of the primed weights relative to the rest (learner)."}
    )
    after_priming: str = field(
        default="keep",
        metadata={"help": "What becomes of the primed weights (learner).", "choices": ["keep", "fold"]},
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
