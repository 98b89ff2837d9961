"""A plain accelerate loop with a Learner, without Trainer. The three lines that differ from any other loop are marked.

    python -m scripts.demo.accelerate_loop                                   # or
    torchrun --nproc_per_node 2 -m scripts.demo.accelerate_loop

It trains a small DistilBERT from config on invented token rows, so that it runs anywhere; a real model and real data
go where `make_model` and `make_data` stand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import DistilBertConfig, DistilBertForSequenceClassification, get_linear_schedule_with_warmup

from peft_learners import LearnerConfig  # 1: registers Learners with PEFT


def make_model() -> torch.nn.Module:
    config = DistilBertConfig(
        dim=32, hidden_dim=64, n_layers=2, n_heads=2, vocab_size=100, dropout=0.0, attention_dropout=0.0
    )
    return DistilBertForSequenceClassification(config)


def make_data(rows: int = 128, tokens: int = 8) -> TensorDataset:
    """Rows of token ids; the label is the parity of the first token."""
    ids = torch.randint(3, 100, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return TensorDataset(ids, ids[:, 0] % 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/accelerate_loop"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--priming_epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=16, help="rows per process and micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    args = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    model = get_peft_model(make_model(), LearnerConfig(r=8, priming_epochs=args.priming_epochs, task_type="SEQ_CLS"))
    # A rate for this tiny random model. Pretrained ones want a lower one.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    loader = DataLoader(make_data(), batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    per_epoch = -(-len(loader) // args.gradient_accumulation_steps)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, args.epochs * per_epoch)
    tuner = accelerator.unwrap_model(model).base_model
    tuner.set_schedule(
        args.epochs * per_epoch, per_epoch, optimizer=optimizer, wrapper=model
    )  # 2: lays out the phases

    step = 0
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for ids, labels in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=labels).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
            if accelerator.sync_gradients:
                schedule.step()
                step += 1
                tuner.update_and_allocate(step)  # 3: crosses the boundary when it is due
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        accelerator.print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}, {trained:,} parameters trained")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    accelerator.print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main()
