"""Step time and memory of FAR against full fine-tuning of the same model, measured side by side.

    python scripts/bench_far.py --model_name_or_path MODEL --threads 2 --out bench.json

All variants are held at once and take their steps in turn, a step each per round. Times are reported as the ratio to
full fine-tuning's step of the same round (median and quartiles over the rounds); the seconds that stand in the file
are there to compute it again, and say nothing by themselves. Memory is counted, not sampled: the bytes that autograd
keeps for backward, and those of parameters, gradients and optimizer state. Priming is one variant, because it is the
same with every granularity, and with `discard_unkept`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import run_record
import torch
from bench_common import (
    WARMUP_ROUNDS,
    CommonArguments,
    Variant,
    aligned,
    load_config,
    load_model,
    measure,
    parse,
    random_rows,
    ratio_cells,
    record,
    take_step,
    with_optimizer,
)
from peft import get_peft_model

from peft_learners import FARConfig


@dataclass
class BenchArguments(CommonArguments):
    """What is measured, on what, and where the record goes."""

    retention_ratio: float = field(default=0.1, metadata={"help": "Share of each FFN layer's nodes that FAR keeps."})
    granularity: str = field(
        default="hidden_unit",
        metadata={
            "help": "What a node is in the variants far_*; output_node is measured in any case.",
            "choices": ["hidden_unit", "output_node"],
        },
    )


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
    variants = {"full": with_optimizer(args, load_model(args, config, device), {})}
    take_step(variants["full"], rows)
    for name, (past_boundary, settings) in far_variants(args).items():
        adapter = FARConfig(priming_steps=1, task_type="SEQ_CLS", **settings)
        model = get_peft_model(load_model(args, config, device), adapter)
        variants[name] = variant = with_optimizer(args, model, settings, saves=past_boundary)
        tuner: Any = variant.model.base_model
        tuner.set_schedule(total_steps=WARMUP_ROUNDS + args.rounds + 2, optimizer=variant.optimizer)
        take_step(variant, rows)
        if past_boundary:
            tuner.update_and_allocate(1)
    return variants


def report(variants: dict[str, dict[str, Any]]) -> str:
    """The ratios to full fine-tuning as a table."""
    kinds = ("stored", "parameters", "gradients", "optimizer", "total")
    rows = [[name, *ratio_cells(found, kinds)] for name, found in variants.items()]
    return aligned([["", "step time [quartiles]", *kinds, "adapter file"], *rows])


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the results file holds."""
    args, device = parse(BenchArguments, __doc__, argv)
    config = load_config(args)
    rows = random_rows(args, config, device)
    variants = build_variants(args, config, rows, device)
    found = measure(variants, rows, args.rounds)
    results = record(args, variants["full"].model, device, variants=found)
    run_record.write_json(Path(args.out), results)
    print(f"Ratios to full fine-tuning, {args.rounds} rounds in turn:\n{report(found)}\n-> {args.out}")
    return results


if __name__ == "__main__":
    main()
