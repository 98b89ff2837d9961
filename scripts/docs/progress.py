"""Tables of the sweep itself: learning rates, phases, which cells are there, and what it ran on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from scripts.bench.tables import Lines, markdown
from scripts.docs.runs import ALL_TASKS, Record, Results, task_label
from scripts.docs.scores import NOTHING, OPEN, rate_text
from scripts.docs.statistics import MISSING
from scripts.sweep import store as sweep_store
from scripts.sweep.plan import GRID_SEED, PROTOCOLS, VARIANTS, Run, rates


def rates_table(results: Results) -> Lines:
    """Scores on the held-out rows and on dev by learning rate, the chosen one in bold."""
    names = [name for name in VARIANTS if any(rates(results.held_out, task, name, GRID_SEED) for task in ALL_TASKS)]
    tasks = [task for task in ALL_TASKS if any(rates(results.held_out, task, name, GRID_SEED) for name in names)]
    if not names:
        return NOTHING
    body = [[VARIANTS[name].label, *(_rates_cell(results, task, name) for task in tasks)] for name in names]
    return markdown(["", *(task_label(task) for task in tasks)], body)


def _rates_cell(results: Results, task: str, variant: str) -> str:
    parts = []
    for lr in rates(results.held_out, task, variant, GRID_SEED):
        run = Run("tuned", task, variant, lr, GRID_SEED)
        dev = sweep_store.score(results.records[run]["final"], task, "eval_")
        bold = "**" if lr == results.chosen.get((task, variant)) else ""
        parts.append(f"{bold}{rate_text(lr)}: {_score_text(results.held_out[run])} / {_score_text(dev)}{bold}")
    open_end = f" {OPEN}" if parts and not results.is_searched(task, variant) else ""
    return "<br>".join(parts) + open_end or MISSING


def _score_text(score: float | None) -> str:
    return "no value" if score is None or score == float("-inf") else f"{score:.1f}"


def phase_shares(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Of each phase, by name: its share of the steps and of the seconds in steps (medians over the runs), and the
    numbers of trained parameters that occur."""
    shares: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        phases = record["phases"]
        steps, seconds = (sum(phase[key] for phase in phases) for key in ("steps", "seconds"))
        for phase in phases:
            own = shares.setdefault(phase["name"], {"steps": [], "seconds": [], "trained": []})
            own["steps"].append(phase["steps"] / steps)
            own["seconds"].append(phase["seconds"] / seconds)
            own["trained"].append(phase["trained_parameters"])
    return {
        name: {
            "steps": median(own["steps"]),
            "seconds": median(own["seconds"]),
            "trained": (min(own["trained"]), max(own["trained"])),
        }
        for name, own in shares.items()
    }


def phased(results: Results) -> list[tuple[str, str]]:
    """`(protocol, variant)` of methods with several phases, under the recipe of the paper that they come from."""
    pairs = [(protocol, name) for protocol in ("paper", "nas") for name in results.shown(protocol)]
    return [pair for pair in pairs if any(len(record["phases"]) > 1 for record in results.cells(*pair))]


def phases_table(results: Results) -> Lines:
    """What each phase takes, and trains."""
    body = []
    for protocol, name in phased(results):
        records = results.cells(protocol, name)
        label = f"{VARIANTS[name].label} ({len(records)} run{'s' if len(records) > 1 else ''})"
        for phase, found in phase_shares(records).items():
            least, most = found["trained"]
            trained = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            shares = (f"{100 * found[key]:.0f} %" for key in ("steps", "seconds"))
            body.append([label, phase, *shares, trained])
            label = ""
    return markdown(["", "phase", "steps", "time in steps", "trained"], body) if body else NOTHING


def coverage_table(results: Results) -> Lines:
    """Finished seeds of the planned ones, by protocol, method and task."""
    lines: Lines = []
    for protocol, recipe in PROTOCOLS.items():
        plan = {(task, name): seeds for (own, task, name), seeds in results.planned_seeds.items() if own == protocol}
        tasks = [task for task in ALL_TASKS if any(task == planned for planned, _ in plan)]
        names = [name for name in VARIANTS if any(name == planned for _, planned in plan)]
        body = [
            [VARIANTS[name].label, *(_seeds_cell(results, protocol, task, name, plan) for task in tasks)]
            for name in names
        ]
        count = sum(run.protocol == protocol for run in results.records)
        title = f"**{recipe.label}** ({count} finished runs)"
        lines += [title, "", *markdown(["", *(task_label(task) for task in tasks)], body), ""]
    return lines[:-1]


def _seeds_cell(
    results: Results, protocol: str, task: str, variant: str, plan: Mapping[tuple[str, str], set[int]]
) -> str:
    seeds = plan.get((task, variant))
    if not seeds:
        return ""
    if protocol == "tuned" and (missing := results.missing_of_grid(task, variant)):
        total = len(VARIANTS[variant].lrs)
        return MISSING if missing == total else f"{total - missing} of {total} rates"
    done = len(results.cell(protocol, task, variant))
    if not done:
        return MISSING
    open_end = protocol == "tuned" and not results.is_searched(task, variant)
    return f"{done} of {len(seeds)}" if not open_end else f"{done} {OPEN}"


def setting_table(results: Results) -> Lines:
    """What the runs were made with; the number of runs in brackets where they differ."""
    records = list(results.records.values())
    if not records:
        return NOTHING
    versions = ("python", "torch", "transformers", "peft")
    found = {
        "model": [record["model"] for record in records],
        "machine": [
            f"{d['name']}, {d['processes']} process{'es' if d['processes'] > 1 else ''} of {d['threads']} thread"
            f"{'s' if d['threads'] > 1 else ''} ({d['type']})"
            for d in (record["device"] for record in records)
        ],
        "versions": [", ".join(f"{name} {record['versions'].get(name)}" for name in versions) for record in records],
        "batch": [f"{record['config']['total_batch_size']} rows" for record in records],
        "code": [_commit(record.get("code")) for record in records],
        "metrics": [record["metrics_source"] for record in records],
        "matrix products": [record["config"].get("float32_matmul_precision", "highest") for record in records],
    }
    body = [[name, "<br>".join(_counted(values))] for name, values in found.items()]
    dates = sorted(record["date"][:10] for record in records)
    hours = sum(record["wall_seconds"]["total"] for record in records) / 3600
    body.append(["runs", f"{len(records)}, {hours:.1f} hours in all"])
    body.append(["dates", " to ".join(dict.fromkeys((dates[0], dates[-1])))])
    return markdown(["", ""], body)


def _commit(code: str | None) -> str:
    """A commit, shortened; what follows says whether there were changes."""
    if not code:
        return "not recorded"
    commit, *changes = code.split("-")
    return "-".join([commit[:7], *changes])


def _counted(values: list[str]) -> list[str]:
    counts = Counter(values)
    return [value if len(counts) == 1 else f"{value} ({count})" for value, count in counts.most_common()]
