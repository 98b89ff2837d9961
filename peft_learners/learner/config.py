"""The configuration of Learners, and their phases."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Union

from peft.utils.other import get_pattern_key

from ..config import (
    FLAG,
    LARGEST,
    NOT_ZERO,
    Check,
    PhasedConfig,
    is_names,
    is_number,
    is_positive_int,
    is_share,
    is_whole,
    names_unknown_fields,
    one_of,
    option,
    regex_in,
)
from ..phases.schedule import Schedule, ScheduleError, epochs_to_steps, lay_out

PRIMING, LEARNING = "priming", "learning"
#: The container of the primed dense deltas.
DENSE_PART = "learner_dense_delta"
#: What `priming_modules` may say in one word.
ATTENTION, FEED_FORWARD, EVERY = "attention", "ffn", "all"


def _is_choice(value: object) -> bool:
    blocks = isinstance(value, (list, tuple, set, frozenset)) and all(map(is_whole, value))
    return bool(value) and (isinstance(value, str) or is_names(value) or blocks)


@names_unknown_fields
@dataclass
class LearnerConfig(PhasedConfig):
    """Configuration of Learners: low-rank modules on every linear layer, with priming.

    A Learner replaces a linear layer `y = x W^T + b` by
    `y = x (W + scaling * P2 P1 + priming_lr_scale * D)^T + b + db`. `P1` and `P2` have the shapes `(r, in_features)`
    and `(out_features, r)`; `db` is a delta on the bias. The attention's linear layers also get a dense delta
    `D: (out_features, in_features)`. D trains for the first `priming_epochs` epochs. Then it is frozen or, with
    `after_priming="fold"`, folded into `P1` and `P2`. Everything else trains throughout. Norms inside the blocks get a
    delta on their weight and bias. The new head is trained whole.

    Source: Vucetic et al., "Efficient Fine-Tuning of Compressed Language Models with Learners"
    (arXiv 2208.02070), section 4 and equation 2.
    """

    method: ClassVar[str] = "learner"
    narrowing: ClassVar[tuple[str, ...]] = (*PhasedConfig.narrowing, "priming_modules")
    default_targets: ClassVar[str] = (
        "every linear layer of the backbone (a pooler only if the model has a head that uses it) and, with "
        "train_norms, the norms of its blocks in any case"
    )
    display_name: ClassVar[str] = "Learner"
    about: ClassVar[str] = (
        "Learners put a low-rank module on every linear layer, and in a first phase, *priming*, train the attention's "
        "own weights too. Then those freeze, and the low-rank modules, biases, norms and the head go on training "
        "([Vucetic et al., 2022](https://arxiv.org/abs/2208.02070))."
    )

    elsewhere: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "Here it is `scaling`: scaling = lora_alpha / r",
        "alpha": "Here it is `scaling`: scaling = alpha / r",
        "use_rslora": "Here it is `scaling`: scaling = lora_alpha / sqrt(r)",
        "lora_dropout": "Here it is `learner_dropout`",
        "bias": "Here it is `train_biases`: True or False",
        "lora_bias": "Here it is `train_biases`",
        "alpha_pattern": "`scaling` is one number for all layers; ranks differ by `rank_pattern`",
        "init_lora_weights": "A fresh Learner changes nothing of the output, as LoRA with init_lora_weights=True",
    }

    r: int = option(
        64,
        "Rank of the Learner modules (the paper's hidden size l).",
        Check(is_positive_int, "a whole number of at least 1", "r=64"),
    )
    priming_epochs: float = option(
        2,
        "Epochs (fractions allowed) during which the dense deltas of priming_modules train too. 0: no priming, which "
        "is LoRA with a scaling of 1, plus biases and norms.",
        Check(
            lambda v: is_number(v) and v >= 0,
            f"a number of at least 0 (0: no priming), at most {LARGEST:,}",
            "priming_epochs=2",
        ),
    )
    priming_steps: Optional[int] = option(
        None,
        "Optimizer steps of priming, in place of priming_epochs, for data of unknown length.",
        Check(lambda v: v is None or is_whole(v), "None or a whole number of at least 0", "priming_steps=500"),
    )
    priming_lr_scale: float = option(
        0.1,
        "Learning rate of the primed dense deltas relative to the rest. They want one of full fine-tuning's size: "
        "about a tenth of LoRA's. 1.0 is the one rate of the paper, for about 1e-4. The stored parameter "
        "theta gives D = priming_lr_scale * theta, which has this effect with Adam-like optimizers, without parameter "
        "groups.",
        Check(lambda v: is_number(v) and v > 0, f"a number above 0 and at most {LARGEST:,}", "priming_lr_scale=0.1"),
    )
    priming_modules: Union[list[int], list[str], str] = option(
        ATTENTION,
        "Which linear layers are primed, among the targets: 'attention' (the paper's), 'ffn' (those of the "
        "feed-forward pairs) or 'all'; a list of indices of blocks, whose attention is primed; a list of names; or a "
        "regex. What the words and indices stand for is found by structure, and saved by name.",
        Check(
            _is_choice,
            "'attention', 'ffn', 'all', a list of blocks' indices, a list of names, or a regex (none: "
            "priming_epochs=0)",
            "priming_modules='attention'",
            regexes=regex_in,
        ),
    )
    after_priming: str = option(
        "keep",
        "What becomes of the dense deltas when priming is over. 'keep': they stay, frozen. 'fold': the whole update "
        "of each primed layer becomes the nearest product of rank fold_rank (a truncated SVD), which trains on, and "
        "the dense delta goes: from then on the adapter is a plain LoRA, with biases and norms.",
        one_of(("keep", "fold"), "after_priming='fold'"),
    )
    fold_rank: Optional[Union[int, float]] = option(
        None,
        "With after_priming='fold': the rank of folded layers (None: theirs, r); or a share of each update's energy "
        "in (0, 1), e.g. 0.95, by the smallest ranks that keep it and no more parameters in all than with r.",
        Check(
            lambda v: v is None or is_positive_int(v) or is_share(v),
            "None, a rank of at least 1 or a share in (0, 1)",
            "fold_rank=0.95",
        ),
    )
    kept_energy: Optional[dict[str, float]] = option(
        None,
        "Share of each folded update's energy that was kept, by layer. Written by training; not for the user.",
        Check(
            lambda v: v is None or (isinstance(v, dict) and all(is_number(x) and 0 <= x <= 1 for x in v.values())),
            "None or a dict with a share from 0 to 1 for each layer",
        ),
    )
    rank_pattern: dict[str, int] = option(
        dict,
        "Ranks that differ from r: {module name or regex: rank}.",
        Check(
            lambda v: isinstance(v, dict) and is_names(list(v)) and all(map(is_positive_int, v.values())),
            "a dict of ranks of at least 1",
            "rank_pattern={'q_lin': 8}",
            regexes=list,
        ),
    )
    learner_dropout: float = option(
        0.0,
        "Dropout on the input of the low-rank path.",
        Check(lambda v: is_number(v) and 0 <= v < 1, "a probability in [0, 1)", "learner_dropout=0.1"),
    )
    scaling: float = option(
        1.0,
        "Factor of P2 P1; the paper's is 1.",
        Check(lambda v: is_number(v) and v != 0, NOT_ZERO, "scaling=1.0"),
    )
    train_biases: bool = option(True, "Train a delta on the bias of each adapted linear.", FLAG)
    train_norms: bool = option(True, "Train deltas on the norms inside the blocks.", FLAG)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.priming_modules, str):
            self.priming_modules = sorted({*self.priming_modules})
        if self.fold_rank is not None and self.after_priming != "fold":
            raise ValueError(
                f"LearnerConfig: `fold_rank` must be None unless primed layers are folded, got {self.fold_rank!r}. "
                f"For example: LearnerConfig(after_priming='fold', fold_rank={self.fold_rank!r})."
            )

    def rank_of(self, name: str) -> tuple[str, int]:
        """The field that gives a module its rank, and the rank."""
        key = get_pattern_key(list(self.rank_pattern), name)
        return ("rank_pattern", self.rank_pattern[key]) if key in self.rank_pattern else ("r", self.r)

    @property
    def primes(self) -> bool:
        """Whether this adapter has a priming phase (complete or not)."""
        return self.priming_steps > 0 if self.priming_steps is not None else self.priming_epochs > 0

    @property
    def is_folded(self) -> bool:
        """Whether its dense deltas were folded into the factors."""
        return self.primes and self.after_priming == "fold" and PRIMING in self.completed_phases

    def savings(self) -> dict[str, str]:
        if not self.primes or self.phases_complete:
            return super().savings()
        found = {"priming_modules=[...]": "indices of the blocks whose attention is to be primed, or names of layers"}
        if self.after_priming == "keep":
            found["after_priming='fold'"] = "what training holds after priming, and the file"
        found["priming_epochs=0"] = "no priming"
        return {**found, **{field: what for field, what in super().savings().items() if "save_dtype" in field}}

    def fixed_in_training(self) -> dict[str, Any]:
        scales = {"scaling": float(self.scaling), "priming_lr_scale": float(self.priming_lr_scale)}
        return {**scales, "after_priming": self.after_priming}

    def learned(self) -> dict[str, Any]:
        return {"kept_energy": self.kept_energy}

    @property
    def phases_complete(self) -> bool:
        return not self.primes or PRIMING in self.completed_phases

    def schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """Priming, then learning."""
        if self.priming_steps is not None:
            steps = self.priming_steps
            advice = f"Set priming_steps to at most {(total_steps or 1) - 1}, or train longer."
        elif self.priming_epochs == 0:
            steps, advice = 0, ""
        else:
            in_steps = "Give priming in steps: LearnerConfig(priming_steps=...)."
            per_epoch = self._known(steps_per_epoch, "in an epoch", "priming_epochs", in_steps)
            steps = epochs_to_steps(self.priming_epochs, per_epoch)
            half = (total_steps or 0) / 2 / per_epoch if (total_steps or 0) > 1 else 0
            advice = (
                f"priming_epochs={self.priming_epochs} at {per_epoch} steps per epoch is too long: set it lower, for "
                f"example LearnerConfig(priming_epochs={half:.2g}), or train longer."
            )
        if total_steps is not None and 0 < steps == total_steps:
            raise ScheduleError(
                f"priming needs {steps} of the training's {total_steps} optimizer steps, which leaves none for "
                f"learning. {advice}"
            )
        return self._phases(steps, total_steps, advice)

    def boundary_facts(self) -> str:
        kept = self.kept_energy if self.is_folded else None
        if not kept:
            return ""
        least = min(kept, key=lambda name: kept[name])
        return (
            f"{len(kept)} layers folded, kept energy: least {kept[least]:.4f} ({least}), "
            f"median {statistics.median(kept.values()):.4f}"
        )

    def outline(self) -> Schedule:
        return self._phases(int(self.primes))

    def _all_phases(self) -> list[str]:
        return [PRIMING, LEARNING]

    @staticmethod
    def _phases(priming: int, total_steps: int | None = None, advice: str = "") -> Schedule:
        lengths = [(PRIMING, priming), (LEARNING, None)]
        return lay_out(lengths, total_steps, advice, freezes={LEARNING: frozenset({DENSE_PART})})

    def trained_by_phase(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Optional[int]]:
        count = sum(math.prod(shape) for shape in shapes.values())
        dense = sum(math.prod(shape) for key, shape in shapes.items() if f".{DENSE_PART}" in key)
        if self.is_folded:
            return {PRIMING: None, LEARNING: count}
        return {phase: count if phase == PRIMING else count - dense for phase in self.phase_names}

    def module_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        rows, energies = super().module_rows(shapes), self.kept_energy or {}
        for row, parts in zip(rows, self._parts_by_module(shapes).values(), strict=True):
            if factor := parts.get("learner_P1.weight"):
                row["rank"] = factor[0]
                row["primed"] = f"{DENSE_PART}.weight" in parts or row["module"] in energies
            if row["module"] in energies:
                row["kept_energy"] = energies[row["module"]]
        return rows
