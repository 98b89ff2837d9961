"""Train primed Learners that fold beside those that keep their primed weights, unprimed ones and LoRA.

    python -m scripts.glue.fold --model_name_or_path MODEL --data_dir ../shared/glue
    python -m scripts.glue.fold ... --tasks cola --ranks 64 --variants fold keep -- --max_train_samples 64

Each run is one of scripts.glue.train and leaves one line in `--out`; what follows `--` goes to all of them. A run that
is finished is skipped: if interrupted, run the command again. All runs see the same few rows of the train set, drawn
with a fixed seed, and hold out a quarter of them: the better of two learning rates is the better one there.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from scripts.glue import data as glue_data
from scripts.glue import run_record, train

#: Methods with their arguments. The primed weights move at a fifth of the rate of the factors.
PRIMED = {"method": "learner", "priming_epochs": 1.0, "priming_lr_scale": 0.2}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "unprimed": {"method": "learner", "priming_epochs": 0.0},
    "keep": {**PRIMED, "after_priming": "keep"},
    "fold": {**PRIMED, "after_priming": "fold"},
    "rewarm": {**PRIMED, "after_priming": "fold", "method": "learner_rewarm"},
}
#: Those of the comparison; "rewarm" is an attempt to better "fold".
COMPARED = ("lora", "unprimed", "keep", "fold")
#: Rows of the train set that are drawn, by task.
ROWS = {"cola": 4000, "mrpc": 1600}
RANKS = (64, 16)
RATES = (3e-4, 1e-3)
COMMON = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "optim": "adamw_torch_fused",
    "float32_matmul_precision": "medium",
    "save_strategy": "no",
    "holdout_share": 0.25,
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    rank: int
    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """What it is called in files."""
        return f"{self.task}-r{self.rank}-{self.variant}-lr{self.lr:g}-seed{self.seed}"

    def arguments(self) -> dict[str, Any]:
        """Its arguments of scripts.glue.train."""
        own = {"task": self.task, "rank": self.rank, "learning_rate": self.lr, "seed": self.seed}
        return {**COMMON, **VARIANTS[self.variant], **own}


def draw(task: glue_data.Task, source: Path, folder: Path) -> None:
    """Write a task's TSV files again, with the rows of its train set that are drawn."""
    (folder / task.folder).mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        header, *rows = (source / task.folder / name).read_text(encoding="utf-8").rstrip("\n").split("\n")
        if name == "train.tsv":
            rows = random.Random(0).sample(rows, ROWS[task.name])
        (folder / task.folder / name).write_text("\n".join([header, *rows, ""]), encoding="utf-8")


def make(run: Run, data_dir: Path, out: Path, shared: Sequence[str]) -> None:
    """Train, and add the run's line to the file."""
    pairs = [word for name, value in run.arguments().items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        draw(glue_data.find_task(run.task), data_dir, Path(folder, "data"))
        own = ["--data_dir", str(Path(folder, "data")), "--output_dir", str(Path(folder, "run"))]
        record = train.main([*pairs, *own, *shared])
    run_record.write_lines(out, [*run_record.read_lines(out), {"run": run.name, **record}])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of TSV files, as in scripts.glue.train")
    parser.add_argument("--out", type=Path, default=Path("results/fold/minilm.jsonl"))
    parser.add_argument("--tasks", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=COMPARED)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    args = parser.parse_args(words)
    torch.backends.cuda.enable_flash_sdp(False)  # on a CPU the kernel is slower than plain products for short rows
    shared = ["--model_name_or_path", args.model_name_or_path, *extra]
    for seed, rank, task, lr, variant in product(args.seeds, args.ranks, args.tasks, args.rates, args.variants):
        run = Run(task, rank, variant, lr, seed)
        if run.name not in {row["run"] for row in run_record.read_lines(args.out)}:
            make(run, args.data_dir, args.out, shared)


if __name__ == "__main__":
    main()
