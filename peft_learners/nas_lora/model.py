"""The model of NAS-LoRA: the search space, and what happens at a boundary."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Optional

import torch
from peft.utils import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint import Indices, Shapes
from ..costs import Values
from ..phases.driver import Entry, Training, injected_model
from ..phases.optimizer import Observer
from ..phases.schedule import Phase, Schedule, ScheduleError
from ..phases.shards import compared
from ..structure.attention import value_names
from ..structure.modules import bias_names, bias_of, block_linear_names, is_linear, linear_names, walk
from ..structure.targets import matches
from ..structure.weights import sizes
from ..tuner import OUTLINE, PhasedModel
from .architecture import Architecture, Positions, positions_in
from .budget import Gatherer, budget_path, prune
from .config import CONTAINERS, RETRAINING, NASLoRAConfig
from .files import (
    check_scores,
    is_pruned_file,
    position_indices,
    scores_of,
    shapes_in_form_of,
    take_scores,
    without_scores,
)
from .layer import NASLoRABias, NASLoRALayer, NASLoRALinear, kept_of, layers_of, space_of, waits_for_file
from .rewind import rewind_saved_modules

if TYPE_CHECKING:
    from ..weighted_sum import Combined


class NASLoRAModel(PhasedModel):
    """Puts low-rank updates and bias deltas on a model, searches which of them matter, and retrains those alone.

    Example:
        ```py
        >>> from transformers import AutoModelForSequenceClassification, Trainer
        >>> from peft import get_peft_model
        >>> from peft_learners import NASLoRAConfig, PhaseCallback

        >>> model = AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
        >>> model = get_peft_model(model, NASLoRAConfig(r=16, parameter_budget=100_000, task_type="SEQ_CLS"))
        >>> Trainer(model, args, train_dataset=data, callbacks=[PhaseCallback()]).train()
        >>> model.base_model.architecture().rows()
        ```
    """

    prefix = "nas_lora_"
    tuner_layer_cls = NASLoRALayer
    cuts_parameters = True
    reads_gradients = True
    needs_optimizer = "gathers importance before each step of its optimizer, whose state is pruned with the parameters"
    supported = (
        "NAS-LoRA puts low-rank updates on linear layers (torch.nn.Linear, transformers' Conv1D, quantised ones); "
        "with r=0 it takes every module with a bias vector."
    )

    def architecture(self, adapter_name: Optional[str] = None) -> Architecture:
        """What is kept of the search space now: all of it before the first pruning.

        Args:
            adapter_name: None: the active adapter.
        """
        adapter_name = self.active_adapters[0] if adapter_name is None else adapter_name
        config = self.peft_config[adapter_name]
        layers = layers_of(self.model, adapter_name)
        positions = {name: layer.kept_positions(adapter_name) for name, layer in layers.items()}
        counts = {name: layer.counts(adapter_name) for name, layer in layers.items()}
        return Architecture.of(config, positions, counts)

    # -- choice of modules ------------------------------------------------------------------------------------------

    def _resolve_targets(self, config: NASLoRAConfig, model: nn.Module) -> set[str]:
        self._biases_alone = config.r == 0  # then target_modules says whose
        return super()._resolve_targets(config, model)

    def _found_targets(self, config: NASLoRAConfig, model: nn.Module) -> list[str]:
        names = linear_names(model)
        if config.target_modules is not None:
            return names
        if config.r == 0:
            return []
        blocks = block_linear_names(model) or names
        values = set(value_names(model, blocks))
        return [name for name in blocks if name not in values]

    def _complete_targets(self, config: NASLoRAConfig, model: nn.Module, chosen: set[str]) -> set[str]:
        given, low_rank = config.target_modules, chosen if config.r else set()
        if given is None and config.r:
            self._write_targets(config, chosen)
        biases = self._resolve_biases(config, model, given, chosen) if config.train_biases else set()
        modules = {name: module for name, module in walk(model) if name in low_rank | biases}
        self._parts = {name: (config.r if name in low_rank else 0, name in biases) for name in modules}
        self._check_space(config, model, modules, bool(low_rank))
        return set(self._parts)

    def _resolve_biases(self, config: NASLoRAConfig, model: nn.Module, given: Any, chosen: set[str]) -> set[str]:
        every = self._names_among(config, bias_names(model))
        asked = config.bias_modules
        if asked is None and given is None:
            config.write("bias_modules", "all")
            return every
        if asked == "all":
            return every
        if asked is None:
            return every & chosen
        biases = {name for name in every if matches(name, asked)}
        if not biases:
            raise ValueError(
                f"NASLoRAConfig: `bias_modules` must name modules of the backbone with a bias, got {asked!r}, which "
                f"matches none of {len(every)}."
            )
        return biases

    def _is_supported(self, module: nn.Module) -> bool:
        return is_linear(module) or (self._biases_alone and bias_of(module) is not None)

    def _check_space(
        self, config: NASLoRAConfig, model: nn.Module, modules: dict[str, nn.Module], any_low_rank: bool
    ) -> None:
        kind = type(model).__name__
        if config.r and not any_low_rank and not config.inference_mode:
            raise NoMatchingPeftModuleError(
                f"No linear layer of the {kind} is left for low-rank updates (target_modules, exclude_modules, "
                "layers_to_transform). To search biases alone: NASLoRAConfig(r=0)."
            )
        if not modules:
            raise NoMatchingPeftModuleError(
                f"r=0 searches biases alone, and the {kind} has none in its backbone that are not left out. Search "
                "low-rank updates: NASLoRAConfig(r=16)."
            )
        space = 0
        for name, (rank, bias) in self._parts.items():
            own = bias_of(modules[name])
            space += rank * sum(sizes(modules[name])) if rank else 0
            space += own.numel() if bias and own is not None else 0
        if config.architecture is None:
            config.budget_in(space)
        else:
            unknown = [name for name in config.architecture if name not in self._parts]
            if len(unknown) == len(config.architecture):
                raise ValueError(
                    f"The architecture names {unknown[0]}, which is not in the search space of this {kind}, and none "
                    "of its other modules is. It can be used on models of the kind that it was found on."
                )
            lost = [name for name in unknown if any(kept for kept, _ in config.architecture[name].values())]
            if lost:  # a pooler, which another task's model does not have
                warnings.warn(
                    f"The architecture keeps something of {', '.join(lost[:3])}, which the {kind} does not have or "
                    "leaves out.",
                    stacklevel=2,
                )
            config.write("architecture", {n: parts for n, parts in config.architecture.items() if n in self._parts})

    def _hidden_size(self, config: NASLoRAConfig, name: str) -> tuple[str, int]:
        return "r", self._parts.get(name, (0, False))[0]

    # -- injection --------------------------------------------------------------------------------------------------

    def _new_layer(self, module: nn.Module, name: str) -> NASLoRALayer:
        return NASLoRALinear(module) if is_linear(module) else NASLoRABias(module)

    def _update_layer(self, layer: Any, adapter: str, config: NASLoRAConfig, name: str) -> None:
        layer.update_layer(adapter, config, name, *self._parts.get(name, (0, False)))

    # -- what an adapter costs --------------------------------------------------------------------------------------

    @classmethod
    def values_by_phase(cls, layers: Mapping[str, Any], adapter: str, config: NASLoRAConfig) -> dict[str, Values]:
        """The search space, then the budgets of what is kept of it; in the phase that a pruned adapter is in, what it
        has kept."""
        spaces = {layer.nas_lora_space[adapter].name: layer.nas_lora_space[adapter] for layer in layers.values()}
        units = [(own, part) for own in spaces.values() for part in own.indexed()]
        space = sum(own.size(part) for own in spaces.values() for part in own.shapes)
        scored, cheapest = sum(own.size(part) for own, part in units), min(own.cost(part) for own, part in units)

        def values(phase: str, count: int, positions: int, at_most: bool) -> Values:
            scores = min(scored, count) if phase != RETRAINING and config.criterion != "random" else 0
            return Values(count, 0, 4 * (positions + scores), at_most)  # int32 and float32

        first, *later = config.phase_names
        found = {first: values(first, space, 0, at_most=False)}
        if not config.found_before:
            budgets = budget_path(space, config.budget_in(space), config.rounds)
            found |= {
                phase: values(phase, b, b // cheapest, at_most=True) for phase, b in zip(later, budgets, strict=True)
            }
        if config.architecture is not None:
            kept = {(m, p): count for m, parts in config.architecture.items() for p, (count, _) in parts.items()}
            count = sum(kept.get((own.name, part), 0) for own in spaces.values() for part in own.shapes)
            held = (kept.get((own.name, part), 0) * own.whole(part) // own.size(part) for own, part in units)
            now = config.phase_names[config.pruned_rounds]
            found[now] = values(now, count, sum(held), at_most=False)
        return {RETRAINING: found[RETRAINING]} if config.found_before else found

    def _outline_layer(self, layer: Any, config: NASLoRAConfig, name: str) -> None:
        layer.outline(OUTLINE, config, name, *self._parts.get(name, (0, False)))  # initial values need memory

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in layers_of(self.model, adapter_name).values():
            layer.restore_initial(adapter_name)

    # -- weighted sums ----------------------------------------------------------------------------------------------

    def _config_of_sum(self, configs: list[Any], found: Combined) -> tuple[NASLoRAConfig, Combined]:
        if any(config.granularity != "structured" for config in configs):
            raise NotImplementedError(
                "add_weighted_adapter: it needs granularity='structured'. With 'unstructured' the factors keep single "
                "entries, and a sum of such updates has another form. Use the adapters together "
                "(model.base_model.set_adapter([...]) adds them up), or export each to LoRA (peft_learners.export) "
                "and combine there."
            )
        found = found.acting()
        if not found.names:
            raise ValueError("add_weighted_adapter: the sum is zero (nothing is kept, or all weights are 0).")
        # The architecture that keeps exactly what the sum has, of a search space of its largest rank.
        rank = max((pair.rank for pair in found.low_rank.values()), default=0)
        counts: dict[str, dict[str, list[int]]] = {name: {} for name in sorted(found.names)}
        positions: Positions = {name: {} for name in counts}
        for name, pair in found.low_rank.items():
            for part, length in (("U", len(pair.b)), ("V", pair.a.shape[1])):
                counts[name][part] = [pair.rank * length, rank * length]
            positions[name]["U"] = torch.arange(pair.rank, dtype=torch.int32, device="cpu")
        for name, bias in found.biases.items():
            counts[name]["bias"] = [len(bias), len(bias)]
            positions[name]["bias"] = torch.zeros(1, dtype=torch.int32, device="cpu")
        summed = replace(
            configs[0],
            init_weights=True,
            r=rank,
            target_modules=self._minimal_names(set(found.low_rank)) or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            train_biases=bool(found.biases),
            bias_modules=self._minimal_names(set(found.biases)) or None,
            parameter_budget=sum(kept for parts in counts.values() for kept, _ in parts.values()),
            architecture=counts,
            rounds=1,
            pruned_rounds=1,
            completed_phases=[],
            phase_first_steps=None,
        )
        summed.completed_phases = summed.phase_names[:-1]
        summed.kept_positions = positions
        return summed, found

    def _take_sum(self, adapter: str, found: Combined) -> None:
        values = {
            "U": {name: pair.b for name, pair in found.low_rank.items()},
            "V": {name: pair.a.t() for name, pair in found.low_rank.items()},
            "bias": found.biases,
        }
        for part, own in values.items():
            for name, value in own.items():
                layer: Any = self.model.get_submodule(name)
                leaf = layer.leaf(CONTAINERS[part], adapter)
                leaf.set(value.clone(memory_format=torch.contiguous_format))

    # -- phases -----------------------------------------------------------------------------------------------------

    @classmethod
    def check_phases(cls, root: nn.Module, adapter: str, config: NASLoRAConfig, schedule: Schedule) -> None:
        """There must be something that fits the budget, and kept units whose positions are known.

        Raises:
            ScheduleError: a budget below the cheapest unit, or an architecture without its positions.
        """
        layers = layers_of(root, adapter)
        for name, layer in layers.items():
            if not layer.knows_positions(adapter):
                raise ScheduleError(waits_for_file(adapter, name))
        if not any(phase.name != RETRAINING for phase in schedule.phases):
            return
        budget = config.budget_in(space_of(layers, adapter))
        costs = {
            layer.nas_lora_space[adapter].cost(part): f"{part} of {name}"
            for name, layer in reversed(layers.items())
            for part, _ in layer.scored(adapter)
        }
        if budget < min(costs):
            raise ScheduleError(
                f"parameter_budget={config.parameter_budget} ({budget:,} parameters) is below the cheapest unit that "
                f"could be kept, which costs {min(costs):,} ({costs[min(costs)]}). Raise it to at least "
                f"{min(costs):,}, or prune single entries: NASLoRAConfig(granularity='unstructured')."
            )

    @classmethod
    def enter_phase(
        cls, root: nn.Module, adapter: str, config: NASLoRAConfig, phase: Phase, entry: Entry, training: Training
    ) -> None:
        """Prune and rewind where a search is over; begin to gather scores where one starts."""
        index = config.phase_names.index(phase.name)
        layers = layers_of(root, adapter)
        if entry == "crossed":
            prune(root, adapter, config, index, training)
            cls._record(root, adapter, config, index)
        elif entry == "resumed" and not config.phases_complete:
            if index and not any(layer.is_pruned(adapter) for layer in layers.values()):
                raise ScheduleError(
                    f"The training is resumed in the phase {phase.name!r}, but the adapter {adapter!r} is not pruned "
                    "yet. Load the checkpoint's adapter first."
                )
            space, kept = space_of(layers, adapter), kept_of(layers, adapter)
            if index and kept > budget_path(space, config.budget_in(space), config.rounds)[index - 1]:
                raise ScheduleError(
                    f"The training is resumed in the phase {phase.name!r}, but the adapter {adapter!r} has {kept:,} "
                    "parameters, more than that phase's budget: it was saved at an earlier step."
                )
            config.write("pruned_rounds", index)
        gathers = phase.name != RETRAINING and config.criterion != "random"
        for layer in layers.values():
            if not gathers:
                layer.nas_lora_scores.pop(adapter, None)
            elif entry != "resumed" or adapter not in layer.nas_lora_scores:
                layer.nas_lora_scores[adapter] = {}
        if entry == "resumed" and gathers:
            under_way = training.global_step > phase.first_step
            if under_way and not any(layer.nas_lora_scores[adapter] for layer in layers.values()):
                raise ScheduleError(
                    f"The training is resumed in the phase {phase.name!r}, but the scores that the search has "
                    f"gathered for the adapter {adapter!r} were not loaded. An adapter that is saved in its "
                    "search has them in its file: load it with is_trainable=True."
                )

    @classmethod
    def observer(cls, root: nn.Module, adapter: str, config: NASLoRAConfig, phase: Phase) -> Observer | None:
        if phase.name == RETRAINING or config.criterion == "random":
            return None
        layers = list(layers_of(root, adapter).values())
        return Gatherer(layers, adapter, config.criterion == "magnitude", config.averaging == "last")

    @classmethod
    def _record(cls, root: nn.Module, adapter: str, config: NASLoRAConfig, rounds: int) -> None:
        layers = layers_of(root, adapter).items()
        config.write("architecture", {name: layer.counts(adapter) for name, layer in layers} if rounds else None)
        config.write("pruned_rounds", rounds)
        config.write("completed_phases", config.phase_names[:rounds])

    @classmethod
    def restart(cls, root: nn.Module, adapter: str, config: NASLoRAConfig, optimizer: Optimizer | None) -> None:
        """The whole search space, at its initial values."""
        cls._set_kept(root, adapter, None, optimizer)
        rewind_saved_modules(root, adapter)
        cls._record(root, adapter, config, 0)
        config.kept_positions = {}

    @classmethod
    def _set_kept(
        cls,
        root: nn.Module,
        adapter: str,
        positions: Positions | None,
        optimizer: Optimizer | None,
    ) -> None:
        for name, layer in layers_of(root, adapter).items():
            layer.nas_lora_scores.pop(adapter, None)
            layer.set_kept(adapter, None if positions is None else positions.get(name, {}), optimizer)

    @classmethod
    def has_trained(cls, root: nn.Module, adapter: str, config: NASLoRAConfig) -> bool:
        if config.architecture is not None or not config.init_weights:
            return config.architecture is not None
        for layer in layers_of(root, adapter).values():
            space = layer.nas_lora_space[adapter]
            for part in reversed(space.shapes):  # biases first: zeros need no numbers to be drawn
                value = layer.leaf(CONTAINERS[part], adapter).tensor
                if not value.is_meta and not torch.equal(*compared(value, space.initial(part))):
                    return True
        return False

    # -- saving and loading -----------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        values = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        scores = scores_of(layers_of(model, adapter_name), adapter_name)
        return {**values, **{f"{key}.{adapter_name}": value for key, value in scores.items()}}

    @classmethod
    def _without_aside(cls, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        check_scores(adapter, state_dict)
        return without_scores(state_dict)

    @classmethod
    def _take_aside(cls, root: nn.Module, adapter: str, config: Any, state_dict: dict[str, Tensor]) -> None:
        take_scores(layers_of(root, adapter), adapter, state_dict, keep=not config.inference_mode)

    @classmethod
    def _indices(cls, root: nn.Module, adapter: str, config: NASLoRAConfig) -> dict[str, Indices]:
        return position_indices(layers_of(root, adapter), adapter)

    @classmethod
    def _shapes_in_form_of(
        cls, root: nn.Module, adapter: str, config: NASLoRAConfig, state_dict: dict[str, Tensor]
    ) -> Shapes:
        layers = layers_of(root, adapter)
        if not all(layer.knows_positions(adapter) for layer in layers.values()):
            return cls._own_shapes(root, adapter)  # its config says which file it waits for
        return shapes_in_form_of(layers, adapter, state_dict)

    @classmethod
    def _fit_to_file(
        cls,
        root: nn.Module,
        adapter: str,
        config: NASLoRAConfig,
        state_dict: dict[str, Tensor],
        optimizer: Optimizer | None,
    ) -> None:
        root = injected_model(root)
        layers = layers_of(root, adapter)
        if not is_pruned_file(state_dict):
            cls._set_kept(root, adapter, None, optimizer)
            cls._record(root, adapter, config, 0)
            return
        positions = positions_in(state_dict)
        cls._set_kept(root, adapter, positions, optimizer)
        space = space_of(layers, adapter)
        path = budget_path(space, config.budget_in(space), config.rounds)
        kept = kept_of(layers, adapter)
        cls._record(root, adapter, config, max(1, sum(kept <= budget for budget in path)))
