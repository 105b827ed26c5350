"""What counts as an integer, a number or a flag where users give options: NumPy's too, taken in as Python's.

Nothing here needs torch or NumPy.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

PLAIN = (bool, int, float, str, type(None))
NUMPY_KINDS = ("b", "i", "u", "f")


def plain(value: Any) -> Any:
    """The int, float or bool that a number stands for, in tuples and lists too; anything else as it is.

    >>> from fractions import Fraction
    >>> plain((Fraction(1, 2), True, "same"))
    (0.5, True, 'same')
    """
    if type(value) in PLAIN:
        return value
    if type(value) in (tuple, list):
        return type(value)(plain(one) for one in value)
    if getattr(getattr(value, "dtype", None), "kind", None) in NUMPY_KINDS and value.shape == ():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(name: str, value: Any) -> int:
    """The int that `value` is; TypeError for what is none."""
    value = plain(value)
    if not is_integer(value):
        raise TypeError(f"{name} {value!r}; allowed: an integer")
    return int(value)


def odd_length(n: Any) -> int:
    """The length of an asymmetric pair's kernels as an int; ValueError where SAME padding would not be symmetric."""
    n = plain(n)
    if not is_integer(n) or n < 1 or n % 2 == 0:
        raise ValueError(f"kernel length {n!r}; allowed: an odd integer, so that SAME padding is symmetric")
    return int(n)
