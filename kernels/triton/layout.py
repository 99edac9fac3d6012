"""Where packed blocks hold codes and grids, element by element: what encoding and unpacking have in common.

Layouts are those of `kernels/packing.py` and of what `kernels.quantize.encode` returns, the latter in buffers
`[batch, kv_heads, capacity, ...]`: block `i` of row `batch * kv_heads + head` is block `row * capacity + i`.
"""

import triton
import triton.language as tl


@triton.jit
def code_bit(plane, half, BITS: tl.constexpr, BY_NIBBLE: tl.constexpr):
    """Lowest bit in its word of a code of 2, 4 or 8 bits; of the two low bits of a code of 3."""
    if BITS == 3:
        return plane // 2 % 2 * 16 + half * 8 + plane % 2 * 4 + plane // 4 * 2
    elif BY_NIBBLE:
        return plane // 2 * 16 + half * 8 + plane % 2 * 4
    else:
        return half * 16 + plane * BITS


@triton.jit
def high_bit(plane, word, half):
    """Bit in word `word // 2` of the 1-bit row of the third bit of a code in word `word` of the 2-bit row."""
    return plane // 2 % 2 * 16 + half * 8 + plane % 2 * 4 + word % 2 * 2 + plane // 4


@triton.jit
def grid_of(
    scales, zeros, gain, offset, block, first, token, head, channel,
    HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """float32 scale and zero of encoding, and those of decoding, which `gain` and `offset` change.

    scales: float16, as stored; or the float32 tables, with `zeros`, of static scales.
    block, first: positions of a block and of a token in the buffers, int64. token, channel: broadcastable, the former
        counted from `first`.
    """
    if SCALE == "static":
        scale = tl.load(scales + head * HEAD_DIM + channel)
        zero = tl.load(zeros + head * HEAD_DIM + channel)
    else:
        NUMBERS: tl.constexpr = 1 if SYMMETRIC else 2
        if SCALE == "channel":
            scales += block * HEAD_DIM * NUMBERS
            index = channel * NUMBERS
        else:
            scales += first * GROUPS * NUMBERS
            index = token * GROUPS * NUMBERS
            if GROUPS > 1:
                index = index + channel // (HEAD_DIM // GROUPS) * NUMBERS
        scale = tl.load(scales + index).to(tl.float32)
        if SYMMETRIC:
            zero = scale * (-((1 << BITS) - 1) / 2) if CODES == "affine" else tl.zeros_like(scale)
        else:
            zero = tl.load(scales + index + 1).to(tl.float32)
    if gain is not None:
        return scale, zero, scale * tl.load(gain), zero + scale * tl.load(offset)
    else:
        return scale, zero, scale, zero
