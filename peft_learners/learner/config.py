from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

from ..config import PhasedConfig, is_number, is_positive_int, names_unknown_fields, require
from ..phases.schedule import Schedule, ScheduleError, epochs_to_steps, lay_out

PRIMING, LEARNING = "priming", "learning"
#: Containers of a Learner layer by what they hold; they are the parts that phases speak of. Their names end in nothing
#: a model calls a module (PEFT matches modules_to_save by endings), and those of biases and norms hold what Trainer
#: exempts from weight decay.
LOW_RANK_PARTS = ("learner_P1", "learner_P2")
SMALL_PARTS = ("learner_bias_delta", "learner_layernorm_delta")
DENSE_PART = "learner_dense_delta"


@names_unknown_fields
@dataclass
class LearnerConfig(PhasedConfig):
    """Configuration of Learners: low-rank modules on every linear layer, with priming.

    A Learner replaces a linear layer `y = x W^T + b` by `y = x (W + scaling * P2 P1 + D)^T + b + db`, with
    `P1: (r, in_features)`, `P2: (out_features, r)`, the bias delta `db: (out_features,)`, and, on the attention's
    linear layers only, a dense delta `D: (out_features, in_features)`. D trains for the first `priming_epochs` epochs
    and is frozen from then on; everything else trains throughout. Norms inside the blocks get a delta on their weight
    and bias, and the new head is trained whole.

    Source: Vucetic et al., "Efficient Fine-Tuning of Compressed Language Models with Learners"
    (arXiv 2208.02070), section 4 and equation 2.

    Raises:
        ValueError: a field with a value that can't be right; the sentence names field, value and what would be.
        TypeError: an unknown field.
    """

    display_name: ClassVar[str] = "Learner"
    about: ClassVar[str] = (
        "Learners put a low-rank module on every linear layer, and in a first phase, *priming*, train the attention's "
        "own weights too. Then those freeze, and the low-rank modules, biases, norms and the head go on training "
        "([Vucetic et al., 2022](https://arxiv.org/abs/2208.02070))."
    )

    r: int = field(default=64, metadata={"help": "Rank of the Learner modules (the paper's hidden size l)."})
    priming_epochs: float = field(
        default=2,
        metadata={
            "help": "Epochs (fractions allowed) during which the attention's dense deltas train too. 0: no priming, "
            "which is LoRA with a scaling of 1, plus biases and norms."
        },
    )
    priming_steps: Optional[int] = field(
        default=None,
        metadata={"help": "Optimizer steps of priming, in place of priming_epochs, for data of unknown length."},
    )
    priming_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of the primed dense deltas relative to the rest. The stored parameter theta gives "
            "D = priming_lr_scale * theta, which has this effect with Adam-like optimizers, without parameter groups."
        },
    )
    priming_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Names (or a regex) of the linear layers to prime, among the targets. None: the attention's, "
            "found by structure."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks that differ from r: {module name or regex: rank}."}
    )
    learner_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the low-rank path."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of P2 P1; the paper's is 1."})
    train_biases: bool = field(default=True, metadata={"help": "Train a delta on the bias of each adapted linear."})
    train_norms: bool = field(default=True, metadata={"help": "Train deltas on the norms inside the blocks."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_peft_type("LEARNER")
        require(is_positive_int(self.r), self, "r", "a whole number of at least 1", "r=64")
        ok = is_number(self.priming_epochs) and self.priming_epochs >= 0
        require(ok, self, "priming_epochs", "a number of at least 0 (0: no priming)", "priming_epochs=2")
        ok = self.priming_steps is None or self.priming_steps == 0 or is_positive_int(self.priming_steps)
        require(ok, self, "priming_steps", "None or a whole number of at least 0", "priming_steps=500")
        ok = is_number(self.priming_lr_scale) and self.priming_lr_scale > 0
        require(ok, self, "priming_lr_scale", "a number above 0", "priming_lr_scale=0.1")
        value = self.priming_modules
        names = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value)
        require(value is None or isinstance(value, str) or names, self, "priming_modules", "None, a regex or names")
        if names:
            assert not isinstance(value, str) and value is not None
            self.priming_modules = sorted(value)
        ok = isinstance(self.rank_pattern, dict) and all(is_positive_int(rank) for rank in self.rank_pattern.values())
        require(ok, self, "rank_pattern", "a dict of ranks of at least 1", "rank_pattern={'q_lin': 8}")
        ok = is_number(self.learner_dropout) and 0 <= self.learner_dropout < 1
        require(ok, self, "learner_dropout", "a probability in [0, 1)", "learner_dropout=0.1")
        require(is_number(self.scaling) and self.scaling != 0, self, "scaling", "a number other than 0", "scaling=1.0")
        for name in ("train_biases", "train_norms"):
            require(isinstance(getattr(self, name), bool), self, name, "True or False")

    @property
    def primes(self) -> bool:
        """Whether this adapter has a priming phase (complete or not)."""
        return self.priming_steps > 0 if self.priming_steps is not None else self.priming_epochs > 0

    def fixed_in_training(self) -> dict[str, Any]:
        return {"scaling": float(self.scaling), "priming_lr_scale": float(self.priming_lr_scale)}

    @property
    def phases_complete(self) -> bool:
        return not self.primes or PRIMING in self.completed_phases

    def schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """Priming, then learning.

        Args:
            total_steps: optimizer steps of the whole training, None if unknown.
            steps_per_epoch: optimizer steps of one epoch, None if unknown.

        Raises:
            ScheduleError: epochs without a known length, or fewer steps than priming needs.
        """
        if self.priming_steps is not None:
            steps = self.priming_steps
            advice = f"Set priming_steps to at most {total_steps}, or train longer."
        elif self.priming_epochs == 0:
            steps, advice = 0, ""
        elif steps_per_epoch is None:
            raise ScheduleError(
                f"priming_epochs={self.priming_epochs} needs the number of optimizer steps in an epoch, which is "
                "unknown (data without a length?). Give priming in steps: LearnerConfig(priming_steps=...)."
            )
        else:
            steps = epochs_to_steps(self.priming_epochs, steps_per_epoch)
            most = (total_steps or 0) / steps_per_epoch
            advice = (
                f"priming_epochs={self.priming_epochs} at {steps_per_epoch} steps per epoch is too long: set "
                f"priming_epochs to at most {most:.4g}, or train longer."
            )
        return self._phases(steps, total_steps, advice)

    def outline(self) -> Schedule:
        return self._phases(int(self.primes))

    @staticmethod
    def _phases(priming: int, total_steps: int | None = None, advice: str = "") -> Schedule:
        small = frozenset((*LOW_RANK_PARTS, *SMALL_PARTS))
        return lay_out([(PRIMING, priming, small | {DENSE_PART}), (LEARNING, None, small)], total_steps, advice)

    def trained_by_phase(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Optional[int]]:
        count = sum(math.prod(shape) for shape in shapes.values())
        dense = sum(math.prod(shape) for key, shape in shapes.items() if f".{DENSE_PART}" in key)
        phases = [phase.name for phase in self.outline().phases]
        return {phase: count if phase == PRIMING else count - dense for phase in phases}
