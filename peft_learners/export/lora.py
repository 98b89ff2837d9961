"""An adapter of this package as a LoRA adapter: low-rank updates, biases (`lora_bias`), the rest whole."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Union

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import PhasedConfig
from ..discovery import float_weight, is_linear, linear_names
from ..factors import Factored, joined, nearest, total, without_idle
from ..layer import DeltaLayer, parameter_at
from ..names import rank_patterns, saved_names, target_names
from ..phases import injected_model

Values = Mapping[str, Tensor]
REPORT_NAME = "export_report.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class ExportedModule:
    """What became of an adapter's part in one module.

    Attributes:
        name: the module's name in the base model.
        kind: "low_rank" or "whole" (by `modules_to_save`).
        rank: of the LoRA update; 0 for a whole module.
        bias: whether it has a bias delta (`lora_bias`).
        parameters: that are stored for it.
        exact: False where a dense update was cut down to its rank.
        error: `||D - B A|| / ||D||` of its weight update D (Frobenius norms); 0.0 where it is exact.
    """

    name: str
    kind: str
    rank: int
    bias: bool
    parameters: int
    exact: bool
    error: float


@dataclass
class LoraExport:
    """A LoRA adapter that was made of another one.

    Attributes:
        config: its config.
        state_dict: its values, by names as in a file.
        modules: what became of each module.
        notes: sentences on what a user of the export should know.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    modules: list[ExportedModule]
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the export computes what the adapter computes, to rounding."""
        return all(module.exact for module in self.modules)

    @property
    def worst(self) -> ExportedModule:
        """The module with the largest error."""
        return max(self.modules, key=lambda module: module.error)

    def save_pretrained(self, path: Union[str, os.PathLike]) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and `export_report.json` (errors by module).

        Raises:
            ValueError: the folder holds an adapter of another kind.
        """
        folder = Path(path)
        there = folder / CONFIG_NAME
        if there.is_file() and (kind := json.loads(there.read_text()).get("peft_type")) != "LORA":
            raise ValueError(
                f"{folder} holds an adapter of type {kind}, which the export would destroy. Name another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        report = {"exact": self.exact, "notes": self.notes, "modules": [asdict(module) for module in self.modules]}
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def to_lora(
    model: nn.Module, rank: float | None = None, adapter_name: str = "default", *, strict_serving: bool = False
) -> LoraExport:
    """A Learner, FAR or NAS-LoRA adapter as a LoRA adapter with scaling 1.

    - Low-rank updates (Learners, NAS-LoRA) are taken over as they are; ranks of which pruning has left nothing are
      left out. With the biases by `lora_bias`, and norms and head whole, by `modules_to_save`, this is exact.
    - Dense updates (primed layers of a Learner together with their low-rank part, FAR's linear layers) become the
      nearest update of a rank: a truncated SVD.
    - Other modules (FAR's embeddings and convolutions) are stored whole, as norms are.

    Args:
        model: a `PeftModel`, or a model with an injected adapter.
        rank: for dense updates alone. An int: the rank; a float in (0, 1]: the share of the energy (the sum of squared
            singular values) that the rank of each module keeps.
        adapter_name: which adapter.
        strict_serving: refuse what servers that know only LoRA's A and B on linear layers don't take (biases, whole
            modules), and give all modules one rank, padded with zeros, since they read one scaling from the config.

    Raises:
        ValueError: no such adapter, or one that is merged or offloaded, or inside torch's own encoder layers; dense
            updates without a `rank`; with `strict_serving`, what would be lost.
    """
    root = injected_model(model)
    config = _config_of(root, adapter_name)
    rank = _checked_rank(rank)
    modules = dict(root.named_modules(remove_duplicate=False))  # T5's embeddings have three names
    layers = {n: m for n, m in modules.items() if isinstance(m, DeltaLayer) and m.has_adapter(adapter_name)}
    _refuse_unreadable(modules, layers)
    linear = {name: layer for name, layer in layers.items() if is_linear(layer) and layer.acts(adapter_name)}
    pairs, biases = _factors(linear, adapter_name, config, rank)
    whole = {
        name: _whole(layer, adapter_name)
        for name, layer in layers.items()
        if name not in linear and layer.acts(adapter_name)
    }
    whole = {name: own for name, own in whole.items() if own.changes}
    whole |= {
        name: Whole(wrapper.modules_to_save[adapter_name].state_dict())
        for name, wrapper in modules.items()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
    }
    if strict_serving:
        _refuse_to_lose(config, biases, whole)
        widest = max((pair.rank for pair in pairs.values()), default=1)
        pairs, biases = {name: _padded(pair, widest) for name, pair in pairs.items()}, {}
    if not pairs:  # a LoRA adapter has at least one target
        pairs = _nothing_on_one_layer(root)
    return _assemble(root, config, pairs, biases, whole)


def save_as_lora(
    path: Union[str, os.PathLike],
    model: nn.Module,
    rank: float | None = None,
    adapter_name: str = "default",
    *,
    strict_serving: bool = False,
) -> LoraExport:
    """`to_lora`, written to a folder that `PeftModel.from_pretrained` loads without this package.

    Args:
        path: the folder.
        model, rank, adapter_name, strict_serving: as for `to_lora`.
    """
    export = to_lora(model, rank, adapter_name, strict_serving=strict_serving)
    export.save_pretrained(path)
    return export


# -- what is in the adapter ------------------------------------------------------------------------------------------


def _config_of(root: nn.Module, adapter: str) -> PhasedConfig:
    configs: Mapping[str, Any] = getattr(root, "peft_config", {})
    ours = [name for name, config in configs.items() if isinstance(config, PhasedConfig)]
    if adapter not in ours:
        raise ValueError(f"adapter_name must be one of this package's adapters in the model {ours}, got {adapter!r}.")
    return configs[adapter]


def _checked_rank(rank: float | None) -> float | None:
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    share = isinstance(rank, Real) and not isinstance(rank, Integral)
    if rank is None or (whole and rank >= 1) or (share and 0 < rank <= 1):
        return int(rank) if whole and rank is not None else rank
    raise ValueError(
        f"rank must be a whole number of at least 1, or a share of the energy in (0, 1] (1.0: all), got {rank!r}."
    )


def _refuse_unreadable(modules: Mapping[str, nn.Module], layers: Mapping[str, DeltaLayer]) -> None:
    """Refuse adapters whose values are not there, or that stock LoRA would not compute with."""
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(
                "The model's weights have adapters merged into them: call `model.unmerge_adapter()` first."
            )
        if any(p.is_meta for p in layer.parameters()):
            raise ValueError(
                f"The weights of {name} are offloaded, or on meta. Load the base model on one device first."
            )
        if isinstance(modules.get(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name} is part of a torch.nn.TransformerEncoderLayer, which in eval mode reads weights without "
                "calling their layers: a LoRA there would have no effect. Merge instead: model.merge_and_unload()."
            )


def _factors(
    layers: Mapping[str, Any], adapter: str, config: PhasedConfig, rank: float | None
) -> tuple[dict[str, Factored], dict[str, Tensor]]:
    """The update of each linear layer as a pair (rank 1, zeros, where there is none), and the biases."""
    found = {name: (*layer.matrices(adapter), layer.bias_delta(adapter)) for name, layer in layers.items()}
    dense = [name for name, (_, deltas, _) in found.items() if any(bool(delta.any()) for delta, _ in deltas)]
    if dense and rank is None:
        raise ValueError(
            f"{len(dense)} of the {len(found)} linear layers of this {type(config).__name__} have trained dense "
            f"updates (first: {dense[0]}), which no LoRA holds exactly. Say how close it should come: rank=64 (the "
            "rank of each such layer) or rank=0.99 (the share of each update's energy to keep)."
        )
    pairs: dict[str, Factored] = {}
    biases: dict[str, Tensor] = {}
    for name, (low_rank, deltas, bias) in found.items():
        if name in dense:
            assert rank is not None
            pair = nearest(total(low_rank, deltas), rank)
        else:
            pair = without_idle(joined(low_rank)) if low_rank else _zeros(layers[name])
        pairs[name] = pair if pair.rank else _zeros(layers[name])
        if bias is not None:
            biases[name] = bias.detach()
    return pairs, biases


def _zeros(layer: Any) -> Factored:
    like = next(layer.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device": like.device}
    return Factored(torch.zeros(1, layer.in_features, **options), torch.zeros(layer.out_features, 1, **options))


def _nothing_on_one_layer(root: nn.Module) -> dict[str, Factored]:
    modules, names = dict(root.named_modules()), linear_names(root)
    if not names:
        raise ValueError("The model has no linear layer that a LoRA adapter could be put on.")
    layer: Any = modules[names[0]]
    if isinstance(layer, Conv1D):
        weight = layer.weight
        return {names[0]: Factored(weight.new_zeros(1, weight.shape[0]), weight.new_zeros(weight.shape[1], 1))}
    return {names[0]: _zeros(layer)}


@dataclass(frozen=True)
class Whole:
    """A module that is stored whole.

    Attributes:
        values: its parameters and buffers.
        changes: whether they differ from the base model's.
        error: `||stored - base - delta|| / ||delta||`, which a base of half precision rounds.
    """

    values: Values
    changes: bool = True
    error: float = 0.0


def _whole(layer: DeltaLayer, adapter: str) -> Whole:
    base: Any = layer.get_base_layer()
    values, lost, moved = dict(base.state_dict()), 0.0, 0.0
    for key, delta in layer.effective_deltas(adapter).items():
        exact = parameter_at(base, key).detach() + delta  # in the wider of both types, as the layer sums
        values[key] = layer.sum_with(base, key, delta, 1)
        lost += float((values[key].double() - exact.double()).square().sum())
        moved += float(delta.double().square().sum())
    return Whole(values, moved > 0, math.sqrt(lost / moved) if moved else 0.0)


def _padded(pair: Factored, rank: int) -> Factored:
    more = rank - pair.rank
    a = torch.cat([pair.a, pair.a.new_zeros(more, pair.a.shape[1])])
    return Factored(a, torch.cat([pair.b, pair.b.new_zeros(len(pair.b), more)], dim=1), pair.error)


def _refuse_to_lose(config: PhasedConfig, biases: Mapping[str, Tensor], whole: Mapping[str, Whole]) -> None:
    lost, fields = [], []
    trained = {name: bias for name, bias in biases.items() if bool(bias.any())}
    if trained:
        count = sum(bias.numel() for bias in trained.values())
        lost.append(f"biases of linear layers ({count:,} parameters in {len(trained)}; first: {next(iter(trained))})")
        fields.append("train_biases=False")
    if whole:
        count = sum(value.numel() for own in whole.values() for value in own.values.values())
        first = ", ".join(list(whole)[:3])
        lost.append(f"what is stored whole ({count:,} parameters in {len(whole)} modules; first: {first})")
        fields += [f"{name}=False" for name in ("train_norms", "train_embeddings") if hasattr(config, name)]
    if lost:
        without = f", or train without them: {type(config).__name__}({', '.join(fields)})" if fields else ""
        raise ValueError(
            f"strict_serving: servers that take A and B of linear layers alone would lose {', and '.join(lost)}. "
            "Serve the merged model instead (model.merge_and_unload()), load an export without strict_serving with "
            f"PEFT{without}."
        )


# -- the LoRA adapter ------------------------------------------------------------------------------------------------


def _assemble(
    root: nn.Module,
    config: PhasedConfig,
    pairs: Mapping[str, Factored],
    biases: Mapping[str, Tensor],
    whole: Mapping[str, Whole],
) -> LoraExport:
    modules = _originals(root)
    state: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = pair.a, pair.b
        if biases:
            state[f"{name}.lora_B.bias"] = biases.get(name, pair.b.new_zeros(len(pair.b)))
    save, others = saved_names(list(whole), modules)
    stored = {**whole, **{name: Whole(modules[name].state_dict(), changes=False) for name in others}}
    for name, own in stored.items():
        state |= {f"{name}.{key}": value for key, value in own.values.items()}
    ranks = {name: pair.rank for name, pair in pairs.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    patterns = rank_patterns(ranks, most)
    transposed = {isinstance(modules[name], Conv1D) for name in pairs}
    lora = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=target_names(list(pairs), modules),
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        lora_bias=bool(biases),
        modules_to_save=save or None,
        fan_in_fan_out=transposed == {True},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    if config.task_type is None:
        base = type(root)
        lora.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    rows = [_row(name, pair, biases.get(name), bool(biases)) for name, pair in pairs.items()]
    rows += [
        ExportedModule(name, "whole", 0, False, sum(v.numel() for v in own.values.values()), own.error == 0, own.error)
        for name, own in stored.items()
    ]
    # Copies, since safetensors takes no tensors that share memory.
    copies = {_PREFIX + key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    return LoraExport(lora, copies, rows, _notes(pairs, biases, stored, modules))


def _notes(
    pairs: Mapping[str, Factored],
    biases: Mapping[str, Tensor],
    stored: Mapping[str, Whole],
    modules: Mapping[str, nn.Module],
) -> list[str]:
    """What a user of the export should know."""
    notes = []
    without = [name for name in pairs if biases and getattr(modules[name], "bias", None) is None]
    if without:
        notes.append(
            f"lora_bias gives {len(without)} targets a bias of zeros that have none in the base model (first: "
            f"{without[0]}): PEFT can't merge the export. Merge the original adapter instead."
        )
    if biases and any(float_weight(modules[name]) is None for name in pairs):
        notes.append(
            "PEFT's LoRA takes no lora_bias on some quantised layers (torchao, HQQ): load it on a float base."
        )
    if any(own.error for own in stored.values()):
        notes.append(
            "What is stored whole is rounded to the base model's type, in which PEFT would hold it anyway: small "
            "changes are lost. With the base model in float32 the export keeps them."
        )
    return notes


def _row(name: str, pair: Factored, bias: Tensor | None, with_biases: bool) -> ExportedModule:
    count = pair.a.numel() + pair.b.numel() + (len(pair.b) if with_biases else 0)
    return ExportedModule(name, "low_rank", pair.rank, bias is not None, count, pair.error == 0, pair.error)


def _originals(root: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by their names in it, without those of adapters."""
    found: dict[str, nn.Module] = {}

    def collect(module: nn.Module, name: str) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        found[name] = module
        for child, inner in module.named_children():
            collect(inner, f"{name}.{child}" if name else child)

    collect(root, "")
    return found
