"""Tiny real Trainer runs for the tests: data, arguments, trainers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import zoo
from peft import PeftConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from tuners import TUNERS

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig, PhaseCallback


class Rows(Dataset):
    """Random token rows whose label is the parity of their first token."""

    def __init__(self, rows: int = 24, tokens: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 60, (rows, tokens), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


class CausalRows(Rows):
    """The same rows, to be continued."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return {**row, "labels": row["input_ids"]}


def words_tokenizer(words: int = 40) -> Any:
    """One token per word ("w0", "w1", ...), for models that know 64 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(words))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_undriven(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Save an adapter whose phases nobody may have driven, without the warning that tells so; gives the model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*phases were never driven")
        model.save_pretrained(folder)
    return model


def adapted(config: PeftConfig, arch: str = "distilbert", seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    """A fresh adapter on a zoo model (head and adapter depend on `seed` alone)."""
    model = zoo.build(arch, seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    set_seed(seed + 1)
    return get_peft_model(model, config)


def learner(arch: str = "distilbert", seed: int = 0, dropout: float = 0.0, **config: Any) -> torch.nn.Module:
    """A fresh Learner on a zoo model."""
    settings: dict[str, Any] = {"r": 4, "priming_epochs": 1, "task_type": zoo.ZOO[arch].task_type}
    return adapted(LearnerConfig(**{**settings, **config}), arch, seed, dropout)


def far(arch: str = "distilbert", seed: int = 0, dropout: float = 0.0, **config: Any) -> torch.nn.Module:
    """A fresh FAR adapter on a zoo model; a quarter of the nodes is kept."""
    settings: dict[str, Any] = {"retention_ratio": 0.25, "priming_epochs": 1, "task_type": zoo.ZOO[arch].task_type}
    return adapted(FARConfig(**{**settings, **config}), arch, seed, dropout)


def nas(arch: str = "distilbert", seed: int = 0, dropout: float = 0.0, **config: Any) -> torch.nn.Module:
    """A fresh NAS-LoRA adapter on a zoo model; half of the search space is kept."""
    settings: dict[str, Any] = {"r": 4, "task_type": zoo.ZOO[arch].task_type}
    return adapted(NASLoRAConfig(**{**settings, **config}), arch, seed, dropout)


def bottleneck(arch: str = "distilbert", seed: int = 0, dropout: float = 0.0, **config: Any) -> torch.nn.Module:
    """Fresh parallel adapters on a zoo model: hooks beside each FFN."""
    settings: dict[str, Any] = {"mode": "parallel", "bottleneck_dim": 4, "task_type": zoo.ZOO[arch].task_type}
    return adapted(BottleneckConfig(**{**settings, **config}), arch, seed, dropout)


class Around(torch.nn.Module):
    """A user's own module that holds a model with an adapter."""

    def __init__(self, *encoders: torch.nn.Module) -> None:
        super().__init__()
        self.encoders, self.head = torch.nn.ModuleList(encoders), torch.nn.Linear(2, 2)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        logits = self.head(sum(encoder(input_ids, attention_mask).logits for encoder in self.encoders))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def arguments(out: Path | str, **settings: Any) -> TrainingArguments:
    """Six steps in three epochs of two, weight decay, warm-up, and clipping that bites."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 12,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 1,
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(out), **{**defaults, **settings})


def trainer(model: torch.nn.Module, args: TrainingArguments, *, rows: int = 24, **kwargs: Any) -> Trainer:
    kwargs.setdefault("callbacks", [PhaseCallback()])
    config = getattr(model, "active_peft_config", None)
    kind = CausalRows if getattr(config, "task_type", None) == "CAUSAL_LM" else Rows
    return Trainer(model, args, train_dataset=kind(rows), eval_dataset=kind(8, seed=9), **kwargs)


#: A checkpoint and an evaluation after each step, and the best one taken at the end.
KEEP_BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


class TightTrainer(Trainer):
    """Out of memory at step 3, as long as a batch has more than 8 rows."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._train_batch_size > 8 and self.state.global_step == 3:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(*args, **kwargs)


def adapter_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All values of the adapter and the head, copied."""
    return {
        name: p.detach().clone()
        for name, p in model.state_dict().items()
        if any(f".{tuner.prefix}" in name for tuner in TUNERS.values()) or ".modules_to_save." in name
    }


def dense_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those of the primed layers, which are not the model's any more once they are frozen."""
    parts = [getattr(module, "learner_dense_delta", {}) for module in model.modules()]
    return [value.parameter for part in parts for value in part.values()]


def sgd(model: torch.nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    """An optimizer over what trains: also one to hand over where a boundary is crossed and no step is made."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def take_steps(model: PeftModel, batch: dict[str, torch.Tensor], steps: int) -> tuple[list[float], list[str]]:
    """Losses and phases of a training by hand, whose first epoch ends halfway; all that trains has a gradient."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    starts = model.base_model.set_schedule(total_steps=steps, steps_per_epoch=steps // 2, optimizer=optimizer)
    losses, phases = [], [start.phase for start in starts]
    for step in range(1, steps + 1):
        loss = model(**batch).loss
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        phases += [start.phase for start in model.base_model.update_and_allocate(step)]
    return losses, phases
