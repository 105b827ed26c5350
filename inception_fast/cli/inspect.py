"""Draw activation size, parameters and multiply-adds along a network's depth; flag representational bottlenecks."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from .common import OK, CommandError, add_json, integer, note, one_line, out_folder, print_json

if TYPE_CHECKING:
    from torch import nn

    from ..measure.design import Design

DEFAULT_OUT = "inspect-report"
BAR = 24  # characters of the longest


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name from 'inception-fast list', or package.module:function making a module"
    )
    parser.add_argument("--image-size", type=integer(1, 8192), metavar="S", help="square input (default: the model's)")
    parser.add_argument("--input", type=shape, metavar="C,H,W", help="the input's shape (default: the model's)")
    parser.add_argument(
        "--out",
        type=out_folder,
        default=DEFAULT_OUT,
        metavar="DIR",
        help=f"for inspect.json and inspect.png (default {DEFAULT_OUT})",
    )
    add_json(parser)


def shape(text: str) -> tuple[int, ...]:
    """An argument type: "320,35,35"."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; allowed: C,H,W such as 320,35,35")
    return sizes


def run(args: argparse.Namespace) -> int:
    """Prints the levels, writes their picture."""
    import torch

    from ..measure.design import inspect
    from ..measure.results import write_json
    from .bench import _output_folder

    with torch.device("meta"), redirect_stdout(sys.stderr):  # what the user's code prints is no result of ours
        module, sizes = subject(args.model, args.image_size, args.input)
        try:
            design = inspect(module.eval(), torch.empty(1, *sizes))
        except Exception as error:  # the user's own code may raise anything
            raise untaken(args.model, sizes, error) from error
    folder = _output_folder(args.out)
    document = {"model": args.model, "input": sizes} | {k: v for k, v in design.to_dict().items() if k != "model"}
    write_json(folder / "inspect.json", document)
    written = [folder / "inspect.json"]
    try:
        from ..measure.design_plot import plot

        plot(design, f"{args.model}, input {'x'.join(map(str, sizes))}", folder / "inspect.png")
        written.append(folder / "inspect.png")
    except ImportError as error:
        note(f"no plot: matplotlib is not installed ({error}); pip install 'inception-fast[bench]'")
    if args.json:
        print_json(document)
    else:
        _show(design)
        print("written: " + ", ".join(map(str, written)))
    return OK


def subject(name: str, image_size: int | None, given: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    """The module called `name` and the [c, h, w] it is looked at with; CommandError says what is wrong with either."""
    if image_size and given and (image_size, image_size) != given[1:]:
        seen = f"--image-size {image_size} with --input {','.join(map(str, given))}"
        raise CommandError(f"{seen}; allowed: one of them")
    if ":" in name:
        module = _made(name)
    else:
        from .. import create_model
        from ..models._registry import find_family

        try:
            find_family(name, ("or package.module:function",))
        except ValueError as error:
            raise CommandError(str(error)) from error
        module = create_model(name)
    config: Any = getattr(module, "data_config", None)
    sizes = given or (tuple(config.input_size) if config is not None else None)
    if image_size:
        sizes = ((sizes or (3,))[0], image_size, image_size)
    if sizes is None:
        raise CommandError(f"{name} does not tell its input; give --input C,H,W or --image-size S")
    return module, sizes


def untaken(name: str, sizes: tuple[int, ...], error: Exception) -> CommandError:
    """What to say where the module raised `error` for an input of these sizes."""
    kind = "" if isinstance(error, (RuntimeError, ValueError, TypeError)) else f"{type(error).__name__}: "
    return CommandError(f"{name} cannot take an input of {'x'.join(map(str, sizes))}: {kind}{one_line(error)}")


def _made(name: str) -> nn.Module:
    """What the function called "package.module:function" returns; the working folder is searched too."""
    import importlib
    import os

    import torch
    from torch import nn

    home, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(home), function)
        try:
            made = make()
        except Exception:
            if torch.get_default_device().type != "meta":
                raise
            with torch.device("cpu"):  # it reads values, such as a rate for each layer out of torch.linspace
                made = make()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        said = f"{type(error).__name__}: {one_line(error)}"
        raise CommandError(f"{name}: {said}; allowed: package.module:function that needs no arguments") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, nn.Module):
        raise CommandError(f"{name} makes a {type(made).__name__}; allowed: a torch.nn.Module")
    return made


def _show(design: Design) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("level", "map", "values", "", "parameters", "multiply-adds", box=None, pad_edge=False)
    for i in (2, 4, 5):
        table.columns[i].justify = "right"
    most = max(level.values for level in design.levels)
    flagged = {(flag.name, flag.values) for flag in design.bottlenecks}
    for level in design.levels:
        narrow = (level.name, level.values) in flagged
        bar = "#" * max(1, round(BAR * level.values / most))
        size = "x".join(map(str, (*level.shape[1:], level.shape[0])))
        cells = (escape(level.name), size, f"{level.values:,}", bar, f"{level.params:,}", f"{level.macs:,}")
        table.add_row(*cells, style="bold red" if narrow else "")
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
    print(f"in all {design.params:,} parameters, {design.macs:,} multiply-adds an image")
    for flag in design.bottlenecks:
        print(f"representational bottleneck: {flag}")
    if not design.bottlenecks:
        print("no representational bottleneck")
