"""Draw docs/phases.svg: what each method trains, phase by phase.

    python -m scripts.docs.phases           # writes it
    python -m scripts.docs.phases --check   # writes nothing; fails if it is not up to date

The picture has a panel of its own behind it, so that it reads on light and dark pages, and it is narrow, so that a
phone shows its words at a readable size.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from html import escape

from scripts.docs.pages import ROOT

PICTURE = ROOT / "docs" / "phases.svg"
WIDTH, MARGIN, BAR, GAP = 520, 16, 26, 6
TRAINS, FROZEN, BOUNDARY, PANEL, INK, QUIET = "#3f51b5", "#c5cae9", "#f48fb1", "#f7f7fb", "#1a1a2e", "#5c5f77"


@dataclass(frozen=True)
class Bar:
    """One part of an adapter. Shares of the training; `after`: what it says when it is frozen, "" if it is gone."""

    text: str
    start: float = 0.0
    end: float = 1.0
    after: str = ""


@dataclass(frozen=True)
class Method:
    """A lane of the picture.

    Attributes:
        phases: each phase's name, with the share of the training at which it begins.
        note: what happens at the boundary.
    """

    name: str
    phases: tuple[tuple[str, float], ...]
    bars: tuple[Bar, ...]
    note: str = ""


METHODS = (
    Method(
        "Learner",
        (("priming", 0.0), ("learning", 0.4)),
        (Bar("low-rank P1, P2, biases, norms, head"), Bar("attention: D", 0.0, 0.4, "D stays, frozen")),
        "or D and P2 P1 become one product of low rank (fold)",
    ),
    Method(
        "FAR",
        (("priming", 0.0), ("reconfigured", 0.16)),
        (
            Bar("attention, embeddings, norms, head"),
            Bar("FFN nodes that moved most: 10 %"),
            Bar("90 %", 0.0, 0.16, "the other FFN nodes, frozen"),
        ),
        "priming is 1 % of the steps (drawn wider)",
    ),
    Method(
        "NAS-LoRA",
        (("search", 0.0), ("retraining", 0.5)),
        (Bar("U, V, biases, head", 0.0, 0.5), Bar("what is kept, head", 0.5)),
        "prune to the budget, go back to the initial values, begin anew",
    ),
    Method("Bottleneck adapters", (("training", 0.0),), (Bar("adapters, norms, head"),)),
)


def text(x: float, y: float, words: str, size: int = 15, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}"{more}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}"/>'


def boundary(x: float, top: float, end: float) -> str:
    return f'<path d="M{x:g} {top:g}V{end:g}" stroke="{BOUNDARY}" stroke-width="2" stroke-dasharray="4 3"/>'


def lane(method: Method, top: float) -> tuple[list[str], float]:
    """A method's lane, and where it ends."""

    def at(share: float) -> float:
        return MARGIN + share * (WIDTH - 2 * MARGIN)

    found = [text(MARGIN, top + 18, method.name, 18, more=' font-weight="bold"')]
    y = top + 44
    for name, start in method.phases:
        found.append(text(at(start) + 2, y, name, 14, QUIET, ' font-style="italic"'))
    first = y = y + 8
    words = []
    for bar in method.bars:
        if bar.after:
            found.append(box(at(0), y, at(1) - at(0), BAR, FROZEN))
            words.append(text(at(bar.end) + 8, y + 18, bar.after))
        found.append(box(at(bar.start), y, at(bar.end) - at(bar.start), BAR, TRAINS))
        words.append(text(at(bar.start) + 8, y + 18, bar.text, 15, "#ffffff"))
        y += BAR + GAP
    found += [boundary(at(start), first - 4, y) for _, start in method.phases[1:]] + words
    if method.note:
        found.append(text(MARGIN, y + 14, method.note, 14, QUIET))
        y += 20
    return found, y + 22


def drawn() -> str:
    """The picture."""
    parts: list[str] = []
    y: float = 14
    for method in METHODS:
        found, y = lane(method, y)
        parts += found
    parts += [box(MARGIN, y, 18, 18, TRAINS), text(MARGIN + 26, y + 14, "trains", 14, QUIET)]
    parts += [box(MARGIN + 96, y, 18, 18, FROZEN), text(MARGIN + 122, y + 14, "frozen, still used", 14, QUIET)]
    parts += [boundary(MARGIN + 270, y, y + 18), text(MARGIN + 280, y + 14, "boundary; time runs right", 14, QUIET)]
    height = y + 34
    names = ", ".join(method.name for method in METHODS)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">',
            f"<title>What each method trains, phase by phase: {escape(names)}</title>",
            f'<rect width="{WIDTH}" height="{height:g}" rx="10" fill="{PANEL}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if it is not up to date")
    if not parser.parse_args(argv).check:
        PICTURE.write_text(drawn(), encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != drawn():
        sys.exit(f"Not up to date: {PICTURE.name}. Run: python -m scripts.docs.phases")


if __name__ == "__main__":
    main()
