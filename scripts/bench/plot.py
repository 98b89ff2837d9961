"""Pictures of the benchmark's rows.

    python -m scripts.bench.plot results/bench --out results/figures

A setting's picture, `bench-<setting>-<cpu or cuda>.png`, has a bar per method in each of three panels: time of a step,
relative to full fine-tuning's (median and quartiles of the paired ratios); flops of matrix products, relative to
LoRA's, with the bound drawn in; and bytes that a step holds. The curves' picture, `bench-scaling-<cpu or cuda>.png`,
has the time of a step, relative to LoRA's, against rank, tokens, width and number of adapters.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib
import pandas as pd

from scripts.bench.rows import Row, column, read_rows, table_of
from scripts.bench.tables import METHODS, time_column

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("stored", "parameters", "gradients", "optimizer")
AXES = {
    "rank": "rank",
    "tokens": "tokens per step",
    "width": "width",
    "adapters": "adapters in the model, one active",
    "active_adapters": "adapters, all active",
}
CURVES = {"learner_unprimed": "Learner, without priming", "full": "full fine-tuning"}


def draw_setting(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Draw one setting's three panels.

    Args:
        rows: by method; LoRA among them.
        path: of the picture.
    """
    size = (13, 1.2 + 0.28 * len(rows))
    figure, (times, flops, sizes) = plt.subplots(1, 3, sharey=True, figsize=size, layout="constrained")
    places = range(len(rows))
    low, medians, high = (rows[time_column("full", name)] for name in ("q1", "median", "q3"))
    times.barh(places, medians, xerr=[medians - low, high - medians], color="tab:blue", error_kw={"linewidth": 1})
    times.axvline(1, color="0.4", linewidth=1)
    times.set_title("time of a step / full fine-tuning's", fontsize=10)
    lora = rows.loc["lora"]
    flops.barh(places, rows.flops / lora.flops, color="tab:green")
    bound = lora.bound_flops / lora.flops
    flops.axvline(bound, color="tab:red", linewidth=1.5, label=f"bound ({bound:.2f})")
    flops.set_title("flops of matrix products / LoRA's", fontsize=10)
    flops.legend(fontsize=8, loc="lower right")
    left = pd.Series(0.0, rows.index)
    for kind in KINDS:
        values = rows[f"bytes.{kind}"] / 1e6
        sizes.barh(places, values, left=left, label=kind)
        left += values
    sizes.set_title("bytes that a step holds (MB)", fontsize=10)
    sizes.legend(fontsize=8)
    times.set_yticks(places, [METHODS[name].replace("`", "") for name in rows.index], fontsize=8)
    times.invert_yaxis()
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def draw_scaling(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the curves, a panel per axis."""
    rows = rows[column(rows, "skipped").isna()].sort_values("value")
    axes = [axis for axis in AXES if axis in set(rows.axis)]
    size = (3.4 * len(axes), 3.4)
    figure, panels = plt.subplots(1, len(axes), squeeze=False, sharey=True, figsize=size, layout="constrained")
    for panel, axis in zip(panels[0], axes, strict=True):
        for method, label in CURVES.items():
            own = rows[(rows.axis == axis) & (rows.method == method)]
            low, median, high = (own[time_column("lora", name)] for name in ("q1", "median", "q3"))
            line = panel.plot(own.value, median, marker="o", markersize=3, label=label)[0]
            panel.fill_between(own.value, low, high, alpha=0.2, color=line.get_color())
        panel.axhline(1, color="0.4", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(own.value, [f"{value:g}" for value in own.value], fontsize=8)
        panel.set_xlabel(AXES[axis])
    panels[0][0].set_ylabel("time of a step / LoRA's")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture into a file, and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def title_of(row: Row) -> str:
    """A picture's title: model, shape, rank and device."""
    setting, device = row["setting"], row["device"]
    shape = f"{setting['batch']} x {setting['tokens']} tokens, r={setting['rank']}, {setting['dtype']}"
    return f"{setting['model']}, {shape}; {device['name']}, {device['threads']} threads"


def draw_all(rows: Sequence[Row], out: Path, ending: str) -> Iterator[Path]:
    """Draw every setting that there are rows of; gives the paths."""
    for setting, device in dict.fromkeys((row["setting"]["name"], row["device"]["type"]) for row in rows):
        path = out / f"bench-{setting}-{device}.{ending}"
        own = [row for row in rows if (row["setting"]["name"], row["device"]["type"]) == (setting, device)]
        found = table_of(own, device).loc[setting]
        if setting == "scaling":
            title = f"Two blocks of BERT; {own[0]['device']['name']}, {own[0]['device']['threads']} threads"
            draw_scaling(pd.json_normalize(own), title, path)
        elif "lora" in found.index:
            found = found[column(found, "skipped").isna()]
            draw_setting(found.reindex([name for name in METHODS if name in found.index]), title_of(own[0]), path)
        else:
            continue
        yield path


def main(argv: Optional[list[str]] = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Draw the benchmark's rows.")
    parser.add_argument("rows", nargs="?", type=Path, default=Path("results/bench"), help="folder (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/figures"), help="folder (default: %(default)s)")
    parser.add_argument("--ending", default="png", choices=["png", "svg"], help="kind of file (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (rows := read_rows(args.rows)):
        raise FileNotFoundError(f"{args.rows} must hold rows of scripts.bench.run (*.jsonl), but has none.")
    for path in draw_all(rows, args.out, args.ending):
        print(f"-> {path}")


if __name__ == "__main__":
    main()
