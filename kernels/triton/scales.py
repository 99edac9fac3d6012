"""Reading stored scales and zeros."""

import triton
import triton.language as tl

from .words import number_pair, power


@triton.jit
def scale_and_zero(scales, offsets, ZERO: tl.constexpr, live):
    """float32 scale and zero at `offsets`, see `load_held`; without ZERO scales stand alone."""
    stored = load_held(scales + offsets, live)
    if ZERO:
        scale, zero = number_pair(stored)
    else:
        scale = stored.to(tl.float32)
        zero = tl.zeros_like(scale)
    return scale, zero


@triton.jit
def load_held(pointer, live):
    """What is there, 0 where not `live`; None: all are."""
    if live is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=live, other=0)


@triton.jit
def largest_scale(scales, start, stop, ZERO: tl.constexpr):
    """The largest of scales `[start, stop)`, at least the smallest that a float16 can be."""
    highest = tl.full([1024], power(-24), tl.float32)
    for begin in range(start, stop, 1024):
        at = begin + tl.arange(0, 1024)
        scale, _ = scale_and_zero(scales, at, ZERO, at < stop)
        highest = tl.maximum(highest, scale)
    return tl.max(highest, 0)
