"""The model of Learners: which layers, what is primed, checks at the boundary."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..checkpoint import Shapes
from ..costs import Values
from ..layers.base import tuner_layers, values_of
from ..phases.driver import Entry, Training, injected_model
from ..phases.schedule import Phase, Schedule, ScheduleError
from ..structure.attention import attention_names
from ..structure.feed_forward import feed_forwards
from ..structure.modules import block_indices, is_linear, is_norm, linear_names, walk
from ..structure.targets import is_named, matches, rank_patterns
from ..structure.weights import float_weight, stored_as
from ..tuner import PhasedModel
from .config import ATTENTION, DENSE_PART, EVERY, FEED_FORWARD, LEARNING, PRIMING, LearnerConfig
from .fold import fold, folding_layers, record_ranks
from .layer import LearnerLayer, LearnerLinear, LearnerNorm

if TYPE_CHECKING:
    from ..weighted_sum import Combined


#: Learning rates of dense weights with Adam: a usual one, and one above which a small encoder learned nothing.
DENSE_RATE, HIGHEST_DENSE_RATE = 1e-4, 5e-4


def _last(names: Iterable[str]) -> list[str]:
    """The last parts of these names."""
    return sorted({name.rpartition(".")[2] for name in names})


class LearnerModel(PhasedModel):
    """Puts Learners on a model: low-rank modules, bias and norm deltas, and a dense delta on the attention to prime.

    Example:
        ```py
        >>> from transformers import AutoModelForSequenceClassification, Trainer
        >>> from peft import get_peft_model
        >>> from peft_learners import LearnerConfig, PhaseCallback

        >>> model = AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
        >>> model = get_peft_model(model, LearnerConfig(r=64, priming_epochs=2, task_type="SEQ_CLS"))
        >>> Trainer(model, args, train_dataset=data, callbacks=[PhaseCallback()]).train()
        ```
    """

    prefix = "learner_"
    tuner_layer_cls = LearnerLayer
    supported = (
        "Learners support linear layers (torch.nn.Linear, transformers' Conv1D, quantised ones) and norms with a "
        "weight vector."
    )

    # -- choice of modules ------------------------------------------------------------------------------------------

    def _found_targets(self, config: LearnerConfig, model: nn.Module) -> list[str]:
        return linear_names(model)

    def _complete_targets(self, config: LearnerConfig, model: nn.Module, chosen: set[str]) -> set[str]:
        targets = super()._complete_targets(config, model, chosen)
        self._primed = self._resolve_priming(config, model, targets) if targets and config.primes else set()
        return targets

    def _nothing_left(self, config: LearnerConfig, model: nn.Module) -> str:
        narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
        narrowed = {name: getattr(config, name) for name in narrowing if getattr(config, name) is not None}
        return "No linear layer of the backbone is left to adapt" + (
            f" with {narrowed}." if narrowed else ": the model has none that a Learner can stand in for."
        )

    def _resolve_priming(self, config: LearnerConfig, model: nn.Module, targets: set[str]) -> set[str]:
        modules = {name: module for name, module in walk(model) if name in targets}
        linears = [name for name, module in modules.items() if is_linear(module)]
        asked: Any = config.priming_modules
        if asked in (ATTENTION, FEED_FORWARD, EVERY) or isinstance(asked[0], int):
            primed = self._found_to_prime(asked, model, linears)
            if primed:
                config.write("priming_modules", self._minimal_names(primed))
        else:
            primed = self._named_to_prime(asked, linears)
        packed = sorted(name for name in primed if float_weight(modules[name]) is None)
        if packed:
            raise ValueError(self._cannot_prime(config, modules, primed, packed))
        return primed

    def _found_to_prime(self, asked: str | list[int], model: nn.Module, linears: list[str]) -> set[str]:
        """Those of `linears` that a word stands for, or the attention of some blocks."""
        if asked == EVERY:
            return set(linears)
        attention = attention_names(model, linears)
        if asked == ATTENTION:
            return set(attention)
        if asked == FEED_FORWARD:
            paired = {name for pair in feed_forwards(model) for name in pair.names}
            if not paired & set(linears):
                outside = [name for name in linears if name not in attention] or linears
                raise ValueError(
                    "LearnerConfig: `priming_modules` can't be 'ffn': no feed-forward pair (linear layers d -> h and "
                    f"h -> d with an activation between) was found among the targets in the {type(model).__name__}. "
                    f"Name the layers: LearnerConfig(priming_modules={_last(outside)})."
                )
            return paired & set(linears)
        blocks = block_indices(model, attention)
        known = sorted(set(blocks.values()))
        lost = [index for index in asked if index not in known]
        if lost:
            there = f"from {known[0]} to {known[-1]}" if known else "none"
            raise ValueError(
                "LearnerConfig: `priming_modules` must hold indices of blocks that have an attention among the "
                f"targets (there are: {there}), got {lost[0]}. Linear layers can be named instead: "
                f"LearnerConfig(priming_modules={_last(linears)})."
            )
        return {name for name, index in blocks.items() if index in asked}

    def _named_to_prime(self, asked: str | list[str], linears: list[str]) -> set[str]:
        """Those of `linears` that the user names."""
        primed = {name for name in linears if matches(name, asked)}
        if isinstance(asked, str):
            lost = [] if primed else [asked]
        else:
            lost = [name for name in asked if not any(is_named(linear, name) for linear in linears)]
        if lost:
            raise ValueError(
                f"LearnerConfig: `priming_modules` must name linear layers among the targets, got {lost[0]!r}, "
                f"which matches none of the {len(linears)} targeted linear layers (named {', '.join(_last(linears))})."
            )
        return primed

    def _cannot_prime(
        self, config: LearnerConfig, modules: dict[str, nn.Module], primed: set[str], packed: list[str]
    ) -> str:
        by_steps, more = config.priming_steps is not None, len(packed) - 1
        reason = (
            (f"priming_steps={config.priming_steps}" if by_steps else f"priming_epochs={config.priming_epochs}")
            + f" adds a dense delta to {packed[0]}{f' (and {more} more)' if more else ''}, whose weights are not a "
            f"floating-point matrix (got {stored_as(modules[packed[0]])}). "
        )
        if config.completed_phases:
            return (
                f"{reason}This adapter was primed on a base model in float: load that one (merge the adapter there "
                "and quantise what comes out), or train a Learner with LearnerConfig(priming_epochs=0)."
            )
        floats = primed - set(packed)
        if floats:
            names = self._minimal_names(floats)
            return (
                f"{reason}Prime float layers only, LearnerConfig(priming_modules={names}), or none: priming_epochs=0."
            )
        return f"{reason}Do without priming: LearnerConfig(priming_epochs=0)."

    def _hidden_size(self, config: LearnerConfig, name: str) -> tuple[str, int]:
        return config.rank_of(name)

    # -- injection --------------------------------------------------------------------------------------------------

    def _new_layer(self, module: nn.Module, name: str) -> LearnerLayer:
        return LearnerNorm(module) if is_norm(module) else LearnerLinear(module)

    def _update_layer(self, layer: Any, adapter: str, config: LearnerConfig, name: str) -> None:
        if isinstance(layer, LearnerLinear):
            layer.update_layer(adapter, config, name, primed=name in self._primed)
        else:
            layer.update_layer(adapter, config)
        if PRIMING in config.completed_phases:
            layer.freeze_parts(adapter, (DENSE_PART,))

    # -- weighted sums ----------------------------------------------------------------------------------------------

    def _config_of_sum(self, configs: list[Any], found: Combined) -> tuple[LearnerConfig, Combined]:
        ranks = {name: pair.rank for name, pair in found.low_rank.items()}
        most = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        config = replace(
            configs[0],
            init_weights=True,
            r=most,
            rank_pattern=rank_patterns(ranks, most),
            scaling=1.0,
            learner_dropout=0.0,
            target_modules=self._minimal_names(found.names),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            train_biases=any(name in found.low_rank for name in found.biases),
            train_norms=False,  # those that have deltas are named
            priming_modules=self._minimal_names(set(found.dense)) or ATTENTION,
            priming_epochs=1 if found.dense else 0,
            priming_steps=None,
            priming_lr_scale=1.0,
            after_priming="keep",
            fold_rank=None,
            kept_energy=None,
            completed_phases=[PRIMING] if found.dense else [],
            phase_first_steps=None,
        )
        return config, found

    def _take_sum(self, adapter: str, found: Combined) -> None:
        parts = {
            "learner_P1": {name: pair.a for name, pair in found.low_rank.items()},
            "learner_P2": {name: pair.b for name, pair in found.low_rank.items()},
            DENSE_PART: found.dense,
            "learner_bias_delta": found.biases,
            "learner_layernorm_delta": found.norms,
        }
        for part, values in parts.items():
            for name, value in values.items():
                layer: Any = self.model.get_submodule(name)
                layer.leaf(part, adapter).set(value.clone())

    # -- phases -----------------------------------------------------------------------------------------------------

    @classmethod
    def values_by_phase(cls, layers: Mapping[str, Any], adapter: str, config: LearnerConfig) -> dict[str, Values]:
        """With the dense deltas that train in priming and, later, are frozen or gone; at the ranks of each phase."""
        first = last = dense = 0
        for layer in layers.values():
            count = sum(value.numel() for part, value in layer.parts_of(adapter) if part != DENSE_PART)
            first, last = first + count, last + count
            if isinstance(layer, LearnerLinear) and layer.learner_primed[adapter]:
                sizes = (layer.in_features, layer.out_features)
                dense += math.prod(sizes)
                rank = layer.learner_r[adapter]
                if config.is_folded:  # its rank in priming is not known any more
                    first += max(0, config.r - rank) * sum(sizes)
                if config.after_priming == "fold" and not isinstance(config.fold_rank, float):
                    last += (min(config.fold_rank or rank, *sizes) - rank) * sum(sizes)
        if not config.primes:
            return {LEARNING: Values(last)}
        if config.after_priming == "keep":
            return {PRIMING: Values(first + dense), LEARNING: Values(last, dense)}
        unknown = isinstance(config.fold_rank, float) and not config.is_folded
        return {PRIMING: Values(first + dense, at_most=config.is_folded), LEARNING: Values(last, at_most=unknown)}

    @classmethod
    def enter_phase(
        cls, root: nn.Module, adapter: str, config: LearnerConfig, phase: Phase, entry: Entry, training: Training
    ) -> None:
        """Fold the dense deltas into the factors where priming is over, if the adapter is to go on without them."""
        if phase.name != LEARNING or config.after_priming != "fold" or not folding_layers(root, adapter):
            return
        if entry == "resumed":
            raise ScheduleError(
                f"The training is resumed in the phase {phase.name!r}, but the adapter {adapter!r} is not folded yet. "
                "Load the checkpoint's adapter first."
            )
        fold(root, adapter, config, training)

    @classmethod
    def why_optimizer(cls, config: LearnerConfig) -> str:
        folds = "folds its dense deltas at its boundary, and drops what the optimizer holds of the old factors"
        return folds if config.after_priming == "fold" else ""

    @classmethod
    def reshapes(cls, config: LearnerConfig) -> bool:
        return config.after_priming == "fold"

    @classmethod
    def restart(cls, root: nn.Module, adapter: str, config: LearnerConfig, optimizer: Optimizer | None) -> None:
        """Primed layers that were folded get a dense delta again, of zeros; their factors stay as they are."""
        for layer in tuner_layers(root):
            if isinstance(layer, LearnerLinear) and layer.learner_primed.get(adapter):
                layer.take_form(adapter, layer.learner_r[adapter], True, optimizer)
        config.write("kept_energy", None)

    @classmethod
    def check_phases(cls, root: nn.Module, adapter: str, config: LearnerConfig, schedule: Schedule) -> None:
        """Priming needs something to prime.

        Raises:
            ScheduleError: the schedule has a priming phase, and no layer of the adapter a dense delta.
        """
        primes = PRIMING in schedule.first_steps
        if primes and not any(getattr(layer, "learner_primed", {}).get(adapter) for layer in tuner_layers(root)):
            raise ScheduleError(
                f"The adapter {adapter!r} is to be primed (priming_epochs={config.priming_epochs}), but none of its "
                "layers belongs to an attention, so that there is nothing to prime. Name the layers, "
                "LearnerConfig(priming_modules=[...]), or do without: LearnerConfig(priming_epochs=0)."
            )

    @classmethod
    def check_learning_rate(
        cls, adapter: str, config: LearnerConfig, schedule: Schedule, optimizer: Optimizer
    ) -> None:
        """Warn of a rate at which dense weights don't learn with Adam."""
        rate = max(float(group.get("initial_lr") or group["lr"]) for group in optimizer.param_groups)
        primed = config.priming_lr_scale * rate
        if "Adam" in type(optimizer).__name__ and primed > HIGHEST_DENSE_RATE and PRIMING in schedule.first_steps:
            warnings.warn(
                f"The adapter {adapter!r} primes dense weights at a learning rate of {primed:.2g}: {rate:.2g} times "
                f"priming_lr_scale={config.priming_lr_scale:g}. They want one of full fine-tuning's size; above "
                f"{HIGHEST_DENSE_RATE:g} a small encoder learned nothing. Lower it: "
                f"LearnerConfig(priming_lr_scale={DENSE_RATE / rate:.1g}).",
                stacklevel=2,
            )

    @classmethod
    def check_trained(cls, root: nn.Module, adapter: str, config: LearnerConfig, phase: Phase) -> None:
        """Name primed layers that did not move while others did, save those that someone froze."""
        thetas = values_of(root, adapter, DENSE_PART).items()
        idle = [name for name, theta in thetas if theta.requires_grad and not theta.any()]
        others_moved = any(p2.any() for p2 in values_of(root, adapter, "learner_P2").values())
        if phase.name == PRIMING and config.init_weights and idle and others_moved:
            warnings.warn(
                f"Priming moved nothing in {len(idle)} layers of the adapter {adapter!r} (first: {idle[0]}), "
                "while others moved: they had no gradient. The model may have skipped them in each step so far (layer-"
                "drop), or not need them for this task; or it reads their weights without calling them, and then a "
                "Learner there has no effect. In the latter cases leave them out with exclude_modules.",
                stacklevel=2,
            )

    @classmethod
    def has_trained(cls, root: nn.Module, adapter: str, config: LearnerConfig) -> bool:
        moved = values_of(root, adapter, "learner_P2" if config.is_folded else DENSE_PART)
        return config.init_weights and any(bool(value.any()) for value in moved.values())

    # -- loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def _forms_in(
        cls, root: nn.Module, adapter: str, config: LearnerConfig, state_dict: dict[str, Tensor]
    ) -> dict[str, tuple[int, bool]]:
        """`{primed layer: (rank, whether it has a dense delta)}` in a file, for an adapter that is to be folded."""
        found = {}
        for name, layer in root.named_modules() if config.after_priming == "fold" else ():
            if isinstance(layer, LearnerLinear) and layer.learner_primed.get(adapter):
                p1 = state_dict.get(f"{name}.{layer.file_key('learner_P1')}")
                rank = len(p1) if p1 is not None and p1.dim() == 2 and len(p1) else layer.learner_r[adapter]
                found[name] = rank, f"{name}.{layer.file_key(DENSE_PART)}" in state_dict
        return found

    @classmethod
    def _shapes_in_form_of(
        cls, root: nn.Module, adapter: str, config: LearnerConfig, state_dict: dict[str, Tensor]
    ) -> Shapes:
        shapes = super()._shapes_in_form_of(root, adapter, config, state_dict)
        forms = cls._forms_in(root, adapter, config, state_dict)
        folded = not any(dense for _, dense in forms.values())
        for name, (rank, _) in forms.items():
            layer: Any = root.get_submodule(name)
            shapes[f"{name}.{layer.file_key('learner_P1')}"] = (rank, layer.in_features)
            shapes[f"{name}.{layer.file_key('learner_P2')}"] = (layer.out_features, rank)
            shapes.pop(f"{name}.{layer.file_key(DENSE_PART)}", None)
            if not folded:
                shapes[f"{name}.{layer.file_key(DENSE_PART)}"] = (layer.out_features, layer.in_features)
        return shapes

    @classmethod
    def _fit_to_file(
        cls,
        root: nn.Module,
        adapter: str,
        config: LearnerConfig,
        state_dict: dict[str, Tensor],
        optimizer: Optimizer | None,
    ) -> None:
        forms = cls._forms_in(root, adapter, config, state_dict)
        for name, (rank, dense) in forms.items():
            layer: Any = root.get_submodule(name)
            layer.take_form(adapter, rank, dense, optimizer)
        folded = not any(dense for _, dense in forms.values())
        config.write("completed_phases", [PRIMING] if folded else [])
        config.write("kept_energy", None)  # the file's config knows
        for layer in tuner_layers(root):
            layer.freeze_parts(adapter, ())
        record_ranks(injected_model(root), adapter, config)
