"""The job behind `inception-fast features`: what is missing in the output folder, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .extractors import Extractor
from .feed import Failure
from .shards import Collector, Shards
from .sources import Source, digest_of
from .stream import Clock, stream

SHARD_SIZE = 1024


def extract(
    source: Source,
    extractor: Extractor,
    out: Path | str,
    *,
    batch_size: int = 32,
    workers: int = 0,
    shard_size: int = SHARD_SIZE,
    unreadable: str = "skip",
    on_batch: Callable[[int, int], None] = lambda images, bad: None,
    on_start: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the features of all images of `source` as shards in `out`, and returns the summary of this run.

    Shards that are there already stay. Killed at any point and called again, it ends with every image once.

    Args:
        on_batch: called with the images of a batch, and how many of them could not be read.
        on_start: called once with the images whose shards are there, and all.

    Raises Failure at the first unreadable image, an earlier run's too, where `unreadable` is "fail", ValueError where
    `out` is of another run and at the first feature that is not finite.
    """
    settings = extractor.settings | {"width": extractor.width, "names": digest_of(source)}
    with Shards(Path(out), settings, len(source.names), shard_size) as shards:
        refuse_unreadable(shards, unreadable)
        missing = shards.missing()
        wanted = [index for shard in missing for index in shards.indices(shard)]
        on_start(len(source.names) - len(wanted), len(source.names))
        clock = Clock()
        collector = Collector(shards, source.names)
        options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "unreadable": unreadable}
        for batch in stream(source, extractor, wanted, clock=clock, **options):
            collector.add_batch(batch)
            on_batch(batch.count, len(batch.bad))
        bad = shards.finish()
    return summary(source, bad, clock, len(wanted), extractor, out)


def refuse_unreadable(shards: Shards, unreadable: str) -> None:
    """Raises Failure where that is asked for and a shard of an earlier run leaves out an image."""
    if unreadable == "fail" and (bad := shards.unreadable()):
        raise Failure(f"{bad[0]['reason']}; an earlier run left it out of {shards.folder}, name another --out")


def summary(
    source: Source, bad: list[dict[str, str]], clock: Clock, done: int, extractor: Extractor, out: Path | str
) -> dict[str, Any]:
    """What a run says of itself, in JSON."""
    return {
        "out": str(out),
        "images": len(source.names),
        "features": len(source.names) - len(bad),
        "width": extractor.width,
        "unreadable": bad,
        "images_this_run": done,
        **clock.summary(),
        "settings": extractor.settings,
    }
