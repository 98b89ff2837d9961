"""An adapter of this package as a LoRA adapter: low-rank updates, biases (`lora_bias`), the rest whole."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Union

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import PhasedConfig
from ..layers.base import DeltaLayer
from ..ops.low_rank import Factored
from ..phases.driver import injected_model
from ..structure.modules import is_linear
from ..structure.targets import rank_patterns, saved_names, target_names
from ..structure.weights import float_weight
from .contents import (
    Whole,
    checked_rank,
    config_of,
    factors_of,
    nothing_on_one_layer,
    padded,
    refuse_to_lose,
    refuse_unreadable,
    whole_module,
)

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
    """A Learner, FAR or NAS-LoRA adapter as a LoRA adapter.

    - Low-rank updates (Learners, NAS-LoRA) are taken over as they are. A `scaling` other than 1 goes into
      `lora_alpha`, or, beside biases, into B. Ranks of which pruning has left nothing are dropped. Biases become
      `lora_bias`; norms and head are stored whole, as `modules_to_save`. This is exact.
    - Dense updates (primed layers of a Learner with their low-rank part, FAR's linear layers) become the nearest
      update of a rank: a truncated SVD.
    - Other modules (FAR's embeddings and convolutions) are stored whole, as norms are.

    Args:
        model: a `PeftModel`, or a model with an injected adapter.
        rank: for dense updates alone. An int is the rank. A float in (0, 1] is the share of the energy (the sum of
            squared singular values) that each module keeps.
        adapter_name: which adapter.
        strict_serving: for servers that know only LoRA's A and B on linear layers. What they don't take (biases, whole
            modules) is refused. All modules get one rank, padded with zeros.

    Raises:
        ValueError: no such adapter, or one that is merged or offloaded, or inside torch's own encoder layers; dense
            updates without a `rank`; with `strict_serving`, what would be lost.
        NotImplementedError: an adapter that is not linear (`BottleneckConfig`).
    """
    root = injected_model(model)
    config = config_of(root, adapter_name)
    rank = checked_rank(rank)
    modules = dict(root.named_modules(remove_duplicate=False))  # T5's embeddings have three names
    layers = {n: m for n, m in modules.items() if isinstance(m, DeltaLayer) and m.has_adapter(adapter_name)}
    refuse_unreadable(modules, layers)
    linear = {name: layer for name, layer in layers.items() if is_linear(layer) and layer.is_active(adapter_name)}
    pairs, biases, scaling = factors_of(linear, adapter_name, config, rank)
    whole = {
        name: own
        for name, layer in layers.items()
        if name not in linear and layer.is_active(adapter_name)
        if (own := whole_module(layer, adapter_name)) is not None
    }
    whole |= {
        name: Whole(wrapper.modules_to_save[adapter_name].state_dict())
        for name, wrapper in modules.items()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
    }
    if strict_serving:
        refuse_to_lose(config, biases, whole)
        widest = max((pair.rank for pair in pairs.values()), default=1)
        pairs, biases = {name: padded(pair, widest) for name, pair in pairs.items()}, {}
    if not pairs:  # a LoRA adapter has at least one target
        pairs = nothing_on_one_layer(root)
    # PEFT divides alpha by the rank, and multiplies `lora_bias` by what comes out, in some places.
    inexact = any(scaling * pair.rank / pair.rank != scaling for pair in pairs.values())
    if scaling != 1 and (biases or not scaling or inexact):
        pairs, scaling = {name: replace(pair, b=pair.b * scaling) for name, pair in pairs.items()}, 1.0
    return _assemble(root, config, pairs, biases, whole, scaling)


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
        model: as for `to_lora`, as are all that follow.
        rank: of dense updates, or the share of their energy.
        adapter_name: which adapter.
        strict_serving: refuse what servers that know only LoRA's A and B don't take.
    """
    export = to_lora(model, rank, adapter_name, strict_serving=strict_serving)
    export.save_pretrained(path)
    return export


def _assemble(
    root: nn.Module,
    config: PhasedConfig,
    pairs: Mapping[str, Factored],
    biases: Mapping[str, Tensor],
    whole: Mapping[str, Whole],
    scaling: float,
) -> LoraExport:
    modules = _originals(root)
    state: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = pair.a, pair.b
        if biases:
            state[f"{name}.lora_B.bias"] = biases.get(name, pair.b.new_zeros(len(pair.b)))
    save, others = saved_names(list(whole), modules)
    stored = {**whole, **{name: Whole(modules[name].state_dict()) for name in others}}
    for name, own in stored.items():
        state |= {f"{name}.{key}": value for key, value in own.values.items()}
    ranks = {name: pair.rank for name, pair in pairs.items()}
    most = Counter(ranks.values()).most_common(1)[0][0]
    patterns = rank_patterns(ranks, most)
    transposed = {isinstance(modules[name], Conv1D) for name in pairs}
    lora = LoraConfig(
        r=most,
        lora_alpha=_alpha(scaling, most),
        target_modules=target_names(list(pairs), modules),
        rank_pattern=dict(patterns),
        alpha_pattern={name: _alpha(scaling, own) for name, own in patterns.items()},
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
    rows = []
    for name, pair in pairs.items():
        count = pair.a.numel() + pair.b.numel() + (len(pair.b) if biases else 0)
        rows.append(ExportedModule(name, "low_rank", pair.rank, name in biases, count, pair.error == 0, pair.error))
    rows += [
        ExportedModule(name, "whole", 0, False, sum(v.numel() for v in own.values.values()), own.error == 0, own.error)
        for name, own in stored.items()
    ]
    # Copies, since safetensors takes no tensors that share memory.
    copies = {_PREFIX + key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    return LoraExport(lora, copies, rows, _notes(pairs, biases, stored, modules))


def _alpha(scaling: float, rank: int) -> Any:
    """LoRA's alpha: a whole number where it is one, as others expect."""
    alpha = scaling * rank
    return int(alpha) if alpha == int(alpha) else alpha


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
