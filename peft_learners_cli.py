"""The console command `peft-learners`: look at saved adapters, draw them, export them, write their cards, push them.

This module lies beside the package, since importing anything of that imports PEFT, which takes seconds: help and wrong
arguments are told without it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

PROG = "peft-learners"
ADAPTER = "folder of a saved adapter, or its id on the Hub (OWNER/NAME)"
FOLDER = "folder of a saved adapter"
BASE = "id of the base model on the Hub (default: as in the adapter's config)"


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command, with the arguments of the process by default. What a user can put right is one line on stderr
    and status 2."""
    command, args = parse(sys.argv[1:] if argv is None else argv)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, to programmers
    module = importlib.import_module(f"peft_learners.cli.{command}")
    try:
        module.run(**args)
    except (ValueError, OSError, NotImplementedError) as error:
        from peft_learners.cli import with_options

        print(f"{PROG}: error: {with_options(str(error), args)}", file=sys.stderr)
        sys.exit(2)


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The subcommand that words name, and its arguments."""
    args = vars(make_parser().parse_args([_hyphens(word) for word in words]))
    return args.pop("command"), args


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        print(f"{PROG} {importlib.metadata.version('peft-learners')}")
        parser.exit()


def _hyphens(word: str) -> str:
    """Options are written with hyphens; Python's names of them are taken as well."""
    return re.sub(r"^--\w+", lambda match: match[0].replace("_", "-"), word)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog=PROG, description="Look at adapters of peft-learners, and pass them on.")
    about = "print the version and exit"
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = "show what an adapter is: method, phases, sizes, ranks, what was kept, its base model"
    show = _command(commands, "show", about)
    show.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    show.add_argument("--json", action="store_true", help="print JSON, with a row for each module")

    plot = _command(
        commands, "plot", "draw ranks and kept energy (Learners), kept nodes (FAR) or what a search kept (NAS-LoRA)"
    )
    plot.add_argument("adapters", nargs="+", metavar="ADAPTER", help=f"{ADAPTER}; several of one method are compared")
    plot.add_argument("--out", type=Path, metavar="FILE", help="the picture: .png, .svg or .pdf (default: METHOD.png)")
    plot.add_argument("--title", help="of the picture (default: what it shows)")
    plot.add_argument(
        "--width",
        action="append",
        type=parse_width,
        default=[],
        metavar="[ENDING=]NUMBER",
        help="FAR with discard_unkept: nodes per layer, or of layers whose name ends so (repeatable)",
    )

    export = _command(commands, "export", "write an adapter as plain LoRA, which loads with PEFT alone")
    export.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    export.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    export.add_argument(
        "--rank",
        type=parse_rank,
        help="of dense updates (primed Learners, FAR): a rank (64), or the share of their energy to keep (0.99)",
    )
    export.add_argument(
        "--base-model", metavar="NAME", help="id or folder of the base model (default: as in the adapter's config)"
    )
    export.add_argument(
        "--num-labels", type=parse_count, metavar="N", help="classes of the head (default: found from the file)"
    )
    export.add_argument("--strict-serving", action="store_true", help="refuse what servers of LoRA don't take")

    card = _command(commands, "card", "write an adapter's model card, in place of the text of its README.md")
    card.add_argument("folder", metavar="DIR", help=FOLDER)
    _add_card_options(card)

    push = _command(commands, "push", "upload an adapter to the Hub, with its model card, in one commit")
    push.add_argument("folder", metavar="DIR", help=FOLDER)
    push.add_argument("repo_id", metavar="OWNER/NAME", help="repository on the Hub")
    _add_card_options(push)
    push.add_argument("--private", action="store_true", help="make the new repository private")
    push.add_argument("--update", action="store_true", help="add a commit to a repository that holds files already")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if it does not exist")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--commit-message", metavar="TEXT", help='default: "Upload ... adapter"')
    return parser


def _command(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    description = f"{about[0].upper()}{about[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=description)
    return parser


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", metavar="OWNER/NAME", help=BASE)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a picture, which the card shows")


def parse_rank(text: str) -> float:
    """`64` as a rank, `0.99` as a share."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"must be a rank (64) or a share of the energy (0.99), got {text!r}")


def parse_count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse_width(text: str) -> tuple[str, int]:
    """`1536` or `ENDING=1536` as `(ending of the layers' names, number of nodes)`."""
    ending, _, number = text.rpartition("=")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of nodes, or ENDING=NUMBER, got {text!r}")
    return ending, int(number)


if __name__ == "__main__":
    main()
