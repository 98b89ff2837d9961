"""The Trainer of a run on a task of classification or of scores."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from scripts.evidence import data, variants
from scripts.evidence.plan import Protocol, Run
from scripts.evidence.scoring import score
from scripts.glue import data as glue_data

REGRESSION = ("stsb",)


@cache
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def rows(
    task: str, counts: Mapping[str, int], data_dir: Path | None, model: str, max_length: int
) -> dict[str, Dataset]:
    """The rows of a task by part, as a model's inputs."""
    parts = data.cut(task, counts, data_dir)
    encoded = {name: glue_data.tokenize(part, _tokenizer(model), max_length) for name, part in parts.items()}
    for name in ("choice", "test"):  # by length, so that little is padded
        lengths = [len(ids) for ids in encoded[name]["input_ids"]]
        encoded[name] = encoded[name].select(np.argsort(lengths, kind="stable"))
    return encoded


def load(task: str, model_name: str) -> torch.nn.Module:
    """The model with a new head for the task."""
    return AutoModelForSequenceClassification.from_pretrained(
        model_name,
        num_labels=1 if task in REGRESSION else 2,
        problem_type="regression" if task in REGRESSION else "single_label_classification",
        dtype=torch.float32,
        attn_implementation="eager",  # on a CPU the kernel is slower than plain products for short rows
    )


def answers(task: str, found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """What a model says of each row, a class or a score, and what is right."""
    logits = found.predictions
    return (logits.squeeze(-1) if task in REGRESSION else logits.argmax(-1)), found.label_ids


def trainer_of(
    protocol: Protocol,
    run: Run,
    data_dir: Path | None,
    model_name: str,
    settings: Mapping[str, Any],
    callbacks: list[TrainerCallback],
) -> tuple[Trainer, Dataset]:
    """The Trainer of a run, and the rows to test with."""
    task, variant = protocol.tasks[run.task], protocol.variants[run.variant]
    parts = rows(run.task, task.rows, data_dir, model_name, protocol.max_length)
    set_seed(run.seed)
    base = load(run.task, model_name)
    trainer = Trainer(
        model=variants.build(base, variant.method, variant.fields, protocol.epochs(run)),
        args=TrainingArguments(**settings),
        train_dataset=parts["train"],
        eval_dataset=parts["choice"],
        data_collator=DataCollatorWithPadding(_tokenizer(model_name)),
        compute_metrics=lambda found: {"score": score(run.task, *answers(run.task, found))},
        callbacks=callbacks,
    )
    return trainer, parts["test"]
