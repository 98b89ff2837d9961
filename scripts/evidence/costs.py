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
from transformers import AutoModelForSequenceClassification

from scripts.bench import measure
from scripts.evidence import variants
from scripts.evidence.plan import Protocol, Variant
from scripts.glue import run_record

OUT = Path("results/evidence/costs.jsonl")
REFERENCE, BATCH = "lora", 16
#: Of a training that is never over while it is measured.
LONG = 1_000_000
#: Fields that say how long a first phase is, and what replaces them here.
LENGTHS = {"priming_share": "priming_steps", "priming_ratio": "priming_steps", "search_epochs": "search_steps"}


def rows(tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, vocabulary, (BATCH, tokens), generator=chance)
    labels = torch.randint(0, 2, (BATCH,), generator=chance)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def phases(variant: Variant, base: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[measure.Variant]:
    """The variant in each of its phases, ready to take steps."""
    length = next((steps for field, steps in LENGTHS.items() if field in variant.fields), None)
    fields = {key: value for key, value in variant.fields.items() if key not in LENGTHS}
    for past in (False, True) if length else (False,):
        chosen = {**fields, length: 1 if past else LONG - 1} if length else fields
        torch.manual_seed(0)
        model: Any = variants.build(copy.deepcopy(base), variant.method, chosen, epochs=1).train()
        optimizer = torch.optim.AdamW(measure.trained_parameters(model), lr=1e-5, fused=True)
        ready = measure.Variant(model, optimizer)
        if variants.callbacks(variant.method):
            tuner = model.base_model
            tuner.set_schedule(total_steps=LONG, optimizer=optimizer)
            measure.take_step(ready, batch)
            if past:
                tuner.update_and_allocate(1)
            ready.after_step = partial(tuner.update_and_allocate, 1)
        ready.phase = str(int(past))
        yield ready


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    protocol = Protocol.read()
    torch.set_float32_matmul_precision(protocol.precision)
    base = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path, num_labels=2, dtype=torch.float32, attn_implementation="eager"
    )
    found: list[dict[str, Any]] = []
    for tokens in sorted({task.tokens for task in protocol.tasks.values()}):
        batch = rows(tokens, base.config.vocab_size)
        ready = {
            (name, v.phase): v for name in protocol.variants for v in phases(protocol.variants[name], base, batch)
        }
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
