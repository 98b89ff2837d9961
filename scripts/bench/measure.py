"""What the benchmark measures: variants that take their steps in turn, bytes and flops counted, paired ratios."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from scripts.glue import run_record

#: Rounds before those that count: caches fill, and optimizers make their state.
WARMUP_ROUNDS = 2
#: What a step's time is split into.
TIMES = ("step", "forward_backward", "optimizer")
BYTES = ("stored", "parameters", "gradients", "optimizer", "total")
#: How often an adapter is saved and loaded.
SAVES = 3

Rows = dict[str, torch.Tensor]


def _none() -> Iterable[torch.Tensor]:
    return ()


@dataclass
class Variant:
    """One way to train or to call a model, ready to take steps.

    Attributes:
        optimizer: None: a step is a forward pass without gradients.
        settings: fields of its config that tell it from others.
        phase: of its training.
        saves: whether saving and loading its adapter is of interest.
        after_step: belongs to a step, and to its time; called before gradients are zeroed.
        around: what is to hold while it takes a step; entering and leaving it takes none of the step's time.
        state: tensors that it keeps for training outside the model and the optimizer.
    """

    model: torch.nn.Module
    optimizer: Optional[torch.optim.Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)
    phase: str = "training"
    saves: bool = False
    after_step: Optional[Callable[[], object]] = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    state: Callable[[], Iterable[torch.Tensor]] = _none
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})


# -- steps and their time ------------------------------------------------------------------------------------------


def take_step(variant: Variant, rows: Rows) -> dict[str, float]:
    """One optimizer step, or one forward pass where there is no optimizer; returns its seconds."""
    device, optimizer = rows["input_ids"].device, variant.optimizer
    with variant.around():
        start = _clock(device)
        if optimizer is None:
            with torch.no_grad():
                variant.model(**rows)
            return {"step": _clock(device) - start}
        variant.model(**rows).loss.backward()
        middle = _clock(device)
        optimizer.step()
        if variant.after_step is not None:
            variant.after_step()
        optimizer.zero_grad()
        end = _clock(device)
    return {"step": end - start, "forward_backward": middle - start, "optimizer": end - middle}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def order_of(names: Sequence[str], number: int) -> list[str]:
    """The order of a round, a row of a Williams square: over as many rounds as there are variants (twice as many where
    their number is odd) each stands in each place equally often, and follows each other one equally often."""
    count = len(names)
    places = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2 ...
    order = [names[(place + number) % count] for place in places]
    return order[::-1] if count % 2 and number % 2 else order


def take_rounds(variants: dict[str, Variant], rows: Rows, rounds: int) -> None:
    """Let all variants take a step per round and note its seconds."""
    names = list(variants)
    for number in range(-WARMUP_ROUNDS, rounds):
        for name in order_of(names, number):
            for part, seconds in take_step(variants[name], rows).items():
                if number >= 0:
                    variants[name].seconds[part].append(round(seconds, 7))


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """`q1`, `median` and `q3`; of a single value, the value."""
    if len(values) == 1:
        return {"q1": values[0], "median": values[0], "q3": values[0]}
    found = statistics.quantiles(values, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def ratios(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of two series, taken round by round."""
    return quartiles([a / b for a, b in zip(own, reference, strict=True)])


def time_ratios(own: Variant, reference: Variant) -> dict[str, dict[str, float]]:
    """Ratios of the times that both have, by part of the step."""
    pairs = {part: (own.seconds[part], reference.seconds[part]) for part in TIMES}
    return {part: ratios(*pair) for part, pair in pairs.items() if all(pair)}


# -- bytes ---------------------------------------------------------------------------------------------------------


def _model_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():  # SHiRA's positions, which are no buffers
        yield from getattr(module, "shira_indices", {}).values()


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Sizes by address; a sparse tensor has a storage for its indices and one for its values."""
    dense = (
        t for tensor in tensors for t in ((tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,))
    )
    storages = (tensor.untyped_storage() for tensor in dense)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure_bytes(variant: Variant, rows: Rows) -> dict[str, int]:
    """Bytes that a step holds: `stored`, `parameters`, `gradients`, `optimizer` and their sum, `total`.

    `stored` is what autograd keeps from forward for backward. What the model holds anyway (its parameters, buffers
    and SHiRA's positions) does not count there, and tensors that lie in one storage count once, whole.
    """
    stored: dict[int, int] = {}
    gradients = state = 0
    own = _storages(_model_tensors(variant.model))
    if (optimizer := variant.optimizer) is not None:

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            stored.update(_storages([tensor]))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = variant.model(**rows).loss
        loss.backward()
        gradients = sum(p.grad.nbytes for p in variant.model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        kept = (value for entry in optimizer.state.values() for value in entry.values())
        state = sum(value.nbytes for value in (*kept, *variant.state()) if isinstance(value, torch.Tensor))
    counted = {
        "stored": sum(size for address, size in stored.items() if address not in own),
        "parameters": sum(own.values()),
        "gradients": gradients,
        "optimizer": state,
    }
    return {**counted, "total": sum(counted.values())}


def peak_step_bytes(variant: Variant, rows: Rows) -> Optional[int]:
    """The most that a step allocates beyond what stays between steps, as CUDA's allocator saw it; None on the CPU."""
    device = rows["input_ids"].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    take_step(variant, rows)
    return torch.cuda.max_memory_allocated(device) - before


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that require a gradient, shared ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def saving(variant: Variant, base: torch.nn.Module) -> dict[str, Any]:
    """Size of the adapter's file, and the seconds to save it and to load it onto a fresh copy of the base model."""
    if not variant.saves:
        return {"adapter_file_bytes": None, "save_seconds": None, "load_seconds": None}
    save: list[float] = []
    load: list[float] = []
    model: Any = variant.model
    for _ in range(SAVES):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            model.save_pretrained(folder)
            save.append(time.perf_counter() - start)
            size, fresh = run_record.saved_bytes(Path(folder)), copy.deepcopy(base)
            start = time.perf_counter()
            PeftModel.from_pretrained(fresh, folder)
            load.append(time.perf_counter() - start)
    return {"adapter_file_bytes": size, "save_seconds": save, "load_seconds": load}


# -- flops ---------------------------------------------------------------------------------------------------------

_aten = torch.ops.aten
#: Formulas, from shapes, of what torch's counter passes over: products that are added to a tensor in place, and the
#: CPU's kernel for scaled dot products.
_FORMULAS = {
    _aten.addmm_: lambda out, a, b, **_: mm_flop(a, b),
    _aten.baddbmm_: lambda out, a, b, **_: bmm_flop(a, b),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
_MATRIX_PRODUCTS = {"aten.mm", "aten.addmm", "aten.addmm_"}


def count_flops(function: Callable[[], object]) -> dict[str, int]:
    """Flops of a call (two per multiplication): of products of two matrices, and of `attention`, that is, of products
    in batches and of the kernels of scaled dot products."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        function()
    by_operator = counter.get_flop_counts().get("Global", {})
    products = sum(count for operator, count in by_operator.items() if str(operator) in _MATRIX_PRODUCTS)
    return {"matrix_products": products, "attention": sum(by_operator.values()) - products}


def step_flops(variant: Variant, rows: Rows) -> dict[str, int]:
    """Flops of forward and backward; of forward where nothing trains."""

    def step() -> None:
        if variant.optimizer is None:
            with torch.no_grad():
                variant.model(**rows)
        else:
            variant.model(**rows).loss.backward()

    counted = count_flops(step)
    variant.model.zero_grad()
    return counted


def bound_flops(base: torch.nn.Module, learner: Any, rows: Rows) -> int:
    """Flops of matrix products that training low-rank updates on a model's linear layers can't do without.

    These are those of training a bias on each of the layers (forward, and backward to activations as far as needed:
    `4 N` per row and layer of N weights; the new head trains whole), plus the gradients of A: (r, d) and B: (h, r):
    `4 rho N` per row, with `rho N = r (d + h)`, or by way of the weight's gradient `2 N` per row and `4 r N`, which is
    less for large ranks.

    Args:
        base: the model without adapters.
        learner: a copy with Learners on the layers, and on norms if these count as trained: before the first layers
            they need a gradient that nothing else does.
    """
    plain, inner = copy.deepcopy(base).requires_grad_(False), learner.base_model.model
    for name, module in inner.named_modules():
        if hasattr(module, "modules_to_save"):
            plain.get_submodule(name).requires_grad_(True)
    ranks: dict[torch.nn.Module, int] = {}
    low_rank = 0

    def stand_in(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """A bias is added, whether the layer has one or not."""
        nonlocal low_rank
        if layer in ranks:
            count, (d, h), r = (
                inputs[0].numel() // layer.in_features,
                (layer.in_features, layer.out_features),
                ranks[layer],
            )
            low_rank += min(4 * r * (d + h) * count, 2 * d * h * count + 4 * r * d * h)
        return output + torch.zeros(1, dtype=output.dtype, device=output.device, requires_grad=True)

    for name in learner.targeted_module_names:
        layer, twin = inner.get_submodule(name), plain.get_submodule(name)
        if hasattr(layer, "learner_P1"):
            ranks[twin] = layer.learner_r["default"]
        twin.register_forward_hook(stand_in)
    return count_flops(lambda: plain(**rows).loss.backward())["matrix_products"] + low_rank
