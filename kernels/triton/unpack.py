"""Packed blocks to dense states: the operations of `kernels.quantize.decode`, in its order, in one pass.

Scale and zero are applied in float32 (float64 where that is asked for), and what results is rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..format import Format, Side, row_words
from ..quantize import NO_TABLES, Tables
from .layout import code_bit, grid_of, high_bit
from .words import planes

WIDEST_ROW = 8192
"""Numbers of the longest rows that a program holds."""

_TILE = 4096


def unserved(fmt: Format, side: Side, head_dim: int, block: int, tables: Tables = NO_TABLES) -> str | None:
    """The option that keeps a format from this kernel; None: it is served."""
    if max(head_dim, block) > WIDEST_ROW:
        return f"head_dim={head_dim} (more than {WIDEST_ROW})"
    for name, table in tables.tensors().items():
        if table.dtype != torch.float32:
            return f"{name} in {table.dtype} (not float32)"
    return None


def decode(
    packed: dict[str, Tensor],
    fmt: Format,
    side: Side,
    head_dim: int,
    block: int,
    tables: Tables = NO_TABLES,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """States `[batch, kv_heads, tokens, head_dim]` in the rotated basis, if the format has one.

    packed: tensors `[batch, kv_heads, blocks, ...]`, views of longer buffers included, of a format for which
        `unserved` is None.
    """
    batch, heads, blocks = packed["codes"].shape[:3]
    states = packed["codes"].new_empty(batch, heads, blocks * block, head_dim, dtype=dtype)
    if not states.numel():
        return states
    capacity = _capacity(packed)
    if capacity is None:
        packed, capacity = {name: tensor.contiguous() for name, tensor in packed.items()}, blocks
    columns = triton.next_power_of_2(head_dim if side == "key" else block)
    rows = max(1, _TILE // columns)
    if side == "value":
        rows = min(rows, triton.next_power_of_2(head_dim))
    elif fmt.scale == "channel":
        rows = min(rows, block & -block)
    chunks = 1 if side == "key" else triton.cdiv(head_dim, rows)
    tiles = triton.cdiv(blocks * block, rows) if side == "key" else blocks * chunks
    static = fmt.scale == "static"
    with torch.cuda.device_of(states):
        _write_states[(tiles, batch * heads)](
            packed["codes"],
            _contiguous(tables.scale) if static else packed["scales"],
            _contiguous(tables.zero) if static else None,
            _contiguous(tables.gain), _contiguous(tables.offset), _contiguous(tables.codebook),
            packed.get("outlier_index"), packed.get("outlier_value"), states,
            heads, blocks * block, capacity,
            HEAD_DIM=head_dim,
            BLOCK=block,
            GROUPS=fmt.groups(head_dim) if fmt.scale == "token" else 1,
            BITS=fmt.bits,
            KEY=side == "key",
            SCALE=fmt.scale,
            SYMMETRIC=fmt.symmetric,
            CODES=fmt.codes,
            SLOTS=fmt.outliers,
            WORDS=row_words(head_dim if side == "key" else block, fmt.bits),
            PLANES=planes(fmt.bits),
            WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
            ROWS=rows,
            COLUMNS=columns,
            CHUNKS=chunks,
            num_warps=min(8, max(1, rows * columns // 1024)),
            # a fused multiply-add rounds once where the reference rounds twice
            enable_fp_fusion=False,
        )  # fmt: skip
    return states


def _contiguous(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _capacity(packed: dict[str, Tensor]) -> int | None:
    """Blocks between the first of one row and of the next, in contiguous buffers that all have as many; else None."""
    found = set()
    for tensor in packed.values():
        batch, heads, blocks, *_ = tensor.shape
        inner = tensor[0, 0, 0].numel()
        step = tensor.stride(1) if heads > 1 else tensor.stride(0) if batch > 1 else blocks * inner
        regular = batch == 1 or tensor.stride(0) == heads * step
        if not (regular and tensor[0, 0].is_contiguous()) or step % inner:
            return None
        found.add(step // inner)
    return found.pop() if len(found) == 1 else None


@triton.jit
def _write_states(
    codes, scales, zeros, gain, offset, levels, outlier_index, outlier_value, states, heads, tokens, capacity,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, KEY: tl.constexpr,
    SCALE: tl.constexpr, SYMMETRIC: tl.constexpr, CODES: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, PLANES: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """States of a tile of packed rows `[ROWS, COLUMNS]`: tokens of keys, channels of values."""
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    lane = tl.arange(0, ROWS)[:, None]
    position = tl.arange(0, COLUMNS)[None, :]
    # int64: where the tile begins; int32: offsets inside it
    if KEY:
        token, channel = lane, position
        first_token = (tile * ROWS).to(tl.int64)
        last_lane = tokens - tile * ROWS - 1
        # the only block of the tile where scales are per channel
        block = row * capacity + first_token // BLOCK
        first_row = row * capacity * BLOCK + first_token
        exists = (lane <= last_lane) & (position < HEAD_DIM)
    else:
        token, channel = position, tile % CHUNKS * ROWS + lane
        first_token = (tile // CHUNKS * BLOCK).to(tl.int64)
        last_lane = HEAD_DIM - tile % CHUNKS * ROWS - 1
        block = row * capacity + tile // CHUNKS
        first_row = block * HEAD_DIM + tile % CHUNKS * ROWS
        exists = (lane <= last_lane) & (position < BLOCK)
    target = states + (row * tokens + first_token) * HEAD_DIM + (token * HEAD_DIM + channel)

    # beyond the end, the last row and column are read again, and not stored
    lane, known = tl.minimum(lane, last_lane), tl.minimum(position, (HEAD_DIM if KEY else BLOCK) - 1)
    if KEY:
        token, channel = lane, known
    else:
        token, channel = known, tl.minimum(channel, HEAD_DIM - 1)
    code = _code(codes + first_row * WORDS, lane, known, BITS, CODES == "codebook", WORDS, PLANES)
    _scale, _zero, scale, zero = grid_of(
        scales, zeros, gain, offset, block, row * capacity * BLOCK + first_token, token, row % heads,
        channel, HEAD_DIM, GROUPS, BITS, SCALE, SYMMETRIC, CODES,
    )  # fmt: skip
    if CODES == "codebook":
        level = tl.load(levels + code)
    elif CODES == "float8":
        level = _float8(code)
    else:
        level = code
    x = level.to(WIDE) * scale.to(WIDE) + zero.to(WIDE)
    if SLOTS > 0:
        for slot in range(SLOTS):
            index = tl.load(outlier_index + first_row * SLOTS + (lane * SLOTS + slot))
            value = tl.load(outlier_value + first_row * SLOTS + (lane * SLOTS + slot))
            x = tl.where(position == index, x + value.to(WIDE), x)
    tl.store(target, x.to(states.dtype.element_ty), mask=exists)


@triton.jit
def _code(
    words, row, position,
    BITS: tl.constexpr, BY_NIBBLE: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """The codes at `position` of `row`, int32 both, of rows that begin at `words`."""
    RUN: tl.constexpr = WORDS * 32 // BITS // PLANES
    plane, word, half = position // RUN, position % RUN // 2, position % 2
    MASK: tl.constexpr = 3 if BITS == 3 else (1 << BITS) - 1
    code = (tl.load(words + (row * WORDS + word)) >> code_bit(plane, half, BITS, BY_NIBBLE and BITS == 4)) & MASK
    if BITS == 3:
        top = tl.load(words + (row * WORDS + RUN // 2 + word // 2)) >> high_bit(plane, word, half)
        code = code | (top & 1) << 2
    return code


@triton.jit
def _float8(code):
    """The levels of 8-bit floats, which are float16 numbers of the same bits; NaN of what is none."""
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    level = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), level)
