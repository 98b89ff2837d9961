"""Count and time a step of each variant in each of its phases, all in turn.

    python -m scripts.evidence.costs --model_name_or_path MODEL   # results/evidence/costs.jsonl

Seconds of runs that trained side by side tell nothing. So the seconds to a score are steps times a phase's median
ratio to LoRA's step, measured here round by round, on rows of a task's usual length.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.bench import measure
from scripts.evidence import classifier, variants
from scripts.evidence.plan import FILE, REFERENCE, Protocol, Variant
from scripts.glue import run_record

OUT = Path("results/evidence/costs.jsonl")
#: Of a training that is never over while it is measured.
LONG = 1_000_000
#: Of a first phase that is to be over: a search of fewer has no scores of biases, which begin at zero.
FIRST_STEPS = 3


def workload(protocol: Protocol, task: str, model_name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and a batch of random tokens, as long as the task's rows are."""
    chance, length = torch.Generator().manual_seed(0), protocol.tasks[task].tokens
    batch = protocol.recipe_of(task)["per_device_train_batch_size"]
    if protocol.tasks[task].causal:
        from scripts.evidence import causal  # TRL, which no other task needs

        base = causal.load()[0]
    else:
        base = classifier.load(task, model_name)
    ids = torch.randint(base.config.vocab_size // 2, base.config.vocab_size, (batch, length), generator=chance)
    labels = ids if protocol.tasks[task].causal else torch.zeros(batch, dtype=torch.long)
    return base, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def phases(variant: Variant, base: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[measure.Variant]:
    """The variant in each of its phases, ready to take steps."""
    fields = dict(variant.fields)
    primes = fields.pop("priming_share", None) is not None or variant.method == "FARConfig"
    length = "search_steps" if variant.method == "NASLoRAConfig" else "priming_steps" if primes else None
    for past in (False, True) if length else (False,):
        chosen = {**fields, length: FIRST_STEPS if past else LONG - 1} if length else fields
        torch.manual_seed(0)
        model: Any = variants.build(copy.deepcopy(base), variant.method, chosen, epochs=1).train()
        optimizer = torch.optim.AdamW(measure.trained_parameters(model), lr=1e-5, fused=True)
        ready = measure.Variant(model, optimizer)
        if variants.callbacks(variant.method, variant.fields):
            tuner = model.base_model
            tuner.set_schedule(total_steps=LONG, optimizer=optimizer)
            for step in range(1, FIRST_STEPS + 1):
                measure.take_step(ready, batch)
                tuner.update_and_allocate(step)
            ready.after_step = partial(tuner.update_and_allocate, FIRST_STEPS)
        ready.phase = str(int(past))
        yield ready


def kinds(protocol: Protocol) -> dict[int, tuple[str, list[str]]]:
    """By length of rows: a task of that length, and the variants that are trained on such tasks. Variants whose step
    depends on more than the phase are left out, and those that differ from an earlier one by their length alone."""
    found: dict[int, tuple[str, list[str]]] = {}
    for stage in protocol.stages:
        for task in stage.tasks:
            _, names = found.setdefault(protocol.tasks[task].tokens, (task, []))
            for name in stage.variants:
                if not protocol.variants[name].fields.get("by_block") and not set(protocol.alike(name)) & set(names):
                    names.append(name)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--protocol", type=Path, default=FILE, help="YAML file")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    protocol = Protocol.read(args.protocol)
    torch.set_float32_matmul_precision(protocol.precision)
    found: list[dict[str, Any]] = []
    for tokens, (task, names) in kinds(protocol).items():
        base, batch = workload(protocol, task, args.model_name_or_path)
        ready = {(name, v.phase): v for name in names for v in phases(protocol.variants[name], base, batch)}
        counted = {key: (measure.measure_bytes(v, batch), measure.step_flops(v, batch)) for key, v in ready.items()}
        measure.take_rounds(ready, batch, args.rounds)
        reference = ready[REFERENCE, "0"]
        found += [
            {
                "variant": name,
                "phase": int(phase),
                "tokens": tokens,
                "trained_parameters": sum(p.numel() for p in measure.trained_parameters(variant.model)),
                "bytes": counted[name, phase][0],
                "flops": counted[name, phase][1],
                "ratio_to_lora": measure.time_ratios(variant, reference)["step"],
                "rounds": args.rounds,
                "threads": torch.get_num_threads(),
                "versions": run_record.versions(),
                "code": run_record.code(),
                "date": run_record.now(),
            }
            for (name, phase), variant in ready.items()
        ]
    run_record.write_lines(args.out, found)


if __name__ == "__main__":
    main()
