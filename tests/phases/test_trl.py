"""TRL's SFTTrainer with a Learner on a tiny decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl (tested with the version in constraints.txt)")


def test_sft_trainer(tmp_path: Path):
    """TRL's SFTTrainer goes through the phases."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from peft_learners import LearnerConfig, PhaseCallback

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    rows = [{"text": " ".join(f"w{(i * 7 + j) % 40}" for j in range(6))} for i in range(8)]
    args = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", max_length=16, disable_tqdm=True,
    )  # fmt: skip
    base = zoo.build("llama")
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    run = trl.SFTTrainer(
        base, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LearnerConfig(r=4, priming_epochs=1, task_type="CAUSAL_LM"), callbacks=[PhaseCallback()],
    )  # fmt: skip
    run.train()
    starts = {log["phase"]: log["step"] for log in run.state.log_history if "phase_first_step" in log}
    assert starts == {"priming": 0, "learning": 2}
    assert run.model.peft_config["default"].completed_phases == ["priming"]
    plain = run.model.unload()
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())
