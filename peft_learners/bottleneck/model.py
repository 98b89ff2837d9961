"""The model of bottleneck adapters: where adapters go."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from ..structure.attention import attention_output_names
from ..structure.feed_forward import FeedForward, feed_forwards
from ..structure.modules import common_parent, is_linear, is_norm, linear_names, new_head, stacked_parameters, walk
from ..structure.targets import is_all_linear
from ..structure.weights import base_of, sizes
from ..tuner import PhasedModel
from .config import BottleneckConfig
from .layer import BottleneckLayer, BottleneckLinear, BottleneckNorm
from .passing import FeedForwardInput


class BottleneckModel(PhasedModel):
    """Puts bottleneck adapters into a model, behind attentions and feed-forward networks, or beside the latter.

    A block with several feed-forward networks (MobileBERT) gets one for each, and one with two attentions (a T5
    decoder's) one for each of these.

    Example:
        ```py
        >>> from transformers import AutoModelForSequenceClassification, Trainer
        >>> from peft import get_peft_model
        >>> from peft_learners import BottleneckConfig

        >>> model = AutoModelForSequenceClassification.from_pretrained("distilbert-base-uncased")
        >>> model = get_peft_model(model, BottleneckConfig(mode="parallel", task_type="SEQ_CLS"))
        >>> Trainer(model, args, train_dataset=data).train()
        ```
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    supported = (
        "Bottleneck adapters support linear layers (torch.nn.Linear, transformers' Conv1D, quantised ones) and norms "
        "with a weight vector."
    )

    # -- choice of modules ------------------------------------------------------------------------------------------

    def _resolve_targets(self, config: BottleneckConfig, model: nn.Module) -> set[str]:
        self._pairs = {pair.last: pair for pair in feed_forwards(model)}
        return super()._resolve_targets(config, model)

    def _found_targets(self, config: BottleneckConfig, model: nn.Module) -> list[str]:
        return linear_names(model) if is_all_linear(config.target_modules) else self._places(config, model)

    def _complete_targets(self, config: BottleneckConfig, model: nn.Module, chosen: set[str]) -> set[str]:
        if config.mode == "parallel":
            self._refuse_elsewhere(model, chosen)
        return super()._complete_targets(config, model, chosen)

    def _places(self, config: BottleneckConfig, model: nn.Module) -> list[str]:
        """The layers behind which adapters go by default."""
        if config.mode == "parallel":
            return list(self._pairs)
        attentions = attention_output_names(model, linear_names(model))
        fused = bool(stacked_parameters(model))  # experts are named with what other methods leave out, too
        for found, what in (
            (attentions, "output projection of an attention"),
            (self._pairs or fused, "feed-forward network"),
        ):
            if not found and (attentions or self._pairs):
                warnings.warn(
                    f"No {what} was found in the {type(model).__name__}: no adapter is put there. If it has one, name "
                    "the linear layers that adapters should follow: BottleneckConfig(target_modules=[...]).",
                    stacklevel=2,
                )
        return [*attentions, *self._pairs]

    def _refuse_elsewhere(self, model: nn.Module, chosen: set[str]) -> None:
        modules = dict(walk(model))
        lost = sorted(n for n in chosen if is_linear(modules[n]) and n not in self._pairs)
        if lost:
            known = f"target_modules={self._names_of_last()}" if self._pairs else "none were found in this model"
            raise ValueError(
                "BottleneckConfig: with mode='parallel', `target_modules` must name linear layers that lead out of a "
                f"feed-forward network ({known}), got {lost[0]}. Leave `target_modules` out to put an adapter beside "
                "each, or take mode='sequential', which can follow any linear layer."
            )

    def _names_of_last(self) -> str:
        """What to give as `target_modules` for the layers that lead out of feed-forward networks."""
        names = self._minimal_names(set(self._pairs))
        if isinstance(names, list) and len(names) > 1:  # blocks have numbers
            split = [[r"\d+" if part.isdigit() else re.escape(part) for part in n.split(".")] for n in self._pairs]
            regex = "|".join(sorted({r"\.".join(parts) for parts in split}))
            if sum(bool(re.fullmatch(regex, name)) for name, _ in walk(self.model)) == len(self._pairs):
                return f"r'{regex}'"
        return repr(names)

    def _nothing_left(self, config: BottleneckConfig, model: nn.Module) -> str:
        beside = "No feed-forward network" if config.mode == "parallel" else "No attention or feed-forward network"
        if not self._found_targets(config, model):
            return (
                f"{beside} was found in the model. Name linear layers for adapters to follow: "
                "BottleneckConfig(mode='sequential', target_modules=[...])."
            )
        narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        narrowed = {name: getattr(config, name) for name in narrowing if getattr(config, name) is not None}
        head = new_head(model)  # is in modules_to_save by itself
        saved = [name for name in narrowed.pop("modules_to_save", ()) if name not in head]
        if saved:
            narrowed["modules_to_save"] = saved
        return f"{beside} is left to adapt with {narrowed}."

    def _hidden_size(self, config: BottleneckConfig, name: str) -> tuple[str, int]:
        return "bottleneck_dim", config.bottleneck_dim or 0

    # -- injection --------------------------------------------------------------------------------------------------

    def _new_layer(self, module: nn.Module, name: str) -> BottleneckLayer:
        return BottleneckNorm(module) if is_norm(module) else BottleneckLinear(module)

    def _update_layer(self, layer: Any, adapter: str, config: BottleneckConfig, name: str) -> None:
        if isinstance(layer, BottleneckNorm):
            layer.update_layer(adapter, config)
        elif config.mode == "parallel":
            pair = self._pairs[name]
            layer.update_layer(adapter, config, sizes(self.model.get_submodule(pair.first[0]))[0])
        else:
            layer.update_layer(adapter, config, layer.out_features)

    def _create_and_replace(self, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super()._create_and_replace(peft_config, adapter_name, *args, **kwargs)
        name = kwargs["current_key"]
        layer = self.model.get_submodule(name)
        if isinstance(layer, BottleneckLinear) and layer.is_parallel(adapter_name):
            self._connect(layer, self._pairs[name])

    def _connect(self, layer: BottleneckLinear, pair: FeedForward) -> None:
        if layer.bottleneck_input is not None:
            return
        layer.bottleneck_input = FeedForwardInput(layer)
        holder = common_parent((pair.first[0], pair.last))
        while isinstance(self.model.get_submodule(holder), (nn.ModuleList, nn.ModuleDict)):
            holder = holder.rpartition(".")[0]  # those are never called
        first = base_of(self.model.get_submodule(pair.first[0]))
        layer.bottleneck_input.connect(first, self.model.get_submodule(holder))

    # -- what a network can't do ------------------------------------------------------------------------------------

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not for bottleneck adapters.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "add_weighted_adapter: bottleneck adapters are not linear. A weighted sum of their weights is not the sum "
            "of what they do. Use them together: model.base_model.set_adapter([...]) adds them up."
        )
