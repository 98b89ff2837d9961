"""Which modules of a model an adapter is put on: by structure, or by the names that the user gives."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _find_minimal_target_modules,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, NoMatchingPeftModuleError
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import PhasedConfig
from .heads import short, warn_of_rest, whole_modules
from .modules import is_linear, is_norm, linear_names, norm_names, original_of, stacked_parameters, walk
from .weights import base_of, float_weight, is_offloaded, sizes, stored_as

#: Ranks and hidden sizes up to this are right on layers of any size.
ALWAYS_RIGHT = 1024


class TargetChoice(BaseTuner):
    """The part of a tuner that chooses modules: by structure, or by names. A subclass defines `_found_targets`."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]
    #: Sentence of an error: what `_is_supported` takes.
    supported: ClassVar[str] = ""

    def _found_targets(self, config: Any, model: nn.Module) -> list[str]:
        """The modules to adapt as the model's structure tells them: where `target_modules` is None or 'all-linear'."""
        raise NotImplementedError

    def _new_layer(self, module: nn.Module, name: str) -> nn.Module:
        """A tuner layer, still without adapters, to stand in for a module of the model."""
        raise NotImplementedError

    def _complete_targets(self, config: Any, model: nn.Module, chosen: set[str]) -> set[str]:
        """All modules to adapt: the chosen ones and what goes with them (norms, biases); may complete the config."""
        explicit = names_modules(config.target_modules)
        if not chosen and explicit:
            return chosen  # PEFT says that all was excluded
        if not chosen:
            raise NoMatchingPeftModuleError(self._nothing_left(config, model))
        norms = norm_names(model) if getattr(config, "train_norms", False) else []
        targets = chosen | self._names_among(config, norms)
        if not explicit:
            self._write_targets(config, targets)
        return targets

    def _nothing_left(self, config: Any, model: nn.Module) -> str:
        """Sentence of an error: structure tells no module to adapt, or the config leaves none of those in."""
        return f"{type(config).__name__} leaves no module of the model to adapt."

    def _resolve_targets(self, config: Any, model: nn.Module) -> set[str]:
        """Names of all modules to adapt."""
        refuse_unfit_head(model, list(config.modules_to_save or ()))
        if names_modules(config.target_modules):
            chosen = self._named_targets(config, model)
        else:
            chosen = self._names_among(config, self._found_targets(config, model))
        return self._complete_targets(config, model, chosen)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, PhasedConfig)
        given = list(peft_config.modules_to_save or [])
        kind, by_structure = type(peft_config).__name__, peft_config.target_modules is None
        named = names_modules(peft_config.target_modules)
        elsewhere = self._named_elsewhere(peft_config)
        saved, apart = whole_modules(self.model, given, elsewhere, self._own_names(), kind)
        if saved != given:
            peft_config.write("modules_to_save", saved)
        excluded = peft_config.exclude_modules
        if excluded and not isinstance(excluded, str):
            names = [name for name, _ in walk(self.model)]
            lost = sorted(e for e in excluded if not any(is_named(name, e) for name in names))
            if lost:
                warnings.warn(f"exclude_modules={lost} match no module of the model.", stacklevel=2)
        self._targets: set[str] = set()
        if peft_config.target_modules != DUMMY_TARGET_MODULES:
            self._targets = self._resolve_targets(peft_config, self.model)
            modules = dict(walk(self.model))
            for name in sorted(self._targets):
                self._check_size(peft_config, name, modules[name])
        if not peft_config.inference_mode:
            if not named:
                self._warn_of_left_out(peft_config, self.model)
            warn_of_rest(self.model, saved, apart, self._targets | elsewhere, by_structure, kind)
        return peft_config

    def _hidden_size(self, config: Any, name: str) -> tuple[str, int]:
        """The field that says how large an adapter is on a linear layer, and what it says; 0 where it says nothing."""
        return "", 0

    def _check_size(self, config: Any, name: str, module: nn.Module) -> None:
        """Refuse a rank that no layer needs, before anything is allocated.

        Raises:
            ValueError: it is above the layer's own sizes, and large.
        """
        field, size = self._hidden_size(config, name) if is_linear(module) else ("", 0)
        if size > ALWAYS_RIGHT and size > max(sizes(module)):
            inputs, outputs = sizes(module)
            raise ValueError(
                f"{type(config).__name__}: `{field}` must be at most {max(inputs, outputs, ALWAYS_RIGHT)} on {name}, "
                f"which has {inputs} inputs and {outputs} outputs ({ALWAYS_RIGHT} is right on any layer), got {size}."
            )

    def _warn_of_left_out(self, config: PhasedConfig, model: nn.Module) -> None:
        """Name what an adapter would be put on, were it linear layers. For where the user names no modules."""
        found = stacked_parameters(model)
        holders = self._names_among(config, sorted({name.rpartition(".")[0] for name in found})) - self._targets
        left = {name: p.numel() for name, p in found.items() if name.rpartition(".")[0] in holders}
        if left:
            last = sorted({name.rpartition(".")[2] for name in left})
            warnings.warn(
                f"{type(config).__name__} leaves {len(left)} parameters of the {type(model).__name__}, with "
                f"{sum(left.values()):,} entries, as they are: {short(list(left))}. They belong to no linear layer, "
                "where an adapter of this kind would go. PEFT's LoRA adapts fused experts: "
                f"LoraConfig(target_parameters={last}).",
                stacklevel=2,
            )

    def _named_elsewhere(self, config: PhasedConfig) -> set[str]:
        """Modules that the config excludes, or names as targets by their whole names."""
        targets = () if isinstance(config.target_modules, str) else config.target_modules or ()
        excluded = config.exclude_modules or ()
        return {name for name, _ in walk(self.model) if name and (name in targets or matches(name, excluded))}

    def _own_names(self) -> set[str]:
        """Names of the modules in the tuner's layers."""
        examples = [nn.Linear(1, 1, device="meta"), nn.LayerNorm(1, device="meta")]  # no random numbers are drawn
        return {name for module in examples for name, _ in self._new_layer(module, "").named_children()}

    def _matches(self, config: PhasedConfig, key: str) -> Any:
        """PEFT's own rule for target_modules, exclude_modules, layers_to_transform and modules_to_save. Falsy for what
        is left out; where it is excluded, in a way that PEFT knows."""
        return check_target_module_exists(config, key)

    def _names_among(self, config: PhasedConfig, names: list[str]) -> set[str]:
        """Those of `names` (found by structure) that exclude_modules and layers_to_transform leave in."""
        # A bare full name would bypass layers_to_transform in PEFT's rule: match by last component.
        probe = copy.copy(config)
        probe.target_modules = {name.rpartition(".")[2] for name in names}
        found = set()
        for name in names:
            # Top-level names match exactly in PEFT's rule, which skips the layer check: they lie in no layer.
            if "." not in name and config.layers_to_transform is not None:
                continue
            result = self._matches(probe, name)
            # PEFT saves every module whose name *ends* like this whole.
            saved = any(name.endswith(ending) for ending in config.modules_to_save or ())
            if result and not saved:
                found.add(name)
        return found

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        if key in self._targets:
            return True
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return False
        if peft_config.target_modules is None:  # all that structure says; PEFT wants to hear what was excluded
            return self._matches(peft_config, key) if matches(key, peft_config.exclude_modules or ()) else False
        result = self._matches(peft_config, key)
        return False if result else result  # what is excluded is falsy

    def _is_supported(self, module: nn.Module) -> bool:
        """Whether the tuner has a layer that can stand in for this module."""
        return is_linear(module) or is_norm(module)

    def _named_targets(self, config: PhasedConfig, model: nn.Module) -> set[str]:
        """The modules that the user's target_modules name, less the excluded ones."""
        chosen, modules = set(), dict(walk(model))
        for name, module in modules.items():
            result = self._matches(config, name) if name else None
            if not result:
                continue
            parent = modules.get(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                raise ValueError(
                    f"Target module {name} lies inside a torch.nn.MultiheadAttention, which reads its weight without "
                    "calling it, so that an adapter there would have no effect. Leave it out of `target_modules`."
                )
            if not self._is_supported(module):
                kind = type(base_of(module)).__name__
                raise ValueError(f"Target module {name} ({kind}) is not supported. {self.supported}")
            chosen.add(name)
        given = config.target_modules or ()
        if isinstance(given, str):
            return chosen
        lost = [name for name in given if not any(is_named(module, name) for module in modules)]
        if not chosen and len(lost) == len(given):
            last = sorted({name.rpartition(".")[2] for name in linear_names(model)})
            raise NoMatchingPeftModuleError(
                f"Target modules {given} not found in the base model. Its linear layers are named {', '.join(last)}; "
                "leave `target_modules` out to adapt them all."
            )
        if chosen and lost:
            warnings.warn(f"target_modules={sorted(lost)} match no module of the model.", stacklevel=2)
        return chosen

    def _minimal_names(self, names: set[str]) -> list[str] | str:
        """The shortest suffixes that match exactly these modules, as PEFT condenses long lists of targets; a regex
        where one's whole name is the end of another's."""
        every = [name for name, _ in walk(self.model) if name]
        return target_names(sorted(names), every) if names else []

    def _write_targets(self, config: PhasedConfig, names: set[str]) -> None:
        """Let the config name exactly these modules, so that a saved one finds them again."""
        found = self._minimal_names(names)
        if isinstance(found, str):  # PEFT allows no choice of layers beside a regex, and this one has made it
            config.write("layers_to_transform", None)
            config.write("layers_pattern", None)
        config.write("target_modules", found if isinstance(found, str) else set(found) or None)


def is_all_linear(given: object) -> bool:
    """Whether `target_modules` asks for every linear layer."""
    return isinstance(given, str) and given.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def names_modules(given: object) -> bool:
    """Whether `target_modules` names modules, so that structure has no say."""
    return given is not None and not is_all_linear(given)


def is_named(module_name: str, name: str) -> bool:
    """Whether PEFT lets `name` stand for the module: its whole name, or the end of it."""
    return module_name == name or module_name.endswith(f".{name}")


def matches(module_name: str, given: str | Iterable[str]) -> bool:
    """Whether a regex, or one of several names, stands for the module."""
    if isinstance(given, str):
        return re.fullmatch(given, module_name) is not None
    return any(is_named(module_name, name) for name in given)


def refuse_unfit_head(model: nn.Module, trained_whole: list[str]) -> None:
    """Modules that are trained whole need float weights that stay where they are.

    Raises:
        ValueError: a linear layer in them is quantised or offloaded.
    """
    for name, module in walk(model):
        if not matches(name, trained_whole):
            continue
        for part in original_of(module).modules():
            last = name.rpartition(".")[2]
            whole = f"{name} is trained whole (the model's head, and what modules_to_save names), but its weights are "
            if is_linear(part) and float_weight(part) is None:
                raise ValueError(
                    f"{whole}quantised (got {stored_as(part)}). Leave it in float when the base model is quantised: "
                    f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{last!r}]), or with other methods "
                    f"modules_to_not_convert=[{last!r}]."
                )
            if is_offloaded(part):
                raise ValueError(f"{whole}offloaded. Keep it on a device: device_map={{..., {name!r}: 0}}.")


def target_names(names: list[str], modules: Collection[str]) -> list[str] | str:
    """The shortest endings that match exactly these modules, or a regex where there are none.

    Args:
        modules: names of all modules of the base model.
    """
    others = {name for name in modules if name} - set(names)
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(re.escape(name) for name in sorted(names))  # PEFT wants the whole name to match
    return sorted(_find_minimal_target_modules(names, others)) if others else sorted(names)


def rank_patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """Those ranks that differ from the usual one, by keys that PEFT reads as regexes for the ends of names.

    Args:
        ranks: of all targets. Keys are whole names; anchored and escaped if one of them fits another target, too.
    """
    names = [name for name, rank in ranks.items() if rank != usual]
    plain = all(get_pattern_key(names, name) == name for name in ranks)
    return {name if plain else f"^{re.escape(name)}": ranks[name] for name in names}


def saved_names(names: list[str], modules: Collection[str]) -> tuple[list[str], list[str]]:
    """Names for `modules_to_save`, and the other modules that they match too: PEFT takes all that end like them."""
    others = [m for m in modules if m and m not in names and any(m.endswith(name) for name in names)]
    return sorted(names), others
