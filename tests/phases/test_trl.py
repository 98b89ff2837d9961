"""TRL's trainers with this package's adapters on a tiny decoder."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import PeftModel, get_peft_model
from training import sgd, words_tokenizer

from peft_learners import BottleneckConfig, FARConfig, LearnerConfig, NASLoRAConfig, PhaseCallback

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl (tested with the version in constraints.txt)")


def text(i: int) -> str:
    return " ".join(f"w{(i * 7 + j) % 40}" for j in range(6))


def decoder(tied: bool) -> torch.nn.Module:
    base = zoo.build("llama").config
    base.tie_word_embeddings = tied
    return type(zoo.build("llama"))(base)


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
    "bf16": False, "logging_steps": 1, "save_strategy": "no", "max_length": 16, "disable_tqdm": True,
}  # fmt: skip


@pytest.mark.parametrize("after_priming", ["keep", "fold"])
def test_sft_trainer(tmp_path: Path, after_priming):
    """TRL's SFTTrainer goes through the phases."""
    from datasets import Dataset

    args = trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS)
    base = zoo.build("llama")
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    config = LearnerConfig(r=4, priming_epochs=1, after_priming=after_priming, task_type="CAUSAL_LM")
    run = trl.SFTTrainer(
        base, args, train_dataset=Dataset.from_list([{"text": text(i)} for i in range(8)]),
        processing_class=words_tokenizer(), peft_config=config, callbacks=[PhaseCallback()],
    )  # fmt: skip
    run.train()
    starts = {log["phase"]: log["step"] for log in run.state.log_history if "phase_first_step" in log}
    assert starts == {"priming": 0, "learning": 2}
    assert run.model.peft_config["default"].completed_phases == ["priming"]
    plain = run.model.unload()
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_far_defaults(tmp_path: Path, tied):
    """`FARConfig()` in SFTTrainer: our sentence comes before TRL's error, and what it advises trains."""
    from datasets import Dataset

    def run(config: FARConfig) -> Any:
        args = trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS | {"warmup_steps": 0})
        rows = Dataset.from_list([{"text": text(i)} for i in range(8)])
        callbacks = [PhaseCallback()]
        return trl.SFTTrainer(
            decoder(tied), args, train_dataset=rows, processing_class=words_tokenizer(), peft_config=config,
            callbacks=callbacks,
        )  # fmt: skip

    with (
        pytest.warns(UserWarning, match=r"the LM head \(lm_head\).*FARConfig\(train_embeddings=False\)"),
        pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"),
    ):
        run(FARConfig())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*LM head.*")
        trained = run(FARConfig(train_embeddings=False))
    trained.train()
    assert trained.model.peft_config["default"].reconfigured


def test_far_without_trl(monkeypatch: pytest.MonkeyPatch):
    """Who has not imported TRL, or has no LM head that is adapted, hears nothing of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*LM head.*")
        get_peft_model(zoo.build("bert"), FARConfig(task_type="SEQ_CLS"))
        monkeypatch.delitem(sys.modules, "trl")
        get_peft_model(decoder(tied=False), FARConfig(task_type="CAUSAL_LM"))


TRAINED: dict[str, Any] = {
    "learner": LearnerConfig(r=4, priming_steps=2),
    "folded": LearnerConfig(r=4, priming_steps=2, after_priming="fold"),
    # TRL reads the LM head's weight without calling it.
    "far": FARConfig(retention_ratio=0.25, priming_steps=2, exclude_modules=["lm_head"]),
    "nas": NASLoRAConfig(r=4, search_steps=2, parameter_budget=0.5),
    "nas-structured": NASLoRAConfig(r=4, search_steps=2, parameter_budget=0.5, granularity="structured"),
    "bottleneck": BottleneckConfig(bottleneck_dim=4),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "loaded"])
@pytest.mark.parametrize("tuner", TRAINED)
def test_dpo_reference(tmp_path: Path, tuner, loaded):
    """DPO on a trained adapter begins at log 2: its reference is a clone of the adapter, made by names."""
    from datasets import Dataset

    config = TRAINED[tuner]
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(zoo.causal_lm("llama"), config)
    optimizer = sgd(model, lr=0.5)
    model.base_model.set_schedule(6, 2, optimizer=optimizer)
    inputs = zoo.inputs_of("llama", model)["input_ids"]
    for step in range(1, 7):
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.update_and_allocate(step)
    if loaded:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(zoo.causal_lm("llama"), tmp_path / "adapter", is_trainable=True)
    rows = [{"prompt": text(i), "chosen": f" w{i}", "rejected": f" w{i + 1}"} for i in range(8)]
    args = trl.DPOConfig(output_dir=str(tmp_path / "dpo"), **{**SETTINGS, "max_steps": 2})
    run = trl.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words_tokenizer())
    run.train()
    losses = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[1] != losses[0]
