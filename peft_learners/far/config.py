"""The configuration of FAR, and its phases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Optional

from ..config import (
    FLAG,
    LARGEST,
    SEED,
    Check,
    PhasedConfig,
    is_names,
    is_number,
    is_whole,
    names_unknown_fields,
    one_of,
    option,
)
from ..phases.schedule import Schedule, ScheduleError, epochs_to_steps, lay_out, ratio_to_steps

PRIMING, RECONFIGURED = "priming", "reconfigured"
GRANULARITIES, SELECTIONS = ("hidden_unit", "output_node"), ("l1", "l2", "random")
#: Containers of trained values of a FAR layer; both phases train all of them, only their sizes change. The names of
#: those of biases and norms hold what Trainer exempts from weight decay.
PARTS = ("far_delta", "far_layernorm_delta", "far_bias_delta")

_PARTS_LEFT_OUT = {"train_embeddings": "neither embeddings nor LM head", "train_attention": "no attention"}


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_patterns(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_pattern, value))


def _is_pattern(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 1 and is_names(value)


@names_unknown_fields
@dataclass
class FARConfig(PhasedConfig):
    """Configuration of FAR, Freeze And Reconfigure: after a short priming, only the FFN nodes that moved most train.

    Every trained weight W of the backbone gets a delta D: `y = x (W + D)^T + b + db`. All deltas train in the first
    `priming_ratio` of the steps. Then the nodes of each FFN layer are ranked by how far their weights moved:
    `score_i = sum |D|` over the weights of node i, without its bias. The `retention_ratio` highest go on training. The
    deltas of the others freeze; with `discard_unkept` they are dropped. Attention, embeddings, norms, biases and the
    new head train throughout.

    A node is a hidden unit: its row in the first linear layer (gate and up for gated FFNs), its bias entry, and its
    column in the second layer. With `granularity="output_node"` it is an output row of each linear layer with its bias
    entry.

    Source: Vucetic et al., "Efficient Fine-Tuning of BERT Models on the Edge" (arXiv 2205.01541), as described and
    re-implemented in arXiv 2208.02070, section 5.
    """

    method: ClassVar[str] = "far"
    narrowing: ClassVar[tuple[str, ...]] = (*PhasedConfig.narrowing, "train_embeddings", "train_attention")
    default_targets: ClassVar[str] = "all that has parameters"
    display_name: ClassVar[str] = "FAR"
    about: ClassVar[str] = (
        "FAR, *Freeze And Reconfigure*, trains all weights for a short *priming*, and ranks the nodes of each "
        "feed-forward network by how far it moved them. Then only the nodes that moved most go on training, beside "
        "attention, embeddings, norms, biases and the head "
        "([Vucetic et al., 2022](https://arxiv.org/abs/2205.01541))."
    )

    elsewhere: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("r", "rank", "lora_alpha", "lora_dropout", "rank_pattern"),
            "FAR trains whole weights, not low-rank updates: how many nodes is `retention_ratio`. Low-rank updates "
            "are LearnerConfig(r=64)",
        ),
        "bias": "Here it is `train_biases`: True or False",
        "feedforward_modules": "Here it is `ffn_modules`, e.g. ffn_modules=[['fc_in', 'fc_out']]",
    }

    retention_ratio: float = option(
        0.10,
        "Share of the nodes of each FFN layer that go on training, rounded to nearest.",
        Check(_is_share, "a number from 0 to 1", "retention_ratio=0.1"),
    )
    priming_ratio: float = option(
        0.01,
        "Share of all optimizer steps that prime.",
        Check(_is_share, "a number from 0 to 1", "priming_ratio=0.01"),
    )
    priming_steps: Optional[int] = option(
        None,
        "Optimizer steps of priming, in place of priming_ratio.",
        Check(lambda v: v is None or is_whole(v), "None or a whole number of at least 0", "priming_steps=50"),
    )
    priming_epochs: Optional[float] = option(
        None,
        "Epochs of priming (fractions allowed), in place of priming_ratio.",
        Check(
            lambda v: v is None or (is_number(v) and v >= 0),
            f"None or a number of at least 0, at most {LARGEST:,}",
            "priming_epochs=0.5",
        ),
    )
    granularity: str = option(
        "hidden_unit",
        "What a node is: 'hidden_unit' of an FFN, or 'output_node' of each of its linear layers.",
        one_of(GRANULARITIES),
    )
    selection: str = option(
        "l1",
        "How nodes are ranked: by the 'l1' or 'l2' norm of their weights' change, or 'random'.",
        one_of(SELECTIONS),
    )
    seed: int = option(0, "Seed of selection='random'.", replace(SEED, example="seed=0"))
    discard_unkept: bool = option(
        False,
        "Return the nodes that are not kept to their pretrained values: a small adapter. False, as in the paper: they "
        "keep, frozen, what they learned in priming, and the adapter holds it.",
        FLAG,
    )
    train_attention: bool = option(True, "Train the attention.", FLAG)
    train_embeddings: bool = option(
        True,
        "Train the embeddings: tables, what else lies beside them (their norm, ViT's patches and class token), and an "
        "LM head, tied or not. False: FAR's small variant.",
        FLAG,
    )
    train_norms: bool = option(True, "Train the norms.", FLAG)
    train_biases: bool = option(True, "Train the biases of linear layers.", FLAG)
    ffn_modules: Optional[list[list[str]]] = option(
        None,
        "Endings of the names of the FFNs' linear layers, the last being the one that leads out, e.g. "
        "[['fc_in', 'fc_out']]. None: found from the model's structure.",
        Check(
            lambda v: v is None or _is_patterns(v),
            "None or a list of lists of at least two names",
            "ffn_modules=[['fc_in', 'fc_out']]",
        ),
    )
    reconfigured: bool = option(False, "Whether nodes were selected. Written by training; not for the user.", FLAG)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.priming_steps is not None and self.priming_epochs is not None:
            raise ValueError(
                f"FARConfig: give priming in one unit, got priming_steps={self.priming_steps} and "
                f"priming_epochs={self.priming_epochs}."
            )
        others = (name for name in ("priming_steps", "priming_epochs") if getattr(self, name) is not None)
        unit = next(others, "priming_ratio")
        if getattr(self, unit) == 0 and self.selection != "random":
            raise ValueError(
                f"FARConfig: `{unit}` must be above 0 with selection={self.selection!r}, which ranks nodes by "
                f"what priming moved, got 0. Nodes can do without only with FARConfig({unit}=0, "
                "selection='random')."
            )
        if self.ffn_modules is not None:
            self.ffn_modules = [list(pattern) for pattern in self.ffn_modules]

    def savings(self) -> dict[str, str]:
        found = {f"{name}=False": what for name, what in _PARTS_LEFT_OUT.items() if getattr(self, name)}
        if not self.discard_unkept:
            found["discard_unkept=True"] = "what training holds after priming, and the file"
        low_rank = {"LearnerConfig(priming_epochs=0)": "low-rank updates in place of whole weights"}
        return {**found, **super().savings(), **low_rank}

    def fixed_in_training(self) -> dict[str, Any]:
        names = ("retention_ratio", "granularity", "selection", "seed", "discard_unkept")
        return {name: getattr(self, name) for name in names}

    @property
    def phases_complete(self) -> bool:
        return self.reconfigured

    def schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """Priming, then the reconfigured training."""
        in_steps = "Give priming in steps: FARConfig(priming_steps=...)."
        if self.priming_steps is not None:
            steps = self.priming_steps
            advice = f"Set priming_steps to at most {(total_steps or 1) - 1}, or train longer."
        elif self.priming_epochs is not None:
            per_epoch = self._known(steps_per_epoch, "in an epoch", "priming_epochs", in_steps)
            steps = epochs_to_steps(self.priming_epochs, per_epoch)
            advice = f"priming_epochs={self.priming_epochs} at {per_epoch} steps per epoch is too long."
        else:
            total_steps = self._known(total_steps, "of the whole training", "priming_ratio", in_steps)
            steps = ratio_to_steps(self.priming_ratio, total_steps)
            advice = f"Lower priming_ratio={self.priming_ratio}, or train longer."
        if total_steps is not None and steps == total_steps:
            raise ScheduleError(
                f"priming needs {steps} of the training's {total_steps} optimizer steps, which leaves none for the "
                f"nodes that are kept. {advice}"
            )
        return self._phases(steps, total_steps, advice)

    def outline(self) -> Schedule:
        return self._phases(1)

    @staticmethod
    def _phases(priming: int, total_steps: int | None = None, advice: str = "") -> Schedule:
        return lay_out([(PRIMING, priming), (RECONFIGURED, None)], total_steps, advice)

    def trained_by_phase(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Optional[int]]:
        def count(*parts: str) -> int:
            return sum(math.prod(shape) for key, shape in shapes.items() if any(f".{part}" in key for part in parts))

        rest = count("far_rest", "far_bias_rest")  # what the nodes that are not kept learned in priming
        trained = sum(map(math.prod, shapes.values())) - rest - count("far_kept")
        if not self.reconfigured:
            return {PRIMING: trained, RECONFIGURED: None}
        return {PRIMING: None if self.discard_unkept else trained + rest, RECONFIGURED: trained}

    def module_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        """With `nodes` of FFN layers that are kept, `of_nodes` (None where the file does not tell)."""
        rows = []
        for module, parts in self._parts_by_module(shapes).items():
            trained = sum(math.prod(shape) for part, shape in parts.items() if part.startswith(PARTS))
            row: dict[str, Any] = {"module": module, "parameters": trained}
            if kept := parts.get("far_kept"):
                row["nodes"] = kept[0]
                row["of_nodes"] = _nodes(kept[0], parts["far_delta.weight"], parts.get("far_rest"))
            rows.append(row)
        return rows


def _nodes(kept: int, delta: tuple[int, ...], rest: Optional[tuple[int, ...]]) -> Optional[int]:
    """How many nodes a layer has of which some are kept, by the shapes of both parts of its delta."""
    if rest is None:
        return None
    if kept == 0:
        return rest[delta.index(0)]
    return kept + kept * math.prod(rest) // math.prod(delta)
