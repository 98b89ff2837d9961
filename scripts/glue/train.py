"""Train an adapter (or the whole model) on a GLUE task with the Trainer, and leave one results file.

    python -m scripts.glue.train --task cola --data_dir ../shared/glue --method learner
    torchrun --nproc_per_node 2 -m scripts.glue.train --task rte --method lora --use_cpu

Every argument of `transformers.TrainingArguments` works too; the defaults of some are the recipe of arXiv 2208.02070
(AdamW, learning rate 2e-5, batches of 16, 5 epochs, a linear schedule). Called again with the same arguments, a run
that was cut off goes on from its last checkpoint, and a finished one says so. This script holds no algorithm: a method
is one entry in `methods.METHODS`.
"""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from peft_learners.phases.whole_checkpoints import last_whole
from scripts.glue import data as glue_data
from scripts.glue import metrics as glue_metrics
from scripts.glue import run_record
from scripts.glue.arguments import GlueTrainingArguments, ScriptArguments, run_config
from scripts.glue.method_arguments import MethodArguments
from scripts.glue.methods import METHODS


def load_model(
    args: ScriptArguments, method_args: MethodArguments, task: glue_data.Task
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model to train, with a new head for the task, and its tokenizer."""
    name = args.model_name_or_path
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"--model_name_or_path must be a Hub id or a folder that exists, got {name!r}.")
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"No tokenizer could be loaded for --model_name_or_path {args.model_name_or_path!r} ({error}). "
            "A folder must hold its files: tokenizer.json and tokenizer_config.json."
        ) from error
    labels = {"id2label": dict(enumerate(task.labels)), "label2id": {n: i for i, n in enumerate(task.labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=task.num_labels,
        problem_type="regression" if task.regression else "single_label_classification",
        dtype=torch.float32,  # "auto" would train a checkpoint kept in half precision in half precision
        **({} if task.regression else labels),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # A folder without tokenizer files gives a tokenizer that knows no word, and no error.
    known, room = len(tokenizer), model.config.vocab_size
    if not len(tokenizer.all_special_tokens) < known <= room:
        raise ValueError(
            f"The tokenizer of --model_name_or_path {args.model_name_or_path!r} has {known} tokens, the model {room}: "
            "the folder must hold the model's own tokenizer files (tokenizer.json, tokenizer_config.json)."
        )
    extra = METHODS[args.method].tokens(method_args)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", sys.maxsize) - extra)
    if not 1 <= args.max_length <= longest:
        raise ValueError(f"--max_length must be from 1 to {longest} for this model, got {args.max_length}.")
    # BERT's and DistilBERT's forward takes any keyword, but their loss stays a mean over its batch. The Trainer would
    # take it for scaled, and multiply loss and gradients by the numbers of processes and of accumulation steps.
    model.accepts_loss_kwargs = False
    return METHODS[args.method](model, method_args), tokenizer


def make_compute_metrics(task: glue_data.Task) -> tuple[Callable[[EvalPrediction], dict[str, float]], str]:
    """The function for the Trainer, and where its numbers come from."""
    metric, source = glue_metrics.load_metric(task.name)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return metric(logits.squeeze(-1) if task.regression else np.argmax(logits, axis=-1), prediction.label_ids)

    return compute_metrics, source


def open_run(
    args: ScriptArguments, training_args: TrainingArguments, results_file: Path, identity: dict[str, Any]
) -> tuple[Optional[dict[str, Any]], Optional[Path]]:
    """Look at what `output_dir` holds: the results of a finished run, or the checkpoint to go on from.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    folder, main = Path(training_args.output_dir), training_args.process_index == 0
    record = folder / "run_config.json"
    with training_args.main_process_first(local=False, desc="opening the run"):
        if args.overwrite and main:
            for path in (*run_record.checkpoints(folder), folder / "adapter", folder / "model"):
                shutil.rmtree(path, ignore_errors=True)
            for path in (results_file, record):
                path.unlink(missing_ok=True)
        finished = run_record.read_json(results_file)
        finished = finished if finished is not None and finished.get("finished") else None
        earlier = {key: finished.get(key) for key in identity} if finished else None
        begun = run_record.read_json(record) if run_record.checkpoints(folder) and not finished else None
        if begun:
            earlier = {key: begun.get(key) for key in identity}
        if earlier is not None and (changed := run_record.differences(earlier, identity)):
            raise ValueError(
                f"--output_dir {folder} holds a run with other settings ({'; '.join(changed)}). Choose another "
                "--output_dir (and --results_file), or --overwrite to start this one again."
            )
        if finished:
            return finished, None
        if main:
            run_record.write_json(record, {**(begun or {}), **identity})
        return None, last_whole(folder)


def build_trainer(
    args: ScriptArguments, method_args: MethodArguments, training_args: TrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """The Trainer of a run, and what the record says about its rows, metrics and parameters."""
    task = glue_data.find_task(args.task)
    set_seed(training_args.seed)  # before the model: the seed decides the new head too
    model, tokenizer = load_model(args, method_args, task)
    data = glue_data.load_glue(task, args.data_dir, args.max_train_samples, args.max_eval_samples)

    def encode(rows: datasets.Dataset, name: str) -> datasets.Dataset:
        return glue_data.tokenize(rows, tokenizer, args.max_length, args.pad_to_max_length, f"Tokenizing {name}")

    dev = {suffix: encode(rows, f"dev {suffix}".strip()) for suffix, rows in data.dev.items()}
    compute_metrics, source = make_compute_metrics(task)
    callbacks: list[TrainerCallback] = [make() for make in METHODS[args.method].callbacks]
    callbacks.append(run_record.PhaseTimer())  # after the callback that names the phase
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=encode(data.train, "train"),
        eval_dataset=dev.get("", dev),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    counts = {f"dev_{suffix}".rstrip("_"): len(rows) for suffix, rows in dev.items()}
    about = {
        "rows": {"train": len(data.train), **counts},
        "metrics_source": source,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
    }
    return trainer, about


def check_rows(record: Path, rows: dict[str, int], checkpoint: Optional[Path], trainer: Trainer) -> None:
    """Keep beside a run's settings how many rows it has.

    Raises:
        ValueError: the run that is to go on had others.
    """
    there = run_record.read_json(record) or {}
    if checkpoint and there.get("rows", rows) != rows:
        raise ValueError(
            f"{record.parent} holds a run on other rows ({there['rows']} there, {rows} here). Give it the same "
            "--data_dir, or --overwrite to start again."
        )
    if trainer.is_world_process_zero():
        run_record.write_json(record, {**there, "rows": rows})


def learned_architecture(model: torch.nn.Module) -> dict[str, Any]:
    """What a search has kept, for the record; nothing for a method that searches none."""
    if not hasattr(tuner := getattr(model, "base_model", None), "architecture"):
        return {}
    found = tuner.architecture()
    fields = {"granularity": found.granularity, "r": found.r, "budget": found.budget, "rows": found.rows()}
    return {"architecture": fields}


def kept_energy(model: torch.nn.Module) -> dict[str, Any]:
    """How much of each layer's update a fold has kept, for the record; nothing where nothing was folded."""
    configs = getattr(model, "peft_config", {}).values()
    found = [kept for config in configs if (kept := getattr(config, "kept_energy", None))]
    return {"kept_energy": found[0]} if found else {}


def final_evaluation(trainer: Trainer, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of the weights that are saved: those of the last row of the training, or of one more evaluation."""
    last = epochs[-1] if epochs else {}
    values = run_record.eval_values(last)
    if values and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return values
    return run_record.eval_values(trainer.evaluate())


def peak_memory(trainer: Trainer, timer: run_record.PhaseTimer) -> int:
    """Highest memory use of any process of the run, in bytes."""
    peak = torch.tensor([max(timer.peak_bytes, run_record.peak_memory_bytes())], device=trainer.args.device)
    return int(trainer.accelerator.gather(peak).max())


def save(trainer: Trainer) -> Path:
    """Save the adapter (the model for a method without one) and the tokenizer; returns the folder."""
    folder = Path(trainer.args.output_dir) / ("adapter" if hasattr(trainer.model, "peft_config") else "model")
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle with this machine's paths
    return folder


def train(
    args: ScriptArguments,
    method_args: MethodArguments,
    training_args: TrainingArguments,
    checkpoint: Optional[Path],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train, evaluate and save; returns what the results file says about the run, without its settings."""
    trainer, about = build_trainer(args, method_args, training_args)
    say(f"Rows: {about['rows']}. Parameters: {about['trained']:,} of {about['total']:,} trained.")
    check_rows(Path(training_args.output_dir) / "run_config.json", about["rows"], checkpoint, trainer)
    if checkpoint:
        say(f"Going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log = trainer.state.log_history
    epochs = run_record.epoch_rows(log)  # before the final evaluation adds itself to the log
    final = final_evaluation(trainer, epochs)
    folder = save(trainer)
    # By type: the Trainer may have put a restored copy in its place.
    timer = next(c for c in trainer.callback_handler.callbacks if isinstance(c, run_record.PhaseTimer))
    model = trainer.accelerator.unwrap_model(trainer.model)
    phases = run_record.phase_rows(log, timer.seconds, trainer.state.global_step, about["trained"])
    return {
        "versions": run_record.versions(),
        "code": run_record.code(),
        "device": run_record.device_record(training_args),
        "rows": about["rows"],
        "parameters": {
            "trained_first_phase": phases[0]["trained_parameters"],
            "trained_last_phase": phases[-1]["trained_parameters"],
            "total": about["total"],
        },
        "epochs": epochs,
        "final": final,
        **learned_architecture(model),
        **kept_energy(model),
        "metrics_source": about["metrics_source"],
        "phases": phases,
        "optimizer_bytes": timer.optimizer_bytes,
        "wall_seconds": {
            "train": sum(timer.seconds.values()),
            "eval": run_record.eval_seconds(log),
            "total": timer.loop_seconds,
        },
        "peak_memory_bytes": peak_memory(trainer, timer),
        "adapter_bytes": run_record.saved_bytes(folder) if trainer.is_world_process_zero() else None,
        "date": run_record.now(),
        "finished": True,
    }


def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Run the script; returns what the results file holds."""
    results = run(argv)
    # The Trainer with its DDP wrapper must be gone first: destroyed last, the wrapper would wait for gloo's threads
    # while these wait for Python's lock, forever.
    gc.collect()
    PartialState().destroy_process_group()
    return results


def run(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """`main` without the end of the processes' communication."""
    parser = HfArgumentParser((ScriptArguments, MethodArguments, GlueTrainingArguments), description=__doc__)
    args, method_args, training_args = parser.parse_args_into_dataclasses(argv)
    if method_args.r is None:
        method_args.r = METHODS[args.method].rank
    if training_args.has_default_output_dir:
        training_args.output_dir = str(Path("runs") / default_name(args, method_args, training_args))
    if training_args.process_index > 0:
        datasets.disable_progress_bars()
        return train_or_find(args, method_args, training_args, say=lambda _: None)
    with run_record.only_process(Path(training_args.output_dir)):
        return train_or_find(args, method_args, training_args, say=print)


def default_name(args: ScriptArguments, method_args: MethodArguments, training_args: TrainingArguments) -> str:
    """Name of the run's folder."""
    label = run_record.model_label(args.model_name_or_path).replace("/", "--")
    rank = f"-r{method_args.r}" if "r" in METHODS[args.method].arguments else ""
    return f"{glue_data.find_task(args.task).name}-{args.method}{rank}-{label}-seed{training_args.seed}"


def train_or_find(
    args: ScriptArguments,
    method_args: MethodArguments,
    training_args: TrainingArguments,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What the results file holds: of a finished run, or after training."""
    task, label = glue_data.find_task(args.task), run_record.model_label(args.model_name_or_path)
    results_file = Path(args.results_file or Path(training_args.output_dir) / "results.json")
    config = run_config(args, method_args, training_args)
    identity = {"method": args.method, "task": task.name, "model": label, "config": config}
    say(f"{task.name}: {args.method} on {label}, in {training_args.output_dir}")
    torch.set_float32_matmul_precision(args.float32_matmul_precision)
    finished, checkpoint = open_run(args, training_args, results_file, identity)
    if finished:
        say(f"This run is finished: {results_file}. Start it again with --overwrite.")
        return finished

    record = train(args, method_args, training_args, checkpoint, say)
    results = {"schema_version": run_record.SCHEMA_VERSION, **identity, **record}
    if training_args.process_index == 0:
        run_record.write_json(results_file, results)
    values = ", ".join(f"{key} {value:.4f}" for key, value in results["final"].items())
    say(f"{task.name}, {args.method}: {values} -> {results_file}")
    return results


if __name__ == "__main__":
    try:
        main()
    except run_record.BusyError as error:
        print(error, file=sys.stderr)
        sys.exit(run_record.EXIT_BUSY)
