"""Where a step's time goes: torch's profile of it, operators grouped by what they are for.

    python -m scripts.bench.profile --setting minilm-16x128-r64 --method lora learner_primed full \\
        --model_name_or_path MODEL --out results/bench

Writes `profile-<setting>-<cpu or cuda>.json`, with the shares of the step's time by method and the operators that take
most of it. Products of matrices are told apart by their shapes, so that the number of rows must be no feature size of
the model: where it is one, rows are a token shorter. The time is that of operators themselves, without those they
call; on a GPU it is that of their kernels, and "outside operators" what is left of the step. The profiler slows steps:
compare times by `scripts.bench.run`, and shares here.
"""

import gc
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import HfArgumentParser

from scripts.bench.measure import WARMUP_ROUNDS, Variant, aligned, take_step
from scripts.bench.methods import METHODS, linear_layers
from scripts.bench.run import common_fields
from scripts.bench.settings import SETTINGS, Workload, prepare
from scripts.glue import run_record

STEPS, TOP = 5, 15
_STEP = "bench::step"
BASE, DENSE_GRADIENT = "products of activations and weights", "gradients of whole weights"
FORMING, NARROW, HEAD = "forming W'", "products with factors or kept nodes", "other products of matrices"
OUTSIDE = "outside operators"
#: Parts of operators' names, in the order in which they are looked for.
_BY_NAME = {
    "attention": ("scaled_dot_product", "bmm", "softmax", "flash_attention", "efficient_attention"),
    "optimizer": ("adam",),
    "norms": ("layer_norm", "rms_norm"),
    "activation function": ("gelu", "silu", "relu", "tanh"),
    "embeddings and loss": ("embedding", "nll_loss", "cross_entropy"),
}
#: Where the operands of a product stand among an operator's inputs.
_OPERANDS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
Shape = Sequence[int]


@dataclass
class ProfileArguments:
    """What is profiled, and where the record goes."""

    setting: str = field(metadata={"help": "One setting of scripts.bench.run.", "choices": list(SETTINGS)})
    method: list[str] = field(metadata={"help": "One or several methods.", "choices": list(METHODS)})
    model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "The model of the settings minilm-*: a Hub id or a local folder."}
    )
    out: str = field(default="results/bench", metadata={"help": "Folder of the record."})
    steps: int = field(default=STEPS, metadata={"help": "Steps to profile."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    device: Optional[str] = field(default=None, metadata={"help": "cpu or cuda. Default: cuda if there is one."})
    seed: int = field(default=0, metadata={"help": "Of the new head, the rows and fresh adapters."})


@dataclass(frozen=True)
class Sizes:
    """By which a product is known: features of the adapted layers, rows (all tokens, or one token of each row), and
    what adapters have besides (ranks, numbers of kept nodes)."""

    features: frozenset[int]
    rows: frozenset[int]
    narrow: frozenset[int]

    @classmethod
    def of(cls, work: Workload, variant: Variant) -> "Sizes":
        base = {size for parameter in work.base.parameters() for size in parameter.shape}
        own = (p for p in variant.model.parameters() if p.requires_grad and p.dim() == 2)
        layers: list[Any] = [work.base.get_submodule(name) for name in linear_layers(work)]
        features = frozenset(size for layer in layers for size in (layer.in_features, layer.out_features))
        batch, tokens = work.rows["input_ids"].shape
        narrow = frozenset(size for parameter in own for size in parameter.shape) - base
        return cls(features, frozenset((batch, batch * tokens)), narrow)


def purpose_of(name: str, shapes: Sequence[Shape], sizes: Sizes) -> str:
    """What an operator is for, by its name and the shapes of its inputs."""
    if name in _OPERANDS:
        left, right = (shapes[place] for place in _OPERANDS[name])
        return _purpose_of_product((left[0], left[1], right[1]), sizes)
    for purpose, parts in _BY_NAME.items():
        if any(part in name.lower() for part in parts):
            return purpose
    return "copies, sums, element by element" if name.startswith("aten::") else OUTSIDE


def _purpose_of_product(product: tuple[int, int, int], sizes: Sizes) -> str:
    """Of (m, k) times (k, n)."""
    m, k, n = product
    if {m, k, n} & sizes.narrow:
        return FORMING if k in sizes.narrow and {m, n} <= sizes.features else NARROW
    if k in sizes.rows and {m, n} <= sizes.features:
        return DENSE_GRADIENT
    return BASE if {k, n} <= sizes.features and m in sizes.rows else HEAD


def without_ambiguity(tokens: int, batch: int, features: Collection[int]) -> int:
    """The most tokens per row, up to `tokens`, that make a number of rows which is no feature size."""
    while tokens * batch in features:
        tokens -= 1
    return tokens


def profile_variant(work: Workload, variant: Variant, steps: int) -> dict[str, Any]:
    """Shares of a step's time by purpose, and the operators that take most of it."""
    sizes, on_gpu = Sizes.of(work, variant), work.device.type == "cuda"
    for _ in range(WARMUP_ROUNDS):
        take_step(variant, work.rows)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(steps):
            with record_function(_STEP):
                take_step(variant, work.rows)
    averages = profiled.key_averages(group_by_input_shape=True)
    whole = sum(event.cpu_time_total for event in averages if event.key == _STEP)
    shares: dict[str, float] = defaultdict(float)
    operators = []
    for event in averages:
        if on_gpu and not event.key.startswith("aten::"):
            continue  # kernels, which their operators count already
        share = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / whole
        purpose = purpose_of(event.key, event.input_shapes, sizes)
        shares[purpose] += share
        shapes = [shape for shape in event.input_shapes if shape]
        calls = event.count / steps
        operators.append({"name": event.key, "shapes": shapes, "calls": calls, "for": purpose, "share": share})
    shares[OUTSIDE] += 1 - sum(shares.values())
    top = sorted((o for o in operators if o["name"] != _STEP), key=lambda o: -o["share"])[:TOP]
    return {
        "settings": variant.settings,
        "phase": variant.phase,
        "profiled_step_seconds": whole / steps / 1e6,
        "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
        "operators": top,
    }


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the file holds."""
    (args,) = HfArgumentParser(ProfileArguments, description=__doc__).parse_args_into_dataclasses(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    work = prepare(SETTINGS[args.setting], args.model_name_or_path, device, args.seed)
    return profile_setting(work, args.method, args.steps, Path(args.out), args.model_name_or_path)


def profile_setting(
    work: Workload, methods: Sequence[str], steps: int, out: Path, path: Optional[str] = None
) -> dict[str, Any]:
    """Profile methods one after the other, and write the record.

    Args:
        path: of the model, where the setting has no config of its own.

    Raises:
        ValueError: there is no such method, or the rank is a size of one of the model's parameters.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}; got {', '.join(unknown)}.")
    setting, layers = work.setting, [work.base.get_submodule(name) for name in linear_layers(work)]
    if setting.rank in {size for parameter in work.base.parameters() for size in parameter.shape}:
        raise ValueError(f"rank must be none of the model's sizes, for products to be told apart, got {setting.rank}.")
    features = {size for layer in layers for size in layer.weight.shape}
    tokens = without_ambiguity(setting.tokens, setting.batch, features)
    if tokens != setting.tokens:
        work = prepare(replace(setting, tokens=tokens), path, work.device, work.seed)
    found = {}
    for name in methods:
        torch.manual_seed(work.seed)
        found[name] = profile_variant(work, METHODS[name](work), steps)
        gc.collect()
    record = {**common_fields(work.record(), work.device), "steps": steps, "methods": found}
    file = out / f"profile-{setting.name}-{work.device.type}.json"
    run_record.write_json(file, record)
    print(f"{report(found)}\n-> {file}")
    return record


def report(found: dict[str, dict[str, Any]]) -> str:
    """Shares by purpose, a column per method."""
    purposes = list(dict.fromkeys(purpose for entry in found.values() for purpose in entry["shares"]))
    table = [["", *found]]
    table += [[p, *(f"{100 * entry['shares'].get(p, 0):.1f} %" for entry in found.values())] for p in purposes]
    return aligned(table)


if __name__ == "__main__":
    main()
