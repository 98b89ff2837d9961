"""What pruning would keep of U, of V and of the biases, at several budgets: of an adapter saved in its search.

    python -m scripts.glue.kept_shares runs/mrpc-search/checkpoint-220 --budgets 0.05 0.1 0.25 0.5 --out shares.json

The checkpoint holds the scores that the search has gathered; for each budget the adapter is loaded again and pruned.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from peft_learners import NASLoRAConfig


def shares(checkpoint: Path, base: torch.nn.Module, budget: float) -> dict[str, Any]:
    """Kept shares of U, V and the biases when the search ends where the checkpoint was written.

    Args:
        base: the base model; adapted in place.
        budget: share of the search space that is kept.

    Raises:
        ValueError: another kind of adapter, or one that is not in its (first) search.
    """
    config = PeftConfig.from_pretrained(checkpoint)
    if not isinstance(config, NASLoRAConfig) or config.pruned_rounds:
        raise ValueError(f"{checkpoint} must hold a NAS-LoRA adapter saved in its search, got {config!r:.60}...")
    config.inference_mode, config.parameter_budget, config.rounds = False, budget, 1
    config.phase_first_steps = {"search": 0, "retraining": 2}
    model = get_peft_model(base, config)
    model.load_adapter(str(checkpoint), "default", is_trainable=True)
    model.base_model.set_schedule(total_steps=3, global_step=1)
    model.base_model.update_and_allocate(2)
    architecture = model.base_model.architecture()
    kept = {part: [0, 0] for part in ("U", "V", "bias")}
    for parts in architecture.counts.values():
        for part, (count, of) in parts.items():
            kept[part][0] += count
            kept[part][1] += of
    return {
        "budget": budget,
        "parameters": architecture.kept,
        "kept": {part: {"parameters": n, "share": n / of} for part, (n, of) in kept.items() if of},
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the script; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of an adapter that was saved in its search")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5], help="shares of the space")
    parser.add_argument("--model_name_or_path", help="base model; default: the one named in the adapter's config")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    config = PeftConfig.from_pretrained(args.checkpoint)
    name = args.model_name_or_path or config.base_model_name_or_path
    rows = [
        shares(args.checkpoint, AutoModelForSequenceClassification.from_pretrained(name), budget)
        for budget in args.budgets
    ]
    state = json.loads((args.checkpoint / "trainer_state.json").read_text())
    fields = ("r", "granularity", "init", "criterion", "averaging", "init_seed")
    record = {
        "model": Path(name).name,
        "config": {field: getattr(config, field) for field in fields},
        "search_steps": state["global_step"],
        "rows": rows,
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        kept = ", ".join(f"{part} {100 * own['share']:.1f} %" for part, own in row["kept"].items())
        print(f"budget {row['budget']:g}: {row['parameters']:,} parameters; kept of {kept}")
    return record


if __name__ == "__main__":
    main()
