"""Step time, memory and flops of Learners against PEFT's LoRA and full fine-tuning of the same model.

    python scripts/bench_learner.py --model_name_or_path MODEL --rank 64 --threads 2 --out bench.json

The reference is LoRA on the same linear layers, of the same rank, with the same biases (`bias="lora_only"`) and the
same head; a Learner trains the blocks' norms besides. All variants are held at once and take their steps in turn, a
step each per round. Times are reported as the ratio to LoRA's step of the same round (median and quartiles over the
rounds), for full fine-tuning and priming also to full fine-tuning's; the seconds that stand in the file are there to
compute it again, and say nothing by themselves. Memory is counted, not sampled.

Flops are counted by torch, and set against a bound: those of training these layers' biases alone (forward, and
backward to activations as far as needed, 4 N per row and layer of N weights) plus `4 rho N`, with `rho N = r (d + h)`,
for the gradients of A and B.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import run_record
import torch
from bench_common import (
    CommonArguments,
    Variant,
    aligned,
    load_config,
    load_model,
    measure,
    parse,
    random_rows,
    ratio_cells,
    ratios,
    record,
    take_step,
    with_optimizer,
)
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from peft_learners import LearnerConfig

HEAD = "classifier"


@dataclass
class BenchArguments(CommonArguments):
    """What is measured, on what, and where the record goes."""

    rank: int = field(default=64, metadata={"help": "Rank of LoRA and the Learner."})


def learner(args: BenchArguments, base: torch.nn.Module, priming_epochs: int, **more: Any) -> Variant:
    settings = {"r": args.rank, "priming_epochs": priming_epochs, **more}
    model = get_peft_model(copy.deepcopy(base), LearnerConfig(task_type="SEQ_CLS", **settings))
    return with_optimizer(args, model, settings, saves=True)


def primed(args: BenchArguments, base: torch.nn.Module, rows: dict[str, torch.Tensor]) -> Variant:
    """A Learner past its priming, of one step."""
    variant = learner(args, base, 1, priming_steps=1)
    tuner: Any = variant.model.base_model
    tuner.set_schedule(total_steps=args.rounds + 10, optimizer=variant.optimizer)
    take_step(variant, rows)
    tuner.update_and_allocate(1)
    return variant


def build_variants(args: BenchArguments, base: torch.nn.Module, rows: dict[str, torch.Tensor]) -> dict[str, Variant]:
    """All variants, LoRA first."""
    lora = {"r": args.rank, "lora_alpha": args.rank, "target_modules": "all-linear", "bias": "lora_only"}
    peer = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="SEQ_CLS", **lora))
    return {
        "lora": with_optimizer(args, peer, lora, saves=True),
        "full": with_optimizer(args, copy.deepcopy(base), {}),
        "learner_priming": learner(args, base, 1),
        "learner_primed": primed(args, base, rows),
        "learner_unprimed": learner(args, base, 0),
        "learner_unprimed_no_norms": learner(args, base, 0, train_norms=False),
    }


def flops_of(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> int:
    """Flops of forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(**rows).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def bound_of(args: BenchArguments, base: torch.nn.Module, learner: Any, rows: dict[str, torch.Tensor]) -> int:
    """Flops that training low-rank updates on these layers can't do without (see above)."""
    plain, inner = copy.deepcopy(base).requires_grad_(False), learner.base_model.model
    plain.get_submodule(HEAD).requires_grad_(True)
    low_rank, handles = 0, []

    def count(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal low_rank
        per_row = args.rank * (layer.in_features + layer.out_features)
        low_rank += 4 * per_row * (inputs[0].numel() // layer.in_features)

    for name in learner.targeted_module_names:
        if hasattr(inner.get_submodule(name), "learner_P1"):
            plain.get_submodule(name).bias.requires_grad_(True)
            handles.append(inner.get_submodule(name).register_forward_pre_hook(count))
    with torch.no_grad():
        learner(**rows)
    for handle in handles:
        handle.remove()
    return flops_of(plain, rows) + low_rank


def report(found: dict[str, dict[str, Any]]) -> str:
    """The ratios to LoRA as a table."""
    kinds = ("stored", "parameters", "gradients", "optimizer", "total")
    head = ["", "step time [quartiles]", *kinds, "adapter file", "flops / bound"]
    rows = [[name, *ratio_cells(v, kinds), f"{v['flops_to_bound']:.3f}"] for name, v in found.items()]
    return aligned([head, *rows])


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the results file holds."""
    args, device = parse(BenchArguments, __doc__, argv)
    config = load_config(args)
    base, rows = load_model(args, config, device), random_rows(args, config, device)
    variants = build_variants(args, base, rows)
    bound = bound_of(args, base, variants["learner_unprimed"].model, rows)
    flops = {name: flops_of(variant.model, rows) for name, variant in variants.items()}
    found = measure(variants, rows, args.rounds)
    full = variants["full"].seconds["step"]
    for name, entry in found.items():
        entry |= {"flops": flops[name], "flops_to_bound": flops[name] / bound}
        entry["step_time_to_full"] = ratios(variants[name].seconds["step"], full)
    results = record(args, base, device, reference="lora", bound_flops=bound, variants=found)
    run_record.write_json(Path(args.out), results)
    print(f"Ratios to LoRA, {args.rounds} rounds in turn:\n{report(found)}\n-> {args.out}")
    return results


if __name__ == "__main__":
    main()
