"""Step time and memory of FAR against full fine-tuning of the same model, measured side by side.

    python scripts/bench_far.py --model_name_or_path MODEL --threads 2 --out bench.json

All variants are held at once and take their steps in turn, a step each per round. Times are reported as the ratio to
full fine-tuning's step of the same round (median and quartiles over the rounds); the seconds that stand in the file
are there to compute it again, and say nothing by themselves. Memory is counted, not sampled: the bytes that autograd
keeps for backward, and those of parameters, gradients and optimizer state. Priming is one variant, because it is the
same with every granularity, and with `discard_unkept`.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import run_record
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, HfArgumentParser

from peft_learners import FARConfig

#: Rounds before those that count: caches fill, and optimizers make their state.
WARMUP_ROUNDS = 2
#: What a step's time is split into.
TIMES = ("step", "forward_backward", "optimizer")


@dataclass
class BenchArguments:
    """What is measured, on what, and where the record goes."""

    model_name_or_path: str = field(metadata={"help": "A Hub id or a local folder. It gets a head of two classes."})
    out: str = field(metadata={"help": "The results file (JSON)."})
    batch_size: int = field(default=16, metadata={"help": "Rows per step."})
    tokens: int = field(default=128, metadata={"help": "Tokens per row: random ids, no padding."})
    rounds: int = field(default=15, metadata={"help": f"Rounds that count, after {WARMUP_ROUNDS} that don't."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    device: Optional[str] = field(default=None, metadata={"help": "cpu or cuda. Default: cuda if there is one."})
    dropout: Optional[float] = field(
        default=None, metadata={"help": "Hidden and attention dropout. Default: as the model's config says."}
    )
    retention_ratio: float = field(default=0.1, metadata={"help": "Share of each FFN layer's nodes that FAR keeps."})
    granularity: str = field(
        default="hidden_unit",
        metadata={
            "help": "What a node is in the variants far_*; output_node is measured in any case.",
            "choices": ["hidden_unit", "output_node"],
        },
    )
    fused: bool = field(default=True, metadata={"help": "AdamW in its fused form, as the Trainer has it."})
    seed: int = field(default=0, metadata={"help": "Of the new head, the rows and dropout."})


@dataclass
class Variant:
    """One way to train, ready to take steps."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})


def load_config(args: BenchArguments) -> Any:
    """The model's config with the dropout asked for.

    Raises:
        ValueError: more tokens than the model has positions.
    """
    config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=2)
    positions = getattr(config, "max_position_embeddings", args.tokens)
    if not 1 <= args.tokens <= positions:
        raise ValueError(f"--tokens must be from 1 to {positions} for this model, got {args.tokens}.")
    if args.dropout is not None:
        for name in dropout_of(config):
            setattr(config, name, args.dropout)
    if config.pad_token_id is None:  # heads that look for the last token of a row need one
        config.pad_token_id = 0
    return config


def dropout_of(config: Any) -> dict[str, float]:
    """The config's dropout rates by the names they have in this architecture; not LayerDrop, which skips layers."""
    numbers = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: float(v) for k, v in numbers.items() if "drop" in k and "layerdrop" not in k}


def random_rows(args: BenchArguments, config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """One batch of random tokens and labels."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, args.tokens)
    rows = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(2, (args.batch_size,), generator=generator),
    }
    return {name: value.to(device) for name, value in rows.items()}


def far_variants(args: BenchArguments) -> dict[str, tuple[bool, dict[str, Any]]]:
    """`{name: (whether it is past the boundary, settings of FARConfig)}`."""
    own = {"retention_ratio": args.retention_ratio, "granularity": args.granularity}
    variants: dict[str, tuple[bool, dict[str, Any]]] = {
        "far_priming": (False, own),
        "far_after": (True, own),
        "far_after_discard": (True, {**own, "discard_unkept": True}),
    }
    if args.granularity != "output_node":
        variants["far_after_output_node"] = (True, {**own, "granularity": "output_node"})
    return variants


def build_variants(
    args: BenchArguments, config: Any, rows: dict[str, torch.Tensor], device: torch.device
) -> dict[str, Variant]:
    """All variants, each with a model and an optimizer of its own, and one step behind it."""

    def pretrained() -> torch.nn.Module:
        torch.manual_seed(args.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path, config=config, dtype=torch.float32
        )
        return model.to(device)

    def with_optimizer(model: torch.nn.Module, settings: dict[str, Any]) -> Variant:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Variant(model.train(), torch.optim.AdamW(trained, lr=2e-5, fused=args.fused), settings)

    variants = {"full": with_optimizer(pretrained(), {})}
    take_step(variants["full"], rows)
    for name, (past_boundary, settings) in far_variants(args).items():
        adapter = FARConfig(priming_steps=1, task_type="SEQ_CLS", **settings)
        variants[name] = variant = with_optimizer(get_peft_model(pretrained(), adapter), settings)
        tuner: Any = variant.model.base_model
        tuner.set_schedule(total_steps=WARMUP_ROUNDS + args.rounds + 2, optimizer=variant.optimizer)
        take_step(variant, rows)
        if past_boundary:
            tuner.update_and_allocate(1)
    return variants


def take_step(variant: Variant, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """One optimizer step; returns its seconds."""
    device = rows["input_ids"].device
    start = _clock(device)
    variant.model(**rows).loss.backward()
    middle = _clock(device)
    variant.optimizer.step()
    variant.optimizer.zero_grad()
    end = _clock(device)
    return {"step": end - start, "forward_backward": middle - start, "optimizer": end - middle}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _model_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _unique_bytes(tensors: Iterator[torch.Tensor]) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_bytes(variant: Variant, rows: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes that a step holds: `stored`, `parameters`, `gradients`, `optimizer` and their sum, `total`.

    `stored` is what autograd keeps from forward for backward. What the model holds anyway (its parameters and buffers)
    does not count there, and tensors that lie in one storage count once, whole.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in _model_tensors(variant.model)}
    stored: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = variant.model(**rows).loss
    loss.backward()
    gradients = sum(p.grad.nbytes for p in variant.model.parameters() if p.grad is not None)
    variant.optimizer.step()
    variant.optimizer.zero_grad()
    state = [value for entry in variant.optimizer.state.values() for value in entry.values()]
    counted = {
        "stored": sum(stored.values()),
        "parameters": _unique_bytes(_model_tensors(variant.model)),
        "gradients": gradients,
        "optimizer": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
    }
    return {**counted, "total": sum(counted.values())}


def peak_step_bytes(variant: Variant, rows: dict[str, torch.Tensor]) -> Optional[int]:
    """The most that a step allocates beyond what stays between steps, as CUDA's allocator saw it; None on the CPU."""
    device = rows["input_ids"].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    take_step(variant, rows)
    return torch.cuda.max_memory_allocated(device) - before


def adapter_file_bytes(variant: Variant) -> int:
    """Size of the adapter's file."""
    with tempfile.TemporaryDirectory() as folder:
        model: Any = variant.model
        model.save_pretrained(folder)
        return run_record.saved_bytes(Path(folder))


def take_rounds(variants: dict[str, Variant], rows: dict[str, torch.Tensor], rounds: int) -> None:
    """Let all variants take a step per round and note its seconds. Each round begins with another variant."""
    names = list(variants)
    for number in range(-WARMUP_ROUNDS, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for part, seconds in take_step(variants[name], rows).items():
                if number >= 0:
                    variants[name].seconds[part].append(seconds)


def ratios(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of two series, taken round by round."""
    each = [a / b for a, b in zip(own, reference, strict=True)]
    if len(each) == 1:
        return {"q1": each[0], "median": each[0], "q3": each[0]}
    quartiles = statistics.quantiles(each, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), quartiles, strict=True))


def report(variants: dict[str, dict[str, Any]]) -> str:
    """The ratios to full fine-tuning as a table."""
    kinds = ("stored", "parameters", "gradients", "optimizer", "total")
    table: list[tuple[str, ...]] = [("", "step time [quartiles]", *kinds, "adapter file")]
    for name, found in variants.items():
        step = found["time_ratios"]["step"]
        time_cell = f"{step['median']:.3f} [{step['q1']:.3f}, {step['q3']:.3f}]"
        size = found["adapter_file_bytes"]
        cells = (f"{found['bytes_ratios'][kind]:.3f}" for kind in kinds)
        table.append((name, time_cell, *cells, f"{size / 1e6:.2f} MB" if size is not None else ""))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the results file holds."""
    (args,) = HfArgumentParser(BenchArguments, description=__doc__).parse_args_into_dataclasses(argv)
    for name in ("batch_size", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_config(args)
    rows = random_rows(args, config, device)
    variants = build_variants(args, config, rows, device)

    counted = {name: measure_bytes(variant, rows) for name, variant in variants.items()}
    peaks = {name: peak_step_bytes(variant, rows) for name, variant in variants.items()}
    take_rounds(variants, rows, args.rounds)

    found: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        parameters = list(variant.model.parameters())
        found[name] = {
            "settings": variant.settings,
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "bytes": counted[name],
            "bytes_ratios": {kind: value / counted["full"][kind] for kind, value in counted[name].items()},
            "peak_step_bytes": peaks[name],
            "time_ratios": {part: ratios(variant.seconds[part], variants["full"].seconds[part]) for part in TIMES},
            "seconds": variant.seconds,
            "adapter_file_bytes": adapter_file_bytes(variant) if name.startswith("far_after") else None,
        }
    elsewhere = ("model_name_or_path", "out", "device")
    settings = {key: value for key, value in asdict(args).items() if key not in elsewhere}
    results = {
        "schema_version": run_record.SCHEMA_VERSION,
        "model": run_record.model_label(args.model_name_or_path),
        "settings": {
            **settings,
            "warmup_rounds": WARMUP_ROUNDS,
            "dropout_in_config": dropout_of(config),
            "attention": getattr(variants["full"].model.config, "_attn_implementation", None),
        },
        "versions": run_record.versions(),
        "device": run_record.device_record(SimpleNamespace(device=device, world_size=1)),
        "variants": found,
        "date": run_record.now(),
    }
    run_record.write_json(Path(args.out), results)
    print(f"Ratios to full fine-tuning, {args.rounds} rounds in turn:\n{report(found)}\n-> {args.out}")
    return results


if __name__ == "__main__":
    main()
