"""Runs TF-slim's own graphs on random weights: real checkpoints, inputs and logits in a folder. A program of its own.

tf_slim needs the legacy Keras, which must be chosen before tensorflow is imported, so it cannot share a process with
Keras 3. `python slim_graphs.py DIR` writes, for each net, DIR/<net>.ckpt* and DIR/<net>.npz with `x<size>`,
`logits<size>` (and `aux<size>`).
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

NETS = {"inception_v1": (224, 209), "inception_v2": (224, 107), "inception_v2_plain": (112,), "inception_v3": (299,)}
"""Image sizes. v1 and v2 pad even sizes otherwise than odd ones, v3 does not; its auxiliary head needs 299."""

CLASSES = 1001


def load_slim() -> tuple[Any, Any]:
    """tensorflow and tf_slim.nets, with the names that tf_slim 1.1 expects from older releases."""
    os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    import tensorflow as tf

    legacy = importlib.import_module("tf_keras.src.legacy_tf_layers")
    sys.modules["tf_keras.legacy_tf_layers"] = legacy
    for name in ("base", "convolutional", "core", "normalization", "pooling"):
        module = importlib.import_module(f"tf_keras.src.legacy_tf_layers.{name}")
        sys.modules[f"tf_keras.legacy_tf_layers.{name}"] = module
    ops = importlib.import_module("tensorflow.python.framework.ops")
    ops.Tensor = importlib.import_module("tensorflow.python.framework.tensor").Tensor
    return tf, importlib.import_module("tf_slim.nets.inception")


def value(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A random value that keeps activations of order one: He's variance for weights, BN statistics near (0, 1)."""
    if name.endswith("moving_variance"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) < 2:
        return rng.normal(0, 0.1, shape).astype(np.float32)
    fan_in = np.prod(shape[:2]) if name.endswith("depthwise_weights") else np.prod(shape[:-1])
    return rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)


def plain_stem(v2: Any) -> None:
    """Makes the stem of the v2 graph the 7x7 convolution of slim's `use_separable_conv=False`, which tf_slim lacks."""
    add_arg_scope = importlib.import_module("tf_slim.ops.arg_scope").add_arg_scope
    conv2d = v2.layers.conv2d

    @add_arg_scope
    def separable_conv2d(x: Any, depth: int, kernel: list[int], depth_multiplier: int, **options: Any) -> Any:
        return conv2d(x, depth, kernel, **options)

    v2.layers.separable_conv2d = separable_conv2d


def run(tf: Any, slim: Any, name: str, folder: Path) -> None:
    """Builds the graph at each size on the same variables, saves the checkpoint, evaluates."""
    v1 = tf.compat.v1
    base = name.removesuffix("_plain")
    rng = np.random.default_rng(len(name))
    arrays: dict[str, np.ndarray] = {}
    with tf.Graph().as_default(), v1.Session() as session:
        outputs, feeds = {}, {}
        for size in NETS[name]:
            x = v1.placeholder(tf.float32, (2, size, size, 3))
            options: dict[str, Any] = {"is_training": False, "num_classes": CLASSES, "reuse": v1.AUTO_REUSE}
            if base == "inception_v3":
                options["create_aux_logits"] = True
            with importlib.import_module("tf_slim").arg_scope(getattr(slim, f"{base}_arg_scope")()):
                logits, endpoints = getattr(slim, base)(x, **options)
            arrays[f"x{size}"] = rng.uniform(-1, 1, x.shape).astype(np.float32)
            feeds[x] = arrays[f"x{size}"]
            outputs[f"logits{size}"] = logits
            if "AuxLogits" in endpoints:
                outputs[f"aux{size}"] = endpoints["AuxLogits"]
        # What training leaves behind in a checkpoint, for the reader to pass over.
        root = next(v for v in v1.global_variables()).op.name
        for extra in ("global_step", f"{root}/Momentum", f"{root}/RMSProp_1", f"{root}/ExponentialMovingAverage"):
            v1.get_variable(extra, (), tf.float32)
        variables = v1.global_variables()
        values = {v.initial_value: value(v.op.name, tuple(v.shape), rng) for v in variables}
        session.run([v.initializer for v in variables], values)
        v1.train.Saver().save(session, str(folder / f"{name}.ckpt"), write_meta_graph=False)
        if name == "inception_v1":
            saver = v1.train.Saver(write_version=v1.train.SaverDef.V1)
            saver.save(session, str(folder / "old.ckpt"), write_meta_graph=False, latest_filename="old")
        arrays |= session.run(outputs, feeds)
    np.savez(folder / f"{name}.npz", **arrays)


def main() -> None:
    tf, slim = load_slim()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for name in NETS:
        if name.endswith("_plain"):
            plain_stem(importlib.import_module("tf_slim.nets.inception_v2"))
        run(tf, slim, name, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
