"""Kernels that ask the device about itself."""

import triton
import triton.language as tl


@triton.jit
def read(numbers, sums, count, TILE: tl.constexpr):
    """Sum `count` int32, a multiple of `TILE`, so that every one is read once; each program writes its sum."""
    total = tl.zeros([TILE], tl.int32)
    step = tl.num_programs(0).to(tl.int64) * TILE
    begin = tl.program_id(0).to(tl.int64) * TILE
    while begin < count:
        total += tl.load(numbers + begin + tl.arange(0, TILE))
        begin += step
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def product(left, right, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """`out = left @ right` of float16, where `left [M, K]` is given by its bits, as int32, and `right` is `[K, N]`."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    bits = tl.load(left + m[:, None] * K + k[None, :])
    x = bits.to(tl.int16).to(tl.float16, bitcast=True)
    y = tl.load(right + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y))
