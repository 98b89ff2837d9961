"""Markdown tables of the benchmark's rows, as they stand in the docs.

python -m scripts.bench.tables results/bench [--table learner]
python -m scripts.bench.tables --write    # into the pages, where they are marked <!-- bench:learner -->
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

from scripts.bench import targets as bench_targets
from scripts.bench.rows import Row, row_of, rows_to_show, settings_of, time_ratio

Lines = list[str]
#: The four shapes of MiniLM, with the heads of their columns.
SHAPES = {
    "minilm-16x32-r8": "r=8, 32 tokens",
    "minilm-16x128-r8": "r=8, 128",
    "minilm-16x32-r64": "r=64, 32",
    "minilm-16x128-r64": "r=64, 128",
}
LONG = "minilm-16x128-r64"
LEARNER = {
    "learner_priming": "in priming",
    "learner_primed": "after priming",
    "learner_unprimed": "without priming",
    "learner_unprimed_no_norms": "the same, `train_norms=False`",
    "full": "full fine-tuning",
}
FLOPS = {
    "lora": "LoRA",
    "learner_priming": "Learner, in priming",
    "learner_primed": "Learner, after priming",
    "learner_unprimed": "Learner, without priming",
    "full": "full fine-tuning",
}
FAR = {
    "far_priming": "in priming",
    "far_after": "after, by hidden unit",
    "far_after_discard": "the same, `discard_unkept`",
    "far_after_output_node": "after, by output node",
}
NAS = {
    "nas_search": ("search of U-MaM, against the same adapter without importance", "nas_plain"),
    "nas_search_s_mam": ("search of S-MaM, against the same", "nas_plain_s_mam"),
    "nas_search_u_bitfit": ("search of U-BitFit, against the same", "nas_plain_u_bitfit"),
    "u_bitfit_10": ("retraining 10 % of the biases, against BitFit", "bitfit"),
    "nas_retrain_structured": ("retraining S-MaM at half, against LoRA of rank 8 with biases", "lora_mam"),
    "nas_retrain_unstructured": ("retraining U-MaM at half, against LoRA of rank 8 with biases", "lora_mam"),
}
INFERENCE = {
    "inference_lora": "LoRA",
    "inference_learner": "Learner, after priming",
    "inference_learner_unprimed": "Learner, without priming",
    "inference_learner_merged": "Learner, merged",
}
METHODS = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "lora_dora": "LoRA with `use_dora`",
    "adalora": "AdaLoRA",
    "shira": "SHiRA",
    "adapter_sequential": "bottleneck adapters, sequential",
    "adapter_parallel": "bottleneck adapters, parallel",
    "prompt_tuning": "prompt tuning",
    "freeze_ffns": "FREEZE FFNs",
    "lora_mam": "MaM (LoRA of rank 8, all biases)",
    "learner_priming": "Learner, in priming",
    "learner_primed": "Learner, after priming",
    "learner_unprimed": "Learner, without priming",
    "learner_unprimed_no_norms": "Learner, without priming and norms",
    "far_priming": "FAR, in priming",
    "far_after": "FAR, after",
    "far_after_discard": "FAR, after, `discard_unkept`",
    "far_after_output_node": "FAR, after, by output node",
    "nas_search": "NAS-LoRA, search (U-MaM)",
    "nas_retrain_structured": "NAS-LoRA, retraining (S-MaM)",
    "nas_retrain_unstructured": "NAS-LoRA, retraining (U-MaM)",
    "bitfit": "BitFit",
    "u_bitfit_10": "NAS-LoRA, retraining (U-BitFit, 10 %)",
}
#: Methods that train low-rank updates of the setting's rank on all layers.
HELD_AGAINST_THE_BOUND = ("lora", "lora_dora", "adalora", *(name for name in METHODS if name.startswith("learner")))


def quartile_cell(row: Optional[Row], reference: str) -> str:
    """`median [q1, q3]` of the step's time; empty where it was not measured."""
    if row is None or reference not in row.get("time_ratios", {}):
        return ""
    found = time_ratio(row, reference)
    return f"{found['median']:.2f} [{found['q1']:.2f}, {found['q3']:.2f}]"


def byte_cell(row: Optional[Row], reference: str, kind: str) -> str:
    return f"{row['bytes_ratios'][reference][kind]:.2f}" if row is not None and "bytes_ratios" in row else ""


def megabytes(row: Optional[Row], key: str = "adapter_file_bytes") -> str:
    return f"{row[key] / 1e6:.2f} MB" if row is not None and row.get(key) else ""


def seconds_cell(row: Row, key: str) -> str:
    return f"{sorted(row[key])[len(row[key]) // 2]:.2f} s" if row.get(key) else ""


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> Lines:
    """The lines of a table."""
    rule = "|" + "---|" * len(head)
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *body))
    return [first.replace("|  |", "| |"), rule, *rest]


def learner_table(rows: Sequence[Row], device: str, ending: str = "") -> Lines:
    """Step time against LoRA, and bytes in the last shape.

    Args:
        ending: of the settings' names.
    """
    body = []
    for name, label in LEARNER.items():
        cells = [quartile_cell(row_of(rows, shape + ending, name, device), "lora") for shape in SHAPES]
        long = row_of(rows, LONG + ending, name, device)
        body.append([label, *cells, *(byte_cell(long, "lora", kind) for kind in ("stored", "total"))])
    return markdown(["", *SHAPES.values(), "stored", "all"], body)


def flops_table(rows: Sequence[Row], device: str) -> Lines:
    """Flops relative to the bound."""
    body = []
    for name, label in FLOPS.items():
        found = (row_of(rows, shape, name, device) for shape in SHAPES)
        body.append([label, *(f"{row['flops_to_bound']:.2f}" if row else "" for row in found)])
    return markdown(["", *SHAPES.values()], body)


def far_table(rows: Sequence[Row], device: str) -> Lines:
    """Against full fine-tuning; stored bytes also with the model's own dropout."""
    head = ["", "time of a step", "stored", "stored, with dropout", "all", "adapter's file"]
    body = []
    for name, label in FAR.items():
        row, dropout = row_of(rows, LONG, name, device), row_of(rows, f"{LONG}-dropout", name, device)
        stored = [byte_cell(found, "full", "stored") for found in (row, dropout)]
        body.append([label, quartile_cell(row, "full"), *stored, byte_cell(row, "full", "total"), megabytes(row)])
    return markdown(head, body)


def nas_table(rows: Sequence[Row], device: str) -> Lines:
    """Each against its own peer."""
    body = []
    for name, (label, peer) in NAS.items():
        found = [row_of(rows, shape, name, device) for shape in ("minilm-16x128-r8", "minilm-16x32-r8")]
        times = [quartile_cell(row, peer) for row in found]
        body.append([label, *times, byte_cell(found[0], peer, "optimizer"), megabytes(found[0])])
    return markdown(["", "16 x 128 tokens", "16 x 32 tokens", "optimizer state", "adapter's file"], body)


def inference_table(rows: Sequence[Row], device: str, ending: str = "") -> Lines:
    """A forward pass against the base model's.

    Args:
        ending: of the settings' names.
    """
    body = []
    for name, label in INFERENCE.items():
        found = (row_of(rows, shape + ending, name, device) for shape in SHAPES)
        body.append([label, *(quartile_cell(row, "inference_base") for row in found)])
    return markdown(["", *SHAPES.values()], body)


def methods_table(rows: Sequence[Row], device: str, setting: str) -> Lines:
    """All methods that train in one setting."""
    head = ["", "step, to LoRA", "step, to full", "tokens/s", "flops / bound", "stored", "all"]
    head += ["exchanged", "file", "save", "load"]
    body, lora = [], row_of(rows, setting, "lora", device)
    assert lora is not None
    for name, label in METHODS.items():
        row = row_of(rows, setting, name, device)
        if row is None or "skipped" in row:
            body += [[label, f"skipped: {row['skipped']}", *[""] * (len(head) - 2)]] if row else []
            continue
        body.append(
            [
                label,
                *(quartile_cell(row, peer) for peer in ("lora", "full")),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops_to_bound']:.2f}" if name in HELD_AGAINST_THE_BOUND else "",
                *(f"{row['bytes'][kind] / lora['bytes'][kind]:.2f}" for kind in ("stored", "total")),
                megabytes(row, "exchanged_bytes"),
                megabytes(row),
                *(seconds_cell(row, key) for key in ("save_seconds", "load_seconds")),
            ]
        )
    return markdown(head, body)


def models_table(rows: Sequence[Row], device: str) -> Lines:
    """The main comparisons of larger models, a row per setting, and of the one shape of MiniLM beside them."""
    columns = {
        "Learner after priming / LoRA": ("learner_primed", "lora"),
        "Learner without priming / LoRA": ("learner_unprimed", "lora"),
        "Learner in priming / full": ("learner_priming", "full"),
        "FAR after priming / full": ("far_after", "full"),
        "Learner unmerged / base, inference": ("inference_learner_unprimed", "inference_base"),
    }
    body = []
    for setting, kind in settings_of(rows):
        larger = setting == LONG or not setting.startswith("minilm")
        if kind == device and larger and row_of(rows, setting, "learner_primed", device):
            found = ((row_of(rows, setting, name, device), peer) for name, peer in columns.values())
            body.append([setting, *(quartile_cell(row, peer) for row, peer in found)])
    return markdown(["", *columns], body)


def scaling_table(rows: Sequence[Row], device: str) -> Lines:
    """The Learner's step time relative to LoRA's along each curve."""
    body = []
    for axis in dict.fromkeys(row["axis"] for row in rows if "axis" in row):
        own = [r for r in rows if r.get("axis") == axis and r["device"]["type"] == device]
        cells = [
            f"{row['value']}: {time_ratio(row, 'lora')['median']:.2f}"
            for row in own
            if row["method"] == "learner_unprimed" and "time_ratios" in row
        ]
        body.append([axis, ", ".join(cells)])
    return markdown(["", "Learner / LoRA"], body)


def targets_table(rows: Sequence[Row], device: str) -> Lines:
    """What was aimed at, what was found."""
    body = [
        [f.target.name, f.setting, f"{f.target.limit:g}", "" if f.value is None else f"{f.value:.3f}", f.verdict]
        for f in bench_targets.check(rows, device)
    ]
    return markdown(["figure", "setting", "at most", "found", ""], body)


def profile_table(folder: Path, setting: str, device: str) -> Lines:
    """Where a step's time goes: shares by purpose, a column per method."""
    found = json.loads((folder / f"profile-{setting}-{device}.json").read_text())["methods"]
    purposes = dict.fromkeys(purpose for entry in found.values() for purpose in entry["shares"])
    body = [[p, *(f"{100 * entry['shares'].get(p, 0):.0f} %" for entry in found.values())] for p in purposes]
    return markdown(["", *(METHODS[name] for name in found)], body)


TABLES: dict[str, Callable[[Sequence[Row], str], Lines]] = {
    "learner": learner_table,
    "flops": flops_table,
    "far": far_table,
    "nas": nas_table,
    "inference": inference_table,
    "learner-kept-heap": partial(learner_table, ending=bench_targets.KEPT_HEAP),
    "inference-kept-heap": partial(inference_table, ending=bench_targets.KEPT_HEAP),
    "models": models_table,
    "scaling": scaling_table,
    "targets": targets_table,
}


def tables_of(rows: Sequence[Row], device: str) -> dict[str, Callable[[Sequence[Row], str], Lines]]:
    """All tables, and one of all methods for each setting that has rows of single shapes."""
    shaped = [setting for setting, kind in settings_of(rows) if kind == device and row_of(rows, setting, "lora", kind)]
    return {**TABLES, **{name: partial(methods_table, setting=name) for name in shaped if name != "scaling"}}


# -- pages ----------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[2] / "docs"


def spliced(text: str, kind: str, lines_of: Callable[[str], Lines]) -> str:
    """A page with `lines_of(NAME)` between its markers, `<!-- KIND:NAME -->` and `<!-- KIND:end -->`.

    Raises:
        ValueError: a marker has no end, or an end no marker.
    """
    mark = re.compile(rf"<!-- {kind}:([\w-]+) -->\n(.*?)<!-- {kind}:end -->", re.DOTALL)
    found = mark.findall(text)
    if text.count(f"<!-- {kind}:") != 2 * len(found) or any(f"<!-- {kind}:" in body for _, body in found):
        raise ValueError(f"Each <!-- {kind}:NAME --> must have its <!-- {kind}:end --> before the next one begins.")

    def fill(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- {kind}:{match[1]} -->", "", *lines_of(match[1]), "", f"<!-- {kind}:end -->"])

    return mark.sub(fill, text)


def with_tables(text: str, folder: Path, device: str = "cpu") -> str:
    """A page with the tables between its markers, `<!-- bench:NAME -->` and `<!-- bench:end -->`.

    Raises:
        ValueError: there is no table of a marker's name.
    """
    rows = rows_to_show(folder)
    tables = tables_of(rows, device)

    def lines_of(name: str) -> Lines:
        if name.startswith("profile-"):
            return profile_table(folder, name.removeprefix("profile-"), device)
        if name not in tables:
            raise ValueError(f"<!-- bench:{name} --> must name one of {', '.join(tables)}, or profile-SETTING.")
        return tables[name](rows, device)

    return spliced(text, "bench", lines_of)


def write_pages(folder: Path, docs: Path = DOCS) -> list[str]:
    """Bring all pages up to date; returns the names of those that were not."""
    changed = []
    for page in sorted(docs.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = with_tables(text, folder)
        if new != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page.name)
    return changed


def main(argv: Optional[list[str]] = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Print the benchmark's tables in Markdown.")
    parser.add_argument("rows", nargs="?", type=Path, default=Path("results/bench"), help="folder (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="whose rows (%(default)s)")
    parser.add_argument("--table", help="only one: " + ", ".join(TABLES) + ", or a setting (default: all)")
    parser.add_argument("--write", action="store_true", help="bring the tables in docs/*.md up to date")
    args = parser.parse_args(argv)
    if args.write:
        print(f"rewritten: {', '.join(write_pages(args.rows)) or 'none'}")
        return
    rows = rows_to_show(args.rows)
    tables = tables_of(rows, args.device)
    if args.table is not None and args.table not in tables:
        parser.error(f"--table must be one of {', '.join(tables)}, got {args.table!r}")
    for name, table in tables.items():
        if args.table in (None, name):
            print(f"<!-- {name} -->", *table(rows, args.device), "", sep="\n")


if __name__ == "__main__":
    main()
