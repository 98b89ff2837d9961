"""A picture of the FFN nodes that FAR adapters kept, layer by layer.

    python -m scripts.glue.plot_nodes ADAPTER_FOLDER [OTHER_FOLDER ...] --out nodes.png

One panel per adapter: a row is a layer, a tick a kept node. The layers of an FFN keep the same hidden units and make
one row; with `granularity="output_node"` each has its own. Two adapters of one model are compared: which share of the
second one's nodes the first one kept too, and which share chance would give.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import matplotlib
from safetensors import safe_open

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: `{layer: (indices of the kept nodes, ascending; number of nodes)}`, in the order of the model.
Kept = dict[str, tuple[list[int], int]]
_KEPT, _DELTA, _REST = ".far_kept", ".far_delta.weight", ".far_rest"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Overlap:
    """How far two adapters kept the same nodes of a layer.

    Attributes:
        share: of the second one's nodes, those that the first one kept too.
        chance: what `share` would be on average if the first one had drawn its nodes at random.
    """

    share: float
    chance: float


def read_config(folder: Path, kind: str = "FAR", name: str = "FAR") -> dict[str, Any]:
    """The config of a saved adapter.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it holds one of another method.
    """
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} must be the folder of a saved adapter, but has no {file}.")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != kind:
        raise ValueError(f"{folder} must hold a {name} adapter, got one of type {config.get('peft_type')!r}.")
    return config


def name_of(folder: Path) -> str:
    """An adapter's name: that of its folder, or of the run where `scripts.glue.train` called the folder "adapter"."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 2, and capital letters with the others."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", name)]


def read_kept(folder: Path, widths: Optional[Mapping[str, int]] = None) -> Kept:
    """The nodes that a saved FAR adapter kept.

    Args:
        folder: of the adapter.
        widths: numbers of nodes, by endings of layers' names ("" for all layers); only looked at where the file does
            not hold the nodes that were not kept.

    Raises:
        ValueError: no nodes were selected yet, or a layer's number of nodes is unknown or can't be right.
    """
    config = read_config(folder)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        layers = sorted((key[: -len(_KEPT)] for key in keys if key.endswith(_KEPT)), key=natural)
        if not layers:
            raise ValueError(
                f"{folder} was saved before its nodes were selected (in priming), so there are none to draw. Save the "
                "adapter after the boundary."
            )
        kept: Kept = {}
        for layer, axis in _one_per_unit(layers, config):
            name, indices = layer.removeprefix(_PEFT_PREFIX), file.get_tensor(layer + _KEPT).tolist()
            if layer + _REST in keys:
                width = sum(file.get_slice(layer + part).get_shape()[axis] for part in (_DELTA, _REST))
            else:
                width = _given_width(folder, name, widths or {})
            if indices and indices[-1] >= width:
                raise ValueError(f"{name} keeps node {indices[-1]}, so it must have more than {width} nodes.")
            kept[name] = (indices, width)
    return kept


def _one_per_unit(layers: Sequence[str], config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The layers to draw, each with the axis of its weights' delta that its nodes lie along."""
    if config["granularity"] == "output_node":
        return [(layer, 0) for layer in layers]
    units: dict[str, tuple[str, int]] = {}
    for layer in layers:
        unit, axis = layer, 0
        for *first, last in config.get("ffn_modules") or []:
            # The one that leads out is the one to take: a fused gate's rows are each unit's twice.
            if _ends(layer, last):
                axis = 1
            for ending in first:
                if _ends(layer, ending):
                    unit = layer[: len(layer) - len(ending)] + last
        if axis == 1 or unit not in units:
            units[unit] = (layer, axis)
    return list(units.values())


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _given_width(folder: Path, layer: str, widths: Mapping[str, int]) -> int:
    fitting = [ending for ending in widths if not ending or _ends(layer, ending)]
    if not fitting:
        raise ValueError(
            f"The file in {folder} does not tell how many nodes {layer} has: with discard_unkept it holds only those "
            f"that were kept. Give the number: --width 1536, or --width {layer.rpartition('.')[2]}=1536."
        )
    return widths[max(fitting, key=len)]


def overlaps(first: Kept, second: Kept) -> dict[str, Overlap]:
    """The overlap of each layer that both adapters have nodes of, and in which the second kept any.

    Raises:
        ValueError: the adapters are not of one model.
    """
    found = {}
    for layer, (indices, width) in second.items():
        others, other_width = first.get(layer, ([], width))
        if width != other_width:
            raise ValueError(f"{layer} has {other_width} nodes in the first adapter and {width} in the second.")
        if layer in first and indices:
            found[layer] = Overlap(len({*indices} & {*others}) / len(indices), len(others) / width)
    if not found:
        raise ValueError("The two adapters keep nodes of no layer in common, so they can't be compared.")
    return found


def short_names(layers: Sequence[str]) -> list[str]:
    """The layers' names without what all of them begin or end with; a number keeps the word before it."""
    split = [layer.split(".") for layer in layers]
    shortest = min(map(len, split))
    begin = end = 0
    if len(split) > 1:
        while begin < shortest - 1 and len({parts[begin] for parts in split}) == 1:
            begin += 1
        while end < shortest - begin - 1 and len({parts[-1 - end] for parts in split}) == 1:
            end += 1
    if begin and any(parts[begin].isdigit() for parts in split):
        begin -= 1
    return [".".join(parts[begin : len(parts) - end]) for parts in split]


def title_of(folder: Path) -> str:
    """A panel's title: which adapter, and how its nodes were selected."""
    config = read_config(folder)
    kept = f"{config['retention_ratio']:.0%} of nodes ({config['granularity']})"
    return f"{name_of(folder)}: {kept}, selection {config['selection']}"


def draw(panels: Mapping[str, Kept], path: Path, compared: Optional[Mapping[str, Overlap]] = None) -> None:
    """Draw the panels below each other into a PNG file.

    Args:
        panels: kept nodes by title.
        path: of the file.
        compared: overlaps by layer; they stand beside the rows of the last panel.
    """
    heights = [max(len(kept), 2) for kept in panels.values()]
    figure, grid = plt.subplots(
        len(panels),
        1,
        squeeze=False,
        figsize=(10, 0.9 * len(panels) + 0.3 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (title, kept) in zip(grid[:, 0], panels.items(), strict=True):
        rows = range(len(kept))
        positions = [indices for indices, _ in kept.values()]
        axis.eventplot(positions, lineoffsets=list(rows), linelengths=0.8, linewidths=0.6, colors="tab:blue")
        for row, (_, width) in zip(rows, kept.values(), strict=True):  # where layers differ, their ends show
            axis.plot([width - 0.5] * 2, [row - 0.4, row + 0.4], color="0.6", linewidth=1)
        axis.set_yticks(rows, short_names(list(kept)))
        axis.set_ylim(len(kept) - 0.5, -0.5)
        axis.set_xlim(-0.5, max(width for _, width in kept.values()) - 0.5)
        axis.set_title(title, fontsize=10)
    if compared is not None:
        for row, layer in enumerate(kept):
            if layer in compared:
                text = f" {compared[layer].share:.0%} (chance {compared[layer].chance:.0%})"
                axis.text(1, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
        axis.text(1, -0.6, " kept above too", transform=axis.get_yaxis_transform(), va="bottom", fontsize=8)
    axis.set_xlabel("node")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_width(text: str) -> tuple[str, int]:
    """`1536` or `ENDING=1536` as `(ending of the layers' names, number of nodes)`."""
    ending, _, number = text.rpartition("=")
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of nodes, or ENDING=NUMBER, got {text!r}")
    return ending, int(number)


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description="Draw which FFN nodes FAR adapters kept.")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER_FOLDER", help="folder of a saved adapter")
    parser.add_argument("--out", type=Path, default=Path("nodes.png"), help="the picture (default: %(default)s)")
    parser.add_argument(
        "--width",
        action="append",
        type=parse_width,
        default=[],
        metavar="[ENDING=]NUMBER",
        help="nodes per layer, or of layers whose name ends so (repeatable); for adapters saved with discard_unkept",
    )
    args = parser.parse_args(argv)
    kept = [read_kept(folder, dict(args.width)) for folder in args.adapters]
    compared = overlaps(*kept) if len(kept) == 2 else None
    panels: dict[str, Kept] = {}
    for folder, nodes in zip(args.adapters, kept, strict=True):
        title = title_of(folder)
        panels[title if title not in panels else f"{title} [{len(panels) + 1}]"] = nodes
    draw(panels, args.out, compared)
    for layer, overlap in (compared or {}).items():
        print(f"{layer}: {overlap.share:.1%} kept by both, by chance {overlap.chance:.1%}")
    print(f"-> {args.out}")


if __name__ == "__main__":
    main()
