"""Quantizing and packing blocks: the operations of `kernels.quantize.encode`, in its order, on one tile per program.

Codes, scales and residuals are those of the reference on the CPU bit for bit, with three exceptions: what is summed, a
`mean` grid or the unit of a codebook, is summed in another order, so that zero or scale may be the next float16; of
numbers that compete for a slot at equal cost, the first gets it, where `topk` takes any, and a trimmed range follows;
and NaN is no candidate for a trimmed range.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..float8 import FLOAT8_MAX
from ..format import Format, Side, row_words
from ..quantize import FLOAT16_MAX, NO_TABLES, Tables, packed_shapes
from ..rotation import hadamard_rotate
from .layout import code_bit, grid_of, high_bit
from .words import planes

WIDEST_ROW = 8192
"""Numbers of the longest rows that a program holds."""

LARGEST_TILE = 256 * 256
"""Numbers of the largest blocks whose ranges a program can trim where slots and scales cross."""

_TILE = 4096
_ROUNDER = tl.constexpr(12582912.0)
_LOWEST = tl.constexpr(-(2**31))
# the order of -inf, and the inverted order of inf
_BEHIND = tl.constexpr(-(2**31) + 0x7FFFFF)
_LIMIT = tl.constexpr(FLOAT16_MAX)
_FLOAT8_MAX = tl.constexpr(FLOAT8_MAX)


def unserved(fmt: Format, side: Side, head_dim: int, block: int, tables: Tables = NO_TABLES) -> str | None:
    """The option that keeps a format from these kernels; None: it is served."""
    if block & (block - 1):
        return f"block={block} (not a power of two)"
    if max(head_dim, block) > WIDEST_ROW:
        return f"head_dim={head_dim} (more than {WIDEST_ROW})"
    if fmt.trim and _crossed(fmt, side) and _columns(fmt, head_dim) * block > LARGEST_TILE:
        return f"trim={fmt.trim} with head_dim={head_dim} and block={block}"
    for name, table in tables.tensors().items():
        if table.dtype != torch.float32:
            return f"{name} in {table.dtype} (not float32)"
    return None


def encode(
    states: Tensor,
    fmt: Format,
    side: Side,
    block: int,
    valid: Tensor | None = None,
    tables: Tables = NO_TABLES,
    out: dict[str, Tensor] | None = None,
    at: Tensor | None = None,
    when: Tensor | None = None,
) -> dict[str, Tensor]:
    """`kernels.quantize.encode`, which see, of a format for which `unserved` is None and arguments that fit."""
    batch, heads, tokens, head_dim = states.shape
    if out is None:
        out = {
            name: states.new_empty(batch, heads, tokens // block, *shape, dtype=dtype)
            for name, (shape, dtype) in packed_shapes(fmt, side, head_dim, block).items()
        }
    if not batch * heads * tokens:
        return out
    if fmt.rotation == "hadamard":
        states = hadamard_rotate(states.unflatten(2, (-1, block)).float(), fmt.basis(head_dim)).flatten(2, 3)
    # offsets inside a tile are 32 bits
    if states.stride(3) != 1 or states.stride(2) * max(_TILE, block) >= 2**31:
        states = states.contiguous()
    if valid is not None:
        valid = (valid if valid.stride(1) == 1 else valid.contiguous()).view(torch.uint8)
    place = (at, when, *states.stride()[:3], 0 if valid is None else valid.stride(0))
    place = (*place, heads, tokens, out["codes"].shape[2])
    shared = {
        "HEAD_DIM": head_dim,
        "BLOCK": block,
        "GROUPS": _groups(fmt, head_dim),
        "BITS": fmt.bits,
        "KEY": side == "key",
        "SCALE": fmt.scale,
        "SYMMETRIC": fmt.symmetric,
        "CODES": fmt.codes,
        "GRID": fmt.grid,
        "TRIM": fmt.trim,
        "SLOTS": fmt.outliers,
    }
    sensitivity = None if side == "value" or tables.sensitivity is None else tables.sensitivity.contiguous()
    # no fused multiply-add, which rounds once where the reference rounds twice
    with torch.cuda.device_of(states):
        if fmt.scale != "static":
            rows, columns = _range_tile(fmt, side, head_dim, block)
            chunks = _columns(fmt, head_dim) // columns
            _write_grids[(triton.cdiv(tokens, rows) * chunks, batch * heads)](
                states, valid, sensitivity, out["scales"], *place,
                **shared,
                UNIT=fmt.unit,
                GROUP=triton.next_power_of_2(head_dim // shared["GROUPS"]),
                TOKENS=rows,
                CHANNELS=columns,
                CHUNKS=chunks,
                num_warps=_warps(rows * columns),
                enable_fp_fusion=False,
            )  # fmt: skip
        run, width = _planes(head_dim if side == "key" else block, fmt.bits)
        columns = planes(fmt.bits) * width
        rows = max(1, _TILE // columns)
        if side == "value":
            rows = min(rows, triton.next_power_of_2(head_dim))
        elif fmt.scale == "channel":
            rows = min(rows, block)
        chunks = 1 if side == "key" else triton.cdiv(head_dim, rows)
        tiles = triton.cdiv(tokens, rows) if side == "key" else tokens // block * chunks
        static = fmt.scale == "static"
        _write_codes[(tiles, batch * heads)](
            states, valid, sensitivity,
            _contiguous(tables.scale) if static else out["scales"],
            _contiguous(tables.zero) if static else None,
            _contiguous(tables.gain), _contiguous(tables.offset), _contiguous(tables.codebook),
            out["codes"], out.get("outlier_index"), out.get("outlier_value"), *place,
            **shared,
            WORDS=row_words(head_dim if side == "key" else block, fmt.bits),
            RUN=run,
            WIDTH=width,
            PLANES=planes(fmt.bits),
            ROWS=rows,
            CHUNKS=chunks,
            num_warps=_warps(rows * columns),
            enable_fp_fusion=False,
        )  # fmt: skip
        if fmt.unit == "norm":
            rows, columns = _range_tile(fmt, side, head_dim, block)
            _restore_norms[(triton.cdiv(tokens, rows), batch * heads)](
                states, out["scales"], _contiguous(tables.codebook), at, when, *states.stride()[:3], heads, tokens,
                out["codes"].shape[2],
                HEAD_DIM=head_dim,
                BLOCK=block,
                GROUPS=shared["GROUPS"],
                BITS=fmt.bits,
                GROUP=triton.next_power_of_2(head_dim // shared["GROUPS"]),
                TOKENS=rows,
                CHANNELS=columns,
                num_warps=_warps(rows * columns),
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _contiguous(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _groups(fmt: Format, head_dim: int) -> int:
    return fmt.groups(head_dim) if fmt.scale == "token" else 1


def _columns(fmt: Format, head_dim: int) -> int:
    """Channels of a tile of ranges: groups, and channels of a group, padded to powers of two."""
    groups = _groups(fmt, head_dim)
    return triton.next_power_of_2(groups) * triton.next_power_of_2(head_dim // groups)


def _crossed(fmt: Format, side: Side) -> bool:
    """Whether numbers that compete for slots do not share a scale."""
    return (fmt.scale == "token") != (side == "key")


def _range_tile(fmt: Format, side: Side, head_dim: int, block: int) -> tuple[int, int]:
    """Tokens and channels whose ranges one program finds."""
    columns = _columns(fmt, head_dim)
    if fmt.trim and _crossed(fmt, side):
        return block, columns
    if fmt.scale == "token":
        return max(1, _TILE // columns), columns
    return block, min(columns, max(1, _TILE // block))


def _planes(length: int, bits: int) -> tuple[int, int]:
    """Codes of a plane of a row, and that number padded to a power of two."""
    run = row_words(length, bits) * 32 // bits // planes(bits)
    return run, triton.next_power_of_2(run)


def _warps(numbers: int) -> int:
    """One for 1024 numbers of a tile, which is 32 registers of each thread for every tensor."""
    return min(16, max(1, numbers // 1024))


@triton.jit
def _write_grids(
    states, valid, sensitivity, scales, at, when,
    batch_stride, head_stride, token_stride, valid_stride, heads, tokens, capacity,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr,
    SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, CODES: tl.constexpr, GRID: tl.constexpr,
    TRIM: tl.constexpr, SLOTS: tl.constexpr,
    UNIT: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """float16 scale and zero from the ranges of a tile `[TOKENS, CHANNELS]`.

    `GROUP` is the number of channels of a group, padded; a tile has whole groups, and whole blocks of a scale per
    channel.
    """
    first, go = _destination(at, when, tokens // BLOCK, capacity)
    if not go:
        return
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    first_token = (tile // CHUNKS * TOKENS).to(tl.int64)
    token = tl.arange(0, TOKENS)
    column = tile % CHUNKS * CHANNELS + tl.arange(0, CHANNELS)
    real = token < tokens - first_token
    base = states + row // heads * batch_stride + row % heads * head_stride + first_token * token_stride
    x, exists, channel = _whole_tokens(base, token, column, real, token_stride, HEAD_DIM, GROUPS, GROUP)
    seen = exists
    keep = exists
    if valid is not None and (TRIM > 0 or SCALE == "channel"):
        marks = valid + row // heads * valid_stride + first_token
        keep = exists & (tl.load(marks + token, mask=real, other=0) > 0)[:, None]
        if SCALE == "channel":
            # a token's range is of that token alone
            seen = keep

    # `vectors`: the numbers that share a scale are along AXIS
    AXIS: tl.constexpr = 2 if SCALE == "token" else 0
    if TRIM > 0:
        vectors, marked = _vectors(x, GROUP, SCALE), _vectors(seen, GROUP, SCALE)
        high = _ranked(tl.where(marked, _order(vectors), _BEHIND), TRIM, AXIS)
        low = ~_ranked(tl.where(marked, ~_order(vectors), _BEHIND), TRIM, AXIS)
        above = vectors - _order(high).to(tl.float32, bitcast=True)
        below = _order(low).to(tl.float32, bitcast=True) - vectors
        excess = tl.where(above > 0, above, 0.0) + tl.where(below > 0, below, 0.0)
        cost = tl.where(keep, tl.reshape(excess, [TOKENS, CHANNELS]), 0.0)
        if sensitivity is not None:
            weight = tl.load(sensitivity + row % heads * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
            cost = cost * weight[None, :]
        competing = tl.where(exists, cost.to(tl.int32, bitcast=True), -1)
        if KEY:
            competing = _without_costliest(competing, tl.arange(0, CHANNELS)[None, :], SLOTS, 1)
        else:
            competing = _without_costliest(competing, tl.arange(0, TOKENS)[:, None], SLOTS, 0)
        seen = seen & (competing >= 0)

    vectors, marked = _vectors(x, GROUP, SCALE), _vectors(seen, GROUP, SCALE)
    count = tl.sum(marked.to(tl.int32), AXIS)
    low = tl.where(count > 0, tl.min(tl.where(marked, vectors, float("inf")), AXIS), 0.0)
    high = tl.where(count > 0, tl.max(tl.where(marked, vectors, float("-inf")), AXIS), 0.0)
    # minima and maxima of the hardware pass NaN over
    poisoned = tl.sum((marked & (vectors != vectors)).to(tl.int32), AXIS) > 0
    low, high = tl.where(poisoned, float("nan"), low), tl.where(poisoned, float("nan"), high)

    # levels end at 1, at the largest float or at the last code
    STEPS: tl.constexpr = 2.0 if CODES == "codebook" else 2 * _FLOAT8_MAX if CODES == "float8" else (1 << BITS) - 1.0
    zero = low
    if UNIT != "range":
        squares = tl.sum(tl.where(marked, vectors * vectors, 0.0), AXIS)
        scale = tl.sqrt_rn(tl.div_rn(squares, tl.maximum(count, 1).to(tl.float32)))
    elif GRID != "ends":
        scale = (high - low) * (1.0 / (1 << BITS))
        if GRID == "midpoint":
            zero = low + scale * 0.5
        else:
            total = tl.sum(tl.where(marked, vectors, 0.0), AXIS)
            zero = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32)) - scale * (1 << (BITS - 1))
    elif SYMMETRIC:
        reach = tl.where(high < -low, -low, high)
        scale = tl.div_rn(reach * 2, STEPS)
    else:
        scale = tl.div_rn(high - low, STEPS)
        if CODES == "codebook":
            zero = (high + low) * 0.5

    NUMBERS: tl.constexpr = 1 if SYMMETRIC else 2
    if SCALE == "token":
        group = tl.arange(0, CHANNELS // GROUP)
        place = ((row * capacity + first) * BLOCK + first_token + token)[:, None] * GROUPS + group[None, :]
        stored = real[:, None] & (group < GROUPS)[None, :]
    else:
        place = (row * capacity + first + tile // CHUNKS) * HEAD_DIM + channel
        stored = channel < HEAD_DIM
    tl.store(scales + place * NUMBERS, _half(scale), mask=stored)
    if not SYMMETRIC:
        tl.store(scales + place * NUMBERS + 1, _half(zero), mask=stored)


@triton.jit
def _write_codes(
    states, valid, sensitivity, scales, zeros, gain, offset, levels, codes, outlier_index, outlier_value, at, when,
    batch_stride, head_stride, token_stride, valid_stride, heads, tokens, capacity,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr,
    SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, CODES: tl.constexpr, GRID: tl.constexpr,
    TRIM: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Words and outliers of a tile of packed rows `[ROWS, PLANES * WIDTH]`: tokens of keys, channels of values.

    Columns are in the order of the planes, which hold `RUN` codes each and are padded to `WIDTH`.
    """
    first, go = _destination(at, when, tokens // BLOCK, capacity)
    if not go:
        return
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    lane = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PLANES * WIDTH)[None, :]
    position = column // WIDTH * RUN + column % WIDTH
    # int64: where the tile begins; int32: offsets inside it
    if KEY:
        token, channel = lane, position
        first_token = (tile * ROWS).to(tl.int64)
        # the only block of the tile where scales are per channel
        block = row * capacity + first + first_token // BLOCK
        first_row = (row * capacity + first) * BLOCK + first_token
        real = lane < tokens - tile * ROWS
        exists = real & (column % WIDTH < RUN) & (position < HEAD_DIM)
    else:
        token, channel = position, tile % CHUNKS * ROWS + lane
        first_token = (tile // CHUNKS * BLOCK).to(tl.int64)
        block = row * capacity + first + tile // CHUNKS
        first_row = block * HEAD_DIM + tile % CHUNKS * ROWS
        real = channel < HEAD_DIM
        exists = real & (column % WIDTH < RUN) & (position < BLOCK)
    base = states + row // heads * batch_stride + row % heads * head_stride + first_token * token_stride
    x = tl.load(base + (token * token_stride + channel), mask=exists, other=0).to(tl.float32)

    # beyond the end, the grid of the last token or channel is read again
    known_token = tl.minimum(token, (tokens - 1 - first_token).to(tl.int32))
    known_channel = tl.minimum(channel, HEAD_DIM - 1)
    scale, zero, level_scale, level_zero = grid_of(
        scales, zeros, gain, offset, block, (row * capacity + first) * BLOCK + first_token, known_token, row % heads,
        known_channel, HEAD_DIM, GROUPS, BITS, SCALE, SYMMETRIC, CODES,
    )  # fmt: skip
    ratio = tl.where(scale > 0, tl.div_rn(x - zero, scale), 0.0)
    if CODES == "codebook":
        code = _nearest(ratio, levels, BITS)
        code = tl.where(exists, code, 0)
        level = tl.load(levels + code)
    elif CODES == "float8":
        code = tl.where(exists, _float8(ratio), 0)
    else:
        ratio = tl.where(ratio > 0, tl.where(ratio < (1 << BITS) - 1, ratio, (1 << BITS) - 1.0), 0.0)
        level = tl.floor(ratio + 0.5) if GRID == "midpoint" else (ratio + _ROUNDER) - _ROUNDER
        code = tl.where(exists, level.to(tl.int32), 0)
    _store_words(
        codes + first_row * WORDS, lane * WORDS, code, column, real, BITS, CODES == "codebook", RUN, WIDTH, PLANES, ROWS
    )

    if SLOTS > 0:
        residual = x - (level * level_scale + level_zero)
        if valid is not None:
            keep = tl.load(valid + row // heads * valid_stride + first_token + known_token) > 0
            residual = tl.where(keep, residual, 0.0)
        index = outlier_index + first_row * SLOTS + lane * SLOTS
        value = outlier_value + first_row * SLOTS + lane * SLOTS
        if GRID == "ends":
            cost = tl.abs(residual)
            if sensitivity is not None:
                cost = cost * tl.load(sensitivity + row % heads * HEAD_DIM + known_channel)
            order = tl.where(exists, cost.to(tl.int32, bitcast=True), _LOWEST)
            _store_ranked(order, residual, column, index, value, real, SLOTS, RUN, WIDTH)
        else:
            order = tl.where(exists, ~_order(x), _LOWEST)
            order = _store_ranked(order, residual, column, index, value, real, TRIM, RUN, WIDTH)
            order = tl.where(order == _LOWEST, _LOWEST, ~order)
            _store_ranked(order, residual, column, index + TRIM, value + TRIM, real, TRIM, RUN, WIDTH)


@triton.jit
def _restore_norms(
    states, scales, levels, at, when, batch_stride, head_stride, token_stride, heads, tokens, capacity,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Scales with which what is decoded has the norm of what was encoded, in place of those it was coded with.

    A launch of its own: where rows are channels no program that codes sees a token whole.
    """
    first, go = _destination(at, when, tokens // BLOCK, capacity)
    if not go:
        return
    row = tl.program_id(1).to(tl.int64)
    first_token = (tl.program_id(0) * TOKENS).to(tl.int64)
    token, column = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    base = states + row // heads * batch_stride + row % heads * head_stride + first_token * token_stride
    real = token < tokens - first_token
    x, exists, _channel = _whole_tokens(base, token, column, real, token_stride, HEAD_DIM, GROUPS, GROUP)

    group = tl.arange(0, CHANNELS // GROUP)
    place = ((row * capacity + first) * BLOCK + first_token + token)[:, None] * GROUPS + group[None, :]
    stored = real[:, None] & (group < GROUPS)[None, :]
    scale = tl.load(scales + place, mask=stored, other=0).to(tl.float32)
    # threads that hold the same scale have all read it before one writes
    tl.debug_barrier()
    over = tl.expand_dims(scale, 2)
    ratio = tl.where(over > 0, tl.div_rn(_vectors(x, GROUP, "token"), over), 0.0)
    level = tl.load(levels + _nearest(ratio, levels, BITS))
    marked = _vectors(exists, GROUP, "token")
    encoded = tl.sum(tl.where(marked, ratio * ratio, 0.0), 2)
    decoded = tl.sum(tl.where(marked, level * level, 0.0), 2)
    factor = tl.where(decoded > 0, tl.sqrt_rn(tl.div_rn(encoded, decoded)), 1.0)
    tl.store(scales + place, _half(scale * factor), mask=stored)


@triton.jit
def _destination(at, when, blocks, capacity):
    """The first block to write, and whether to write at all."""
    first = tl.full([], 0, tl.int64)
    if at is not None:
        first = tl.load(at).to(tl.int64)
    go = (first >= 0) & (first + blocks <= capacity)
    if when is not None:
        go = go & (tl.load(when) != 0)
    return first, go


@triton.jit
def _whole_tokens(
    base, token, column, real, token_stride, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    """float32 `[tokens, columns]` with groups padded to `GROUP` columns; which are numbers; the columns' channels."""
    channel = column // GROUP * (HEAD_DIM // GROUPS) + column % GROUP
    exists = real[:, None] & ((column % GROUP < HEAD_DIM // GROUPS) & (channel < HEAD_DIM))[None, :]
    x = tl.load(base + (token[:, None] * token_stride + channel[None, :]), mask=exists, other=0).to(tl.float32)
    return x, exists, channel


@triton.jit
def _vectors(x, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """`x [tokens, channels]` as `[tokens, groups, GROUP]` where scales are per token."""
    if SCALE == "token":
        return tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    else:
        return x


@triton.jit
def _order(x):
    """Integers that sort as the float32 numbers do, NaN last; of such integers, the bits of the numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _ranked(order, RANK: tl.constexpr, AXIS: tl.constexpr):
    """The largest along an axis but for `RANK` of them, equals counted one by one."""
    found = tl.max(order, AXIS, keep_dims=True)
    largest = found
    before = tl.zeros_like(found)
    for _ in range(RANK):
        before += tl.sum((order == largest).to(tl.int32), AXIS, keep_dims=True)
        order = tl.where(order == largest, _LOWEST, order)
        largest = tl.max(order, AXIS, keep_dims=True)
        found = tl.where(before <= RANK, largest, found)
    return found


@triton.jit
def _first_largest(order, index, AXIS: tl.constexpr):
    """The largest along an axis, and the smallest `index` of those."""
    largest = tl.max(order, AXIS, keep_dims=True)
    return largest, tl.min(tl.where(order == largest, index, 2**30), AXIS, keep_dims=True)


@triton.jit
def _without_costliest(cost, index, SLOTS: tl.constexpr, AXIS: tl.constexpr):
    """`cost`, not negative, with -1 for the `SLOTS` largest along an axis that are above 0."""
    for _ in range(SLOTS):
        largest, place = _first_largest(cost, index, AXIS)
        cost = tl.where((index == place) & (largest > 0), -1, cost)
    return cost


@triton.jit
def _nearest(ratio, levels, BITS: tl.constexpr):
    """How many midpoints between neighbouring levels lie below, as `torch.bucketize` counts."""
    code = tl.zeros(ratio.shape, tl.int32)
    for index in range((1 << BITS) - 1):
        midpoint = (tl.load(levels + index + 1) + tl.load(levels + index)) * 0.5
        code += tl.where(ratio <= midpoint, 0, 1)
    return code


@triton.jit
def _float8(ratio):
    """The bytes that `float8.to_float8` makes of numbers, by integers: not all GPUs have the type."""
    bits = ratio.to(tl.int32, bitcast=True)
    size = tl.where(tl.abs(ratio) < _FLOAT8_MAX, tl.abs(ratio), _FLOAT8_MAX) * 256.0
    # below 2**-6 floats are equal steps of 2**-9, as those of float32 around 2**14 are
    small = ((size + 16384.0) - 16384.0) * 512.0
    # above, 20 bits of 23 go, ties to the even, and the exponent is counted from -7 in place of -127
    place = size.to(tl.int32, bitcast=True)
    large = ((place + 0x7FFFF + ((place >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, small.to(tl.int32), large)
    code = tl.where(ratio == ratio, code, 0x7F)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _store_words(
    words, start, code, column, real,
    BITS: tl.constexpr, BY_NIBBLE: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Codes `[ROWS, PLANES * WIDTH]` in the order of the planes, 0 where there are none, as words."""
    plane, word, half = column // WIDTH, column % WIDTH // 2, column % 2
    bits = (code & 3 if BITS == 3 else code) << code_bit(plane, half, BITS, BY_NIBBLE and BITS == 4)
    # no two codes share a bit, so that sums are unions
    pairs = tl.sum(tl.reshape(bits, [ROWS, PLANES, WIDTH // 2, 2]), 3)
    index = tl.arange(0, WIDTH // 2)[None, :]
    tl.store(words + (start + index), tl.sum(pairs, 1), mask=real & (index < RUN // 2))
    if BITS == 3:
        bits = (code >> 2) << high_bit(plane, word, half)
        pairs = tl.sum(tl.reshape(bits, [ROWS, PLANES, WIDTH // 4, 4]), 3)
        index = tl.arange(0, WIDTH // 4)[None, :]
        tl.store(words + (start + RUN // 2 + index), tl.sum(pairs, 1), mask=real & (index < RUN // 4))


@triton.jit
def _store_ranked(
    order, residual, column, outlier_index, outlier_value, real,
    COUNT: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store place and residual of the `COUNT` largest of each row of `order`; `order` with those lowest."""
    for rank in range(COUNT):
        _largest, place = _first_largest(order, column, 1)
        chosen = column == place
        order = tl.where(chosen, _LOWEST, order)
        value = tl.sum(tl.where(chosen, residual, 0.0), 1, keep_dims=True)
        tl.store(outlier_index + rank, (place // WIDTH * RUN + place % WIDTH).to(tl.int16), mask=real)
        tl.store(outlier_value + rank, _half(value), mask=real)
    return order


@triton.jit
def _half(x):
    """float16, the largest number for what is larger."""
    return tl.where(x > _LIMIT, _LIMIT, tl.where(x < -_LIMIT, -_LIMIT, x)).to(tl.float16)
