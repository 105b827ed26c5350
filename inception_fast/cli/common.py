"""What every command shares: its errors, its output and the argument types."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

OK, WRONG, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class CommandError(Exception):
    """The user asked for something that cannot be done; the message is the one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see '{self.prog} --help')")


@contextmanager
def serving(request: str) -> Iterator[None]:
    """Turns a refusal of `request` into a one-line error; what is not a refusal is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        raise CommandError(f"{request}: {one_line(error)}") from error


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The message of an error on one line; the name of its type where it has none."""
    text = " ".join(str(error).split())
    if not text:
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def note(message: str) -> None:
    """One line to the person at the terminal, beside the results."""
    print(f"inception-fast: {message}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The only thing a --json command writes to standard output. NaN and infinity are not JSON and raise.

    The escapes that stand for what another encoding does not hold, as \\xe9, would be no JSON: JSON's own do there.
    """
    utf8 = "utf" in (sys.stdout.encoding or "utf-8").lower()
    print(json.dumps(value, indent=2, ensure_ascii=not utf8, allow_nan=False))


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argument type: an integer in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer; allowed: {low} to {high}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is out of range; allowed: {low} to {high}")
        return value

    return parse


def seconds(text: str) -> float:
    """An argument type: a positive number of seconds, at most a day."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: more than 0, at most 86400 seconds")
    return value


def out_folder(text: str) -> str:
    """An argument type: the path of a folder to write to; an empty one would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path; name a folder")
    return text


def only_with(args: argparse.Namespace, partner: str, given: bool, **defaults: Any) -> None:
    """Gives the flags `defaults` their values where they were not given, and refuses one that was without `partner`."""
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not given:
            raise CommandError(f"--{name.replace('_', '-')} without {partner}; allowed: with {partner}")


def comma_list(item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument type: comma-separated items, each parsed by `item`, repeats dropped, at least one."""

    def parse(text: str) -> list[Any]:
        found = [item(part.strip()) for part in text.split(",") if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError("the list is empty; give at least one value")
        return list(dict.fromkeys(found))

    return parse


def choice(allowed: Sequence[str]) -> Callable[[str], str]:
    """An argument type: one of `allowed`."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not known; allowed: {', '.join(allowed)}")
        return text

    return parse
