"""Train one run of a protocol with the Trainer, and tell it as one record."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
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
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_learners.phases.whole_checkpoints import last_whole
from scripts.evidence import data, variants
from scripts.evidence.plan import Protocol, Run
from scripts.glue import data as glue_data
from scripts.glue import metrics, run_record
from scripts.glue.train import kept_energy

#: Resamples of the test part, drawn alike for all runs: two runs can be compared resample by resample.
RESAMPLES, RESAMPLE_SEED = 200, 0
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


def answers(task: str, logits: np.ndarray) -> np.ndarray:
    """What a model says of each row: a class, or a score."""
    return logits.squeeze(-1) if task in REGRESSION else logits.argmax(-1)


def score(task: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the task's metrics, times 100; not a number where one is none."""
    found = metrics.compute_locally(task, predictions, labels)
    return 100 * sum(found.values()) / len(found)


def resampled(task: str, predictions: np.ndarray, labels: np.ndarray) -> list[float]:
    """The score on as many rows as there are, drawn with repetition, `RESAMPLES` times."""
    chance = np.random.default_rng(RESAMPLE_SEED)
    draws = chance.integers(0, len(labels), (RESAMPLES, len(labels)))
    return [round(score(task, predictions[draw], labels[draw]), 3) for draw in draws]


def train(protocol: Protocol, run: Run, data_dir: Path | None, model_name: str, folder: Path) -> dict[str, Any]:
    """Train the run, from its last checkpoint in `folder` if there is one, and return its record."""
    task, variant = protocol.tasks[run.task], protocol.variants[run.variant]
    recipe = {**protocol.recipe, **task.recipe}
    parts = rows(run.task, task.rows, data_dir, model_name, protocol.max_length)
    torch.set_float32_matmul_precision(protocol.precision)
    set_seed(run.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        model_name,
        num_labels=1 if run.task in REGRESSION else 2,
        problem_type="regression" if run.task in REGRESSION else "single_label_classification",
        dtype=torch.float32,
        attn_implementation="eager",  # on a CPU the kernel is slower than plain products for short rows
    )
    epochs = task.epochs * variant.length
    model: Any = variants.build(base, variant.method, variant.fields, epochs)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    timer = run_record.PhaseTimer()
    steps = round(epochs * -(-len(parts["train"]) // recipe["per_device_train_batch_size"]))
    interval = steps // round(protocol.evaluations * variant.length)

    def scored(found: EvalPrediction) -> dict[str, float]:
        return {"score": score(run.task, answers(run.task, found.predictions), found.label_ids)}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            learning_rate=run.rate,
            num_train_epochs=epochs,
            seed=run.seed,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=interval,
            logging_steps=interval,
            save_strategy="epoch",  # in mid-epoch transformers does not know the order of rows sorted by length again
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
            **recipe,
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["choice"],
        data_collator=DataCollatorWithPadding(_tokenizer(model_name)),
        compute_metrics=scored,
        callbacks=[*variants.callbacks(variant.method), timer],  # the timer after the one that names the phase
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log, last = trainer.state.log_history, trainer.state.global_step
    if not any(entry.get("step") == last and "eval_score" in entry for entry in log):
        trainer.evaluate()
    test = trainer.predict(parts["test"])
    said = answers(run.task, test.predictions)
    trainer.save_model(str(folder / "saved"))
    machine = SimpleNamespace(device=trainer.args.device, world_size=1)
    curve = [{"step": e["step"], "score": e["eval_score"], "loss": e["eval_loss"]} for e in log if "eval_score" in e]
    return {
        "run": run.name,
        "curve": curve,
        "train_loss": [{"step": e["step"], "loss": e["loss"]} for e in log if "loss" in e],
        "test": score(run.task, said, test.label_ids),
        "resampled": resampled(run.task, said, test.label_ids),
        "phases": run_record.phase_rows(log, timer.seconds, last, trained),
        "file_bytes": run_record.saved_bytes(folder / "saved"),
        **kept_energy(trainer.model),
        "rows": {name: len(part) for name, part in parts.items()},
        "model": run_record.model_label(model_name),
        "settings": protocol.settings(run),
        "versions": run_record.versions(),
        "code": run_record.code(),
        "device": run_record.device_record(machine),
        "date": run_record.now(),
    }
