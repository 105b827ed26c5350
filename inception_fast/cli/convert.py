"""Convert weights between layouts, into a safetensors file, a TF-slim checkpoint or a Keras file."""

from __future__ import annotations

import argparse
import dataclasses

from .common import OK, add_json, note, print_json, serving

ALL = ("inception_fast", "slim", "keras")
KERAS = (".keras", ".weights.h5")
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")  # what is no parameter of a batch norm


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a weight file, a TensorFlow checkpoint or hf:<repo>")
    parser.add_argument("target", metavar="DST", help="what to write: NAME.safetensors, .ckpt, .keras or .weights.h5")
    parser.add_argument("--model", metavar="NAME", help="the model SRC must hold (default: recognised)")
    parser.add_argument("--layout", metavar="NAME", help=f"the layout to write, {', '.join(ALL)} (default: by DST)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Says what was written; JSON: `source target layout model options data_config tensors parameters`."""
    from ..weights.convert import convert, untold

    with serving(f"convert {args.source}"):
        if args.layout not in (None, *ALL):
            raise ValueError(f"layout={args.layout!r}; allowed: {', '.join(ALL)}")
        named = args.target.endswith(KERAS)
        if args.layout == "keras" and not named:  # before TensorFlow takes its time to load
            raise ValueError(f"{args.target} is no Keras file; allowed: {', '.join(KERAS)}")
        if named and args.layout in (None, "keras"):
            from .. import tf

            source = tf.convert(args.source, args.target, args.model)
        else:
            source = convert(args.source, args.target, args.model, args.layout)
    if missing := ", ".join(f"{key}={value!r}" for key, value in untold(source, args.target).items()):
        note(f"warning: this layout cannot hold {missing}: pass {missing} to create_model when you load {args.target}")
    tensors = source.state_dict()
    report = {
        "source": args.source,
        "target": args.target,
        "layout": source.layout,
        "model": source.model,
        "options": source.options,
        "data_config": dataclasses.asdict(source.data_config) if source.data_config else None,
        "tensors": len(tensors),
        "parameters": sum(t.numel() for key, t in tensors.items() if not key.endswith(STATISTICS)),
    }
    if args.json:
        print_json(report)
    else:
        options = ", ".join(f"{key}={value}" for key, value in source.options.items())
        print(f"{args.source}: {source.layout} weights of {source.model} ({options})")
        print(f"written: {args.target}, {report['tensors']} tensors, {report['parameters']} parameters")
    return OK
