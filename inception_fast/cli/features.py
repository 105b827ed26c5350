"""Features of every image in a folder, a list, tar shards or parquet files, as parquet shards."""

from __future__ import annotations

import argparse
from typing import Any

from .common import OK, WRONG, add_json, integer, note, only_with, out_folder, print_json, serving
from .progress import Counter

DTYPES = ("float32", "bfloat16")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder, a list of paths (.txt), .tar or .parquet files")
    parser.add_argument("--model", metavar="NAME", help="from 'inception-fast list' (default: what the weights are of)")
    parser.add_argument("--weights", metavar="SOURCE", help="a weight file or hf:<repo>; without it they are random")
    parser.add_argument(
        "--out",
        type=out_folder,
        required=True,
        metavar="DIR",
        help="where the shards go; a run that was killed goes on",
    )
    add_extraction(parser)
    parser.add_argument(
        "--shard-size", type=integer(1, 10**7), default=1024, metavar="N", help="images of a shard (default 1024)"
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="processes of this machine (local, default), or Ray Data",
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="a Ray cluster (default: a local one)")
    parser.add_argument(
        "--ray-actors", type=integer(1, 100000), metavar="N", help="actors that hold the model (default 1)"
    )
    add_json(parser)


def add_extraction(parser: argparse.ArgumentParser) -> None:
    """What `features` and `fid` have in common."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic (default float32)")
    parser.add_argument(
        "--winograd", action="store_true", help="faster convolutions on the CPU, in float32 with larger rounding errors"
    )
    parser.add_argument(
        "--preprocessing",
        choices=("tensorflow", "pytorch-fid", "clean-fid"),
        help="of the FID network: the original graph's, as torch-fidelity (default), pytorch-fid's or clean-fid's",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the network: cpu (default), cuda or cuda:N")
    parser.add_argument("--batch-size", type=integer(1, 4096), default=32, metavar="B", help="images (default 32)")
    parser.add_argument(
        "--workers", type=integer(0, 1024), metavar="N", help="processes that decode (default: a core each; 0: none)"
    )
    parser.add_argument("--threads", type=integer(1, 1024), metavar="N", help="of the network (default: torch's)")
    parser.add_argument(
        "--unreadable",
        choices=("skip", "fail"),
        default="skip",
        help="images that cannot be read are listed with the reason and left out, or end the run (default skip)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the shards that are missing, prints a summary or the JSON object of it; 1 where no image could be read."""
    with serving("features"):
        from ..features.extractors import Recipe
        from ..features.sources import open_source

        set_threads(args)
        only_with(args, "--engine ray", args.engine == "ray", ray_actors=1, ray_address=None)
        only_with(args, "--engine local", args.engine == "local", workers=None)
        source = open_source(args.source, args.out)
        recipe = Recipe(args.model, args.weights, args.dtype, args.preprocessing, args.device, args.winograd)
        if args.weights is None:
            note("warning: no --weights, so the weights are random and the features mean nothing")
        found = _extract(args, source, recipe)
    show_unreadable(found["unreadable"])
    if args.json:
        print_json(found)
    else:
        rate = f"{found['images_per_second']:.1f} images/s" if found["images_this_run"] else "all there already"
        print(f"{found['features']} features of {found['images']} images in {found['out']}, {rate}")
    return OK if found["features"] else WRONG


def _extract(args: argparse.Namespace, source: Any, recipe: Any) -> dict[str, Any]:
    options = {"batch_size": args.batch_size, "shard_size": args.shard_size, "unreadable": args.unreadable}
    with Counter("features") as counter:
        if args.engine == "ray":
            from ..features.ray_engine import extract_with_ray

            return extract_with_ray(
                source,
                recipe,
                args.out,
                actors=args.ray_actors,
                threads=args.threads or 1,
                address=args.ray_address,
                on_batch=counter.add,
                on_start=counter.start,
                **options,
            )
        from ..features.run import extract

        return extract(
            source,
            recipe.make(),
            args.out,
            workers=workers_of(args),
            on_batch=counter.add,
            on_start=counter.start,
            **options,
        )


def set_threads(args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)


def workers_of(args: argparse.Namespace) -> int:
    from ..measure.machine import cores

    return cores() if args.workers is None else int(args.workers)


def show_unreadable(bad: list[dict[str, str]], shown: int = 20) -> None:
    """A line for each unreadable image, up to `shown`; `unreadable.json` has all."""
    for row in bad[:shown]:
        note(f"unreadable: {row['reason'] if row['path'] in row['reason'] else row['path'] + ': ' + row['reason']}")
    if len(bad) > shown:
        note(f"and {len(bad) - shown} more unreadable images")
