"""The options that every family understands, validated in one place; families add their own in a subclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from .._numbers import is_integer, is_number, plain
from .blocks import GLOBAL_POOLS, BasicConv2d, ConvBlock


def check(condition: bool, seen: str, allowed: str) -> None:
    """Raises ValueError naming the value seen and the value allowed."""
    if not condition:
        raise ValueError(f"{seen}; allowed: {allowed}")


def check_choice(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    flag = isinstance(plain(value), bool)  # 1 is equal to True and is none
    same = any(value == choice and isinstance(choice, bool) is flag for choice in allowed)
    check(same, f"{option}={value!r}", ", ".join(map(repr, allowed)))


def check_count(option: str, value: Any, least: int) -> int:
    """The int that `value` is; ValueError for what is none, and below `least`."""
    value = plain(value)
    check(is_integer(value) and value >= least, f"{option}={value!r}", f"an integer >= {least}")
    return int(value)


def check_rate(option: str, value: Any) -> None:
    check(is_number(value) and 0 <= value < 1, f"{option}={value!r}", f"0 <= {option} < 1")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every family. None stands for the family's own habit and is replaced by it.

    num_classes: size of the classifier; 0 leaves it out, and the model returns pooled features.
    aux_logits: auxiliary heads, run in training only.
    convention: "tf" or "torch", padding of strided SAME operations and counting of average pools.
    drop_rate: dropout before the classifier, in training only.
    global_pool: "avg", "max", or "" for none (only without a classifier).
    conv_block: replaces `BasicConv2d`, called (cin, cout, kernel_size, stride=, padding=, eps=, momentum=).
    """

    num_classes: int | None = None
    in_chans: int = 3
    aux_logits: bool = False
    convention: str | None = None
    drop_rate: float | None = None
    global_pool: str = "avg"
    bn_eps: float = 1e-3
    bn_momentum: float = 0.1
    conv_block: ConvBlock | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        self.default("num_classes", 1000)
        self.default("convention", "tf")
        self.default("drop_rate", 0.2)
        check_count("num_classes", self.num_classes, 0)
        check_count("in_chans", self.in_chans, 1)
        check_choice("aux_logits", self.aux_logits, (False, True))
        check_choice("convention", self.convention, ("tf", "torch"))
        check_choice("global_pool", self.global_pool, GLOBAL_POOLS)
        check(
            bool(self.global_pool) or self.classes == 0, "global_pool='' with a classifier", "with num_classes=0 only"
        )
        check_rate("drop_rate", self.dropout)
        check(is_number(self.bn_eps) and 0 < self.bn_eps < math.inf, f"bn_eps={self.bn_eps!r}", "bn_eps > 0, finite")
        object.__setattr__(self, "bn_eps", float(self.bn_eps))  # as files of weights keep it
        momentum = is_number(self.bn_momentum) and 0 <= self.bn_momentum <= 1
        check(momentum, f"bn_momentum={self.bn_momentum!r}", "0 <= bn_momentum <= 1")
        made = self.conv_block is None or callable(self.conv_block)
        check(made, f"conv_block={self.conv_block!r}", "what makes a convolution, as BasicConv2d does")

    def default(self, option: str, value: Any) -> None:
        """Puts `value` where the caller left the option open."""
        if getattr(self, option) is None:
            object.__setattr__(self, option, value)

    @property
    def classes(self) -> int:
        """num_classes once resolved."""
        assert self.num_classes is not None
        return self.num_classes

    @property
    def padding(self) -> str:
        """convention once resolved."""
        assert self.convention is not None
        return self.convention

    @property
    def dropout(self) -> float:
        """drop_rate once resolved."""
        assert self.drop_rate is not None
        return self.drop_rate

    def conv(self) -> ConvBlock:
        """The block that families build convolutions from."""
        return partial(self.conv_block or BasicConv2d, eps=self.bn_eps, momentum=self.bn_momentum)
