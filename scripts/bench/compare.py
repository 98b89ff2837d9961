"""Two checkouts' packages side by side: time and stored bytes of a step with one over those with the other.

    python -m scripts.bench.compare BEFORE AFTER --setting minilm-16x32-r8 --model_name_or_path MODEL --out rows.jsonl

Each checkout has a process of its own, which holds the methods of a group as that checkout's package builds them; both
run these scripts. They take their rounds in turn, and which is first changes from round to round. A row per method
says by quartiles what a step takes after over before, and, in each of the two, over LoRA's step.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pandas as pd
import torch

from scripts.bench.measure import WARMUP_ROUNDS, measure_bytes, order_of, ratios, take_step
from scripts.bench.methods import GROUPS
from scripts.bench.run import groups_of, try_to_build
from scripts.bench.settings import SETTINGS, prepare
from scripts.glue import run_record

ROOT = Path(__file__).resolve().parents[2]
#: These scripts, but the package of the checkout that is the first argument.
_SERVE = f"""
import sys
sys.path[0] = {str(ROOT)!r}
import scripts
sys.path[0] = sys.argv[1]
from scripts.bench import compare
compare.serve(*sys.argv[2:])
"""


def serve(setting: str, model: Optional[str], threads: str, *groups: str) -> None:
    """What a checkout's process does: answer on stdout, a line for each line of stdin, one group after the other."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(int(threads))
    work = prepare(SETTINGS[setting], model or None, torch.device("cpu"))
    found = groups_of(SETTINGS[setting])
    for group in groups or found:
        built = {name: try_to_build(work, build, steps=False) for name, build in found[group].items()}
        variants = {name: variant for name, variant in built.items() if not isinstance(variant, str)}
        stored = {name: measure_bytes(variant, work.rows)["stored"] for name, variant in variants.items()}
        print(json.dumps({"group": group, "stored": stored, "code": run_record.code()}), file=answers)
        for number in map(int, iter(sys.stdin.readline, "next\n")):
            order = order_of(list(variants), number)
            print(json.dumps({name: take_step(variants[name], work.rows)["step"] for name in order}), file=answers)
    print("null", file=answers)


def compare(workers: list[subprocess.Popen], rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of all groups; the workers are of the checkouts before and after."""

    def answer(worker: subprocess.Popen, line: str = "") -> Any:
        worker.stdin.write(line)
        worker.stdin.flush()
        if not (said := worker.stdout.readline()):
            raise RuntimeError("The process of a checkout ended before it was told to; it says above why.")
        return json.loads(said)

    about = [answer(worker) for worker in workers]
    while all(about):
        seconds: list[list[dict[str, float]]] = [[], []]
        for number in range(-WARMUP_ROUNDS, rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                found = answer(workers[side], f"{number}\n")
                seconds[side] += [found] if number >= 0 else []
        before, after = (pd.DataFrame(each) for each in seconds)
        for name in (name for name in about[0]["stored"] if name in about[1]["stored"]):
            to_lora = [ratios(each[name], each["lora"]) if "lora" in each else None for each in (before, after)]
            yield {
                "group": about[0]["group"],
                "method": name,
                "rounds": rounds,
                "time_ratio": ratios(after[name], before[name]),
                "time_to_lora": dict(zip(("before", "after"), to_lora, strict=True)),
                "stored": {"before": about[0]["stored"][name], "after": about[1]["stored"][name]},
                "code": {"before": about[0]["code"], "after": about[1]["code"]},
            }
        about = [answer(worker, "next\n") for worker in workers]


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""

    def quartiles(found: Optional[dict[str, float]]) -> str:
        return f"{found['median']:.3f} [{found['q1']:.3f}, {found['q3']:.3f}]" if found else ""

    return pd.DataFrame(
        {
            "": f"{row['group']}: {row['method']}",
            "time, after / before": quartiles(row["time_ratio"]),
            "to LoRA before": quartiles(row["time_to_lora"]["before"]),
            "after": quartiles(row["time_to_lora"]["after"]),
            "stored, after / before": f"{after / before:.4f}" if before else "",
        }
        for row in rows
        for before, after in [row["stored"].values()]
    ).to_string(index=False)


def main(argv: Optional[list[str]] = None) -> list[dict[str, Any]]:
    """Run the script; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT", help="folders: before, and after")
    parser.add_argument("--setting", required=True, choices=list(SETTINGS))
    parser.add_argument("--model_name_or_path", default="", help="the model of the settings minilm-*")
    parser.add_argument("--groups", nargs="+", default=[], choices=list(GROUPS), help="default: the setting's")
    parser.add_argument("--rounds", type=int, default=8, help="that count (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--out", type=Path, help="file of the rows")
    args = parser.parse_args(argv)
    known = groups_of(SETTINGS[args.setting])
    if lost := [group for group in args.groups if group not in known]:
        parser.error(f"--groups of {args.setting} are {', '.join(known)}, got {', '.join(lost)}")
    words = [args.setting, args.model_name_or_path, str(args.threads), *args.groups]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # the one that waits does not spin
    commands = [[sys.executable, "-c", _SERVE, str(checkout.resolve()), *words] for checkout in args.checkouts]
    workers = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    rows = []
    try:
        for row in compare(workers, args.rounds):
            rows.append({"setting": args.setting, **row})
            if args.out:
                run_record.write_lines(args.out, rows)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    print(report(rows))
    return rows


if __name__ == "__main__":
    main()
