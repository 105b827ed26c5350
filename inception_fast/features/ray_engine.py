"""The same job on Ray Data: actors hold the model, and each takes whole shards.

A shard is written by its actor, whole or not at all, and is the same whoever writes it. So a worker that is killed
loses no row: Ray gives its shard to another one. Sources, weights and the output folder must lie where all nodes see
them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from .extractors import Recipe
from .feed import Failure
from .run import SHARD_SIZE, refuse_unreadable, summary
from .shards import Collector, Shards
from .sources import Source, digest_of
from .stream import Clock, stream

INSTALL = "pip install 'inception-fast[ray]'"
ERRORS = (Failure, ValueError, OSError)  # of a shard, which end the run as they do on one machine


class ShardWorker:
    """Runs in an actor: makes the extractor once, then one shard a call."""

    def __init__(self, source: Any, recipe: Any, folder: str, options: dict[str, Any], home: str) -> None:
        import ray
        import torch

        if os.path.isdir(home):
            os.chdir(home)  # names may be relative to where the command was called
        torch.set_num_threads(options["threads"])
        self.source: Source = ray.get(source)
        self.options = options
        self.extractor = recipe.make()
        self.shards = Shards(Path(folder), options["settings"], len(self.source.names), options["shard_size"])
        if self.extractor.settings["weights"] != options["settings"]["weights"]:
            raise ValueError("other weights on this node than on the driver's; allowed: the same file everywhere")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": [k]} -> one row: its images, how many of them are bad, and the error that ends the run, if any:
        raised in an actor, it would reach the driver as Ray's, between the lines of its traceback.
        """
        shard = int(batch["shard"][0])
        collector, clock, bad = Collector(self.shards, self.source.names), Clock(), 0
        options = {key: self.options[key] for key in ("batch_size", "unreadable")}
        stop = kind = ""
        try:
            indices = self.shards.indices(shard)
            for part in stream(self.source, self.extractor, indices, threads=1, clock=clock, **options):
                collector.add_batch(part)
                bad += len(part.bad)
        except (OSError, ValueError) as error:
            stop = str(error)
            kind = next(known.__name__ for known in ERRORS if isinstance(error, known))
        times = {"waiting": [clock.waiting], "computing": [clock.computing]}
        return {"shard": [shard], "images": [clock.images], "bad": [bad], "stop": [stop], "kind": [kind], **times}


def extract_with_ray(
    source: Source,
    recipe: Recipe,
    out: Path | str,
    *,
    actors: int = 1,
    threads: int = 1,
    address: str | None = None,
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
    unreadable: str = "skip",
    on_batch: Callable[[int, int], None] = lambda images, bad: None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    worker: type = ShardWorker,
) -> dict[str, Any]:
    """`run.extract` on the cluster at `address`, or on a local one that lives as long as the call.

    Args:
        actors: how many hold the model; each has `threads` processors, and a GPU where the recipe asks for one.
        recipe: of the extractor, made once here for its settings and once in every actor.

    Raises ImportError without Ray, and what `run.extract` raises.
    """
    ray = import_ray()
    extractor = recipe.make()
    settings = extractor.settings | {"width": extractor.width, "names": digest_of(source)}
    with Shards(Path(out).resolve(), settings, len(source.names), shard_size) as shards:
        refuse_unreadable(shards, unreadable)
        missing = shards.missing()
        count = sum(len(shards.indices(shard)) for shard in missing)
        on_start(len(source.names) - count, len(source.names))
        clock = Clock()
        options = {"batch_size": batch_size, "unreadable": unreadable, "shard_size": shard_size}
        options |= {"settings": settings, "threads": threads}
        ours = not ray.is_initialized()
        if ours:
            local = {} if address else {"num_cpus": actors * threads + 1, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, logging_level="warning", **local)
        try:
            given = {"source": ray.put(source), "recipe": recipe, "folder": str(shards.folder)}
            given |= {"options": options, "home": os.getcwd()}
            with contextlib.closing(_rows(ray, missing, worker, given, actors, threads)) as rows:
                for row in rows:
                    for known in ERRORS:
                        if row["kind"] == known.__name__:
                            raise known(row["stop"])
                    clock.images += row["images"]
                    clock.waiting += row["waiting"]
                    clock.computing += row["computing"]
                    on_batch(row["images"], row["bad"])
        finally:
            if ours:
                ray.shutdown()
        if shards.missing():
            raise RuntimeError(f"shards {shards.missing()} were not written; run the same command again")
        bad = shards.finish()
    return summary(source, bad, clock, count, extractor, out)


def _rows(
    ray: Any, missing: list[int], worker: type, arguments: dict[str, Any], actors: int, threads: int
) -> Generator[dict[str, Any], None, None]:
    """One row for every shard, as they are done, in any order.

    The blocks are fetched here, not by `iter_rows`: its threads live on in an iterator that is left, and one that asks
    Ray for a block after `ray.shutdown` ends the whole process with status 1 and without a word.
    """
    if not missing:
        return
    from ray.data.block import BlockAccessor

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shards = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    done = shards.map_batches(
        worker,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        num_cpus=threads,
        num_gpus=1 if "device" in arguments["options"]["settings"] else None,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(missing))),
    )
    for bundle in done.iter_internal_ref_bundles():
        for block in bundle.block_refs:
            yield from BlockAccessor.for_block(ray.get(block)).iter_rows(public_row_format=True)


def import_ray() -> Any:
    """ray, with ray.data. Raises ImportError naming the extra to install."""
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray ({error}); {INSTALL}") from error
