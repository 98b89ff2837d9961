"""Train one run of a protocol, and tell it as one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from peft_learners import ScheduleError
from peft_learners.phases.whole_checkpoints import last_whole
from scripts.evidence import classifier, variants
from scripts.evidence.plan import Protocol, Run
from scripts.evidence.scoring import resampled, score
from scripts.glue import run_record
from scripts.glue.train import kept_energy

#: Rows of a test batch. This and the seed decide the order of test rows, so all methods are resampled alike.
TEST_BATCH = 64


def train(protocol: Protocol, run: Run, data_dir: Path | None, model_name: str, folder: Path) -> dict[str, Any]:
    """Train the run, from its last checkpoint in `folder` if there is one, and return its record.

    Args:
        model_name: of the encoder; the decoder's comes in a package.
    """
    task, variant = protocol.tasks[run.task], protocol.variants[run.variant]
    recipe = protocol.recipe_of(run.task)
    torch.set_float32_matmul_precision(protocol.precision)
    epochs = protocol.epochs(run)
    steps = round(epochs * -(-task.rows["train"] // recipe["per_device_train_batch_size"]))
    interval = steps // round(protocol.evaluations * variant.length)
    timer = run_record.PhaseTimer()
    settings = {
        "output_dir": str(folder),
        "learning_rate": run.rate,
        "num_train_epochs": epochs,
        "seed": run.seed,
        # With 64, transformers does not group so few rows by length.
        "per_device_eval_batch_size": 16,
        "eval_strategy": "steps",
        "eval_steps": interval,
        "logging_steps": interval,
        "save_strategy": "epoch",  # in mid-epoch transformers does not know the order of rows sorted by length again
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
        **recipe,
    }
    # The timer is last, after the callback that names the phase.
    callbacks = [*variants.callbacks(variant.method, variant.fields), timer]
    if task.causal:
        from scripts.evidence import causal  # TRL, which no other task needs

        trainer, test_rows, label = causal.trainer_of(protocol, run, settings, callbacks)
    else:
        trainer, test_rows = classifier.trainer_of(protocol, run, data_dir, model_name, settings, callbacks)
        label = run_record.model_label(model_name)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole(folder)
    diverged = False
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except ScheduleError:
        diverged = trainer.state.global_step > 0  # values that are no numbers can't cross a boundary
        if not diverged:
            raise
        trainer.state.log_history.append({"step": trainer.state.global_step, "eval_score": None, "eval_loss": None})
    log, last = trainer.state.log_history, trainer.state.global_step
    if not any(entry.get("step") == last and "eval_score" in entry for entry in log):
        trainer.evaluate()
    found: dict[str, Any] = {"test": None, "resampled": [], "file_bytes": 0}
    if not diverged:
        trainer.args.per_device_eval_batch_size = TEST_BATCH
        said, labels = (causal if task.causal else classifier).answers(run.task, trainer.predict(test_rows))
        trainer.save_model(str(folder / "saved"))
        size = run_record.saved_bytes(folder / "saved")
        found = {
            "test": score(run.task, said, labels),
            "resampled": resampled(run.task, said, labels),
            "file_bytes": size,
        }
    return {
        "run": run.name,
        "curve": [
            {"step": e["step"], "score": e["eval_score"], "loss": e["eval_loss"]} for e in log if "eval_score" in e
        ],
        "train_loss": [{"step": e["step"], "loss": e["loss"]} for e in log if "loss" in e],
        **found,
        "phases": run_record.phase_rows(log, timer.seconds, last, trained),
        **kept_energy(trainer.model),
        "rows": dict(task.rows),
        "model": label,
        "settings": protocol.settings(run),
        "versions": run_record.versions(),
        "code": run_record.code(),
        "device": run_record.device_record(trainer.args),
        "date": run_record.now(),
    }
