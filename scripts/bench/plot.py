"""Pictures of the benchmark's rows.

    python -m scripts.bench.plot results/bench --out results/figures

A setting's picture, `bench-<setting>-<cpu or cuda>.png`, has a bar per method in each of three panels: time of a step,
relative to full fine-tuning's (median and quartiles of the paired ratios); flops of matrix products, relative to
LoRA's, with the bound drawn in; and bytes that a step holds. The curves' picture, `bench-scaling-<cpu or cuda>.png`,
has the time of a step, relative to LoRA's, against rank, tokens, width and number of adapters.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib

from scripts.bench.rows import Row, row_of, rows_to_show, settings_of, time_ratio
from scripts.bench.tables import METHODS

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


def measured(rows: Sequence[Row], setting: str, device: str) -> dict[str, Row]:
    """The rows of methods that train, by name, in the order of the tables."""
    found = {name: row_of(rows, setting, name, device) for name in METHODS}
    return {name: row for name, row in found.items() if row is not None and "skipped" not in row}


def draw_setting(rows: dict[str, Row], title: str, path: Path) -> None:
    """Draw one setting's three panels.

    Args:
        rows: by method; LoRA among them.
        path: of the picture.
    """
    figure, (times, flops, sizes) = plt.subplots(
        1, 3, sharey=True, figsize=(13, 1.2 + 0.28 * len(rows)), layout="constrained"
    )
    places = range(len(rows))
    found = [time_ratio(row, "full") for row in rows.values()]
    medians = [value["median"] for value in found]
    spread = [[v["median"] - v["q1"] for v in found], [v["q3"] - v["median"] for v in found]]
    times.barh(places, medians, xerr=spread, color="tab:blue", error_kw={"linewidth": 1})
    times.axvline(1, color="0.4", linewidth=1)
    times.set_title("time of a step / full fine-tuning's", fontsize=10)
    lora = rows["lora"]
    flops.barh(places, [row["flops"] / lora["flops"] for row in rows.values()], color="tab:green")
    bound = lora["bound_flops"] / lora["flops"]
    flops.axvline(bound, color="tab:red", linewidth=1.5, label=f"bound ({bound:.2f})")
    flops.set_title("flops of matrix products / LoRA's", fontsize=10)
    flops.legend(fontsize=8, loc="lower right")
    left = [0.0] * len(rows)
    for kind in KINDS:
        values = [row["bytes"][kind] / 1e6 for row in rows.values()]
        sizes.barh(places, values, left=left, label=kind)
        left = [a + b for a, b in zip(left, values, strict=True)]
    sizes.set_title("bytes that a step holds (MB)", fontsize=10)
    sizes.legend(fontsize=8)
    times.set_yticks(places, [METHODS[name].replace("`", "") for name in rows], fontsize=8)
    times.invert_yaxis()
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def points_of(rows: Sequence[Row], axis: str, method: str) -> list[tuple[int, dict[str, float]]]:
    """`(value, quartiles of the time relative to LoRA's)` along an axis."""
    found = (row for row in rows if row.get("axis") == axis and row["method"] == method and "skipped" not in row)
    return sorted(((row["value"], time_ratio(row, "lora")) for row in found), key=lambda point: point[0])


def draw_scaling(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the curves, a panel per axis."""
    axes = [axis for axis in AXES if points_of(rows, axis, "learner_unprimed")]
    figure, panels = plt.subplots(
        1, len(axes), squeeze=False, sharey=True, figsize=(3.4 * len(axes), 3.4), layout="constrained"
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        for method, label in CURVES.items():
            points = points_of(rows, axis, method)
            at = [value for value, _ in points]
            line = panel.plot(at, [v["median"] for _, v in points], marker="o", markersize=3, label=label)[0]
            low, high = ([v[key] for _, v in points] for key in ("q1", "q3"))
            panel.fill_between(at, low, high, alpha=0.2, color=line.get_color())
        panel.axhline(1, color="0.4", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, [str(value) for value in at], fontsize=8)
        panel.set_xlabel(AXES[axis])
    panels[0][0].set_ylabel("time of a step / LoRA's")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def save(figure: Any, path: Path, metadata: Optional[Mapping[str, str]] = None) -> None:
    """Write a picture into a file, and forget the figure.

    Args:
        metadata: texts by keyword, to be written into the file: any keyword in PNG, only those of Dublin Core in SVG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata=dict(metadata or {}))
    plt.close(figure)


def title_of(row: Row) -> str:
    """A picture's title: model, shape, rank and device."""
    setting, device = row["setting"], row["device"]
    shape = f"{setting['batch']} x {setting['tokens']} tokens, r={setting['rank']}, {setting['dtype']}"
    return f"{setting['model']}, {shape}; {device['name']}, {device['threads']} threads"


def draw_all(rows: Sequence[Row], out: Path, ending: str) -> Iterator[Path]:
    """Draw every setting that there are rows of; gives the paths."""
    for setting, device in settings_of(rows):
        path = out / f"bench-{setting}-{device}.{ending}"
        own = [row for row in rows if (row["setting"]["name"], row["device"]["type"]) == (setting, device)]
        if setting == "scaling":
            name = own[0]["device"]["name"]
            draw_scaling(own, f"Two blocks of BERT; {name}, {own[0]['device']['threads']} threads", path)
        elif row_of(rows, setting, "lora", device) is not None:
            draw_setting(measured(rows, setting, device), title_of(own[0]), path)
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
    for path in draw_all(rows_to_show(args.rows), args.out, args.ending):
        print(f"-> {path}")


if __name__ == "__main__":
    main()
