"""Tables of the benchmark's rows, as they stand in the docs (where `python -m scripts.docs.report` writes them).

python -m scripts.bench.tables results/bench [--table learner]    # prints them
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import pandas as pd

from scripts.bench.rows import Row, column, read_rows, table_of

#: The four shapes of MiniLM, with the heads of their columns.
SHAPES = {
    "minilm-16x32-r8": "r=8, 32 tokens",
    "minilm-16x128-r8": "r=8, 128",
    "minilm-16x32-r64": "r=64, 32",
    "minilm-16x128-r64": "r=64, 128",
}
LONG = "minilm-16x128-r64"
#: Ends the names of the same shapes, measured with an allocator that gives no memory back.
KEPT_HEAP = "-kept-heap"
#: Shapes whose bytes alone are counted, on a CPU, with a model in bfloat16.
BF16 = {"bert512-2x128-r16-bf16": "r=16", "bert512-2x128-r64-bf16": "r=64"}
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
#: The main comparisons, in inference the last: method and peer by the head of their column.
COMPARISONS = {
    "Learner after priming / LoRA": ("learner_primed", "lora"),
    "Learner without priming / LoRA": ("learner_unprimed", "lora"),
    "Learner in priming / full": ("learner_priming", "full"),
    "FAR after priming / full": ("far_after", "full"),
    "Learner unmerged / base, inference": ("inference_learner_unprimed", "inference_base"),
}


def kept(settings: Sequence[str]) -> tuple[str, ...]:
    return (*settings, *(f"{setting}{KEPT_HEAP}" for setting in settings))


def time_column(peer: str, quantile: str = "median") -> str:
    """Name of the column of a step's time relative to a peer's."""
    return f"time_ratios.{peer}.step.{quantile}"


_RANK_64, _RANK_8 = ("minilm-16x32-r64", "minilm-16x128-r64"), ("minilm-16x32-r8", "minilm-16x128-r8")
_ALL, _LONG = (*_RANK_8, *_RANK_64), ("minilm-16x128-r8", "minilm-16x128-r64")
_TO_LORA, _TO_FULL, _TO_BASE = map(time_column, ("lora", "full", "inference_base"))
_LEARNER, _PLAIN = "Learner after priming", "Learner without priming, unmerged / base model: inference"
#: What was aimed at: a figure, the most it should be, the settings that this is for, the method, and its column.
TARGETS: tuple[tuple[str, float, Sequence[str], str, str], ...] = (
    (f"{_LEARNER} / LoRA: step time", 0.87, kept(_RANK_64), "learner_primed", _TO_LORA),
    (f"{_LEARNER} / LoRA: step time", 0.91, kept(_RANK_8), "learner_primed", _TO_LORA),
    (f"{_LEARNER} / LoRA: stored bytes", 0.95, _RANK_64, "learner_primed", "bytes_ratios.lora.stored"),
    (f"{_LEARNER}: flops / bound", 1.05, _ALL, "learner_primed", "flops_to_bound"),
    ("Learner in priming / full fine-tuning: step time", 1.0, kept(_ALL), "learner_priming", _TO_FULL),
    ("FAR after priming / full fine-tuning: step time", 0.88, _RANK_64, "far_after", _TO_FULL),
    ("FAR after priming / full fine-tuning: stored bytes", 0.78, _RANK_64, "far_after", "bytes_ratios.full.stored"),
    *(
        (f"NAS-LoRA's search ({space}) / without importance: step time", 1.03, _RANK_8, f"nas_search{end}", column_)
        for space, end in (("U-MaM", ""), ("S-MaM", "_s_mam"), ("U-BitFit", "_u_bitfit"))
        for column_ in [time_column(f"nas_plain{end}")]
    ),
    ("Learner, unmerged / base model: inference", 1.03, kept(_LONG), "inference_learner", _TO_BASE),
    (_PLAIN, 1.03, kept(_LONG), "inference_learner_unprimed", _TO_BASE),
    ("import over `import peft`: ms", 50.0, ("import",), "peft_learners", "import_seconds.median"),
)


# -- cells ---------------------------------------------------------------------------------------------------------


def texts(table: pd.DataFrame, name: str, form: str = "{:.2f}", per: float = 1) -> pd.Series:
    """A column's values divided by `per`, as texts; empty where there is none."""
    return column(table, name).map(lambda value: "" if pd.isna(value) or not value else form.format(value / per))


def quartiles(table: pd.DataFrame, peer: str) -> pd.Series:
    """`median [q1, q3]` of the step's time relative to a peer's; empty where it was not measured."""
    median, low, high = (texts(table, time_column(peer, name)) for name in ("median", "q1", "q3"))
    return (median + " [" + low + ", " + high + "]").where(median != "", "")


def at(cells: pd.Series, setting: str, methods: Iterable[str]) -> list[str]:
    """Of texts by setting and method, those of some methods in a setting; empty where there is no row."""
    return [cells.get((setting, method), "") for method in methods]


def seconds(table: pd.DataFrame, name: str) -> pd.Series:
    """The middle one of each row's seconds."""
    return column(table, name).map(
        lambda values: f"{sorted(values)[len(values) // 2]:.2f} s" if isinstance(values, list) else ""
    )


# -- tables --------------------------------------------------------------------------------------------------------


def shapes_table(cells: pd.Series, methods: Mapping[str, str], ending: str = "") -> pd.DataFrame:
    """Texts of methods, a column per shape of MiniLM.

    Args:
        ending: of the settings' names.
    """
    columns = {head: at(cells, f"{shape}{ending}", methods) for shape, head in SHAPES.items()}
    return pd.DataFrame({"": methods.values(), **columns})


def learner_table(table: pd.DataFrame, ending: str = "") -> pd.DataFrame:
    """Step time against LoRA, and bytes in the last shape."""
    stored, total = (texts(table, f"bytes_ratios.lora.{kind}") for kind in ("stored", "total"))
    return shapes_table(quartiles(table, "lora"), LEARNER, ending).assign(
        stored=at(stored, LONG + ending, LEARNER), all=at(total, LONG + ending, LEARNER)
    )


def bf16_table(table: pd.DataFrame) -> pd.DataFrame:
    """Bytes against LoRA's where the model is in bfloat16."""
    kinds = {
        kind: texts(table, f"bytes_ratios.lora.{where}") for kind, where in (("stored", "stored"), ("all", "total"))
    }
    columns = {f"{head}, {kind}": at(kinds[kind], name, LEARNER) for name, head in BF16.items() for kind in kinds}
    return pd.DataFrame({"": LEARNER.values(), **columns})


def flops_table(table: pd.DataFrame) -> pd.DataFrame:
    """Flops relative to the bound."""
    return shapes_table(texts(table, "flops_to_bound"), FLOPS)


def far_table(table: pd.DataFrame) -> pd.DataFrame:
    """Against full fine-tuning; stored bytes also with the model's own dropout."""
    stored = texts(table, "bytes_ratios.full.stored")
    return pd.DataFrame(
        {
            "": FAR.values(),
            "time of a step": at(quartiles(table, "full"), LONG, FAR),
            "stored": at(stored, LONG, FAR),
            "stored, with dropout": at(stored, f"{LONG}-dropout", FAR),
            "all": at(texts(table, "bytes_ratios.full.total"), LONG, FAR),
            "adapter's file": at(texts(table, "adapter_file_bytes", "{:.2f} MB", 1e6), LONG, FAR),
        }
    )


def nas_table(table: pd.DataFrame) -> pd.DataFrame:
    """Each against its own peer."""
    long, short = "minilm-16x128-r8", "minilm-16x32-r8"
    files = texts(table, "adapter_file_bytes", "{:.2f} MB", 1e6)
    return pd.DataFrame(
        {
            "": label,
            "16 x 128 tokens": quartiles(table, peer).get((long, name), ""),
            "16 x 32 tokens": quartiles(table, peer).get((short, name), ""),
            "optimizer state": texts(table, f"bytes_ratios.{peer}.optimizer").get((long, name), ""),
            "adapter's file": files.get((long, name), ""),
        }
        for name, (label, peer) in NAS.items()
    )


def inference_table(table: pd.DataFrame, ending: str = "") -> pd.DataFrame:
    """A forward pass against the base model's."""
    return shapes_table(quartiles(table, "inference_base"), INFERENCE, ending)


def methods_table(table: pd.DataFrame, setting: str) -> pd.DataFrame:
    """All methods that train in one setting."""
    own = table.loc[setting].reindex([name for name in METHODS if (setting, name) in table.index])
    lora = own.loc["lora"]
    found = pd.DataFrame(
        {
            "": own.index.map(METHODS.get),
            "step, to LoRA": quartiles(own, "lora"),
            "step, to full": quartiles(own, "full"),
            "tokens/s": texts(own, "tokens_per_second", "{:,.0f}"),
            "flops / bound": texts(own, "flops_to_bound").where(own.index.isin(HELD_AGAINST_THE_BOUND), ""),
            "stored": texts(own, "bytes.stored", per=lora["bytes.stored"]),
            "all": texts(own, "bytes.total", per=lora["bytes.total"]),
            "exchanged": texts(own, "exchanged_bytes", "{:.2f} MB", 1e6),
            "file": texts(own, "adapter_file_bytes", "{:.2f} MB", 1e6),
            "save": seconds(own, "save_seconds"),
            "load": seconds(own, "load_seconds"),
        }
    )
    for name, why in column(own, "skipped").dropna().items():
        found.loc[name] = [METHODS[name], f"skipped: {why}", *[""] * (found.shape[1] - 2)]
    return found


def models_table(table: pd.DataFrame) -> pd.DataFrame:
    """The main comparisons of larger models, a row per setting, and of the one shape of MiniLM beside them."""
    settings = [name for name, method in table.index if method == "learner_primed"]
    larger = [name for name in settings if name == LONG or not (name.startswith("minilm") or name in BF16)]
    columns = {
        head: [quartiles(table, peer).get((setting, method), "") for setting in larger]
        for head, (method, peer) in COMPARISONS.items()
    }
    return pd.DataFrame({"": larger, **columns})


def scaling_table(rows: Sequence[Row], device: str) -> pd.DataFrame:
    """The Learner's step time relative to LoRA's along each curve."""
    curves: dict[str, list[str]] = {}
    for row in rows:
        if "axis" in row and row["device"]["type"] == device:
            own = curves.setdefault(row["axis"], [])
            if row["method"] == "learner_unprimed" and "time_ratios" in row:
                own.append(f"{row['value']}: {row['time_ratios']['lora']['step']['median']:.2f}")
    return pd.DataFrame({"": curves.keys(), "Learner / LoRA": map(", ".join, curves.values())})


def targets_table(table: pd.DataFrame) -> pd.DataFrame:
    """What was aimed at, what was found."""
    lines = []
    for name, limit, settings, method, where in TARGETS:
        for setting in settings:
            found = column(table, where).get((setting, method))
            value = None if found is None or pd.isna(found) else found * (1000 if name.endswith(": ms") else 1)
            why = column(table, "skipped").get((setting, method))
            verdict = "not measured" if why is None or pd.isna(why) else f"skipped: {why}"
            if value is not None:
                verdict = "met" if value <= limit else "MISSED"
            lines.append((name, setting, f"{limit:g}", "" if value is None else f"{value:.3f}", verdict))
    return pd.DataFrame(lines, columns=["figure", "setting", "at most", "found", ""])


def profile_table(folder: Path, setting: str, device: str) -> pd.DataFrame:
    """Where a step's time goes: shares by purpose, a column per method."""
    found = json.loads((folder / f"profile-{setting}-{device}.json").read_text())["methods"]
    purposes = dict.fromkeys(purpose for entry in found.values() for purpose in entry["shares"])
    columns = {METHODS[n]: [f"{100 * e['shares'].get(p, 0):.0f} %" for p in purposes] for n, e in found.items()}
    return pd.DataFrame({"": purposes.keys(), **columns})


class Tables:
    """All tables of a folder of rows.

    Raises:
        FileNotFoundError: it holds none.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        rows = read_rows(folder)
        table = table_of(rows, device)
        self.makers: dict[str, Callable[[], pd.DataFrame]] = {
            "learner": partial(learner_table, table),
            "flops": partial(flops_table, table),
            "bf16": partial(bf16_table, table),
            "far": partial(far_table, table),
            "nas": partial(nas_table, table),
            "inference": partial(inference_table, table),
            "learner-kept-heap": partial(learner_table, table, KEPT_HEAP),
            "inference-kept-heap": partial(inference_table, table, KEPT_HEAP),
            "models": partial(models_table, table),
            "scaling": partial(scaling_table, rows, device),
            "targets": partial(targets_table, table),
        }
        shaped = [setting for setting, method in table.index if method == "lora" and setting != "scaling"]
        self.makers |= {setting: partial(methods_table, table, setting) for setting in shaped}

    def __getitem__(self, name: str) -> pd.DataFrame:
        """
        Raises:
            ValueError: there is none of that name.
        """
        if name.startswith("profile-"):
            return profile_table(self.folder, name.removeprefix("profile-"), self.device)
        if name not in self.makers:
            raise ValueError(f"The table must be one of {', '.join(self.makers)}, or profile-SETTING, got {name}.")
        return self.makers[name]()


def main(argv: Optional[list[str]] = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Print the benchmark's tables.")
    parser.add_argument("rows", nargs="?", type=Path, default=Path("results/bench"), help="folder (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="whose rows (%(default)s)")
    parser.add_argument("--table", help="only one, or a setting (default: all)")
    args = parser.parse_args(argv)
    tables = Tables(args.rows, args.device)
    for name in tables.makers if args.table is None else [args.table]:
        print(name, tables[name].to_string(index=False), "", sep="\n")


if __name__ == "__main__":
    main()
