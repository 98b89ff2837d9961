"""Bring the pages up to date: the tables in docs/*.md, and the pictures that they show.

    python -m scripts.docs.report            # writes the tables between their markers, and draws the pictures
    python -m scripts.docs.report --check    # writes nothing; fails if a page or a picture is not up to date

All of it comes from committed files: results/sweep (scripts/sweep), results/bench (scripts/bench),
results/architectures (of adapters that `peft-learners plot` drew), results/fold (scripts/glue/fold.py,
scripts/decoder/run.py) and results/papers.json (the papers' own numbers). A table stands between <!-- report:NAME -->
and <!-- report:end -->, so does a picture, as picture-NAME, and those of the benchmark between <!-- bench:NAME --> and
<!-- bench:end -->. A picture's file says what it was drawn from, so that only those are drawn again that
show something else by now.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path

from scripts.bench.rows import read_rows, table_of
from scripts.bench.tables import Tables
from scripts.docs import pictures as report_pictures
from scripts.docs.costs import SETTINGS, table1
from scripts.docs.fold import Fold
from scripts.docs.pages import ROOT, Lines, markdown, spliced
from scripts.docs.progress import coverage_table, phases_table, rates_table, setting_table
from scripts.docs.runs import Papers, Results
from scripts.docs.scores import LAYOUTS, headline, score_tables

PAGES = tuple(sorted((ROOT / "docs").glob("*.md")))


class Report:
    """The report on one folder of results.

    Attributes:
        figures: folder of the pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.figures = folder, folder / "figures"
        self.results = Results.read(folder / "sweep")
        papers = Papers.read(folder / "papers.json")
        fold = Fold(folder / "fold")
        self.tables: dict[str, Callable[[], Lines]] = {
            "headline": partial(headline, self.results),
            **{name: partial(self.costs, papers, setting) for name, setting in SETTINGS.items()},
            **{name: partial(score_tables, self.results, papers, layout) for name, layout in LAYOUTS.items()},
            "lr": partial(rates_table, self.results),
            "phases": partial(phases_table, self.results),
            "coverage": partial(coverage_table, self.results),
            "setting": partial(setting_table, self.results),
            "fold": fold.scores,
            "fold-rewarm": fold.rewarm,
            "decoder": fold.losses,
            "decoder-costs": fold.steps,
        }
        self.pictures = {picture.name: picture for picture in report_pictures.pictures(self.results)}

    @cached_property
    def bench(self) -> Tables:
        """The benchmark's tables."""
        return Tables(self.folder / "bench")

    def costs(self, papers: Papers, setting: str) -> Lines:
        """What a step of each method costs in a setting of the benchmark."""
        rows = read_rows(self.folder / "bench")
        return table1(table_of(rows), papers, setting) if rows else [f"No rows of {setting} yet."]

    def page(self, path: Path) -> str:
        """A page's text as it is to be.

        Raises:
            ValueError: a marker names nothing that there is.
        """
        text = spliced(path.read_text(encoding="utf-8"), "report", partial(self.lines_of, folder=path.parent))
        return spliced(text, "bench", lambda name: markdown(self.bench[name]))

    def lines_of(self, name: str, folder: Path) -> Lines:
        """What stands between the markers of that name, in a page of a folder."""
        if name == "architectures":
            return self.architectures(folder)
        if name.startswith("picture-"):
            return self.picture(name.removeprefix("picture-"), folder)
        if name not in self.tables:
            known = ", ".join([*self.tables, "architectures"])
            raise ValueError(f"<!-- report:{name} --> must name one of {known}, or picture-NAME.")
        return self.tables[name]()

    def picture(self, name: str, folder: Path) -> Lines:
        """The link to a picture.

        Raises:
            ValueError: the report has none of that name.
        """
        if name not in report_pictures.NAMES:
            known = ", ".join(f"picture-{known}" for known in report_pictures.NAMES)
            raise ValueError(f"<!-- report:picture-{name} --> must name one of {known}.")
        if name not in self.pictures:
            return ["Not drawn yet: no finished runs."]
        found = self.pictures[name]
        return [f"![{found.caption}]({_relative(self.figures / found.file, folder)})"]

    def architectures(self, folder: Path) -> Lines:
        """The learned architectures that were drawn: of single adapters, each with its data, and of the sweep."""
        lines: Lines = []
        for path in sorted(self.figures.glob("*-architecture.png")):
            name = path.stem.removesuffix("-architecture")
            data = self.folder / "architectures" / f"{name}.json"
            source = f" ([json]({_relative(data, folder)}))" if data.is_file() else ""
            picture = f"![What {name} kept, by block and module]({_relative(path, folder)})"
            lines += [f"`{name}`{source}:", "", picture, ""]
        for name, found in self.pictures.items():
            if name.startswith("architecture-"):
                lines += [f"{found.caption}:", "", *self.picture(name, folder), ""]
        return lines[:-1] or ["None drawn yet."]

    def outdated(self, pages: Iterable[Path]) -> dict[Path, Callable[[], object]]:
        """The pages whose text is not as it is to be and the pictures that are not drawn from these results, each with
        what brings it up to date."""
        texts = {page: self.page(page) for page in pages}
        undrawn = (picture for picture in self.pictures.values() if not picture.is_drawn(self.figures))
        return {
            **{p: partial(p.write_text, t, encoding="utf-8") for p, t in texts.items() if p.read_text("utf-8") != t},
            **{self.figures / picture.file: partial(picture.draw, self.figures) for picture in undrawn},
        }


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if anything is not up to date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder (default: results)")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="(default: docs/*.md)")
    args = parser.parse_args(argv)
    found = Report(args.results.resolve()).outdated(page.resolve() for page in args.pages)
    if args.check and found:
        sys.exit(f"Not up to date: {', '.join(path.name for path in found)}. Run: python -m scripts.docs.report")
    for path, mend in found.items():
        mend()
        print(f"-> {path}")


if __name__ == "__main__":
    main()
