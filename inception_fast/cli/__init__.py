"""The command line: `inception-fast COMMAND`, also `python -m inception_fast COMMAND`. One file a command."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

from ..train.torchrun import let_the_first_speak, place
from .common import BROKEN_PIPE, INTERRUPTED, OK, USAGE, CommandError, Parser, one_line

COMMANDS = (
    "info",
    "list",
    "classify",
    "bench",
    "convert",
    "train",
    "compare",
    "claims",
    "inspect",
    "profile",
    "features",
    "fid",
    "kernels",
)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # a disk's refusals are no bug of ours
NO_ROOM = "No usable temporary directory"  # what tempfile, which torch asks, makes of a full or read-only disk
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in torch's refusals, RuntimeErrors all
MODULES = {"list": "listing"}  # a submodule named list would hide the built-in here


def build_parser() -> Parser:
    """The parser of every command. A command is a module of its name with add(parser) and run(args) -> exit code."""
    from .. import __version__

    about = "Fast, exact Inception models: run them, time them, convert their weights."
    parser = Parser(prog="inception-fast", description=about)
    parser.add_argument("--version", action="version", version=f"inception-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        module = importlib.import_module(f".{MODULES.get(name, name)}", __name__)
        summary = str(module.__doc__).splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0 done, 1 a wrong result, 2 a request that cannot be served, 130 interrupted."""
    _prepare_streams()
    os.environ["MPLBACKEND"] = "agg"  # we draw into files, and matplotlib does not load where it knows not the name
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        args = build_parser().parse_args(arguments)
        args.argv = arguments
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except CommandError as error:
        return _refused(str(error))
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else OK
    except KeyboardInterrupt:
        if place()[0] == 0:
            print("inception-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; the interpreter would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in DISK and not str(error.strerror).startswith(NO_ROOM):
            raise
        return _refused(f"{args.command}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        return _refused(f"{args.command}: more memory than there is; choose a smaller batch or image: {error}")


def _prepare_streams() -> None:
    """A stream that the shell closed (`>&-`) is None, and print would send what is meant for it to standard output.

    What an encoding does not hold is escaped, as in names of files that are not UTF-8; standard error does so anyway.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _refused(text: str) -> int:
    let_the_first_speak()
    print(f"inception-fast: error: {one_line(text)}", file=sys.stderr)
    return USAGE
