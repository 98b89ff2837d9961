"""Tables of results/fold: primed Learners that fold beside their peers, on MiniLM and on a decoder."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.docs.pages import Lines, markdown
from scripts.docs.runs import task_label
from scripts.docs.scores import NOTHING, rate_text
from scripts.glue import fold as sweep
from scripts.glue import run_record
from scripts.sweep import store

Row = Mapping[str, Any]
LABELS = {
    "lora": "LoRA",
    "unprimed": "Learner, no priming",
    "keep": "primed Learner, keeps",
    "fold": "primed Learner, folds",
    "rewarm": "folds, 20 steps of warm-up after",
    "priming": "primed Learner in its priming",
}
LORA = "lora"
MB = 1e6
#: Differences of scores, in points, and of losses, that one run each can't tell from none: about a standard error of
#: CoLA's dev set, and a guess.
NOISE, NOISE_LOSS = 3, 0.1


class Fold:
    """The committed rows.

    Attributes:
        minilm: runs of scripts.glue.fold.
        decoder: runs of scripts.decoder.run.
        costs: its bytes and times of a step.
    """

    def __init__(self, folder: Path) -> None:
        self.minilm = [{**row, **_named(row)} for row in run_record.read_lines(folder / "minilm.jsonl")]
        self.decoder = run_record.read_lines(folder / "decoder.jsonl")
        self.costs = run_record.read_lines(folder / "decoder-costs.jsonl")

    def scores(self) -> Lines:
        """Scores on MiniLM, each variant at the better of its rates by the held-out rows, and what else it takes."""
        lines, sentences = [], []
        for (task, rank), rows in _groups((r for r in self.minilm if r["seed"] == 0), "task", "rank"):
            best = _best(rows, _held_out)
            where = f"{task_label(task)}, r = {rank}"
            for place, (variant, row) in enumerate(best.items()):
                dev = [store.score(entry, task, "eval_") or 0.0 for entry in row["epochs"]]
                others = [r for r in rows if r["variant"] == variant and r is not row]
                lines.append(
                    {
                        "": "" if place else where,
                        "method": LABELS[variant],
                        "rate": rate_text(row["lr"]),
                        "dev after each epoch": ", ".join(f"{value:.1f}" for value in dev),
                        "held out": f"{_held_out(row):.1f}",
                        "held out, other rate": ", ".join(
                            f"{_held_out(r):.1f} ({rate_text(r['lr'])})" for r in others
                        ),
                        "energy kept, least / median": _energy(row),
                        "file, MB": f"{row['adapter_bytes'] / MB:.1f}",
                        "optimizer, MB": _by_phase(row["optimizer_bytes"]),
                    }
                )
            alone = all(sum(r["variant"] == name for r in rows) == 1 for name in best)
            where += " (one rate each)" if alone else ""
            sentences.append(_beside_lora(where, best, lambda own, lora: _dev(own) - _dev(lora), NOISE, ".1f"))
        if not lines:
            return NOTHING
        head = f"Dev at the end of training, differences up to {NOISE:g} points called level"
        return [*markdown(pd.DataFrame(lines)), "", *_joined(head, sentences), "", self.coverage()]

    def coverage(self) -> str:
        """How many of the planned runs are there."""
        made, texts = {row["run"] for row in self.minilm}, []
        for task, rank in product(sweep.ROWS, sweep.RANKS):
            plan = [sweep.Run(task, rank, name, lr, 0) for lr in sweep.RATES for name in sweep.COMPARED]
            done = sum(run.name in made for run in plan)
            texts.append(f"{task_label(task)}, r = {rank}, {done} of {len(plan)}")
        return f"Finished of the planned runs: {'; '.join(texts)}."

    def rewarm(self) -> Lines:
        """Folding with and without a warm-up after the boundary, by setting and seed."""
        asked = {(r["task"], r["rank"], r["lr"], r["seed"]) for r in self.minilm if r["variant"] == "rewarm"}
        lines = [
            {
                "": f"{task_label(row['task'])}, r = {row['rank']}, {rate_text(row['lr'])}, seed {row['seed']}",
                "method": LABELS[row["variant"]],
                "dev after each epoch": ", ".join(
                    f"{store.score(entry, row['task'], 'eval_') or 0.0:.1f}" for entry in row["epochs"]
                ),
                "held out": f"{_held_out(row):.1f}",
            }
            for key in sorted(asked)
            for row in self.minilm
            if (row["task"], row["rank"], row["lr"], row["seed"]) == key and row["variant"] in ("fold", "rewarm")
        ]
        return markdown(pd.DataFrame(lines)) if lines else NOTHING

    def losses(self) -> Lines:
        """Losses of the decoder, each variant at the better of its rates by the held-out rows."""
        best = _best(self.decoder, lambda row: -_loss(row))
        lines = []
        for variant, row in best.items():
            train = row["train_loss"]
            ends = [entry["step"] for entry in row["held_out"]]
            parts = [statistics.fmean(train[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
            others = [r for r in self.decoder if r["variant"] == variant and r is not row]
            lines.append(
                {
                    "method": LABELS[variant],
                    "rate": rate_text(row["lr"]),
                    f"train loss, mean to step {', '.join(map(str, ends))}": ", ".join(f"{v:.3f}" for v in parts),
                    "held out": ", ".join(f"{entry['loss']:.3f}" for entry in row["held_out"]),
                    "all right": ", ".join(f"{100 * entry['exact_match']:.0f} %" for entry in row["held_out"]),
                    "held out at the end, other rate": ", ".join(
                        f"{r['held_out'][-1]['loss']:.3f} ({rate_text(r['lr'])})" for r in others
                    ),
                    "energy kept, least / median": _energy(row),
                    "file, MB": f"{row['file_bytes'] / MB:.1f}",
                    "optimizer, MB": _by_phase(row["optimizer_bytes"]),
                }
            )
        if not lines:
            return NOTHING
        less = _beside_lora("Held-out loss", best, lambda own, lora: 1 - _loss(own) / _loss(lora), NOISE_LOSS, ".0%")
        head = f"How much less than LoRA's at the end, differences up to {NOISE_LOSS:.0%} called level"
        return [*markdown(pd.DataFrame(lines)), "", *_joined(head, [less])]

    def steps(self) -> Lines:
        """Bytes and seconds of a step of the decoder, by variant and phase."""
        names = {"stored": "saved for backward", "gradients": "gradients", "optimizer": "optimizer", "total": "all"}
        lines = [
            {
                "": LABELS[row["name"]],
                "time to LoRA's": "{median:.2f} ({q1:.2f} to {q3:.2f})".format(**row["ratios_to_lora"]["step"]),
                "trained": f"{row['trained_parameters']:,}",
                **{f"{name}, MB": f"{row['bytes'][kind] / MB:.0f}" for kind, name in names.items()},
            }
            for row in self.costs
        ]
        return markdown(pd.DataFrame(lines)) if lines else NOTHING


def _named(row: Row) -> dict[str, Any]:
    """Task, rank, variant, rate and seed of a run, from its name."""
    task, rank, variant, rest = row["run"].split("-", 3)
    rate, seed = rest.removeprefix("lr").rsplit("-seed", 1)
    return {"task": task, "rank": int(rank[1:]), "variant": variant, "lr": float(rate), "seed": int(seed)}


def _groups(rows: Iterable[Row], *keys: str) -> list[tuple[tuple, list[Row]]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return sorted(found.items(), key=lambda group: [str(part) for part in group[0]])


def _best(rows: Iterable[Row], score: Any) -> dict[str, Row]:
    """By variant, in the order of the labels, the run with the best score."""
    found = {name: [row for row in rows if row["variant"] == name] for name in LABELS}
    return {name: max(own, key=score) for name, own in found.items() if own and name != "rewarm"}


def _held_out(row: Row) -> float:
    value = store.score(row["holdout"], row["task"])
    return float("-inf") if value is None else value


def _dev(row: Row) -> float:
    return store.score(row["final"], row["task"], "eval_") or 0.0


def _loss(row: Row) -> float:
    return row["held_out"][-1]["loss"]


def _energy(row: Row) -> str:
    shares = [100 * share for share in row.get("kept_energy", {}).values()]
    return f"{min(shares):.1f} % / {statistics.median(shares):.1f} %" if shares else ""


def _by_phase(values: Mapping[str, int]) -> str:
    return " → ".join(f"{value / MB:.0f}" for value in values.values())


def _beside_lora(where: str, best: Mapping[str, Row], gain: Any, level: float, form: str) -> str:
    """What each variant has over LoRA, both at their better rates.

    Args:
        gain: of a run over LoRA's run, above 0 where it is better.
        level: gains and losses up to it are within the noise.
    """
    if LORA not in best:
        return f"{where}: no run of LoRA yet."
    texts = []
    for name, row in best.items():
        if name != LORA:
            found = gain(row, best[LORA])
            verdict = "**worse than LoRA**" if found < -level else "level with LoRA, **not better**"
            texts.append(f"{LABELS[name]}: {found:+{form}}, {'better than LoRA' if found > level else verdict}")
    return f"{where}: {'; '.join(texts)}."


def _joined(head: str, sentences: Iterable[str]) -> Lines:
    return [f"{head}, each method at the better of its rates:", "", *(f"- {sentence}" for sentence in sentences)]
