"""What the benchmarks share: variants that take their steps in turn, bytes counted, ratios round by round."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, TypeVar

import run_record
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, HfArgumentParser

#: Rounds before those that count: caches fill, and optimizers make their state.
WARMUP_ROUNDS = 2
#: What a step's time is split into.
TIMES = ("step", "forward_backward", "optimizer")


@dataclass
class CommonArguments:
    """On what is measured, and where the record goes."""

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
    fused: bool = field(default=True, metadata={"help": "AdamW in its fused form, as the Trainer has it."})
    seed: int = field(default=0, metadata={"help": "Of the new head, the rows and dropout."})


A = TypeVar("A", bound=CommonArguments)


@dataclass
class Variant:
    """One way to train, ready to take steps.

    Attributes:
        saves: whether the size of its adapter's file is of interest.
        max_grad_norm: what gradients are clipped to before each step; None: they are not.
        after_step: belongs to a step, and to its time.
        around: what is to hold while it takes a step; entering and leaving it takes none of the step's time.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any] = field(default_factory=dict)
    saves: bool = False
    max_grad_norm: Optional[float] = None
    after_step: Optional[Callable[[], object]] = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMES})


# -- what is measured ----------------------------------------------------------------------------------------------


def parse(arguments: type[A], description: Optional[str], argv: Optional[list[str]]) -> tuple[A, torch.device]:
    """The command line's arguments, and the device; torch gets its threads.

    Raises:
        ValueError: a number below 1.
    """
    (args,) = HfArgumentParser(arguments, description=description).parse_args_into_dataclasses(argv)
    for name in ("batch_size", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    torch.set_num_threads(args.threads)
    return args, torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_config(args: CommonArguments) -> Any:
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


def load_model(args: CommonArguments, config: Any, device: torch.device) -> torch.nn.Module:
    """The model, in float32, with a head that depends on the seed alone."""
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path, config=config, dtype=torch.float32
    )
    return model.to(device)


def random_rows(args: CommonArguments, config: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """One batch of random tokens and labels."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, args.tokens)
    rows = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(2, (args.batch_size,), generator=generator),
    }
    return {name: value.to(device) for name, value in rows.items()}


def with_optimizer(args: CommonArguments, model: torch.nn.Module, settings: dict[str, Any], **more: Any) -> Variant:
    """A variant that trains with AdamW what requires a gradient now.

    Args:
        more: further attributes of the variant.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Variant(model.train(), torch.optim.AdamW(trained, lr=2e-5, fused=args.fused), settings, **more)


# -- steps, their time and bytes -----------------------------------------------------------------------------------


def take_step(variant: Variant, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """One optimizer step; returns its seconds."""
    device = rows["input_ids"].device
    with variant.around():
        start = _clock(device)
        variant.model(**rows).loss.backward()
        middle = _clock(device)
        if variant.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(variant.model.parameters(), variant.max_grad_norm)
        variant.optimizer.step()
        if variant.after_step is not None:
            variant.after_step()
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


# -- the record ----------------------------------------------------------------------------------------------------


def measure(variants: dict[str, Variant], rows: dict[str, torch.Tensor], rounds: int) -> dict[str, dict[str, Any]]:
    """All that is measured of variants that take their steps in turn, by name; ratios are to the first of them."""
    counted = {name: measure_bytes(variant, rows) for name, variant in variants.items()}
    peaks = {name: peak_step_bytes(variant, rows) for name, variant in variants.items()}
    take_rounds(variants, rows, rounds)
    reference, *_ = variants
    first = variants[reference].seconds
    return {
        name: {
            "settings": variant.settings,
            "trained_parameters": sum(p.numel() for p in variant.model.parameters() if p.requires_grad),
            "bytes": counted[name],
            "bytes_ratios": {kind: value / counted[reference][kind] for kind, value in counted[name].items()},
            "peak_step_bytes": peaks[name],
            "time_ratios": {part: ratios(variant.seconds[part], first[part]) for part in TIMES},
            "seconds": variant.seconds,
            "adapter_file_bytes": adapter_file_bytes(variant) if variant.saves else None,
        }
        for name, variant in variants.items()
    }


def record(args: CommonArguments, model: Any, device: torch.device, **found: Any) -> dict[str, Any]:
    """The results file's content: what was measured (`found`), on what, with which versions.

    Args:
        model: one of the models that were measured.
    """
    elsewhere = ("model_name_or_path", "out", "device")
    settings = {key: value for key, value in asdict(args).items() if key not in elsewhere}
    return {
        "schema_version": run_record.SCHEMA_VERSION,
        "model": run_record.model_label(args.model_name_or_path),
        "settings": {
            **settings,
            "warmup_rounds": WARMUP_ROUNDS,
            "dropout_in_config": dropout_of(model.config),
            "attention": getattr(model.config, "_attn_implementation", None),
        },
        "versions": run_record.versions(),
        "device": run_record.device_record(SimpleNamespace(device=device, world_size=1)),
        **found,
        "date": run_record.now(),
    }


def ratio_cells(found: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    """A variant's row in a printed table: the step's time, bytes of some kinds, the size of its file."""
    step, size = found["time_ratios"]["step"], found["adapter_file_bytes"]
    time_cell = f"{step['median']:.3f} [{step['q1']:.3f}, {step['q3']:.3f}]"
    cells = [f"{found['bytes_ratios'][kind]:.3f}" for kind in kinds]
    return [time_cell, *cells, f"{size / 1e6:.2f} MB" if size is not None else ""]


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A table as text, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )
