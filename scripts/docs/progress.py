"""Tables of the sweep itself: learning rates, phases, which cells are there, and what it ran on."""

from __future__ import annotations

import pandas as pd

from scripts.docs.pages import Lines, markdown
from scripts.docs.runs import ORDER, Results, task_label
from scripts.docs.scores import MISSING, NOTHING, OPEN, rate_text
from scripts.sweep.plan import GRID_SEED, PROTOCOLS, VARIANTS, Run, best_rate, planned


def by_task(cells: pd.Series, missing: str = "") -> Lines:
    """Texts by task and variant as a table: a row per variant, a column per task, in the order of the plan."""
    table = cells.unstack("task").fillna(missing).sort_index(key=lambda names: names.map(ORDER))
    table = table.sort_index(axis="columns", key=lambda names: names.map(ORDER)).rename(columns=task_label)
    table.insert(0, "", [VARIANTS[name].label for name in table.index])
    return markdown(table)


def rates_table(results: Results) -> Lines:
    """Scores on the held-out rows and on dev by learning rate, the chosen one in bold."""

    def score(value: float | None) -> str:
        return "no value" if value is None or pd.isna(value) or value == float("-inf") else f"{value:.1f}"

    def cell(grid: pd.DataFrame) -> str:
        task, variant = grid.name
        texts = []
        for lr, dev in zip(grid.lr, grid.score, strict=True):
            held_out = results.held_out[Run("tuned", task, variant, lr, GRID_SEED)]
            bold = "**" if lr == best_rate(results.held_out, task, variant) else ""
            texts.append(f"{bold}{rate_text(lr)}: {score(held_out)} / {score(dev)}{bold}")
        return "<br>".join(texts) + ("" if results.is_searched(task, variant) else f" {OPEN}")

    runs = results.runs[(results.runs.protocol == "tuned") & (results.runs.seed == GRID_SEED)]
    if runs.empty:
        return NOTHING
    return by_task(runs.groupby(["task", "variant"])[["lr", "score"]].apply(cell), MISSING)


def phases_table(results: Results) -> Lines:
    """What each phase takes, and trains: shares of the steps and of the seconds in steps are medians over the runs.

    Methods with several phases stand under the recipe of the paper that they come from.
    """
    lines = []
    for protocol, variant in ((p, name) for p in ("paper", "nas") for name in results.shown(p)):
        records = results.of(protocol, variant=variant).record
        phases = pd.concat([pd.DataFrame(record["phases"]) for record in records], keys=range(len(records)))
        if not phases.index.get_level_values(1).any():  # one phase in each run
            continue
        shares = phases[["steps", "seconds"]] / phases[["steps", "seconds"]].groupby(level=0).transform("sum")
        label = f"{VARIANTS[variant].label} ({len(records)} run{'s' if len(records) > 1 else ''})"
        for name, medians in shares.groupby(phases.name, sort=False).median().iterrows():
            trained = sorted({*phases.trained_parameters[phases.name == name]})
            lines.append(
                {
                    "": label,
                    "phase": name,
                    "steps": f"{100 * medians.steps:.0f} %",
                    "time in steps": f"{100 * medians.seconds:.0f} %",
                    "trained": " to ".join(f"{count:,}" for count in dict.fromkeys((trained[0], trained[-1]))),
                }
            )
            label = ""
    return markdown(pd.DataFrame(lines)) if lines else NOTHING


def coverage_table(results: Results) -> Lines:
    """Finished seeds of the planned ones, by protocol, method and task."""
    plan = pd.DataFrame(map(vars, planned(results.held_out))).groupby(["protocol", "task", "variant"]).seed.nunique()

    def cell(protocol: str, task: str, variant: str, seeds: int) -> str:
        grid, found = len(VARIANTS[variant].lrs), results.grid_size(task, variant)
        if protocol == "tuned" and found < grid:
            return f"{found} of {grid} rates" if found else MISSING
        if not (done := len(results.of(protocol, task, variant))):
            return MISSING
        open_end = protocol == "tuned" and not results.is_searched(task, variant)
        return f"{done} {OPEN}" if open_end else f"{done} of {seeds}"

    lines: Lines = []
    for protocol, recipe in PROTOCOLS.items():
        cells = pd.Series({key[1:]: cell(*key, seeds) for key, seeds in plan.items() if key[0] == protocol})
        count = sum(run.protocol == protocol for run in results.records)
        table = by_task(cells.rename_axis(["task", "variant"]))
        lines += [f"**{recipe.label}** ({count} finished runs)", "", *table, ""]
    return lines[:-1]


def setting_table(results: Results) -> Lines:
    """What the runs were made with; the number of runs in brackets where they differ."""
    records = list(results.records.values())
    if not records:
        return NOTHING
    versions = ("python", "torch", "transformers", "peft")

    def machine(d: dict) -> str:
        processes = f"{d['processes']} process{'es' if d['processes'] > 1 else ''}"
        return f"{d['name']}, {processes} of {d['threads']} thread{'s' if d['threads'] > 1 else ''} ({d['type']})"

    found = pd.DataFrame(
        {
            "model": record["model"],
            "machine": machine(record["device"]),
            "versions": ", ".join(f"{name} {record['versions'].get(name)}" for name in versions),
            "batch": f"{record['config']['total_batch_size']} rows",
            "code": _commit(record.get("code")),
            "metrics": record["metrics_source"],
            "matrix products": record["config"].get("float32_matmul_precision", "highest"),
        }
        for record in records
    )
    texts = {}
    for name, values in found.items():
        counts = values.value_counts()
        texts[name] = "<br>".join(value if len(counts) == 1 else f"{value} ({n})" for value, n in counts.items())
    dates = sorted(record["date"][:10] for record in records)
    hours = sum(record["wall_seconds"]["total"] for record in records) / 3600
    texts["runs"] = f"{len(records)}, {hours:.1f} hours in all"
    texts["dates"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return markdown(pd.DataFrame(texts.items()).set_axis(["", ""], axis="columns"))


def _commit(code: str | None) -> str:
    """A commit, shortened; what follows says whether there were changes."""
    if not code:
        return "not recorded"
    commit, *changes = code.split("-")
    return "-".join([commit[:7], *changes])
