"""The most likely classes of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import OK, CommandError, add_json, integer, note, print_json, serving
from .labels import find_labels

BATCH = 8
TOPK = 5
DEFAULT_MODEL = "inception_v3"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of images")
    parser.add_argument("--model", metavar="NAME", help="from 'inception-fast list' (default: what the weights are of)")
    parser.add_argument("--weights", metavar="SOURCE", help="a weight file or hf:<repo>; without it they are random")
    parser.add_argument("--topk", type=integer(1, 100000), metavar="K", help="classes to print (default 5, or all)")
    parser.add_argument("--labels", metavar="FILE", help="class names: a label a line, or a JSON list")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints `topk` lines an image, or JSON rows `image model weights predictions[{index label probability}]`."""
    photos = _photos(args.images)
    name, model = _model(args)
    if not model.num_classes:
        raise CommandError(f"--weights {args.weights} have no classifier; allowed: weights of a network with classes")
    labels = find_labels(args.labels, args.weights, model.num_classes)
    topk = min(TOPK, model.num_classes) if args.topk is None else args.topk
    if topk > model.num_classes:
        raise CommandError(f"--topk {topk}; the model has {model.num_classes} classes")
    if args.weights is None:
        note("warning: no --weights, so the weights are random and the answers mean nothing")
    rows = []
    for photo, (values, indices) in zip(photos, _top(model, photos, topk), strict=True):
        predictions = [
            {"index": index, "label": labels[index], "probability": value}
            for value, index in zip(values, indices, strict=True)
        ]
        rows.append({"image": str(photo), "model": name, "weights": args.weights, "predictions": predictions})
    if args.json:
        print_json(rows)
    else:
        _show(rows)
    return OK


def _photos(paths: list[str]) -> list[Path]:
    """The files, each read whole and let go: a broken one ends the command before the work, and their pixels may be
    more than there is memory for.
    """
    from ..images import ImageError, find_images, load_photo

    try:
        photos = [file for path in paths for file in find_images(path)]
        for file in photos:
            for remark in load_photo(file).notes:
                note(f"{file}: {remark}")
    except ImageError as error:
        raise CommandError(str(error)) from error
    return photos


def _model(args: argparse.Namespace) -> tuple[str, Any]:
    import torch

    from .. import create_model
    from ..images import check_channels
    from ..weights import resolve

    name = args.model
    with serving("--model" if args.weights is None else "--weights"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name is None:
            name = DEFAULT_MODEL if args.weights is None else resolve(args.weights).model
        model: Any = create_model(name, weights=args.weights).eval()
        check_channels(model.data_config)
    return name, model


def _top(model: Any, photos: list[Path], topk: int) -> list[tuple[list[float], list[int]]]:
    """Probabilities and indices of the likeliest classes, an image a row; eager, as few images repay no plan."""
    import torch

    from ..images import ImageError, load_image, prepare_batch

    rows: list[tuple[list[float], list[int]]] = []
    with torch.inference_mode():
        for start in range(0, len(photos), BATCH):
            batch = photos[start : start + BATCH]
            try:
                x = prepare_batch(map(load_image, batch), model.data_config)
            except ImageError as error:
                raise CommandError(str(error)) from error
            logits = model(x)
            for photo, finite in zip(batch, logits.isfinite().all(dim=1).tolist(), strict=True):
                if not finite:
                    raise CommandError(f"{photo}: the network's output is NaN or infinite; allowed: finite numbers")
            best = logits.softmax(dim=1).topk(topk)
            rows += zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(row["image"])
        for p in row["predictions"]:
            print(f"  {100 * p['probability']:6.2f} %  {p['index']:5d}  {p['label']}")
