"""Bring the tables in docs/*.md up to date, and the picture of the evidence.

    python -m scripts.docs.report            # writes the tables between their markers, and the picture
    python -m scripts.docs.report --check    # writes nothing; fails if a page is not up to date

All of them come from committed files: results/evidence (scripts/evidence), results/bench (scripts/bench),
results/archive.jsonl (older runs) and results/papers.json (the papers' own numbers). A table stands between
<!-- report:NAME --> and <!-- report:end -->, one of the benchmark between <!-- bench:NAME --> and <!-- bench:end -->.
A picture is drawn beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from scripts.bench.rows import read_rows, table_of
from scripts.bench.tables import Tables
from scripts.docs import evidence, folding
from scripts.docs.costs import SETTINGS, table1
from scripts.docs.pages import ROOT, Lines, markdown, spliced
from scripts.evidence.figures import Evidence

PAGES = tuple(sorted((ROOT / "docs").glob("*.md")))


class Report:
    """The report on one folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables: dict[str, Callable[[], Lines]] = {
            **{name: partial(self.costs, setting) for name, setting in SETTINGS.items()},
            **evidence.Tables(self.evidence).tables,
            "folding": partial(folding.table, folder / "archive.jsonl"),
        }

    @cached_property
    def evidence(self) -> Evidence:
        """The runs of the protocol."""
        return Evidence.read(self.folder / "evidence")

    @cached_property
    def bench(self) -> Tables:
        """The benchmark's tables."""
        return Tables(self.folder / "bench")

    def costs(self, setting: str) -> Lines:
        """What a step of each method costs in a setting of the benchmark."""
        papers = json.loads((self.folder / "papers.json").read_text(encoding="utf-8"))
        rows = read_rows(self.folder / "bench")
        return table1(table_of(rows), papers["learners"], setting) if rows else [f"No rows of {setting} yet."]

    def page(self, path: Path) -> str:
        """A page's text as it is to be.

        Raises:
            ValueError: a marker names nothing that there is.
        """
        text = spliced(path.read_text(encoding="utf-8"), "report", self.lines_of)
        return spliced(text, "bench", lambda name: markdown(self.bench[name]))

    def lines_of(self, name: str) -> Lines:
        """What stands between the markers of that name."""
        if name not in self.tables:
            raise ValueError(f"<!-- report:{name} --> must name one of {', '.join(self.tables)}.")
        return self.tables[name]()


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a page is not up to date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder (default: results)")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="(default: docs/*.md)")
    args = parser.parse_args(argv)
    report = Report(args.results)
    texts = {page: report.page(page) for page in args.pages}
    found = {page: text for page, text in texts.items() if page.read_text(encoding="utf-8") != text}
    if args.check and found:
        sys.exit(f"Not up to date: {', '.join(page.name for page in found)}. Run: python -m scripts.docs.report")
    for page, text in found.items():
        page.write_text(text, encoding="utf-8")
        print(f"-> {page}")
    if not args.check:
        evidence.draw(report.evidence, args.results / "figures/evidence.png")


if __name__ == "__main__":
    main()
