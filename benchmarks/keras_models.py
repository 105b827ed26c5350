"""Times `inception_fast.tf.optimize` beside Keras on TensorFlow: model(x), tf.function and jit_compile=True.

    python benchmarks/keras_models.py --out keras-results
    python benchmarks/publish.py keras-results/bench.json

Each of them in the faster of two forms: as it is, and with batch norm folded, weights and activations in the number
format asked for. Photographs, calibrated random weights, outputs proved against float64 before anything is timed, all
runtimes of a case in turns: what `inception-fast bench` does, by the same code. Writes OUT/bench.json with its
provenance, anew after each model; the cases are called "<model> in Keras". A case of ours that is wrong makes the exit
code 1. The whole of it takes some minutes: --seconds is what each case is timed for, if nine rounds fit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inception_fast as fast
from inception_fast.images import prepare_batch, sample_photos
from inception_fast.measure import compare as comparison
from inception_fast.measure.compare import Case, Row, Subject
from inception_fast.measure.flops import layers, totals
from inception_fast.measure.machine import provenance
from inception_fast.measure.peers import Built
from inception_fast.measure.results import write_json
from inception_fast.measure.timer import CALM, ROUNDS, WARM, Plan, interleave, summarise
from inception_fast.weights._tensorflow import load_tensorflow

MODELS = ("inception_v3", "inception_v1", "inception_v2", "inception_resnet_v1")
DTYPES = ("float32", "bfloat16")
QUICK = "inception_v1"
SUFFIX = " in Keras"
SHOWN = ("model", "batch", "dtype", "runtime", "median_ms", "rel_error", "ratio", "status", "note")
TRIAL = Plan(seconds=1e-6, least=2, most=2, warmup=1, settle=0)
Call = Callable[[Any], Any]


def keras_net(model: nn.Module, x: Tensor) -> Any:
    return fast.tf.from_torch(model, (*x.shape[2:], x.shape[1]))


def tensor(x: Tensor, dtype: str = "float32") -> Any:
    tf = load_tensorflow()
    return tf.cast(tf.constant(x.permute(0, 2, 3, 1).contiguous().numpy()), dtype)


def as_torch(y: Any) -> Tensor:
    tf = load_tensorflow()
    return torch.from_numpy(tf.cast(y, "float32").numpy())


def in_dtype(model: Any, dtype: str) -> Any:
    """A copy whose weights and activations are of `dtype`: faster than mixed precision, which casts at each call."""
    import keras

    if dtype == "float32":
        return model

    def clone(layer: Any) -> Any:
        return type(layer).from_config(layer.get_config() | {"dtype": dtype})

    twin = keras.models.clone_model(model, clone_function=clone)
    twin.set_weights(model.get_weights())
    return twin


class Nets:
    """The Keras nets of one torch model, each made once: all runtimes and batch sizes share them."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        plain = keras_net(model, x)
        self.forms = {"plain": plain, "batch norm folded": fast.tf.fold_batch_norm(plain)}
        self._made: dict[tuple[str, str], Any] = {}

    def form(self, name: str, dtype: str) -> Any:
        return self._once(name, dtype, lambda: in_dtype(self.forms[name], dtype))

    def optimized(self, dtype: str, winograd: bool) -> Any:
        name = "winograd" if winograd else "ours"
        return self._once(name, dtype, lambda: fast.tf.optimize(self.forms["plain"], dtype, winograd=winograd))

    def _once(self, name: str, dtype: str, make: Callable[[], Any]) -> Any:
        if (name, dtype) not in self._made:
            self._made[name, dtype] = make()
        return self._made[name, dtype]


class Ours:
    """`inception_fast.tf.optimize` under eager code."""

    name, package = "inception_fast", "inception-fast"

    def __init__(self, nets: Nets, winograd: bool = False) -> None:
        self.nets, self.winograd = nets, winograd
        if winograd:
            self.name = "inception_fast+winograd"

    def reasons(self, dtype: str) -> list[str]:
        return []

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        fast_model = self.nets.optimized(dtype, self.winograd)

        def bind(x: Tensor) -> Callable[[], Any]:
            feed = tensor(x)
            return lambda: fast_model(feed)

        return Built(bind, as_torch)


class Keras:
    """A way to call the Keras model, in the faster of two forms: as it is, and with batch norm folded."""

    package = "tensorflow"

    def __init__(self, name: str, nets: Nets, wrap: Callable[[Any], Call]) -> None:
        self.name, self.nets, self.wrap = name, nets, wrap

    def reasons(self, dtype: str) -> list[str]:
        return []

    def build(self, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Built:
        calls = {name: self.wrap(self.nets.form(name, dtype)) for name in self.nets.forms}

        def bind(x: Tensor, name: str) -> Callable[[], Any]:
            feed = tensor(x, dtype)
            # A result on the CPU is complete when the call returns.
            return lambda: calls[name](feed)

        trial = interleave({name: bind(x, name) for name in calls}, TRIAL)
        best = min(calls, key=lambda name: summarise(trial[name]).best)
        return Built(lambda x: bind(x, best), as_torch, best)


def peers(nets: Nets, winograd: bool) -> list[Ours | Keras]:
    tf = load_tensorflow()

    def inference(model: Any) -> Call:
        return lambda x: model(x, training=False)

    def graph(model: Any, **options: Any) -> Call:
        made: Call = tf.function(inference(model), autograph=False, **options)
        return made

    return [
        *([Ours(nets, winograd=True)] if winograd else []),
        Keras("keras", nets, inference),
        Keras("tf.function", nets, graph),
        Keras("jit_compile", nets, lambda model: graph(model, jit_compile=True)),
    ]


class Quiet:
    """Says on standard error what is being done."""

    def stage(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def done(self, fraction: float) -> None:
        pass


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--winograd", action="store_true", help="also ours with winograd=True, in rows of their own")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each case, if nine rounds fit")
    parser.add_argument("--build-limit", type=float, default=600.0, metavar="S")
    parser.add_argument(
        "--quick", action="store_true", help=f"three rounds, by default of {QUICK}: shows that it works"
    )
    parser.add_argument("--out", type=Path, default=Path("keras-results"))
    args = parser.parse_args(argv)
    args.models = args.models or ([QUICK] if args.quick else list(MODELS))
    for name, allowed in ((args.models, fast.list_models()), (args.dtype, DTYPES)):
        unknown = [value for value in name if value not in allowed]
        if unknown:
            parser.error(f"{', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return args


def subject(name: str, size: int | None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = fast.create_model(name, convention="tf").eval()
    config = model.data_config
    if size:
        config = replace(config, input_size=(3, size, size))
    images = prepare_batch((photo.image for photo in sample_photos()), config)
    comparison.calibrate(model, images)
    return model, images


def truth(model: nn.Module, images: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The float64 logits of every batch; each photograph is computed once."""
    logits = torch.cat(comparison.truth(model, list(images.split(1))))
    every = logits[torch.arange(sum(map(len, inputs))) % len(images)]
    return list(every.split([len(x) for x in inputs]))


def rows_of(name: str, args: argparse.Namespace, work: dict[str, Any]) -> Iterator[Row]:
    """The rows of one model; `work` gets its size."""
    model, images = subject(name, args.image_size)
    macs, params = totals(layers(model, images[:1]))
    work[f"{name}{SUFFIX}"] = {"macs": macs, "params": params, "image_size": images.shape[-1]}
    nets = Nets(model, images)
    for batch in args.batch:
        inputs = comparison.batches(images, batch)
        about = Subject(model, inputs, truth(model, images, inputs))
        # A call of a batch takes long enough to bury what the runtime before it left in the caches.
        plan = Plan(seconds=args.seconds, most=ROUNDS, settle=int(batch == 1), calm=CALM, warm=WARM)
        plan = Plan(seconds=1.0, least=3, most=3, warmup=1) if args.quick else plan
        for dtype in args.dtype:
            case = Case(f"{name}{SUFFIX}", batch, dtype)
            others = peers(nets, args.winograd)
            yield from comparison.compare(
                case, about, others, args.threads, plan, args.build_limit, Quiet(), ours=Ours(nets)
            )


def main(argv: list[str]) -> int:
    args = arguments(argv)
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    tf = load_tensorflow()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    origin = provenance(args.threads, argv) | {"command": " ".join(["python", "benchmarks/keras_models.py", *argv])}
    origin |= {"images": [photo.name for photo in sample_photos()], "weights": "random"}
    rows: list[Row] = []
    work: dict[str, Any] = {}
    for name in args.models:
        for row in rows_of(name, args, work):
            print(*(getattr(row, key) for key in SHOWN), sep="\t", flush=True)
            rows.append(row)
        origin["seconds"] = round(time.perf_counter() - start)
        found = {"provenance": origin, "models": work, "rows": [row.as_json() for row in rows]}
        write_json(args.out / "bench.json", found)
    print(f"{origin['seconds']} s, {args.out / 'bench.json'}", file=sys.stderr)
    return 1 if any(row.runtime == Ours.name and row.status != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
