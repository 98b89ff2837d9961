"""The model of FAR: which modules, and the cut at the boundary."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint import Indices, Shapes
from ..costs import Values
from ..layers.base import DeltaLayer, tuner_layers, values_of
from ..phases.ddp import broadcast_choice
from ..phases.driver import Entry, Training
from ..phases.optimizer import Observer
from ..phases.schedule import Phase, Schedule, ScheduleError
from ..structure.feed_forward import feed_forwards
from ..structure.modules import is_linear, output_embeddings, walk
from ..structure.weights import base_of, float_weight, is_offloaded, is_plain_float, stored_as
from ..tuner import PhasedModel
from .config import PRIMING, RECONFIGURED, FARConfig
from .layer import FAREmbedding, FARLayer, FARLinear, FARModule
from .plan import Target, adaptable, frozen_on_purpose, lay_out_targets, named_feed_forwards, patterns_of
from .selection import select_nodes


class _Steps(Observer):
    """Counts the steps of an optimizer."""

    count = 0

    def __call__(self, optimizer: Optimizer) -> None:
        self.count += 1


class FARModel(PhasedModel):
    """Puts a delta on every weight of a model, and after priming cuts the FFNs' down to the nodes that moved most.

    Example:
        ```py
        >>> from transformers import AutoModelForSequenceClassification, Trainer
        >>> from peft import get_peft_model
        >>> from peft_learners import FARConfig, PhaseCallback

        >>> model = AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
        >>> model = get_peft_model(model, FARConfig(retention_ratio=0.10, task_type="SEQ_CLS"))
        >>> Trainer(model, args, train_dataset=data, callbacks=[PhaseCallback()]).train()
        ```
    """

    prefix = "far_"
    tuner_layer_cls = FARLayer
    merges_shared_weights = True
    cuts_parameters = True
    needs_optimizer = "cuts parameters at its boundary, and with them the state of their optimizer"
    supported = (
        "FAR supports linear layers in floating point, embeddings, norms, convolutions and modules with parameters of "
        "their own."
    )

    # -- choice of modules ------------------------------------------------------------------------------------------

    def _resolve_targets(self, config: FARConfig, model: nn.Module) -> set[str]:
        self._found, self._lost = adaptable(model)
        return super()._resolve_targets(config, model)

    def _found_targets(self, config: FARConfig, model: nn.Module) -> list[str]:
        every = config.target_modules is None
        return [name for name, module in self._found.items() if every or is_linear(module)]

    def _complete_targets(self, config: FARConfig, model: nn.Module, chosen: set[str]) -> set[str]:
        everything = config.target_modules is None
        chosen = self._with_sharers(config, chosen)
        modules = {name: module for name, module in walk(model) if name in chosen}
        pairs = feed_forwards(model)
        if config.ffn_modules is not None:
            pairs = named_feed_forwards(model, config.ffn_modules)
        elif pairs:
            config.write("ffn_modules", patterns_of(pairs))
        self._check_modules(modules, {name for pair in pairs for name in pair.names})
        self._far_targets = lay_out_targets(model, config, modules, pairs)
        self._owners: dict[int, FARLayer] = {}
        if everything:
            if not any(target.nodes for target in self._far_targets.values()):
                raise ValueError(_no_pair(model, config))
            if not config.inference_mode:
                self._warn_of_frozen(model)
        if not config.inference_mode:
            self._warn_of_trl(model)
        return set(self._far_targets)

    def _warn_of_trl(self, model: nn.Module) -> None:
        """TRL's trainers end in an error about `target_modules`, which the user may never have set."""
        head = output_embeddings(model) if "trl" in sys.modules else None
        names = [name for name, module in self._found.items() if module is head and name in self._far_targets]
        if names:
            warnings.warn(
                f"FAR trains the LM head ({names[0]}) as well, and TRL's trainers refuse an adapter there: they read "
                "its weight without calling it. For TRL leave it out, with the embeddings: "
                "FARConfig(train_embeddings=False).",
                stacklevel=2,
            )

    def _warn_of_frozen(self, model: nn.Module) -> None:
        """Name parameters that train although they were frozen before, and those that stay frozen."""
        frozen = [name for name in frozen_on_purpose(model) if name.rpartition(".")[0] in self._far_targets]
        if frozen:
            warnings.warn(
                f"{len(frozen)} parameters (first: {frozen[0]}) were frozen before FAR was added. FAR gives them "
                "trained deltas all the same, as PEFT's tuners do. Leave them out with exclude_modules.",
                stacklevel=2,
            )
        if self._lost:
            warnings.warn(
                f"FAR can't give deltas to {len(self._lost)} parameters of the {type(model).__name__}, which stay "
                f"frozen: {', '.join(self._lost[:5])}{', ...' if len(self._lost) > 5 else ''}.",
                stacklevel=2,
            )

    def _warn_of_left_out(self, config: Any, model: nn.Module) -> None:
        """What FAR leaves out, `_warn_of_frozen` names."""

    def _is_supported(self, module: nn.Module) -> bool:
        base = base_of(module)
        return is_linear(module) or any(p.is_floating_point() for p in base.parameters(recurse=False))

    def _with_sharers(self, config: FARConfig, chosen: set[str]) -> set[str]:
        """A weight that modules share has one delta: all of them are adapted, or none."""
        everything = config.target_modules is None and config.layers_to_transform is None
        names: dict[int, list[str]] = {}
        for name, module in self._found.items():
            for parameter in base_of(module).parameters():
                names.setdefault(id(parameter), []).append(name)
        result = set(chosen)
        for sharers in names.values():
            missing = set(sharers) - chosen
            if len(sharers) > 1 and missing and missing != set(sharers):
                if config.exclude_modules is not None or everything:
                    result -= set(sharers)
                    warnings.warn(
                        f"{' and '.join(sorted(sharers))} share a weight, and {' and '.join(sorted(missing))} is left "
                        "out: none of them is adapted.",
                        stacklevel=2,
                    )
                else:
                    result |= missing
        return result

    def _check_modules(self, modules: dict[str, nn.Module], nodes: set[str]) -> None:
        """Refuse what can't take a dense delta.

        Args:
            nodes: names of the linear layers of FFNs.
        """
        packed = [name for name, module in modules.items() if not _takes_dense(module)]
        if packed:
            more = f" (and to {len(packed) - 1} more)" if len(packed) > 1 else ""
            reason = (
                f"FAR adds a dense delta to {packed[0]}{more}, whose weights are not a floating-point matrix (got "
                f"{stored_as(modules[packed[0]])}). Load the base model in float, without quantisation, or "
            )
            if nodes & set(packed) == nodes & set(modules):
                raise ValueError(
                    f"{reason}train low-rank updates, which a quantised base takes: LearnerConfig(priming_epochs=0) "
                    "or NASLoRAConfig()."
                )
            raise ValueError(
                f"{reason}leave those out: FARConfig(exclude_modules={self._minimal_names(set(packed))})."
            )
        for name, module in modules.items():
            base: Any = base_of(module)
            if any(is_offloaded(part) for part in base.modules()):
                raise ValueError(
                    f"The weights of {name} are offloaded. FAR's deltas are as large as the weights, so there would "
                    "be no room for them either: train low-rank updates, LearnerConfig(priming_epochs=0) or "
                    "NASLoRAConfig()."
                )
            if isinstance(base, nn.Embedding) and base.max_norm is not None:
                raise ValueError(
                    f"The embedding {name} has max_norm={base.max_norm}, which rescales its weights in place while "
                    "they are read. Leave it out with exclude_modules."
                )

    # -- injection --------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("state_dict")
        if given is not None:  # PEFT injects where a file has keys: those that share a delta have none
            held = {key.rsplit(f".{self.prefix}", 1)[0] for key in given}
            own = {n: {id(p) for p in base_of(m).parameters(recurse=False)} for n, m in model.named_modules()}
            shared: set[int] = set().union(*(ids for name, ids in own.items() if name in held))
            sharers = [name for name, ids in own.items() if name not in held and ids & shared]
            kwargs["state_dict"] = {**given, **dict.fromkeys(f"{name}.{self.prefix}shared" for name in sharers)}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _new_layer(self, module: nn.Module, name: str) -> FARLayer:
        if is_linear(module):
            return FARLinear(module)
        if type(base_of(module)) is not nn.Embedding:  # a subclass may scale or shift what it looks up
            return FARModule(module)
        layer = FAREmbedding(module)
        layer.batchless = self._target(name).batchless
        return layer

    def _update_layer(self, layer: Any, adapter: str, config: FARConfig, name: str) -> None:
        layer.update_layer(adapter, config, self._target(name), self._owners)

    def _target(self, name: str) -> Target:
        return self._far_targets.get(name, Target())

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # PEFT warns of tied weights; here they share one delta

    # -- what an adapter costs --------------------------------------------------------------------------------------

    @classmethod
    def values_by_phase(cls, layers: Mapping[str, Any], adapter: str, config: FARConfig) -> dict[str, Values]:
        """All that trains in priming, and what is left of it, whose number the config decides."""

        def values(cut: bool) -> Values:
            count: Counter[str] = Counter()
            for layer in layers.values():
                shapes = {part: tuple(value.shape) for part, value in layer.parts_of(adapter)}
                if layer.holds_nodes(adapter):
                    shapes.update(layer.shapes(adapter, config, cut))
                count.update({part: math.prod(shape) for part, shape in shapes.items()})
            frozen = count["far_rest"] + count["far_bias_rest"]
            indices = count["far_kept"]
            return Values(count.total() - frozen - indices, frozen, indices * torch.int64.itemsize)

        return {PRIMING: values(cut=False), RECONFIGURED: values(cut=True)}

    def _outlines(self, config: FARConfig) -> dict[str, DeltaLayer]:
        uncut = copy.copy(config)
        uncut.reconfigured = False  # there is nothing to cut
        self._owners = {}
        layers = super()._outlines(uncut)
        self._owners = {}
        return layers

    # -- phases -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _named_cuttable(root: nn.Module, adapter: str) -> Iterator[tuple[str, FARLayer]]:
        """Layers that hold weights of FFN nodes, with their names."""
        for name, layer in root.named_modules():
            if isinstance(layer, FARLayer) and layer.holds_nodes(adapter):
                yield name, layer

    @classmethod
    def _cuttable(cls, root: nn.Module, adapter: str) -> Iterator[FARLayer]:
        """The same, without."""
        return (layer for _, layer in cls._named_cuttable(root, adapter))

    @classmethod
    def check_phases(cls, root: nn.Module, adapter: str, config: FARConfig, schedule: Schedule) -> None:
        """There must be nodes to select.

        Raises:
            ScheduleError: no layer of the adapter belongs to an FFN.
        """
        if not any(True for _ in cls._cuttable(root, adapter)):
            raise ScheduleError(f"The adapter {adapter!r}: {_no_pair(root, config)}")

    @classmethod
    def check_learning_rate(cls, adapter: str, config: FARConfig, schedule: Schedule, optimizer: Optimizer) -> None:
        """Priming for one step moves nothing where a warm-up begins at a rate of 0."""
        warms_up = all(group.get("initial_lr") and not group["lr"] for group in optimizer.param_groups)
        if warms_up and schedule.first_steps.get(RECONFIGURED) == 1 and config.selection != "random":
            raise ScheduleError(
                f"The adapter {adapter!r} primes for one step, and the warm-up makes the learning rate of that step "
                "0: nothing would move, so that nodes could not be ranked. Prime for longer, for example "
                "FARConfig(priming_steps=10), or train without a warm-up."
            )

    @classmethod
    def enter_phase(
        cls, root: nn.Module, adapter: str, config: FARConfig, phase: Phase, entry: Entry, training: Training
    ) -> None:
        """Select the nodes, unless that was done (a resumed run, a loaded adapter)."""
        if phase.name != RECONFIGURED or config.reconfigured:
            return
        if isinstance(training.observer, _Steps) and not training.observer.count:
            warnings.warn(
                f"The optimizer that was handed over has made no step in the priming of the adapter {adapter!r}. If "
                "another one trains it, its state will not fit the nodes that are kept: hand that one over, "
                "model.base_model.set_schedule(..., optimizer=optimizer).",
                stacklevel=2,
            )
        units: dict[str, list[FARLayer]] = {}
        for layer in cls._cuttable(root, adapter):
            units.setdefault(layer.far_nodes[adapter].unit, []).append(layer)
        moved = {
            unit: [(layer.value("far_delta", adapter).detach(), layer.far_nodes[adapter]) for layer in members]
            for unit, members in units.items()
        }
        selections = broadcast_choice(select_nodes(config, adapter, moved), training.ranks)
        for unit, members in units.items():
            for layer in members:
                rows = layer.far_nodes[adapter].rows(selections[unit])
                layer.cut(adapter, rows, config.discard_unkept, training.optimizer)
        config.write("reconfigured", True)

    @classmethod
    def observer(cls, root: nn.Module, adapter: str, config: FARConfig, phase: Phase) -> _Steps | None:
        return _Steps() if phase.name == PRIMING else None

    @classmethod
    def restart(cls, root: nn.Module, adapter: str, config: FARConfig, optimizer: Optimizer | None) -> None:
        """All nodes train again, from where they are."""
        for layer in cls._cuttable(root, adapter):
            layer.undo_cut(adapter, optimizer)
        config.write("reconfigured", False)

    @classmethod
    def check_trained(cls, root: nn.Module, adapter: str, config: FARConfig, phase: Phase) -> None:
        """Name modules whose weights did not move while others did, save those that someone froze."""
        deltas = values_of(root, adapter, "far_delta").items()
        idle = [name for name, delta in deltas if delta.requires_grad and not delta.any()]
        if idle and config.init_weights and any(bool(delta.any()) for _, delta in deltas):
            warnings.warn(
                f"Priming moved nothing in {len(idle)} modules of the adapter {adapter!r} (first: {idle[0]}), "
                "while others moved: they had no gradient. The model may have skipped them in each step so far (layer-"
                "drop). If this task never uses them, leave them out with exclude_modules.",
                stacklevel=2,
            )

    @classmethod
    def has_trained(cls, root: nn.Module, adapter: str, config: FARConfig) -> bool:
        layers = [layer for layer in tuner_layers(root) if isinstance(layer, FARLayer)]
        values = [layer.far_rest[adapter] for layer in layers if adapter in layer.far_rest]
        values += values_of(root, adapter, "far_delta").values()
        return config.init_weights and any(bool(value.any()) for value in values if not value.is_meta)

    # -- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def _shapes_in_form_of(
        cls, root: nn.Module, adapter: str, config: FARConfig, state_dict: dict[str, Tensor]
    ) -> Shapes:
        shapes = super()._shapes_in_form_of(root, adapter, config, state_dict)
        cut = any(key.endswith(".far_kept") for key in state_dict)
        if cut != config.reconfigured:
            for name, layer in cls._named_cuttable(root, adapter):
                for part in ("far_kept", "far_rest", "far_bias_rest"):
                    shapes.pop(f"{name}.{part}", None)
                in_form = layer.shapes(adapter, config, cut)
                shapes.update({f"{name}.{layer.file_key(part)}": shape for part, shape in in_form.items()})
        return shapes

    @classmethod
    def _indices(cls, root: nn.Module, adapter: str, config: FARConfig) -> dict[str, Indices]:
        layers = cls._named_cuttable(root, adapter)
        return {f"{n}.far_kept": Indices(n, "kept rows or columns", layer.length(adapter)) for n, layer in layers}

    @classmethod
    def _check_values(
        cls, root: nn.Module, adapter: str, config: FARConfig, state_dict: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> None:
        super()._check_values(root, adapter, config, state_dict, whole)
        chosen: dict[str, tuple[str, Tensor]] = {}
        for name, layer in cls._named_cuttable(root, adapter):
            kept, nodes = state_dict.get(f"{name}.far_kept"), layer.far_nodes[adapter]
            if kept is None or kept.is_meta or kept.dim() != 1:  # told by its shape
                continue
            kept = kept.to("cpu", torch.int64)
            first, selection = chosen.setdefault(nodes.unit, (name, kept[: len(kept) // nodes.copies]))
            if not torch.equal(nodes.rows(selection), kept):
                raise ValueError(
                    f"The checkpoint does not fit the adapter {adapter!r}: {name} must keep the nodes that {first} "
                    f"keeps, got {kept.tolist()[:8]} and {selection.tolist()[:8]}. Nothing was loaded."
                )

    @classmethod
    def _fit_to_file(
        cls,
        root: nn.Module,
        adapter: str,
        config: FARConfig,
        state_dict: dict[str, Tensor],
        optimizer: Optimizer | None,
    ) -> None:
        if config.reconfigured:
            cls.restart(root, adapter, config, optimizer)
            return
        for layer in cls._cuttable(root, adapter):
            rows = torch.arange(layer.kept_rows(adapter, config), device="cpu")
            layer.cut(adapter, rows, config.discard_unkept, optimizer)
        config.write("reconfigured", True)


def _takes_dense(module: nn.Module) -> bool:
    if is_linear(module):
        return float_weight(module) is not None
    floats = (p for p in base_of(module).parameters() if p.is_floating_point())
    return all(is_plain_float(p) for p in floats)


def _no_pair(model: nn.Module, config: FARConfig) -> str:
    kind, pairs = type(model).__name__, feed_forwards(model)
    names = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
    narrowed = {name: getattr(config, name) for name in names if getattr(config, name)}
    if pairs and narrowed:
        return (
            f"none of the {len(pairs)} feed-forward pairs of the {kind} (first: {' and '.join(pairs[0].names)}) is "
            f"among the modules that {narrowed} leave in, so FAR has no nodes to select."
        )
    return (
        f"FAR found no feed-forward pair in the {kind} (linear layers d -> h and h -> d with an activation between), "
        "so there are no nodes to select. Name the layers, the last being the one that leads out: "
        "FARConfig(ffn_modules=[['fc_in', 'fc_out']]). Only linear layers have nodes (fused experts have none)."
    )
