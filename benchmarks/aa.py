"""An A/A study: the same code against itself, a hundred times, with the timer and the verdicts of every benchmark.

    python benchmarks/aa.py --out bench-results

Each contest builds one convolution, pair, block or network of the six twice, times the two in turns and asks whether
one is established as the faster. It is not: every yes is a false alarm. Contests with warm and with flushed caches
take turns. Writes DIR/aa.json; exit code 1 where more than 5 in 100 are false alarms.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import inventory  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import inception_fast as fast  # noqa: E402
from inception_fast.measure.compare import clouds  # noqa: E402
from inception_fast.measure.machine import provenance  # noqa: E402
from inception_fast.measure.results import write_json  # noqa: E402
from inception_fast.measure.timer import Flush, Plan, contrasts, interleave  # noqa: E402
from inception_fast.models.blocks import BasicConv2d  # noqa: E402

ALLOWED = 5.0  # false alarms in a hundred
Subject = tuple[str, nn.Module, Tensor]


def subjects(count: int) -> Iterator[Subject]:
    """`count` subjects: convolutions, pairs, blocks and networks in turn, spread over all there are."""
    convs = [s for s in inventory.convs() if s.groups == 1 and s.h > 1]
    kinds: list[tuple[Sequence[Any], Callable[[Any], Subject]]] = [
        (convs, _conv),
        ([p for p in inventory.pairs() if p.kind == "chain"], _pair),
        (list(inventory.blocks()), _block),
        (fast.list_models(), _network),
    ]
    for number in range(count):
        choices, make = kinds[number % len(kinds)]
        turn = number // len(kinds)
        yield make(choices[turn * max(1, len(choices) * len(kinds) // count) % len(choices)])


def _conv(shape: Any) -> Subject:
    module = BasicConv2d(shape.c, shape.oc, (shape.kh, shape.kw), shape.stride, (shape.kh // 2, shape.kw // 2))
    return f"conv {shape}", module, torch.randn(1, shape.c, shape.h, shape.w)


def _pair(pair: Any) -> Subject:
    halves = [_conv(shape)[1] for shape in (pair.first, pair.second)]
    return f"pair {pair}", nn.Sequential(*halves), torch.randn(2, pair.first.c, pair.first.h, pair.first.w)


def _block(block: Any) -> Subject:
    module = fast.create_model(block.model).get_submodule(block.path)
    return f"block {block}", module, clouds(torch.empty(1, *block.shape), 1).relu()


def _network(name: str) -> Subject:
    return f"network {name}", fast.create_model(name), clouds(torch.empty(1, *inventory.sizes_of(name)), 1)


def contest(subject: Subject, plan: Plan, flush: Flush | None) -> dict[str, Any]:
    """One row: a module optimised twice, each with weights and buffers of its own, and what was said of the two."""
    name, module, x = subject
    first, second = (fast.optimize(copy.deepcopy(module.eval()), x) for _ in range(2))
    with torch.inference_mode():
        if not torch.equal(first(x), second(x)):
            raise AssertionError(f"{name}: two optimised copies differ")
        samples = interleave({"a": lambda: first(x), "b": lambda: second(x)}, plan, before=flush)
    found = contrasts(samples, "a")["b"]
    return {"subject": name, "caches": "warm" if flush is None else "flushed", "rounds": len(samples["a"])} | asdict(
        found
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="contests (default 100)")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of timing for each (default 0.5)")
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="the fewest for each (default 21)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="for aa.json")
    args = parser.parse_args(arguments)
    if args.runs < 1 or args.rounds < 2 or not args.seconds > 0:
        seen = f"--runs {args.runs} --rounds {args.rounds} --seconds {args.seconds}"
        parser.error(f"{seen}; allowed: 1 run and more, 2 rounds and more, of which noise can be told, seconds above 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    origin = provenance(torch.get_num_threads(), []) | {"command": " ".join(["python benchmarks/aa.py", *sys.argv[1:]])}
    plan, flush = Plan(seconds=args.seconds, least=args.rounds, most=max(101, args.rounds)), Flush()
    rows: list[dict[str, Any]] = []
    for number, subject in enumerate(subjects(args.runs), 1):
        rows.append(contest(subject, plan, flush if (number - 1) // 4 % 2 else None))
        print(f"{number}/{args.runs} {told(rows[-1])}", flush=True)
        alarms = sum(row["established"] for row in rows)
        write_json(
            args.out / "aa.json",
            {"provenance": origin, "runs": len(rows), "false_alarms": alarms, "allowed_percent": ALLOWED, "rows": rows},
        )
    print(f"{alarms} false alarms in {len(rows)} runs; allowed: {ALLOWED:g} in 100; written: {args.out / 'aa.json'}")
    return int(100 * alarms > ALLOWED * len(rows))


def told(row: dict[str, Any]) -> str:
    verdict = "FALSE ALARM" if row["established"] else "equal"
    return f"{row['subject']}, {row['caches']}: {row['ratio']:.3f} p {row['p_value']:.2f} {verdict}"


if __name__ == "__main__":
    sys.exit(main())
