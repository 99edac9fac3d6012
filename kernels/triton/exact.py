"""Attention over exact keys and values: sinks, the newest tokens, and the 16-bit baseline."""

import triton
import triton.language as tl

from .query import LOG2E, capped


@triton.jit(
    do_not_specialize=[
        "rows",
        "queries",
        "tokens",
        "slots",
        "first_slot",
        "stride_visible_batch",
        "stride_visible_query",
    ]
)
def attend_exact(
    query,  # [batch * kv_heads, rows, HEAD_DIM]
    key,  # [batch, kv_heads, tokens, HEAD_DIM], channels contiguous
    value,  # [batch, kv_heads, tokens, VALUE_DIM], channels contiguous
    visible,  # uint8 [batch or 1, queries or 1, tokens]; None: all are
    mix,  # float32 [batch * kv_heads, slots, rows, VALUE_DIM]
    lse,  # float32 [batch * kv_heads, slots, rows], to base 2
    tokens_held,  # int32 [1]; None: `tokens`
    scaling,
    softcap,
    rows,
    queries,
    tokens,
    kv_heads,
    slots,
    first_slot,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_visible_batch,
    stride_visible_query,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,  # the newest keys are those of the queries
):
    """Slot `first_slot + split` of `mix` and `lse`, as `attend_blocks` writes them.

    Grid: (batch * kv_heads, splits, row tiles). A split without tokens writes zeros and -inf.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = pid // kv_heads, pid % kv_heads
    if tokens_held is not None:
        tokens = tl.load(tokens_held)
    per_split = tl.cdiv(tl.cdiv(tokens, tl.num_programs(1)), TILE) * TILE
    start = split * per_split
    stop = tl.minimum(start + per_split, tokens)

    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row_live = row < rows
    channel, value_channel = tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    channel_live, value_live = channel < HEAD_DIM, value_channel < VALUE_DIM
    # [HEAD_PAD, ROWS]
    q = tl.load(
        query + (pid * rows + row)[None, :] * HEAD_DIM + channel[:, None],
        mask=row_live[None, :] & channel_live[:, None],
        other=0.0,
    ).to(tl.float32)
    # a query that was rotated or scaled has more digits than keys of 16 bits: the rest goes in a second product
    upper = q.to(key.dtype.element_ty)
    lower = (q - upper.to(tl.float32)).to(key.dtype.element_ty)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([VALUE_PAD, ROWS], tl.float32)
    key_base = key + batch * stride_key_batch + head * stride_key_head
    value_base = value + batch * stride_value_batch + head * stride_value_head
    for begin in range(start, stop, TILE):
        token = begin + tl.arange(0, TILE)
        live = token < stop
        at = token.to(tl.int64)[:, None]
        k = tl.load(
            key_base + at * stride_key_token + channel[None, :], mask=live[:, None] & channel_live[None, :], other=0.0
        )
        v = tl.load(
            value_base + at * stride_value_token + value_channel[None, :],
            mask=live[:, None] & value_live[None, :],
            other=0.0,
        )
        scores = tl.dot(k, upper, input_precision="ieee")
        scores = tl.dot(k, lower, scores, input_precision="ieee")
        scores = scores * (scaling * LOG2E)
        if softcap is not None:
            scores = capped(scores, softcap)
        shown = tl.broadcast_to(live[:, None], scores.shape)
        if CAUSAL:
            shown = shown & (token[:, None] <= (tokens - queries + row % queries)[None, :])
        if visible is not None:
            seen_by = batch * stride_visible_batch + (row % queries)[None, :].to(tl.int64) * stride_visible_query
            seen = tl.load(visible + seen_by + at, mask=live[:, None] & row_live[None, :], other=0)
            shown = shown & (seen != 0)
        scores = tl.where(shown, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 0))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp2(maximum - against)
        weights = tl.exp2(scores - against[None, :])
        total = total * decay + tl.sum(weights, 0)
        mixed = tl.dot(tl.trans(v), weights.to(v.dtype), mixed * decay[None, :], input_precision="ieee")
        maximum = higher

    divisor = tl.where(total > 0, total, 1.0)
    slot_row = (pid * slots + first_slot + split) * rows + row
    tl.store(
        mix + slot_row[None, :] * VALUE_DIM + value_channel[:, None],
        mixed / divisor[None, :],
        mask=row_live[None, :] & value_live[:, None],
    )
    tl.store(lse + slot_row, maximum + tl.log2(divisor), mask=row_live)


@triton.jit
def _add_slots(
    mix, lse, start, stop, base, rows, channel, live, maximum, total, mixed, SLOTS: tl.constexpr, DIM: tl.constexpr
):
    """Fold slots `[start, stop)` of one row into a running sum."""
    for begin in range(start, stop, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        at = base + slot.to(tl.int64) * rows
        weight = tl.load(lse + at, mask=slot < stop, other=float("-inf"))
        part = tl.load(
            mix + at[:, None] * DIM + channel[None, :],
            mask=(slot < stop)[:, None] & live[None, :],
            other=0.0,
        )
        higher = tl.maximum(maximum, tl.max(weight, 0))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        decay, share = tl.exp2(maximum - against), tl.exp2(weight - against)
        mixed = mixed * decay + tl.sum(part * share[:, None], 0)
        total = total * decay + tl.sum(share, 0)
        maximum = higher
    return maximum, total, mixed


@triton.jit(do_not_specialize=["rows", "queries", "rotated_slots", "slots"])
def combine(
    mix,
    lse,
    sink,  # [kv_heads * heads_per_kv_head]: logits of learned sinks; None: there are none
    out,  # [batch * kv_heads, rows, DIM]
    rows,
    queries,
    kv_heads,
    rotated_slots,
    slots,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BASIS: tl.constexpr,  # channels that the Hadamard rotation of the first slots mixes; 1: none
    SLOTS: tl.constexpr,
):
    """All slots of each row as one normalised output; a row that saw nothing is zero.

    Grid: (rows, batch * kv_heads); long prompts have more rows than a grid's second axis takes.

    The mixes of the first `rotated_slots` slots are in the rotated basis.
    """
    pid = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    channel = tl.arange(0, PAD)
    live = channel < DIM
    base = pid * slots * rows + row
    maximum = tl.max(tl.full([SLOTS], float("-inf"), tl.float32), 0)
    total = 0.0
    mixed = tl.zeros([PAD], tl.float32)
    if BASIS > 1:
        maximum, total, mixed = _add_slots(
            mix, lse, 0, rotated_slots, base, rows, channel, live, maximum, total, mixed, SLOTS, DIM
        )
        mixed = _hadamard(mixed, PAD, BASIS)
    else:
        rotated_slots = 0
    maximum, total, mixed = _add_slots(
        mix, lse, rotated_slots, slots, base, rows, channel, live, maximum, total, mixed, SLOTS, DIM
    )
    if sink is not None:
        heads = rows // queries
        logit = tl.load(sink + (pid % kv_heads) * heads + row // queries).to(tl.float32) * LOG2E
        higher = tl.maximum(maximum, logit)
        against = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp2(maximum - against)
        total = total * decay + tl.exp2(logit - against)
        mixed = mixed * decay
    result = mixed / tl.where(total > 0, total, 1.0)
    tl.store(out + (pid * rows + row) * DIM + channel, result.to(out.dtype.element_ty), mask=live)


@triton.constexpr_function
def _stages(basis):
    return basis.bit_length() - 1


@triton.constexpr_function
def _unit(basis):
    return basis**-0.5


@triton.jit
def _hadamard(x, PAD: tl.constexpr, BASIS: tl.constexpr):
    """`x [PAD]` with every run of BASIS numbers in the Hadamard basis (`kernels/rotation.py`)."""
    for stage in tl.static_range(_stages(BASIS)):
        pairs = tl.permute(tl.reshape(x, [PAD >> (stage + 1), 2, 1 << stage]), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [PAD])
    return x * _unit(BASIS)
