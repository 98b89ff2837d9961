"""Tables of results/fold: Learners beside LoRA on a decoder, from runs of scripts.decoder.run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.docs.pages import Lines, markdown
from scripts.glue import run_record

Row = Mapping[str, Any]
LABELS = {
    "lora": "LoRA",
    "unprimed": "Learner, no priming",
    "keep": "primed Learner, keeps",
    "fold": "primed Learner, folds",
    "priming": "primed Learner in its priming",
}
LORA = "lora"
MB = 1e6
#: Differences of losses that one run each can't tell from none: a guess.
NOISE = 0.1
NOTHING: Lines = ["No finished runs yet."]


def losses(folder: Path) -> Lines:
    """Losses, each variant at the better of its rates by the held-out rows."""
    rows = run_record.read_lines(folder / "decoder.jsonl")
    if not rows:
        return NOTHING
    best = {}
    for variant in LABELS:
        if own := [row for row in rows if row["variant"] == variant]:
            best[variant] = min(own, key=_loss)
    lines = []
    for variant, row in best.items():
        train = row["train_loss"]
        ends = [entry["step"] for entry in row["held_out"]]
        parts = [statistics.fmean(train[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        others = [r for r in rows if r["variant"] == variant and r is not row]
        lines.append(
            {
                "method": LABELS[variant],
                "rate": _rate(row["lr"]),
                f"train loss, mean to step {', '.join(map(str, ends))}": ", ".join(f"{v:.3f}" for v in parts),
                "held out": ", ".join(f"{entry['loss']:.3f}" for entry in row["held_out"]),
                "all right": ", ".join(f"{100 * entry['exact_match']:.0f} %" for entry in row["held_out"]),
                "held out at the end, other rate": ", ".join(f"{_loss(r):.3f} ({_rate(r['lr'])})" for r in others),
                "energy kept, least / median": _energy(row),
                "file, MB": f"{row['file_bytes'] / MB:.1f}",
                "optimizer, MB": " → ".join(f"{value / MB:.0f}" for value in row["optimizer_bytes"].values()),
            }
        )
    head = f"How much less than LoRA's at the end, differences up to {NOISE:.0%} called level"
    head += ", each method at the better of its rates:"
    return [*markdown(pd.DataFrame(lines)), "", head, "", f"- {_beside_lora(best)}"]


def steps(folder: Path) -> Lines:
    """Bytes and seconds of a step, by variant and phase."""
    names = {"stored": "saved for backward", "gradients": "gradients", "optimizer": "optimizer", "total": "all"}
    lines = [
        {
            "": LABELS[row["name"]],
            "time to LoRA's": "{median:.2f} ({q1:.2f} to {q3:.2f})".format(**row["ratios_to_lora"]["step"]),
            "trained": f"{row['trained_parameters']:,}",
            **{f"{name}, MB": f"{row['bytes'][kind] / MB:.0f}" for kind, name in names.items()},
        }
        for row in run_record.read_lines(folder / "decoder-costs.jsonl")
    ]
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def _loss(row: Row) -> float:
    return row["held_out"][-1]["loss"]


def _rate(lr: float) -> str:
    """A learning rate without needless zeros: 3e-5."""
    mantissa, exponent = f"{lr:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _energy(row: Row) -> str:
    shares = [100 * share for share in row.get("kept_energy", {}).values()]
    return f"{min(shares):.1f} % / {statistics.median(shares):.1f} %" if shares else ""


def _beside_lora(best: Mapping[str, Row]) -> str:
    """How much less each variant's held-out loss is than LoRA's, both at their better rates."""
    if LORA not in best:
        return "Held-out loss: no run of LoRA yet."
    texts = []
    for name, row in best.items():
        if name != LORA:
            less = 1 - _loss(row) / _loss(best[LORA])
            verdict = "**worse than LoRA**" if less < -NOISE else "level with LoRA, **not better**"
            texts.append(f"{LABELS[name]}: {less:+.0%}, {'better than LoRA' if less > NOISE else verdict}")
    return f"Held-out loss: {'; '.join(texts)}."
