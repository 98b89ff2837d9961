"""What an export to plain LoRA costs: error and dev score of a trained adapter's exports at several ranks.

    python -m scripts.glue.export_quality runs/mrpc-learner/adapter --task mrpc --ranks 8 64 0.9 --out quality.json

Whole numbers are ranks, fractions shares of the energy (see peft_learners.export). Each export is written, loaded by
PEFT as the LoRA adapter that it is, and evaluated on the task's dev set beside the adapter itself.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from peft_learners.export import save_as_lora
from scripts.glue import data as glue_data
from scripts.glue import metrics as glue_metrics
from scripts.glue import run_record


def number(text: str) -> float:
    """A rank (int) or a share of the energy (float)."""
    return int(text) if text.isdigit() else float(text)


@torch.no_grad()
def predictions(model: torch.nn.Module, batches: DataLoader) -> np.ndarray:
    """Logits of all rows, (rows, classes)."""
    model.eval()
    return torch.cat([model(**batch).logits for batch in batches]).float().numpy()


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder of a trained adapter")
    parser.add_argument("--task", required=True, help="GLUE task that it was trained on")
    parser.add_argument("--data_dir", help="folder of TSV files instead of the Hub")
    parser.add_argument("--model_name_or_path", help="base model; default: the one named in the adapter's config")
    parser.add_argument("--ranks", type=number, nargs="+", default=[8, 64, 0.9, 0.99, 1.0])
    parser.add_argument("--max_length", type=int, default=128, help="tokens per row")
    parser.add_argument("--max_eval_samples", type=int, help="first rows of the dev set alone")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    config = PeftConfig.from_pretrained(args.adapter)
    name = args.model_name_or_path or config.base_model_name_or_path
    task = glue_data.find_task(args.task)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = glue_data.load_glue(task, args.data_dir, max_eval_samples=args.max_eval_samples)
    rows = glue_data.tokenize(next(iter(data.dev.values())), tokenizer, args.max_length)
    labels = np.asarray(rows["labels"])
    batches = DataLoader(rows, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))

    def base() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=task.num_labels)

    def scores(logits: np.ndarray) -> dict[str, float]:
        found = logits[:, 0] if task.regression else logits.argmax(1)
        return glue_metrics.compute_locally(task.name, found, labels)

    model = PeftModel.from_pretrained(base(), args.adapter)
    own = predictions(model, batches)
    found = []
    for rank in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            export = save_as_lora(folder, model, rank)
            logits = predictions(PeftModel.from_pretrained(base(), folder), batches)
            size = run_record.saved_bytes(Path(folder))
        cut = [module for module in export.modules if not module.exact]
        found.append(
            {
                "rank": rank,
                "ranks_of_cut_modules": sorted(module.rank for module in cut),
                "cut_modules": len(cut),
                "largest_error": export.worst.error,
                "median_error": statistics.median(module.error for module in cut) if cut else 0.0,
                "parameters": sum(module.parameters for module in export.modules),
                "bytes": size,
                "dev": scores(logits),
                "largest_logit_difference": float(np.abs(logits - own).max()),
                "changed_predictions": None if task.regression else int((logits.argmax(1) != own.argmax(1)).sum()),
            }
        )
        print(f"rank {rank}: error {export.worst.error:.3f}, {size / 1e6:.2f} MB, {found[-1]['dev']}", flush=True)
    record = {
        "schema_version": run_record.SCHEMA_VERSION,
        "task": task.name,
        "rows": len(labels),
        "model": run_record.model_label(name),
        "method": config.peft_type.value,
        "adapter": {"bytes": run_record.saved_bytes(args.adapter), "dev": scores(own)},
        "exports": found,
        "versions": run_record.versions(),
        "date": run_record.now(),
    }
    run_record.write_json(args.out, record)
    return record


if __name__ == "__main__":
    main()
