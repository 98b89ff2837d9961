"""Write the table of fields of each tuner's config into its page in docs/, from the dataclass' own metadata.

python -m scripts.docs.field_tables            # rewrites what lies between the two markers of each page
python -m scripts.docs.field_tables --check    # writes nothing; fails if a page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path

from peft import PeftConfig

from peft_learners.registry import methods

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- fields:begin -->", "<!-- fields:end -->"
#: Help texts of fields that training writes begin a sentence with this word.
WRITTEN = "Written "


def default_of(field: Field) -> str:
    """A field's default as code; "required" if it has none."""
    if field.default_factory is not MISSING:
        return f"`{field.default_factory()!r}`"
    return "required" if field.default is MISSING else f"`{field.default!r}`"


def groups_of(config: type[PeftConfig]) -> dict[str, list[Field]]:
    """A config's fields by where they come from, in the order of their declaration.

    Raises:
        ValueError: a field has no help text.
    """
    known = {f.name for f in fields(PeftConfig)}
    own = set(vars(config).get("__annotations__", {}))
    groups: dict[str, list[Field]] = {
        f"Fields of `{config.__name__}` alone": [],
        "Fields of all tuners": [],
        "Fields of every PEFT config": [],
        "Written by training, and saved with the adapter": [],
    }
    of_tuner, of_all, of_peft, written = groups.values()
    for field in fields(config):
        help_text = field.metadata.get("help")
        if not help_text:
            raise ValueError(f"{config.__name__}.{field.name} must have a help text in its metadata, got none.")
        if WRITTEN in help_text:
            written.append(field)
        elif field.name in known:
            of_peft.append(field)
        else:
            (of_tuner if field.name in own else of_all).append(field)
    return {title: found for title, found in groups.items() if found}


def meaning(config: type[PeftConfig], field: Field) -> str:
    """A field's help text in one line of a table."""
    text = " ".join(field.metadata["help"].split())
    default = getattr(config, "default_targets", "") if field.name == "target_modules" else ""
    if default:
        text = text.replace("found from the model's structure", f"found from the model's structure, {default}")
    return text.replace("|", chr(92) + "|")


def tables(config: type[PeftConfig]) -> str:
    """All fields of a config as Markdown tables."""
    blocks = []
    for title, found in groups_of(config).items():
        rows = [f"| `{f.name}` | {default_of(f)} | {meaning(config, f)} |" for f in found]
        blocks.append("\n".join([f"{title}:", "", "| field | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(blocks)


def with_tables(text: str, config: type[PeftConfig]) -> str:
    """A page's text with the tables between its markers.

    Raises:
        ValueError: the page does not have each marker once, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"The page must hold {BEGIN} and, after it, {END}, once each.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(config)}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a page is not up to date")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    args = parser.parse_args(arguments)
    stale = []
    for method, config in methods().items():
        path = args.docs / f"{method}.md"
        text = path.read_text(encoding="utf-8")
        new = with_tables(text, config)
        if new != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check and stale:
        sys.exit(f"Not up to date: {', '.join(stale)}. Run: python -m scripts.docs.field_tables")
    print(f"{len(methods())} pages, {len(stale)} {'not up to date' if args.check else 'rewritten'}.")


if __name__ == "__main__":
    main()
