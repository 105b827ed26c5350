"""Train a model by the papers' recipe or a modern one; a killed run goes on with --resume."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..train.settings import parse_value
from .common import OK, WRONG, CommandError, add_json, integer, note, only_with, out_folder, print_json, serving

if TYPE_CHECKING:
    from ..train.recipe import Recipe

RECIPE_FLAGS = {
    "lr": "learning rate at its highest",
    "momentum": "momentum of the optimizer",
    "weight_decay": "decay of the weights",
    "label_smoothing": "label smoothing",
    "aux_weight": "share of each auxiliary loss",
    "clip": "largest norm of the gradient, 0 for no limit",
    "ema": "decay of the averaged weights, 0 for none",
    "warmup": "share of the steps over which the learning rate rises",
}
LINE_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="a name from 'inception-fast list', or tiny_inception"
    )
    parser.add_argument(
        "--out", type=out_folder, required=True, metavar="DIR", help="where log, checkpoints, weights and summary go"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint in DIR")
    parser.add_argument(
        "--keep", type=integer(2, 10**6), default=2, metavar="N", help="checkpoints that stay (default 2)"
    )
    parser.add_argument(
        "--seed", type=integer(0, 2**31 - 1), default=0, metavar="K", help="of weights, order, augmentation (default 0)"
    )
    parser.add_argument("--weights", metavar="SOURCE", help="start from a file or hf:<repo> (default: random weights)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a keyword argument of create_model, such as classic=true",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files to DIR/tensorboard too")
    parser.add_argument(
        "--shard", action="store_true", help="share weights and optimizer out over torchrun's processes (FSDP2)"
    )
    parser.add_argument(
        "--drift-every", type=integer(0, 10**9), default=0, metavar="N",
        help="write how each layer's input is distributed to DIR/drift.jsonl every N steps (default 0: never)",
    )  # fmt: skip
    add_budget(parser, steps=1000)
    add_json(parser)


def add_budget(parser: argparse.ArgumentParser, steps: int, size: str = "the model's") -> None:
    """The flags that `train` and `compare` share."""
    parser.add_argument(
        "--checkpoint-every",
        type=integer(1, 10**9),
        default=100,
        metavar="N",
        help="steps between two checkpoints (default 100)",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="digits (default), a folder with a folder for each class, hf:NAME, or torchvision:NAME[:ROOT]",
    )
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the data that ROOT lacks")
    parser.add_argument(
        "--steps", type=integer(1, 10**9), metavar="N", help=f"updates of the weights (default {steps})"
    )
    parser.add_argument(
        "--batch-size", type=integer(1, 65536), metavar="B", help="images a step over all processes (default 32)"
    )
    parser.add_argument("--image-size", type=integer(1, 4096), metavar="S", help=f"square input size (default: {size})")
    parser.add_argument("--recipe", metavar="NAME", help="paper (default, Inception v3's) or modern (SGD, cosine)")
    parser.add_argument("--optimizer", metavar="NAME", help="rmsprop_tf, sgd or adamw (default: the recipe's)")
    for field, text in RECIPE_FLAGS.items():
        parser.add_argument(
            f"--{field.replace('_', '-')}", type=float, metavar="X", help=f"{text} (default: the recipe's)"
        )
    parser.add_argument(
        "--augment", metavar="KIND", help="paper, shift, none or auto (default: paper for photographs, else shift)"
    )
    parser.add_argument(
        "--aux", metavar="WHEN", help="auxiliary heads: on, off or auto (default: where the image size allows)"
    )
    parser.add_argument("--batch-norm", metavar="KIND", help="over processes: sync (default), local or frozen")
    parser.add_argument("--dtype", metavar="NAME", help="float32 (default) or bfloat16 (autocast)")
    parser.add_argument(
        "--winograd", action="store_true", help="float32 convolutions by fewer products, with larger errors (CPU)"
    )
    parser.add_argument("--init-scale", type=float, metavar="X", help="factor on the initial weights (default 1)")
    parser.add_argument("--bad-data", metavar="WHAT", help="broken images, empty classes: refuse (default) or skip")
    parser.add_argument(
        "--eval-images",
        type=integer(0, 10**9),
        default=500,
        metavar="N",
        help="held-out images that judge the end (default 500)",
    )
    parser.add_argument(
        "--workers", type=integer(0, 256), metavar="N", help="processes that prepare images (default: by the data)"
    )
    parser.add_argument("--threads", type=integer(1, 1024), metavar="N", help="threads of torch (default: torch's)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    """Trains, prints the summary. Returns 1 when the loss stopped being a number."""
    import torch

    from ..train.allocator import keep_freed_memory
    from ..train.loop import Options, train
    from ..train.networks import native_size
    from ..train.settings import Settings

    keep_freed_memory()
    with serving("train"):
        if args.threads:
            torch.set_num_threads(args.threads)
        size = args.image_size or native_size(args.model)
        options = parse_options(args.option)
        given = budget(args) | {"seed": args.seed, "weights": args.weights, "options": options, "image_size": size}
        settings = Settings(args.model, recipe=chosen_recipe(args), **given)
        control = Options(
            args.checkpoint_every,
            args.keep,
            args.resume,
            args.workers,
            args.eval_images,
            args.tensorboard,
            args.device,
            download=args.download,
            shard=args.shard,
            drift_every=args.drift_every,
        )
        with Meter(settings.steps, settings.batch_size) as meter:
            summary = train(settings, args.out, control, say=meter.say, on_row=meter.row)
    if not summary:  # a process beside the leader
        return OK
    if args.json:
        print_json(summary)
    else:
        _show(summary, args.out)
    return OK if summary["status"] == "done" else WRONG


def budget(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Settings` that were given as flags."""
    names = (
        "data",
        "steps",
        "batch_size",
        "augment",
        "aux",
        "batch_norm",
        "dtype",
        "init_scale",
        "bad_data",
        "winograd",
    )
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    from ..train.recipe import get_recipe

    only_with(args, "--aux on or auto", args.aux != "off", aux_weight=None)
    changed = {field: getattr(args, field) for field in (*RECIPE_FLAGS, "optimizer")}
    return get_recipe(args.recipe or "paper", **changed)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """["classic=true", "stem=plain"] -> {"classic": True, "stem": "plain"}."""
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise CommandError(f"option {pair!r}; allowed: KEY=VALUE, such as classic=true")
        found[key] = parse_value(text)
    return found


class Meter:
    """Loss, speed and time left: a bar on a terminal, elsewhere a line now and then. Always on standard error."""

    def __init__(self, steps: int, batch_size: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.steps, self.batch_size, self.spoke, self.bar = steps, batch_size, 0.0, None
        console = Console(stderr=True)
        if console.is_terminal and os.environ.get("RANK", "0") == "0":
            columns = (
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("", total=steps)

    def __enter__(self) -> Meter:
        with ExitStack() as stack:
            if self.bar is not None:
                stack.enter_context(self.bar)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.stack.close()

    def say(self, text: str) -> None:
        if self.bar is None:
            note(text)
        else:
            self.bar.console.print(f"inception-fast: {text}", markup=False, highlight=False)

    def row(self, row: dict[str, Any], name: str = "") -> None:
        text = f"{name} loss {row['loss']:.4f}  {row['images_per_second']:.1f} images/s".strip()
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], total=self.steps, description=text)
        elif time.monotonic() - self.spoke > LINE_EVERY or row["step"] == self.steps:
            self.spoke = time.monotonic()
            left = (self.steps - row["step"]) * self.batch_size / row["images_per_second"]
            print(f"step {row['step']}/{self.steps}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)


def _show(summary: dict[str, Any], out: str) -> None:
    judged = summary["evaluation"]
    aux = "with" if summary["auxiliary_heads"] else "without"
    print(
        f"{summary['settings']['model']}, {aux} auxiliary heads: {summary['status']}, "
        f"{summary['steps']} steps in {summary['seconds']:.1f} s"
    )
    if summary["loss"] is not None:
        print(f"last steps: loss {summary['loss']:.4f}, accuracy {summary['accuracy']:.1%}")
    if judged and judged["loss"] is not None:
        print(f"held out:   loss {judged['loss']:.4f}, accuracy {judged['accuracy']:.1%} of {judged['images']} images")
    print(f"written: {', '.join(os.path.join(out, name) for name in [*summary['files'], 'summary.json'])}")
