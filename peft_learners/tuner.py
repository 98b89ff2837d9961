"""What the models of all tuners share: phases, injection, mixed batches, weighted sums, unloading, saving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch
from peft import PeftConfig, PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .checkpoint import (
    Indices,
    Shapes,
    before_next_load,
    missing_parts,
    refuse_foreign,
    refuse_indices,
    refuse_missing,
    refuse_other_form,
    refuse_shapes,
    refuse_types,
    warn_not_finite,
    without_others,
)
from .config import PhasedConfig
from .costs import FLOAT32, PhaseCost, Values, phase_costs, saved_copies, to_be_saved, warn_of_costs
from .layers.base import (
    BASE_ADAPTER,
    OUTLINE,
    DeltaLayer,
    check_adapter_name,
    check_mergeable,
    tuner_layers,
)
from .layers.whole import leave_to_tuner, names_in_model
from .phases.driver import Entry, PhaseDriver, PhaseStart, Training, injected_model, warn_if_never_driven
from .phases.optimizer import Observer
from .phases.schedule import Phase, Schedule
from .registry import tuner_of
from .structure.modules import walk
from .structure.targets import TargetChoice
from .structure.weights import base_of, shape_of
from .wrapping import original_model, put_back_empty, take_out

if TYPE_CHECKING:
    from .weighted_sum import Combined


#: Attribute of a model: the adapter whose file, which was checked, is about to be loaded.
_FROM_FILE = "_peft_learners_from_file"


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _check_state(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Called before a state dict is loaded into a model with adapters, by whatever tool."""
    from_file = root.__dict__.pop(_FROM_FILE, None)
    if any(hasattr(parameter, "_fsdp_flattened") for parameter in root.parameters()):
        return  # FSDP1 has the shapes of shards
    for adapter, config in getattr(root, "peft_config", {}).items():
        if not isinstance(config, PhasedConfig):
            continue
        tuner = tuner_of(config)
        keys = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
        keys = {key: full for key, full in keys.items() if tuner._is_own(key, adapter)}
        given = {key: tuple(state[full].shape) for key, full in keys.items() if state[full].numel()}
        if given:
            own = tuner._shapes_by_key(root, adapter)
            missing = missing_parts(own, keys, partial(tuner._part_of, adapter=adapter))
            # Of a whole file they were ignored on demand; a trained adapter may have them, frozen, as they are.
            known = adapter == from_file or (missing and _has_frozen(root, adapter, config, missing))
            refuse_other_form(own, given, adapter, () if known else missing)


def _has_frozen(root: nn.Module, adapter: str, config: Any, keys: list[str]) -> bool:
    trained = {name for name, _ in root.named_parameters()}
    return trained.isdisjoint(keys) and tuner_of(config).has_trained(root, adapter, config)


def _no_change(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


class PhasedModel(TargetChoice):
    """Base class of this package's tuners.

    A subclass sets `prefix` and `tuner_layer_cls` and defines `_found_targets`, `_new_layer` and `_update_layer`.

    Args:
        model: the model to adapt.
        peft_config: the method's config, or `{adapter name: config}`.
        adapter_name: the adapter's name.
    """

    #: Whether it merges deltas into a weight that several modules use as what they all compute with.
    merges_shared_weights: ClassVar[bool] = False
    #: Why a training with a boundary ahead must hand over its optimizer (predicate of a sentence); "": it need not.
    needs_optimizer: ClassVar[str] = ""
    #: Whether it reads gradients as the optimizer does, before its steps.
    reads_gradients: ClassVar[bool] = False
    #: Whether parameters have other shapes after a boundary (see `reshapes`).
    cuts_parameters: ClassVar[bool] = False
    _to_merge: list[str] | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        model = original_model(model, type(config).__name__)
        take_out(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    # -- phases -----------------------------------------------------------------------------------------------------

    def set_schedule(
        self,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        *,
        global_step: int = 0,
        optimizer: object = None,
        wrapper: nn.Module | None = None,
        stop_at_boundary: bool = False,
    ) -> list[PhaseStart]:
        """Lay the adapter's phases over the training that is about to begin. Call it in loops without `PhaseCallback`.

        Args:
            total_steps: optimizer steps of the whole training.
            steps_per_epoch: optimizer steps of one epoch (batches divided by accumulation steps).
            global_step: optimizer steps that a resumed run has finished. The boundaries that the adapter's config
                remembers stay as they are.
            optimizer: the one that trains the adapter, or accelerate's wrapper of it. FAR, NAS-LoRA and Learners that
                fold need it while a boundary lies ahead, because its state changes with the parameters. For other
                Learners it frees the state of what freezes.
            wrapper: with several processes, what forward is called on: the model as `DistributedDataParallel` or
                `accelerator.prepare` returned it. DDP is rebuilt at the start and at each boundary. Any other module
                (FSDP, an engine) is left alone.
            stop_at_boundary: the loop ends at the next boundary and saves the adapter there. One that an engine can't
                cross is left to the next training, of the adapter as it was saved: call `prepare_optimizer()` then,
                before the engine takes the model.

        Raises:
            ScheduleError: fewer steps than the phases need, nothing to train in one of them, a merged adapter, an
                optimizer or wrapper that is needed and was not handed over, or an engine that can't cross a boundary.
        """
        return PhaseDriver.of(self).start(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            global_step=global_step,
            optimizer=optimizer,
            wrappers=() if wrapper is None else (wrapper,),
            stops=stop_at_boundary,
        )

    def update_and_allocate(self, global_step: int) -> list[PhaseStart]:
        """Move on to the next phase if it begins here. Call it after each `optimizer.step()`, with the step counted.

        Args:
            global_step: finished optimizer steps.

        Returns:
            The phases that begin here; usually none.
        """
        return PhaseDriver.of(self).update(global_step)

    def prepare_optimizer(self) -> None:
        """Let all parts train that train in any phase, as the optimizer's state in a checkpoint does.

        Call it in a loop that resumes, after the adapter is loaded and before the optimizer is made. If the last
        training stopped at a boundary, call it before FSDP or DeepSpeed takes the model: the boundary is crossed here.
        `PhaseCallback` does this by itself.
        """
        PhaseDriver.of(self).prepare()

    def finish_phases(self) -> None:
        """Say that the training is over, in loops that end before the `total_steps` of `set_schedule`, or gave none.

        Until then a saved adapter counts as a checkpoint, which `save_dtype` leaves in full precision.
        """
        PhaseDriver.of(self).finish()

    def restart_phases(self) -> None:
        """Let the active adapters go through all their phases again in the next training.

        Parameters that a boundary made smaller grow again. The optimizer that was handed over to the last training
        drops its state for them. Make any other optimizer anew.
        """
        PhaseDriver.of(self).restart()

    @classmethod
    def check_phases(cls, root: nn.Module, adapter: str, config: Any, schedule: Schedule) -> None:
        """Refuse a schedule that the injected adapter can't follow.

        Raises:
            ScheduleError: for instance a phase whose own parts exist in no layer.
        """

    @classmethod
    def check_learning_rate(
        cls, adapter: str, config: Any, schedule: Schedule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse a learning rate, in a training from the start, that a phase can't do with, or warn of it.

        Raises:
            ScheduleError: a phase of one step, whose rate is 0.
        """

    @classmethod
    def why_optimizer(cls, config: Any) -> str:
        """Why a training with a boundary ahead must hand over its optimizer (predicate of a sentence); "": no need."""
        return cls.needs_optimizer

    @classmethod
    def reshapes(cls, config: Any) -> bool:
        """Whether a boundary of the adapter gives parameters other shapes or values, which engines can't follow."""
        return cls.cuts_parameters

    @classmethod
    def check_trained(cls, root: nn.Module, adapter: str, config: Any, phase: Phase) -> None:
        """Called when `phase` ends: warn if it could not train what it was there for."""

    @classmethod
    def enter_phase(
        cls, root: nn.Module, adapter: str, config: Any, phase: Phase, entry: Entry, training: Training
    ) -> None:
        """Change the adapter's layers for a phase that begins, before its parts are frozen. On all ranks alike.

        Args:
            entry: "new": a training begins in this phase; "resumed": it goes on there, with the adapter loaded;
                "crossed": a boundary was reached. What was done already must not be done again.
            training: what it handed over: the optimizer, whose state is resized with parameters, and DDP.
        """

    @classmethod
    def observer(cls, root: nn.Module, adapter: str, config: Any, phase: Phase) -> Observer | None:
        """What is to be called right before each optimizer step in this phase, if anything.

        A tuner that observes says why in `needs_optimizer`.
        """
        return None

    @classmethod
    def make_whole(cls, root: nn.Module, adapter: str, config: Any) -> None:
        """Let every parameter exist that ever trains, so that an optimizer has the groups of a run's beginning."""
        for layer in tuner_layers(root):
            layer.make_whole(adapter)

    @classmethod
    def restart(cls, root: nn.Module, adapter: str, config: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Undo what `enter_phase` did, so that the first phase can begin again.

        Args:
            optimizer: that the last training handed over, if it is still there.
        """

    @classmethod
    def has_trained(cls, root: nn.Module, adapter: str, config: Any) -> bool:
        """Whether training has moved what an earlier phase trains (to tell a fresh adapter from a trained one)."""
        return False

    # -- what an adapter costs ---------------------------------------------------------------------------------------

    @classmethod
    def values_by_phase(cls, layers: Mapping[str, Any], adapter: str, config: Any) -> dict[str, Values]:
        """What an adapter has in its layers, trained and frozen, in each of its phases, as far as that is known.

        By default what its config counts by the shapes of all its values (`trained_by_phase`), and at most all of them
        in a phase of which it can't tell.

        Args:
            layers: by name: those of a model, or outlines of them (`_outline_layer`).
        """
        shapes = {
            f"{name}.{part}.{i}": tuple(value.shape)
            for name, layer in layers.items()
            for i, (part, value) in enumerate(layer.parts_of(adapter))
        }
        every = sum(map(math.prod, shapes.values()))
        counts = config.trained_by_phase(shapes)
        return {
            phase: Values(every, at_most=True) if own is None else Values(own, every - own)
            for phase, own in counts.items()
        }

    def costs_by_phase(self, adapter_name: str | None = None) -> list[PhaseCost]:
        """What an adapter trains, holds in training and saves in each of its phases.

        Args:
            adapter_name: the adapter; by default the first active one.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        layers = {place: layer for place, layer in self.model.named_modules() if isinstance(layer, DeltaLayer)}
        own = {place: layer for place, layer in layers.items() if layer.has_adapter(name)}
        values = [value for layer in own.values() for _, value in layer.parts_of(name) if value.numel()]
        count, held = sum(v.numel() for v in values), sum(v.numel() * v.element_size() for v in values)
        config: Any = self.peft_config[name]
        by_phase = self.values_by_phase(own, name, config)
        return phase_costs(by_phase, config, saved_copies(self.model, name), held / count if count else FLOAT32)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line of trained parameters with the phase that they are of, and a line for each phase.

        `PeftModel.print_trainable_parameters()` prints the same number without a word of phases: call this one,
        `model.base_model.print_trainable_parameters()`.

        A phase's line has the parameters that train in it (the head among them), the bytes that training holds for the
        adapter (of each trained parameter the value, the gradient and AdamW's two moments; of what is frozen the
        value), and the bytes of the file. "now" marks the phase that the adapter is in.
        """
        model: Any = self.model
        trained, every = PeftModel.get_nb_trainable_parameters(model)
        configs = [(name, self.peft_config.get(name)) for name in self.active_adapters]
        phased = [(name, config) for name, config in configs if isinstance(config, PhasedConfig)]
        phases = {c.present_phase for _, c in phased if len(c.phase_names) > 1 and not c.inference_mode}
        line = f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}"
        print(f"{line} || in the phase {' and '.join(map(repr, sorted(phases)))}" if phases else line)
        for name, config in phased:
            now = "" if config.inference_mode else config.present_phase
            for cost in self.costs_by_phase(name):
                mark = " (now)" if cost.phase == now else ""
                print(f"{name}, {cost.phase}{mark}: {cost}")

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = super()._prepare_adapter_config(peft_config, model_config)
        assert isinstance(config, PhasedConfig)
        if self._targets and not config.inference_mode:  # nothing is allocated yet
            values = self.values_by_phase(self._outlines(config), OUTLINE, config)
            warn_of_costs(config, self.model, phase_costs(values, config, to_be_saved(self.model, config)))
        return config

    def _outlines(self, config: Any) -> dict[str, DeltaLayer]:
        """The layers of an adapter that is about to be made, without memory for what it has in them."""
        layers = {}
        with torch.device("meta"):
            for name, module in walk(self.model):
                if name in self._targets:
                    layers[name] = self._new_layer(base_of(module), name)
                    self._outline_layer(layers[name], config, name)
        return layers

    def _outline_layer(self, layer: Any, config: Any, name: str) -> None:
        """Put into a layer that serves for counting alone what a new adapter would have there.

        For a tuner whose `_update_layer` does more than make parameters.
        """
        self._update_layer(layer, OUTLINE, config, name)

    # -- injection --------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        assert isinstance(config, PhasedConfig)
        check_adapter_name(adapter_name)
        source = config.claim(model, adapter_name)
        if _check_state not in [getattr(h, "hook", None) for h in model._load_state_dict_pre_hooks.values()]:
            model.register_load_state_dict_pre_hook(_check_state)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        leave_to_tuner(model, adapter_name)
        put_back_empty(model)
        config.write("target_modules", config.target_modules)  # PEFT may have condensed it
        PhaseDriver.of(model)  # it notices when the model is copied
        if source is not None:
            for layer in tuner_layers(model):
                if layer.has_adapter(source) and layer.has_adapter(adapter_name):
                    layer.copy_frozen(source, adapter_name)

    def _new_layer(self, module: nn.Module, name: str) -> DeltaLayer:
        """A tuner layer, still without adapters, to stand in for a module of the model."""
        raise NotImplementedError

    def _update_layer(self, layer: Any, adapter: str, config: Any, name: str) -> None:
        """Create what a new adapter has in one of the tuner's layers."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        layer: Any = target
        if not isinstance(target, self.tuner_layer_cls):
            layer = self._new_layer(target, current_key)
            layer._active_adapter = adapter_name
        self._check_size(peft_config, current_key, target)  # targets from a state dict were not known before
        self._update_layer(layer, adapter_name, peft_config, current_key)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path in eval reads weights without calling their layers, but not where a hook is to be called.
            layer.register_forward_pre_hook(_no_change)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `weight` onto what it unwraps, and fails on heads made of several linear layers.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype:  # PEFT's casts parameters alone
            for layer in tuner_layers(self.model):
                layer.cast_frozen(adapter_name)

    # -- mixed batches ----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        modules = [m for m in self.modules() if isinstance(m, (DeltaLayer, AuxiliaryTrainingWrapper))]
        layers = [module for module in modules if isinstance(module, DeltaLayer)]
        known = {name for layer in layers for name in layer._all_available_adapter_names()}
        unknown = set(adapter_names) - known - {BASE_ADAPTER}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) and beams > 1 else 1
        # Beam search repeats the rows of the decoder, but an encoder sees the original ones.
        get_encoder = getattr(self.model, "get_encoder", None)
        encoder = get_encoder() if beams > 1 and get_encoder is not None else None
        inside = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=list(adapter_names) if module in inside else repeated),
                with_kwargs=True,
            )
            for module in modules
        ]
        for layer in layers:
            layer.in_mixed_batch = True
        try:
            yield
        finally:
            for layer in layers:
                layer.in_mixed_batch = False
            for handle in handles:
                handle.remove()

    # -- weighted sums ----------------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose update is `sum_i weights[i] * update_i`, in its last phase, frozen and not active.

        Biases, norms and dense deltas are summed. As in PEFT, no two of the adapters may have a copy of the same whole
        module (a head).

        Args:
            adapters: names of adapters of the model.
            weights: one for each.
            adapter_name: name of the new adapter.
            combination_type: "svd" (PEFT's default): low-rank updates become the nearest one of rank `svd_rank`;
                "cat": they are put side by side, exact, and their ranks add up.
            svd_rank: by default the largest rank among the adapters, layer by layer.

        Raises:
            ValueError: two adapters with a copy of the same module, or an argument that can't be right.
            NotImplementedError: the sum of such adapters is not an adapter of their kind.
        """
        from .weighted_sum import add_combined  # few ask for it, and each import delays all

        add_combined(self, adapters, weights, adapter_name, combination_type, svd_rank)

    def _config_of_sum(self, configs: list[Any], found: Combined) -> tuple[PhasedConfig, Combined]:
        """Config of an adapter that holds a sum, and of the sum what it holds."""
        raise NotImplementedError(
            f"add_weighted_adapter: the weighted sum of {type(configs[0]).__name__} adapters is not an adapter of "
            "that kind. Use them together (model.base_model.set_adapter([...]) adds them up), or export each to LoRA "
            "(peft_learners.export) and combine there."
        )

    def _take_sum(self, adapter: str, found: Combined) -> None:
        """Give the parameters of an injected adapter the values of a sum."""
        raise NotImplementedError

    # -- unloading and saving ---------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for config in self.peft_config.values():
            if isinstance(config, PhasedConfig) and config.unmergeable:  # whatever is active, or named
                raise NotImplementedError(config.unmergeable)
        names = [name for name in self._to_merge or self.active_adapters if name in self.peft_config]
        check_mergeable(self.model, names, self.merges_shared_weights)
        for name in names:
            warn_if_never_driven(self.model, name, self.peft_config[name], "merged")

    @contextmanager
    def _merging(self, adapter_names: list[str] | None) -> Iterator[None]:
        """PEFT's check before merging is not told which adapters it is about."""
        self._to_merge = adapter_names
        try:
            yield
        finally:
            self._to_merge = None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        with self._merging(adapter_names):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unload(self) -> nn.Module:
        """The original model, bit for bit, its original head too (adapters that are merged are unmerged first)."""
        for module in self.model.modules():
            if isinstance(module, DeltaLayer) and module.merged:
                module.unmerge()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module._active_adapter = []
        return super().unload()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = list(tuner_layers(self.model))
        with self._merging(adapter_names):
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.let_go()
        PhaseDriver.forget(model)
        hooks = model._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _check_state]:
            del hooks[key]
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: list[str]
    ) -> dict[str, torch.Tensor]:
        found = dict(state_dict)
        # PEFT leaves out each key that has another adapter's name in it, even as that of a module, or none at all.
        others = tuple(f".{name}." for name in unwanted_adapter_names)
        if others:  # under FSDP1 a state is gathered by all ranks, and one saves
            found |= {key: value for key, value in model.state_dict().items() if any(name in key for name in others)}
        empty = cls._empty_keys(model, adapter_name)
        own = {key: value for key, value in found.items() if cls._is_own(key, adapter_name) and key not in empty}
        values = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in own.items()}
        driver = PhaseDriver.find(model)
        warn_if_never_driven(model, adapter_name, config, "saved")
        if config.save_dtype is not None and not (driver is not None and driver.running):
            dtype = getattr(torch, config.save_dtype)
            values = {key: v.to(dtype) if v.is_floating_point() else v for key, v in values.items()}
        return values

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        names = names_in_model(model, adapter_name)
        given = {names.get(key, key): value for key, value in state_dict.items()}
        state_dict = cls._without_aside(adapter_name, given)
        expected = cls._shapes_in_form_of(model, adapter_name, config, state_dict)
        refuse_foreign(expected, cls.prefix, adapter_name, state_dict.keys() - set(names.values()))
        refuse_missing(names, adapter_name, state_dict)
        state = model.state_dict()
        whole = {full: state[full] for full in names.values() if full in state}
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        state_dict = without_others(model, adapter_name, {*expected, *whole}, state_dict)
        cls._check_values(model, adapter_name, config, state_dict, whole)
        if expected != cls._own_shapes(model, adapter_name):
            # before the adapter changes its form
            shapes = {key: tuple(value.shape) for key, value in whole.items()}
            refuse_shapes({**expected, **shapes}, adapter_name, state_dict, whole, labels)
            driver = PhaseDriver.find(model)
            optimizer = driver.optimizer if driver is not None else None
            cls._fit_to_file(model, adapter_name, config, state_dict, optimizer)
            if driver is None or not driver.prepared:
                for layer in tuner_layers(model):
                    layer.drop_empty(adapter_name)
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )

        # Shapes are checked when loading begins, after `ignore_mismatched_sizes` has had its say, and before anything
        # is copied: torch itself copies what fits and raises afterwards.
        marked = injected_model(model).__dict__

        def check_shapes(values: dict[str, torch.Tensor]) -> None:
            shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            try:
                refuse_shapes(shapes, adapter_name, values, whole, labels)
            except ValueError:
                marked.pop(_FROM_FILE, None)
                raise
            cls._take_aside(model, adapter_name, config, given)

        before_next_load(model, check_shapes)
        marked[_FROM_FILE] = adapter_name
        return remapped

    @classmethod
    def _check_values(
        cls,
        root: nn.Module,
        adapter: str,
        config: Any,
        state_dict: dict[str, torch.Tensor],
        whole: dict[str, torch.Tensor],
    ) -> None:
        """Refuse values in a file that can't be, and name those that are not finite.

        Args:
            whole: the model's values of the modules that the adapter saves whole.
        """
        indices = cls._indices(root, adapter, config)
        refuse_types(indices.keys(), whole, adapter, state_dict)
        refuse_indices(indices, adapter, state_dict)
        warn_not_finite(adapter, state_dict)

    @classmethod
    def _without_aside(cls, adapter: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values in a file less those that are no part of the model's state, once these were checked."""
        return state_dict

    @classmethod
    def _take_aside(cls, root: nn.Module, adapter: str, config: Any, state_dict: dict[str, torch.Tensor]) -> None:
        """Take those values from a file; called as soon as nothing can be refused any more."""

    @classmethod
    def _indices(cls, root: nn.Module, adapter: str, config: Any) -> dict[str, Indices]:
        """What indices the adapter's file may hold, by name."""
        return {}

    @classmethod
    def _own_shapes(cls, root: nn.Module, adapter: str) -> Shapes:
        """What a file of this adapter, as it is now, holds."""
        shapes = cls._shapes_by_key(root, adapter).items()
        return {cls._remove_adapter_name_from_key(key, adapter): shape for key, shape in shapes}

    @classmethod
    def _shapes_by_key(cls, root: nn.Module, adapter: str) -> Shapes:
        """The same by the keys of the model's state dict."""
        empty = cls._empty_keys(root, adapter)
        own = ((key, value) for key, value in root.state_dict(keep_vars=True).items() if cls._is_own(key, adapter))
        return {key: tuple(shape_of(value)) for key, value in own if key not in empty}

    @staticmethod
    def _empty_keys(root: nn.Module, adapter: str) -> set[str]:
        """Keys of parameters that are there for an optimizer alone, which is yet to be made."""
        layers = [(name, layer) for name, layer in root.named_modules() if isinstance(layer, DeltaLayer)]
        return {f"{name}.{key}" for name, layer in layers for key in layer.empty_keys(adapter)}

    @classmethod
    def _is_own(cls, key: str, adapter: str) -> bool:
        """Whether a key of a state dict is an adapter's."""
        return cls._part_of(key, adapter) is not None

    @classmethod
    def _part_of(cls, key: str, adapter: str) -> str | None:
        """The part of an adapter that a key of a state dict is of, `<path>.<prefix><part>.<adapter>` and what follows;
        None if it is not the adapter's. The adapter may be called as some module is."""
        pieces = itertools.pairwise(key.rsplit(".", 3))
        return next((part for part, name in pieces if part.startswith(cls.prefix) and name == adapter), None)

    @classmethod
    def _shapes_in_form_of(
        cls, root: nn.Module, adapter: str, config: Any, state_dict: dict[str, torch.Tensor]
    ) -> Shapes:
        """What a file should hold for this adapter, in the form that this file has (see `_fit_to_file`)."""
        return cls._own_shapes(root, adapter)

    @classmethod
    def _fit_to_file(
        cls,
        root: nn.Module,
        adapter: str,
        config: Any,
        state_dict: dict[str, torch.Tensor],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Bring the adapter into the form that a file holds, if its form changes with its phases. The file fits.

        Args:
            optimizer: of the model's last training, if it is still there.
        """
