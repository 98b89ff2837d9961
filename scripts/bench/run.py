"""Step time, memory, flops and files of all methods on the same models, measured side by side.

    python -m scripts.bench.run --setting minilm-16x128-r64 --model_name_or_path MODEL --out results/bench
    python -m scripts.bench.run --setting all --model_name_or_path MODEL

Each setting leaves a file of JSON lines, a row per method, `<setting>-<cpu or cuda>.jsonl`. A setting whose file is
there is skipped; one that was cut off goes on with the next group of methods. What is measured otherwise than the
setting says (some groups, other rounds, dropout or threads) needs a `--label` of its own.

The methods of a group are held at once, each a copy of one model, and take their steps in turn, a step each per
round. Times are reported as ratios to the step of LoRA, of full fine-tuning and of a method's own peer in the same
round (median and quartiles over the rounds). The seconds are there to compute it again and say nothing by themselves.
Memory is counted, not sampled; on a GPU the allocator's peak stands beside it.

A step is forward, backward, AdamW and zeroing the gradients, with `update_and_allocate` where a method has it.
"""

import gc
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import pandas as pd
import torch
from transformers import HfArgumentParser

from scripts.bench.imports import ROUNDS as IMPORT_ROUNDS
from scripts.bench.imports import import_rows
from scripts.bench.measure import (
    BYTES,
    WARMUP_ROUNDS,
    Variant,
    bound_flops,
    count_flops,
    measure_bytes,
    peak_step_bytes,
    saving,
    step_flops,
    take_rounds,
    take_step,
    time_ratios,
    trained_parameters,
)
from scripts.bench.methods import GROUPS, METHODS, Build, learner, references_of
from scripts.bench.rows import Row, read_rows
from scripts.bench.scaling import AXES, points, scaling_rows
from scripts.bench.scaling import ROUNDS as SCALING_ROUNDS
from scripts.bench.settings import SETTINGS, Setting, Workload, prepare
from scripts.glue import run_record

SCHEMA_VERSION = 2
#: What rows must share for a setting that was cut off to go on with them.
SAME = ("schema_version", "setting", "versions", "code", "device")
#: Settings that are no single shape.
SPECIAL = ("scaling", "import")
#: Arguments with which a run is no longer the setting's own.
OTHERWISE = ("groups", "rounds", "dropout", "threads")
#: Arguments that say nothing to the settings of no single shape.
FOR_SHAPES = ("groups", "dropout")


@dataclass
class BenchArguments:
    """What is measured, and where the rows go."""

    setting: list[str] = field(
        metadata={"help": "One or several, or all.", "choices": [*SETTINGS, *SPECIAL, "all"]},
    )
    model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "The model of the settings minilm-*: a Hub id or a local folder."}
    )
    out: str = field(default="results/bench", metadata={"help": "Folder of the rows."})
    groups: Optional[list[str]] = field(
        default=None, metadata={"help": "Measure these groups of methods alone.", "choices": list(GROUPS)}
    )
    label: Optional[str] = field(
        default=None,
        metadata={"help": "Ends the setting's name, in rows and file: for what is measured under other conditions."},
    )
    rounds: Optional[int] = field(
        default=None,
        metadata={"help": f"Rounds that count, after {WARMUP_ROUNDS} that don't. Default: the setting's."},
    )
    dropout: Optional[float] = field(
        default=None, metadata={"help": "Hidden and attention dropout. Default: the setting's (0, unless it says so)."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    device: Optional[str] = field(default=None, metadata={"help": "cpu or cuda. Default: cuda if there is one."})
    fused: bool = field(default=True, metadata={"help": "AdamW in its fused form, as the Trainer has it."})
    seed: int = field(default=0, metadata={"help": "Of the new head, the rows, fresh adapters and dropout."})
    again: bool = field(default=False, metadata={"help": "Measure settings anew whose files are there."})


def parse(argv: Optional[list[str]]) -> tuple[BenchArguments, torch.device]:
    """The command line's arguments, and the device; torch gets its threads.

    Raises:
        ValueError: a number below 1, or arguments that don't go together.
    """
    (args,) = HfArgumentParser(BenchArguments, description=__doc__).parse_args_into_dataclasses(argv)
    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    otherwise = [f"--{each}" for each in OTHERWISE if getattr(args, each) != getattr(BenchArguments, each, None)]
    if otherwise and args.label is None:
        raise ValueError(f"--label must name what is measured with other {', '.join(otherwise)}, got none.")
    torch.set_num_threads(args.threads)
    return args, torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


# -- a setting -----------------------------------------------------------------------------------------------------


def groups_of(setting: Setting) -> dict[str, dict[str, Build]]:
    """The methods to measure, by group, each beside those with which it is compared."""
    groups: dict[str, dict[str, Build]] = {}
    for group in setting.groups or GROUPS:
        asked = [name for name in GROUPS[group] if setting.methods is None or name in setting.methods]
        needed = {other for name in asked for other in (name, *references_of(name))}
        names = [name for name in GROUPS[group] if name in needed]
        if set(names) - {"lora", "full"} or (group == "learner" and names):
            groups[group] = {name: METHODS[name] for name in names}
    return groups


def measure_group(work: Workload, group: str, methods: Mapping[str, Build], bound: dict[str, int]) -> list[Row]:
    """The rows of one group; a method that can't be built on the model has one that says why.

    Args:
        bound: flops that can't be done without, by kind (`bounds`).
    """
    rows: dict[str, Row] = {}
    variants: dict[str, Variant] = {}
    for name, build in methods.items():
        rows[name] = {"group": group, "method": name}
        made = try_to_build(work, build, steps=group == "peft")
        if isinstance(made, Variant):
            variants[name] = made
        else:
            rows[name]["skipped"] = made
            print(f"  {name} is skipped. {made}")
    counted = {name: measure_bytes(variant, work.rows) for name, variant in variants.items()}
    for name, variant in variants.items():
        flops = step_flops(variant, work.rows)
        limit = bound[bound_of(variant)]
        trained = trained_parameters(variant.model)
        rows[name] |= {
            "phase": variant.phase,
            "settings": variant.settings,
            "trained_parameters": sum(parameter.numel() for parameter in trained),
            "exchanged_bytes": sum(parameter.numel() * parameter.itemsize for parameter in trained),
            "bytes": counted[name],
            "peak_step_bytes": peak_step_bytes(variant, work.rows),
            "flops": flops["matrix_products"],
            "attention_flops": flops["attention"],
            "bound_flops": limit,
            "flops_to_bound": flops["matrix_products"] / limit,
        }
    take_rounds(variants, work.rows, work.setting.rounds)
    for name, variant in variants.items():
        peers = [other for other in references_of(name) if other in variants]
        per_second = (work.rows["input_ids"].numel() / seconds for seconds in variant.seconds["step"])
        rows[name] |= {
            "references": peers,
            "time_ratios": {other: time_ratios(variant, variants[other]) for other in peers},
            "bytes_ratios": {other: _byte_ratios(counted[name], counted[other]) for other in peers},
            "tokens_per_second": statistics.median(per_second),
            "seconds": {part: seconds for part, seconds in variant.seconds.items() if seconds},
            **saving(variant, work.base),
        }
    return list(rows.values())


def try_to_build(work: Workload, build: Build, steps: bool) -> Union[Variant, str]:
    """The variant, or why there is none: configs and tuners say no to models that they are not for.

    Args:
        steps: whether the method may also say no by failing in its first step, as others' may in a type of numbers.
    """
    torch.manual_seed(work.seed)
    try:
        variant = build(work)
    except (ValueError, TypeError, NotImplementedError) as error:
        return _sentence(error)
    try:
        if steps:
            take_step(variant, work.rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _sentence(error)
    return variant


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _byte_ratios(own: dict[str, int], other: dict[str, int]) -> dict[str, float]:
    return {kind: own[kind] / other[kind] for kind in BYTES if other[kind]}


def bounds(work: Workload) -> dict[str, int]:
    """Flops that low-rank training can't do without, where norms train too and where they don't, and inference."""

    def forward() -> None:
        with torch.no_grad():
            work.base(**work.rows)

    return {
        "low_rank": bound_flops(work.base, learner(work, train_norms=False).model, work.rows),
        "low_rank_norms": bound_flops(work.base, learner(work).model, work.rows),
        "inference": count_flops(forward)["matrix_products"],
    }


def bound_of(variant: Variant) -> str:
    """Which of the bounds a variant is held against."""
    if variant.optimizer is None:
        return "inference"
    trained = (name for name, parameter in variant.model.named_parameters() if parameter.requires_grad)
    return "low_rank_norms" if any("learner_layernorm" in name for name in trained) else "low_rank"


def measure_setting(work: Workload, groups: dict[str, dict[str, Build]], path: Path, again: bool = False) -> list[Row]:
    """The setting's rows, written to `path` when all are there; until then they stand in a file beside it.

    Args:
        again: whether groups are measured that this file has already.
    """
    part = path.with_name(f"{path.name}.part")
    if again:
        part.unlink(missing_ok=True)
    common = common_fields(work.record(), work.device)
    rows = read_rows(part)
    if others := [key for key in SAME if any(row.get(key) != common[key] for row in rows)]:
        print(f"  {part} is of another {', '.join(others)}: it begins anew")
        rows = []
    done = {row["group"] for row in rows}
    limits = bounds(work)
    for group, methods in groups.items():
        if group in done:
            print(f"  {group}: is there")
            continue
        rows += [{**common, **row} for row in measure_group(work, group, methods, limits)]
        run_record.write_lines(part, rows)
        _free(work.device)
    run_record.write_lines(path, rows)
    part.unlink(missing_ok=True)
    return rows


def _free(device: torch.device) -> None:
    gc.collect()  # models and their drivers point at each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_point(work: Workload, methods: dict[str, Build]) -> list[Row]:
    """The rows of one point of a curve."""
    rows = measure_group(work, "scaling", methods, bounds(work))
    _free(work.device)
    return rows


# -- rows ----------------------------------------------------------------------------------------------------------


def common_fields(setting: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What all rows of a setting begin with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "setting": {**setting, "warmup_rounds": WARMUP_ROUNDS, "allocator": allocator()},
        "versions": run_record.versions(),
        "code": run_record.code(),
        "device": run_record.device_record(SimpleNamespace(device=device, world_size=1)),
        "date": run_record.now(),
    }


def allocator() -> dict[str, str]:
    """What the environment tells the C library's allocator, which decides what the first touch of memory costs."""
    return {key: value for key, value in os.environ.items() if key.startswith("MALLOC_") or key == "LD_PRELOAD"}


def report(rows: Sequence[Row]) -> str:
    """A setting's rows as a table of medians."""
    lines = {}
    for row in (row for row in rows if "skipped" not in row):
        peer = next((other for other in row["references"] if other != row["method"]), None)
        cells = {"time to": peer or "", "flops / bound": f"{row['flops_to_bound']:.3f}"}
        if peer is not None:
            step, sizes = row["time_ratios"][peer]["step"], row["bytes_ratios"][peer]
            cells["ratio [quartiles]"] = f"{step['median']:.3f} [{step['q1']:.3f}, {step['q3']:.3f}]"
            cells |= {kind: f"{sizes[kind]:.3f}" for kind in ("stored", "total") if kind in sizes}
        lines[f"{row['group']}: {row['method']}"] = cells
    heads = ["time to", "ratio [quartiles]", "stored", "total", "flops / bound"]
    return pd.DataFrame(lines).T.reindex(columns=heads).fillna("").to_string()


# -- command line --------------------------------------------------------------------------------------------------


def settings_to_run(args: BenchArguments, device: torch.device) -> list[str]:
    """Names of the settings, without those of another device and, of all, those whose model is not given.

    Raises:
        ValueError: a setting that is named is for another kind of device, or has no use for an argument.
    """
    useless = [f"--{name}" for name in FOR_SHAPES if getattr(args, name) is not None]
    if "all" not in args.setting:
        for name in args.setting:
            if name in SPECIAL and useless:
                raise ValueError(f"--setting {name} must be without {' and '.join(useless)}: they are for a model's.")
            wanted = SETTINGS[name].device if name in SETTINGS else None
            if wanted not in (None, device.type):
                raise ValueError(f"--setting {name} needs a device of the kind {wanted}, got {device.type}.")
        return args.setting
    names = [name for name, setting in SETTINGS.items() if setting.device in (None, device.type)]
    if args.model_name_or_path is None:
        left = [name for name in names if SETTINGS[name].config is None]
        print(f"Without --model_name_or_path there is no model for: {', '.join(left)}")
        names = [name for name in names if name not in left]
    if useless:
        print(f"With {' and '.join(useless)} these are left out: {', '.join(SPECIAL)}")
        return names
    return [*names, *SPECIAL]


def is_measured(path: Path) -> bool:
    """Whether there are rows in a setting's file, of today's form.

    Raises:
        ValueError: a line is no row.
    """
    rows = read_rows(path)
    return bool(rows) and rows[0].get("schema_version") == SCHEMA_VERSION


def run_setting(setting: str, name: str, args: BenchArguments, device: torch.device, path: Path) -> None:
    """Measure one setting.

    Args:
        name: of the setting with the label.
    """
    if setting == "import":
        common = common_fields({"name": name}, device)
        run_record.write_lines(path, ({**common, **row} for row in import_rows(args.rounds or IMPORT_ROUNDS)))
        return
    if setting == "scaling":
        rows: list[Row] = []
        curves = points(AXES, args.rounds or SCALING_ROUNDS, name=name)
        for work, found in scaling_rows(measure_point, curves, device, args.seed, args.fused):
            rows += [{**common_fields(work.record(), device), **row} for row in found]
        run_record.write_lines(path, rows)
        return
    given = {"groups": args.groups, "rounds": args.rounds, "dropout": args.dropout}
    changes = {key: value for key, value in given.items() if value is not None}
    own = replace(SETTINGS[setting], name=name, **changes)
    work = prepare(own, args.model_name_or_path, device, args.seed, args.fused)
    print(report(measure_setting(work, groups_of(own), path, args.again)))


def main(argv: Optional[list[str]] = None) -> int:
    """Run the script."""
    args, device = parse(argv)
    for setting in settings_to_run(args, device):
        name = "-".join(filter(None, (setting, args.label)))
        place = torch.device("cpu") if setting == "import" else device
        path = Path(args.out) / f"{name}-{place.type}.jsonl"
        if not args.again and is_measured(path):
            print(f"{name}: {path} is there (--again measures anew)")
            continue
        print(f"{name}:")
        run_setting(setting, name, args, place, path)
        print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
