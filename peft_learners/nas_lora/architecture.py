"""A learned architecture as data: what a search has kept, module by module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from peft import PeftConfig
from peft.utils import load_peft_weights
from torch import Tensor

#: `{module: {part: (parameters kept, parameters in the search space)}}`; parts are "U", "V" and "bias".
Counts = dict[str, dict[str, tuple[int, int]]]
#: `{module: {part: positions}}`; see `Architecture`.
Positions = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Architecture:
    """What NAS-LoRA has kept of its search space.

    Attributes:
        granularity: "structured" or "unstructured".
        r: rank of the low-rank updates in the search space.
        budget: parameters that could be kept.
        counts: parameters that are kept and that there were, for every module of the search space.
        positions: ascending, of what is kept: unstructured, of the entries of U (out_features, r), V (in_features, r)
            and the bias, counted one column after the other; structured, under "U" the columns of U and V, under
            "bias" a 0 for a bias vector.
        settings: further fields of the config that lay out the search space.
    """

    granularity: str
    r: int
    budget: int
    counts: Counts
    positions: Positions
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> int:
        """Parameters of the search space."""
        return sum(of for parts in self.counts.values() for _, of in parts.values())

    @property
    def kept(self) -> int:
        """Parameters that are kept; the head is not among them."""
        return sum(kept for parts in self.counts.values() for kept, _ in parts.values())

    def rows(self) -> list[dict[str, Union[str, int, float]]]:
        """One row per update of the search space, those of which nothing is kept too, by name (numbers by value).

        Returns:
            Rows with `module`, `kind` ("low_rank" or "bias"), `parameters` (kept), `of` (in the search space) and
            `share` (of the budget); for a low-rank update also `rank` (structured), or `kept_U` and `kept_V`.
        """
        rows: list[dict[str, Union[str, int, float]]] = []
        for module in sorted(self.counts, key=_natural):
            parts = self.counts[module]
            if "U" in parts:
                (kept_u, of_u), (kept_v, of_v) = parts["U"], parts["V"]
                row = self._row(module, "low_rank", kept_u + kept_v, of_u + of_v)
                if self.granularity == "structured":
                    rows.append({**row, "rank": kept_u * self.r // of_u})
                else:
                    rows.append({**row, "kept_U": kept_u, "kept_V": kept_v})
            if "bias" in parts:
                rows.append(self._row(module, "bias", *parts["bias"]))
        return rows

    def _row(self, module: str, kind: str, kept: int, of: int) -> dict[str, Union[str, int, float]]:
        return {"module": module, "kind": kind, "parameters": kept, "of": of, "share": kept / self.budget}

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> Architecture:
        """The architecture of a saved NAS-LoRA adapter.

        Args:
            model_id: a folder, or a repository on the Hub.
            kwargs: as for `PeftConfig.from_pretrained` (`subfolder`, `revision`, ...).

        Raises:
            ValueError: another kind of adapter, or one that has not been pruned.
        """
        config: Any = PeftConfig.from_pretrained(model_id, **kwargs)
        if getattr(config, "architecture", None) is None or not config.phases_complete:
            raise ValueError(
                f"{model_id} holds no learned architecture: it is a {config.peft_type.value} adapter"
                + (" whose search is not over." if hasattr(config, "architecture") else ".")
            )
        return cls.of(config, positions_in(load_peft_weights(model_id, device="cpu", **kwargs)))

    @classmethod
    def of(
        cls,
        config: Any,
        positions: Positions,
        counts: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    ) -> Architecture:
        """An architecture of the search space that a config lays out.

        Args:
            positions: that the adapter's layers or file hold.
            counts: None: those in the config of a pruned adapter.
        """
        given = config.architecture if counts is None else counts
        own: Counts = {m: {p: (kept, of) for p, (kept, of) in parts.items()} for m, parts in given.items()}
        space = sum(of for parts in own.values() for _, of in parts.values())
        names = (
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "train_biases",
            "bias_modules",
        )
        settings = {name: getattr(config, name) for name in names}
        return cls(config.granularity, config.r, config.budget_in(space), own, positions, settings)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]


def positions_in(state_dict: Mapping[str, Tensor]) -> Positions:
    """The positions in an adapter's file, by module (as it is called in the base model) and part."""
    found: Positions = {}
    for key, value in state_dict.items():
        module, _, part = key.rpartition(".nas_lora_")
        if module and part.endswith("_positions"):
            module = module.removeprefix("base_model.model.")
            found.setdefault(module, {})[part.removesuffix("_positions")] = value
    return found
