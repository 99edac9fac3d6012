"""Keys stored before RoPE: decoded and turned by their tokens' angles, tile by tile."""

import triton
import triton.language as tl

from .scales import scale_and_zero
from .words import planes, power, tile_code, tile_power, unit_exponent


@triton.constexpr_function
def _headroom(entries):
    """Power of two that keeps the scale of an entry's subnormal within float16 where keys are at most 1/4."""
    exponent = 0
    while 2.0 ** (22 - exponent) / entries > 60000:
        exponent += 1
    return 2.0**-exponent


@triton.jit
def grid_pairs(
    grid, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, LUT: tl.constexpr, ENTRIES: tl.constexpr, WORDS: tl.constexpr,
    PADDED: tl.constexpr, MERGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Static scales and zeros by tile, float16 `[TILE, 2 * MERGE * PADDED]`, times a power of two that keeps keys in
    float16.

    Returns both, and the power.
    """
    WIDTH: tl.constexpr = 2 * MERGE * WORDS
    lane = tl.arange(0, 2 * MERGE * PADDED)
    channel = tile_code(lane, WORDS, MERGE)
    peak = tl.zeros([2 * MERGE * PADDED], tl.float32) + power(-100)
    for tile in tl.static_range(planes(BITS) // MERGE):
        at = tile * WIDTH + channel
        inside = (channel < WIDTH) & (at < HEAD_DIM)
        scale = tl.load(grid + at, mask=inside, other=0.0)
        zero = tl.load(grid + HEAD_DIM + at, mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.abs(scale) * ENTRIES + tl.abs(zero))
    norm = tl.exp2(-tl.ceil(tl.log2(tl.max(peak, 0)))) * (0.25 * _headroom(ENTRIES))
    steps = ()
    shifts = ()
    for tile in tl.static_range(planes(BITS) // MERGE):
        at = tile * WIDTH + channel
        inside = (channel < WIDTH) & (at < HEAD_DIM)
        scale = tl.load(grid + at, mask=inside, other=0.0) * (tile_power(lane, BITS, LUT, tile, MERGE) * power(24))
        zero = tl.load(grid + HEAD_DIM + at, mask=inside, other=0.0)
        steps = steps + (tl.broadcast_to((scale * norm).to(tl.float16)[None, :], [TILE, 2 * MERGE * PADDED]),)
        shifts = shifts + (tl.broadcast_to((zero * norm).to(tl.float16)[None, :], [TILE, 2 * MERGE * PADDED]),)
    return steps, shifts, norm


@triton.jit
def turned_pairs(low, high, low_step, low_shift, high_step, high_shift, cos, sin):
    """Keys of two planes decoded and turned, two float16 at a time."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 first, second, part;
        fma.rn.f16x2 first, $2, $4, $5;
        fma.rn.f16x2 second, $3, $6, $7;
        mul.rn.f16x2 part, second, $9;
        neg.f16x2 part, part;
        fma.rn.f16x2 $0, first, $8, part;
        mul.rn.f16x2 part, first, $9;
        fma.rn.f16x2 $1, second, $8, part;
        }
        """,
        "=&r,=&r,r,r,r,r,r,r,r,r",
        [low, high, low_step, low_shift, high_step, high_shift, cos, sin],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def decoded_keys(
    codes, at, INDEX: tl.constexpr, scales, levels, grid, head, block, token, held,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr,
    ZERO: tl.constexpr, LUT: tl.constexpr, lane, MERGE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Keys `[tokens, channels]` of one tile, float32; 0 where not `held`, which is None if all are."""
    entry = codes.to(tl.float32)
    unit = tile_power(lane, BITS, LUT, INDEX, MERGE) * power(unit_exponent(FLOAT))
    if SCALE == "static":
        pointer = grid + head * (2 * HEAD_DIM) + at
        inside = at >= 0 if held is None else at < HEAD_DIM
        scale = tl.load(pointer, mask=inside, other=0.0)
        zero = tl.load(pointer + HEAD_DIM, mask=inside, other=0.0)
        return entry * (scale * unit)[None, :] + zero[None, :]
    else:
        if SCALE == "channel":
            inside = at >= 0 if held is None else at < HEAD_DIM
            scale, zero = scale_and_zero(scales + block * HEAD_DIM, at[None, :], ZERO, inside[None, :])
        else:
            # groups and planes need not coincide
            group = at // (HEAD_DIM // GROUPS)
            where = ((block * BLOCK + token) * GROUPS)[:, None] + group[None, :]
            scale, zero = scale_and_zero(scales, where, ZERO, held)
        if levels is not None:
            zero += scale * tl.load(levels + 1)
            scale = scale * tl.load(levels)
        return entry * (scale * unit if MERGE == 1 else scale * unit[None, :]) + zero
