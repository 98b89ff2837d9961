"""The configuration of NAS-LoRA, and its phases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

from torch import nn

from ..config import (
    FLAG,
    LARGEST,
    NAMES,
    SEED,
    Check,
    PhasedConfig,
    is_names,
    is_number,
    is_positive_int,
    is_whole,
    names_unknown_fields,
    one_of,
    option,
)
from ..phases.driver import injected_model
from ..phases.schedule import Schedule, ScheduleError, epochs_to_steps, lay_out
from .architecture import Architecture, Positions

RETRAINING = "retraining"
GRANULARITIES, CRITERIA = ("structured", "unstructured"), ("importance", "magnitude", "random")
AVERAGINGS, REWINDS, INITS = ("mean", "last"), ("initial", "fresh"), ("kaiming", "lora")
#: Containers of trained values, by part; all phases train all of them, only their sizes change. The name of that of
#: biases holds what Trainer exempts from weight decay.
CONTAINERS = {"U": "nas_lora_U", "V": "nas_lora_V", "bias": "nas_lora_bias_delta"}
#: Each round is a phase.
MOST_ROUNDS = 1000


def _is_counts(parts: object) -> bool:
    """Whether these are `{part: [parameters kept, parameters in the search space]}`."""
    if not isinstance(parts, dict) or not parts.keys() <= CONTAINERS.keys() or ("U" in parts) != ("V" in parts):
        return False
    return all(map(_is_count, parts.values()))


def _is_count(pair: object) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(is_whole, pair)):
        return False
    return pair[0] <= pair[1] > 0


@names_unknown_fields
@dataclass
class NASLoRAConfig(PhasedConfig):
    """Configuration of NAS-LoRA: search, prune to a budget, rewind, retrain.

    A linear layer of the search space is `y = x (W + U V^T)^T + b + db`, with `U: (out_features, r)` and
    `V: (in_features, r)`. Every bias of the backbone has a delta, those of norms too. The search trains all of it, and
    averages the importance `-theta * dL/dtheta` over its optimizer steps. Then the units of lowest importance are
    removed until what is left costs at most `parameter_budget`. Units are entries; with `granularity="structured"`
    they are columns of U and V, and whole bias vectors. What is left, and the head, go back to their initial values
    and train again with a fresh optimizer.

    The head is outside the budget and the search space, as the paper counts.

    Source: Lawton et al., "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained
    Language Models" (arXiv 2305.16597), section 3 and appendix A.
    """

    method: ClassVar[str] = "nas_lora"
    default_targets: ClassVar[str] = "the linear layers of the blocks without value projections"
    display_name: ClassVar[str] = "NAS-LoRA"
    about: ClassVar[str] = (
        "NAS-LoRA first trains low-rank updates and changes of biases all over the model, the *search*, and estimates "
        "how much each of their parameters matters to the loss. Those that matter least are removed until the others "
        "fit a budget; these go back to their initial values, and they and the head are trained again, the "
        "*retraining* ([Lawton et al., 2023](https://arxiv.org/abs/2305.16597))."
    )

    elsewhere: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "NAS-LoRA has no scaling: its updates count as those of LoRA with lora_alpha = r",
        "lora_dropout": "NAS-LoRA has no dropout",
        "bias": "Here it is `train_biases`: True or False",
        "lora_bias": "Here it is `train_biases`",
        "init_r": "Here the rank of the search is `r`",
        "target_r": "Here it is `parameter_budget`: a number of parameters, or a share of the search space",
        "init_lora_weights": "Here LoRA's initial values are init='lora'",
    }

    r: int = option(
        16,
        "Rank of the low-rank updates in the search; 0: biases alone.",
        Check(is_whole, "a whole number of at least 0 (0: biases alone)", "r=16"),
    )
    parameter_budget: Union[int, float] = option(
        0.5,
        "What is kept: a whole number of parameters, or a fraction (0, 1] of the search space. The head is not "
        "counted.",
        Check(
            lambda v: is_positive_int(v) or (isinstance(v, float) and is_number(v) and 0 < v <= 1),
            "a whole number of parameters of at least 1, or a fraction above 0 and at most 1",
            "parameter_budget=25_000",
        ),
    )
    granularity: str = option(
        "unstructured",
        "'unstructured': entries are pruned; 'structured': columns of U and V, whole bias vectors.",
        one_of(GRANULARITIES),
    )
    search_epochs: Optional[float] = option(
        None,
        "Epochs of one round of search. None: all phases, the retraining too, are equally long (half of all epochs "
        "with one round).",
        Check(
            lambda v: v is None or (is_number(v) and v > 0),
            f"None or a number above 0 and at most {LARGEST:,}",
            "search_epochs=5",
        ),
    )
    search_steps: Optional[int] = option(
        None,
        "The same in optimizer steps, in place of search_epochs.",
        Check(lambda v: v is None or is_positive_int(v), "None or a whole number of at least 1", "search_steps=500"),
    )
    rounds: int = option(
        1,
        "1: one-shot. More: that many searches, which prune on a geometric path to the budget.",
        Check(
            lambda v: is_positive_int(v) and v <= MOST_ROUNDS,
            f"a whole number of at least 1, at most {MOST_ROUNDS}",
            "rounds=1",
        ),
    )
    init: str = option(
        "kaiming", "'kaiming': U ~ N(0, 1/sqrt(m)), V ~ N(0, 1/sqrt(n)); 'lora': U zero (the ablation).", one_of(INITS)
    )
    init_seed: int = option(
        0, "Initial values follow this and the module's name alone.", replace(SEED, example="init_seed=0")
    )
    criterion: str = option(
        "importance", "'importance' (signed -theta * gradient), 'magnitude' or 'random'.", one_of(CRITERIA)
    )
    averaging: str = option(
        "mean", "Importance averaged over the search ('mean'), or of its 'last' step.", one_of(AVERAGINGS)
    )
    rewind: str = option("initial", "Values to retrain from: the 'initial' ones, or 'fresh' ones.", one_of(REWINDS))
    train_biases: bool = option(True, "Whether biases belong to the search space.", FLAG)
    bias_modules: Optional[Union[list[str], str]] = option(
        None,
        "Names (or a regex) of the modules whose biases are searched; 'all': every bias of the backbone, norms' "
        "included. None: those of target_modules, and all where target_modules is None too.",
        replace(NAMES, right="None, 'all', a regex or a list of names"),
    )
    architecture: Optional[dict[str, dict[str, Any]]] = option(
        None,
        "Parameters kept of those in the search space, by module and part. Written by training; to use an "
        "architecture again, NASLoRAConfig.from_architecture(...).",
        Check(
            lambda v: v is None or (isinstance(v, dict) and len(v) > 0 and all(map(_is_counts, v.values()))),
            "None, or what training has written there ({module: {part: [parameters kept, of how many]}})",
        ),
    )
    pruned_rounds: int = option(
        0,
        "Rounds of search that are over. Written by training; not for the user.",
        Check(is_whole, "0, or what training has written there"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r == 0 and not self.train_biases:
            raise ValueError("NASLoRAConfig: r=0 and train_biases=False leave nothing to search. Set one of them.")
        if self.search_epochs is not None and self.search_steps is not None:
            raise ValueError(
                f"NASLoRAConfig: give the search in one unit, got search_epochs={self.search_epochs} and "
                f"search_steps={self.search_steps}."
            )
        if self.pruned_rounds > self.rounds or (self.pruned_rounds > 0) != (self.architecture is not None):
            raise ValueError(
                f"NASLoRAConfig: `pruned_rounds` must be 0 without an `architecture`, and from 1 to rounds="
                f"{self.rounds} with one, got {self.pruned_rounds} {'with' if self.architecture else 'without'} one."
            )
        if is_names(self.bias_modules):
            self.bias_modules = sorted(self.bias_modules or ())
        #: Of an architecture that is used again; a saved adapter has them in its file.
        self.kept_positions: Positions = {}

    # -- the paper's four search spaces ------------------------------------------------------------------------------

    @classmethod
    def s_bitfit(cls, parameter_budget: Union[int, float] = 0.5, **fields: Any) -> NASLoRAConfig:
        """S-BitFit: whole bias vectors are searched, and nothing else."""
        return cls(**{"r": 0, "granularity": "structured", "parameter_budget": parameter_budget, **fields})

    @classmethod
    def u_bitfit(cls, parameter_budget: Union[int, float] = 0.5, **fields: Any) -> NASLoRAConfig:
        """U-BitFit: single entries of biases are searched, and nothing else."""
        return cls(**{"r": 0, "granularity": "unstructured", "parameter_budget": parameter_budget, **fields})

    @classmethod
    def s_mam(cls, parameter_budget: Union[int, float] = 0.5, **fields: Any) -> NASLoRAConfig:
        """S-MaM: ranks of low-rank updates, and whole bias vectors."""
        return cls(**{"r": 16, "granularity": "structured", "parameter_budget": parameter_budget, **fields})

    @classmethod
    def u_mam(cls, parameter_budget: Union[int, float] = 0.5, **fields: Any) -> NASLoRAConfig:
        """U-MaM: single entries of low-rank updates and of biases."""
        return cls(**{"r": 16, "granularity": "unstructured", "parameter_budget": parameter_budget, **fields})

    @classmethod
    def from_architecture(
        cls, source: Union[Architecture, nn.Module, str, Path], adapter: Optional[str] = None, **fields: Any
    ) -> NASLoRAConfig:
        """A config that trains an architecture found before, on another task or seed, without a new search.

        Args:
            source: an `Architecture`, a model that holds a pruned adapter, or a folder or Hub id of one.
            adapter: which adapter of a model; None: its only NAS-LoRA adapter.
            fields: of the new config (task_type, init_seed, save_dtype, ...).

        Raises:
            ValueError: the source has no learned architecture, or its search is not over.
            TypeError: a field that the architecture decides.
        """
        if isinstance(source, nn.Module):
            root: Any = injected_model(source)
            configs = getattr(root, "peft_config", {})
            names = [name for name, config in configs.items() if isinstance(config, cls)]
            adapter = names[0] if adapter is None and len(names) == 1 else adapter or "default"
            config = configs.get(adapter)
            if not isinstance(config, cls) or not config.phases_complete:
                raise ValueError(
                    f"The model has no NAS-LoRA adapter {adapter!r} whose search is over: there is no architecture."
                )
            modules: Any = root.named_modules()  # the layers' module imports this one
            layers = {name: module for name, module in modules if adapter in getattr(module, "nas_lora_space", ())}
            source = Architecture.of(config, {name: layer.kept_positions(adapter) for name, layer in layers.items()})
        elif not isinstance(source, Architecture):
            source = Architecture.from_pretrained(str(source))
        decided = ("r", "granularity", "parameter_budget", "architecture", "rounds", "pruned_rounds")
        taken = [name for name in decided if name in fields]
        if taken:
            raise TypeError(f"NASLoRAConfig.from_architecture: {', '.join(taken)} follow from the architecture.")
        counts = {m: {p: list(pair) for p, pair in parts.items()} for m, parts in source.counts.items()}
        own = {"r": source.r, "granularity": source.granularity, "parameter_budget": source.kept or source.budget}
        done = {"architecture": counts, "pruned_rounds": 1}
        config = cls(**{**source.settings, **own, **done, **fields})
        config.kept_positions = {m: {p: v.clone() for p, v in parts.items()} for m, parts in source.positions.items()}
        return config

    def budget_in(self, space: int) -> int:
        """The budget in parameters, for a search space of `space` parameters.

        Raises:
            ValueError: a budget above the search space, or a fraction of less than one parameter.
        """
        budget = self.parameter_budget
        parameters = budget if isinstance(budget, int) else math.floor(budget * space + 1e-6)
        if not 1 <= parameters <= space:
            raise ValueError(
                f"NASLoRAConfig: `parameter_budget` must lie within the search space, which has {space:,} parameters "
                f"on this model (the head is not counted), got {budget!r}. For example: "
                f"NASLoRAConfig(parameter_budget={max(1, space // 2)})."
            )
        return parameters

    # -- phases ------------------------------------------------------------------------------------------------------

    @property
    def phases_complete(self) -> bool:
        return self.architecture is not None and self.pruned_rounds >= self.rounds

    def fixed_in_training(self) -> dict[str, Any]:
        names = ("r", "parameter_budget", "granularity", "rounds", "init", "init_seed")
        return {name: getattr(self, name) for name in (*names, "criterion", "averaging", "rewind", "train_biases")}

    def schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        """One search per round (less those that are over), then the retraining."""
        return self._laid_out(self.pruned_rounds, total_steps, steps_per_epoch)

    def whole_schedule(self, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        return self._laid_out(0, total_steps, steps_per_epoch)

    def _laid_out(self, over: int, total_steps: int | None, steps_per_epoch: int | None) -> Schedule:
        rounds, in_steps = self.rounds - over, "Give the search in steps: NASLoRAConfig(search_steps=...)."
        if self.search_steps is not None:
            steps = self.search_steps
        elif self.search_epochs is not None:
            per_epoch = self._known(steps_per_epoch, "in an epoch", "search_epochs", in_steps)
            steps = epochs_to_steps(self.search_epochs, per_epoch)
        else:
            total_steps = self._known(total_steps, "of the whole training", "search_epochs", in_steps)
            steps = total_steps // (rounds + 1)
        if total_steps is not None and not 0 < steps * rounds < total_steps:
            what = f"{steps} steps" if rounds == 1 else f"{rounds} rounds of {steps} steps"
            raise ScheduleError(
                f"the search takes {what}, which leaves none of the training's {total_steps} optimizer steps to "
                "retrain what is kept. Search for less, or train longer: by default all phases are equally long."
            )
        return self._phases(steps, over, total_steps)

    def outline(self) -> Schedule:
        return self._phases(1)

    def _phases(self, steps: int, over: int = 0, total_steps: int | None = None) -> Schedule:
        searches = ["search"] if self.rounds == 1 else [f"search_{i + 1}" for i in range(self.rounds)]
        lengths = [(name, steps) for name in searches[over:]]
        return lay_out([*lengths, (RETRAINING, None)], total_steps, begin_anew=True)

    def savings(self) -> dict[str, str]:
        return {"r": "a smaller search space", **super().savings()}

    # -- what a model card says of an adapter ------------------------------------------------------------------------

    @property
    def found_before(self) -> bool:
        """Whether the adapter was trained in an architecture that another one's search had found."""
        return self.phases_complete and not self.completed_phases

    def trained_by_phase(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Optional[int]]:
        phases = self.phase_names
        count: dict[str, Optional[int]] = dict.fromkeys(phases)
        if self.architecture is not None:
            space = sum(of for parts in self.architecture.values() for _, of in parts.values())
            count[phases[0]] = space + _head_size(shapes)
        stored = [math.prod(s) for name, s in shapes.items() if not name.endswith(("_positions", "_scores"))]
        count[phases[self.pruned_rounds]] = sum(stored)
        return {phases[-1]: count[phases[-1]]} if self.found_before else count

    def card_sections(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        if not self.phases_complete:
            return {}
        found = Architecture.of(self, {})
        rows = [["updates", "in modules", "parameters kept", "of the search space's", "share"], ["---"] * 5]
        for kind, name in (("low_rank", "low-rank updates"), ("bias", "biases")):
            sizes = [(int(row["parameters"]), int(row["of"])) for row in found.rows() if row["kind"] == kind]
            if sizes:
                kept, of = map(sum, zip(*sizes, strict=True))
                modules = f"{sum(size > 0 for size, _ in sizes)} of {len(sizes)}"
                rows.append([name, modules, f"{kept:,}", f"{of:,}", f"{kept / of:.1%}"])
        rows.append(["all", "", f"{found.kept:,}", f"{found.space:,}", f"{found.kept / found.space:.1%}"])
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        head = f"The head's {_head_size(shapes):,} parameters are trained besides, and not counted here."
        origin = "The architecture was not searched in this training, but found before." if self.found_before else ""
        text = f"{table}\n\nThe budget is {found.budget:,} parameters. {head} {origin}"
        return {"What is kept": text.rstrip()}

    def module_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        """Of each update (`kind`: "low_rank" or "bias") the `parameters` that are kept, `of_parameters`; with whole
        columns also the `rank`. Before the first pruning, of each module all that there is."""
        if self.architecture is not None:
            names = {"of": "of_parameters"}
            found = Architecture.of(self, {}).rows()
            wanted = ("module", "kind", "parameters", "of", "rank")
            return [{names.get(key, key): row[key] for key in wanted if key in row} for row in found]
        own = {key: shape for key, shape in shapes.items() if not key.endswith("_scores")}
        rows = super().module_rows(own)
        for row, parts in zip(rows, self._parts_by_module(own).values(), strict=True):
            if factor := parts.get("nas_lora_U.weight"):
                row["rank"] = factor[1]
        return rows


def _head_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if ".nas_lora_" not in name)
