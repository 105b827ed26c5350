"""The models, by name; a pattern such as '*resnet*' selects."""

from __future__ import annotations

import argparse

from .common import OK, CommandError, add_json, print_json


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="a shell pattern, such as '*resnet*'")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the names, one a line, or as a JSON list."""
    from .. import list_models

    names = list_models(args.pattern)
    if not names:
        raise CommandError(f"no model matches {args.pattern!r}; there are {', '.join(list_models())}")
    if args.json:
        print_json(names)
    else:
        print("\n".join(names))
    return OK
